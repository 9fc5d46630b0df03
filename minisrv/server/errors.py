"""Turns every error into an error object: OpenAI's, `{"error": {message, type, param, code}}`, or
under `/v1/messages` Anthropic's, `{"type": "error", "error": {type, message}, request_id}`.

Knows: the exception tree, FastAPI's own errors and how each looks in a response. An error that the
client did not cause is logged, and shown without its internals.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from minisrv.errors import (
    AuthenticationError,
    MinisrvError,
    RequestError,
    shown,
    truncated,
)
from minisrv.logs import REQUEST_ID
from minisrv.server.anthropic_responses import (
    AnthropicError,
    AnthropicErrorResponse,
    is_anthropic,
)
from minisrv.server.paths import route_path
from minisrv.server.response_schemas import ErrorInfo, ErrorResponse

logger = logging.getLogger("minisrv.server")

_ALLOWED = "Input should be "
"""The beginning of most of pydantic's messages."""

_HTTP_CODES = {
    404: "unknown_url",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's error types, by status."""


class JSON(JSONResponse):
    """A JSON body, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def error_object(error: Exception, path: str = "") -> ErrorResponse | AnthropicErrorResponse:
    """Return `error` as the error object of a `path`; log it if the client did not cause it."""
    status = error_status(error)
    if isinstance(error, MinisrvError) and status != 500:
        return _object(path, status, error.message, error.type, error.param, error.code)
    logger.error("a request failed", exc_info=error)
    return _object(path, 500, "The server failed to process the request.", "internal_error")


def error_status(error: Exception) -> int:
    """Return the HTTP status of `error`."""
    return error.http_status if isinstance(error, MinisrvError) else 500


def error_response(error: Exception, path: str = "") -> JSON:
    """Return the response to a request for `path` that failed with `error` before anything was
    sent. The path is empty where it is not known."""
    headers = {}
    if isinstance(error, MinisrvError) and error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return JSON(error_object(error, path), status_code=error_status(error), headers=headers)


def http_error_response(
    status: int, message: str, path: str = "", headers: Mapping[str, str] | None = None
) -> JSON:
    """Return the response to an error that has an HTTP status but no class in the exception tree.
    The path is empty where it is not known."""
    kind = "invalid_request_error" if status < 500 else "internal_error"
    code = _HTTP_CODES.get(status)
    body = _object(path, status, message, kind, code=code)
    return JSON(body, status_code=status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer each of its errors with an error object."""

    async def ours(request: Request, error: Exception) -> Response:
        return error_response(error, route_path(request.scope))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message, path = str(error.detail), route_path(request.scope)
        if error.status_code in (404, 405):
            what = "Invalid URL" if error.status_code == 404 else "Method not allowed"
            message = f"{what} ({request.method} {request.url.path})"
        return http_error_response(error.status_code, message, path, headers=error.headers)

    app.add_exception_handler(MinisrvError, ours)
    app.add_exception_handler(HTTPException, http)


def _object(
    path: str,
    status: int,
    message: str,
    type: str,
    param: str | None = None,
    code: str | None = None,
) -> ErrorResponse | AnthropicErrorResponse:
    message = _clean(message)
    if is_anthropic(path):
        kind = _ANTHROPIC_TYPES.get(
            status, "invalid_request_error" if status < 500 else "api_error"
        )
        return AnthropicErrorResponse(AnthropicError(kind, message), REQUEST_ID.get())
    return ErrorResponse(ErrorInfo(message, type, param and _clean(param), code))


def _clean(text: str) -> str:
    """Return a text that can be encoded: what a client sent may hold lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


def validation_error(error: ValidationError, body: Any) -> RequestError:
    """Return the most telling error of a `body` as a RequestError, with `param` spelled as OpenAI
    does: `stop[2]`."""
    errors = [_Problem(found, body) for found in error.errors(include_url=False)]
    problem, alternatives = _most_telling(errors)
    kind, context, path = problem.kind, problem.context, list(problem.path)
    if "field" in context:
        path.append(context["field"])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    param = truncated(param)  # clients choose unknown names freely, so they may be long
    if not param:
        if kind == "string_unicode":
            return RequestError("A name in the request body is not valid Unicode.")
        return RequestError("The request body must be a JSON object.")
    match kind:
        case "refused":
            message = problem.message
        case "missing":
            message = f"Missing required parameter: '{param}'."
        case "extra_forbidden":
            message = f"Unrecognized request argument supplied: {param}."
        case "value_error":
            message = f"Invalid '{param}': it {context['error']}."
        case _:
            message = f"Invalid '{param}': {_what_is_wrong(alternatives)} (got {problem.given})."
    return RequestError(message, param=param)


class _Problem:
    """One of pydantic's errors about a request's body.

    location: the place of the error as pydantic gives it. It contains names that are pydantic's
        own: of a union's members, and of what a validator has made of a value.
    path: the location as far as it leads through the body that the client sent.
    """

    def __init__(self, error: Mapping[str, Any], body: Any) -> None:
        self.kind: str = error["type"]
        self.context: Mapping[str, Any] = error.get("ctx", {})
        # pydantic's message would name one of this package's classes.
        is_no_object = self.kind in ("model_type", "model_attributes_type")
        self.message = f"{_ALLOWED}an object" if is_no_object else str(error["msg"])
        self.given = shown(error["input"])
        self.location = tuple(error["loc"])
        missing = self.kind == "missing"
        self.path = _path_in(body, self.location, error["input"], missing=missing)


def _path_in(
    body: Any, location: tuple[int | str, ...], given: Any, *, missing: bool
) -> tuple[int | str, ...]:
    """Return the parts of a location that lead through `body` to the `given` value; the last part
    need not exist in the body if the value is `missing`."""
    path: list[int | str] = []
    values = [body]
    for number, part in enumerate(location):
        value = values[-1]
        if isinstance(value, dict):
            there = part in value
        else:
            there = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if there:
            path.append(part)
            values.append(value[part])
        elif missing and number == len(location) - 1:
            path.append(part)
    if not missing and path and values[-2] is given:
        path.pop()  # it was the name of a union's member, and the value has a field of that name
    return tuple(path)


def _most_telling(errors: list[_Problem]) -> tuple[_Problem, list[_Problem]]:
    """Return the most telling of the errors, and all errors that say what its value may be instead.

    A value that matches none of a union's members has an error for each member. An error about
    something inside the value comes from the member that the client meant, so it is chosen.
    """
    first = errors[0]
    if len(first.path) == len(first.location):
        return first, [first]
    around = [one for one in errors if one.path[: len(first.path)] == first.path]
    deepest = max(around, key=lambda one: len(one.path))  # the first of the deepest
    if len(deepest.path) > len(first.path):
        return deepest, [deepest]
    return first, around


def _what_is_wrong(alternatives: list[_Problem]) -> str:
    """Say in one sentence what a value should be, joining what each of a union's members wants."""
    messages = [one.message for one in alternatives]
    if not all(message.startswith(_ALLOWED) for message in messages):
        return messages[0]
    allowed = dict.fromkeys(message.removeprefix(_ALLOWED) for message in messages)
    return _ALLOWED + ", or ".join(allowed)
