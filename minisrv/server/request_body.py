"""Reads a request's body: from bytes to a validated model, within bounds, and beside the event
loop.

What a body costs depends more on how many values it holds than on how many bytes: four megabytes of
text are read in a millisecond, but four megabytes of `{},` take half a second and half a gigabyte.
So values are counted before the body is parsed. A body that is not small is counted, parsed and
validated in a thread, one body at a time: the GIL lets only one thread run anyway, and the time of
a single call into C, during which no other thread runs, is bounded by the counts.

Knows: JSON, pydantic's validation and FastAPI's routes. Knows no field.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, get_args

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv.errors import RequestError
from minisrv.machine import release_free_memory
from minisrv.server.errors import http_error_response, validation_error
from minisrv.server.middleware import CLIENT_CLOSED_REQUEST
from minisrv.server.offload import LARGE
from minisrv.server.strict import RequestBody
from minisrv.server.value_budget import TooManyValuesError, ValueBudget

_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=RequestBody)

_NUM_BYTES = "minisrv.num_bytes"
"""Key in the ASGI scope under which the body's size in bytes is kept."""
_RELEASE_MEMORY_ABOVE = 256 << 10
"""Size of a body in bytes above which it is worth some milliseconds to return freed memory to the
system."""

_THREAD = ThreadPoolExecutor(1, thread_name_prefix="request-body")


class BodyRoute(APIRoute):
    """A route whose endpoint takes `body`, a `RequestBody` or a union of several, and optionally
    `request`, and returns a response. The body is parsed by this module; FastAPI describes it in
    the OpenAPI document, but would parse and validate it on the event loop."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and then give the memory that a large body took back to the system."""
        try:
            await super().handle(scope, receive, send)
        finally:
            if scope.get(_NUM_BYTES, 0) > _RELEASE_MEMORY_ABOVE:
                _THREAD.submit(release_free_memory)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request."""
        endpoint = self.endpoint
        parameters = inspect.signature(endpoint, eval_str=True).parameters
        body_type, wants_request = parameters["body"].annotation, "request" in parameters
        models = get_args(body_type) or (body_type,)

        async def handle(request: Request) -> Response:
            try:
                data = b"".join([chunk async for chunk in request.stream()])
                request.scope[_NUM_BYTES] = len(data)
            except ClientDisconnect:
                return http_error_response(CLIENT_CLOSED_REQUEST, "The client has gone away.")
            body = await _read(models, data)
            arguments = (body, request) if wants_request else (body,)
            response: Response = await endpoint(*arguments)
            return response

        return handle


async def _read(models: Sequence[type[_Body]], data: bytes) -> _Body:
    """Return the body that `data` holds, which is one of `models`. Raises RequestError."""
    if len(data) <= LARGE:
        found = read_body(models, data)
    else:
        found = await in_turn(lambda: read_body(models, data))
    if isinstance(found, RequestError):
        raise found
    return found


async def in_turn(work: Callable[[], _T]) -> _T:
    """Return what `work` returns, which reads something as large as a body may be. It is done in
    the thread in which bodies are read one after the other."""
    return await asyncio.get_running_loop().run_in_executor(_THREAD, work)


def read_body(models: Sequence[type[_Body]], data: bytes) -> _Body | RequestError:
    """Return the body that `data` holds, or the error if it is invalid. Of several `models` it is
    the first whose required fields it has, or else the last.

    The error is returned and not raised, as a raised one would keep alive the values of all frames
    that it passes through.
    """
    budget = ValueBudget()
    try:
        # Lone surrogates pass here and are refused later, with the name of their field.
        text = str(data, "utf-8-sig", "surrogatepass")
        budget.spend(data)
        value = json.loads(text)
        fields = value.keys() if isinstance(value, dict) else set()
        model = next((each for each in models if each.required_fields() <= fields), models[-1])
        body = model.model_validate(value, context=budget)
    except UnicodeDecodeError:
        return RequestError("The request body cannot be parsed: it must be JSON in UTF-8.")
    except json.JSONDecodeError as error:
        reason = f"{error.msg} (position {error.pos})"
        return RequestError(f"The request body is not valid JSON: {reason}.")
    except RecursionError:
        return RequestError("The request body cannot be parsed: it is nested too deeply.")
    except ValidationError as error:
        return validation_error(error, value)
    except TooManyValuesError as error:
        return RequestError(f"The request body {error}.")
    except ValueError:  # Python limits the digits of an integer
        return RequestError("The request body holds an integer of too many digits.")
    return body.with_num_bytes(len(data))
