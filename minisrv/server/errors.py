"""Every error as OpenAI's error object: `{"error": {message, type, param, code}}`.

Knows: the exception tree, FastAPI's own errors and how each looks on the wire. What is not the
client's doing is logged and shown without its internals.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from minisrv.errors import (
    AuthenticationError,
    EngineNotReadyError,
    MinisrvError,
    QueueFullError,
    RequestError,
)

logger = logging.getLogger("minisrv.server")

NOT_READY_RETRY_AFTER = 2
"""Seconds after which a client may ask again while the engine loads or drains."""

MAX_PARAM = 128
"""Characters of a field's name that an error repeats: a client chooses unknown names freely."""

_HTTP_CODES = {
    404: "unknown_url",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}


class JSON(JSONResponse):
    """A JSON body, encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def error_object(error: Exception) -> dict[str, Any]:
    """The wire form of `error`; logs what is not the client's doing."""
    if isinstance(error, MinisrvError) and error.http_status != 500:
        return _object(error.message, error.type, error.param, error.code)
    logger.error("a request failed", exc_info=error)
    return _object("The server failed to process the request.", "internal_error")


def error_status(error: Exception) -> int:
    """The HTTP status of `error`."""
    return error.http_status if isinstance(error, MinisrvError) else 500


def error_response(error: Exception) -> JSON:
    """The response that `error` becomes if nothing was sent yet."""
    headers = {}
    if isinstance(error, QueueFullError):
        headers["retry-after"] = str(error.retry_after)
    elif isinstance(error, EngineNotReadyError):
        headers["retry-after"] = str(NOT_READY_RETRY_AFTER)
    elif isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return JSON(error_object(error), status_code=error_status(error), headers=headers)


def http_error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> JSON:
    """The response of an error that HTTP has a status for and the exception tree does not."""
    kind = "invalid_request_error" if status < 500 else "internal_error"
    return JSON(
        _object(message, kind, None, _HTTP_CODES.get(status)), status_code=status, headers=headers
    )


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer each of its errors with an error object."""

    async def ours(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_validation_error(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code in (404, 405):
            what = "Invalid URL" if error.status_code == 404 else "Method not allowed"
            message = f"{what} ({request.method} {request.url.path})"
        elif error.status_code == 400:  # FastAPI's word for any body that its parser refuses
            message = "The request body cannot be parsed: it must be JSON in UTF-8."
        return http_error_response(error.status_code, message, error.headers)

    app.add_exception_handler(MinisrvError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _object(
    message: str, type: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    body = {"message": _clean(message), "type": type, "param": param and _clean(param)}
    return {"error": {**body, "code": code}}


def _clean(text: str) -> str:
    """Text that can be encoded: what a client sent may hold lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


def _validation_error(error: RequestValidationError) -> RequestError:
    """The first of the validation errors, with `param` spelled as OpenAI does: `stop[2]`."""
    first = error.errors()[0]
    kind, context = first["type"], first.get("ctx", {})
    path = list(first["loc"][1:])
    if kind == "json_invalid":
        reason = context.get("error", "")
        return RequestError(f"The request body is not valid JSON: {reason} (position {path[0]}).")
    if "field" in context:
        path.append(context["field"])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    if len(param) > MAX_PARAM:
        param = param[:MAX_PARAM] + "..."
    if not param:
        if kind == "string_unicode":
            return RequestError("A name in the request body is not valid Unicode.")
        return RequestError("The request body must be a JSON object.")
    match kind:
        case "refused":
            message = str(first["msg"])
        case "missing":
            message = f"Missing required parameter: '{param}'."
        case "extra_forbidden":
            message = f"Unrecognized request argument supplied: {param}."
        case "value_error":
            message = f"Invalid '{param}': it {context['error']}."
        case _:
            message = f"Invalid '{param}': {first['msg']} (got {reprlib.repr(first['input'])})."
    return RequestError(message, param=param)
