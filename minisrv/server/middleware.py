"""The outermost middleware: hosts, API keys, request ids, limits on bodies, and what becomes of
errors.

It is pure ASGI and passes `receive` on, so that the application sees when a client disconnects.

Knows: HTTP headers, keys and bytes. Knows nothing of what the requests ask for.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisrv.errors import BodiesFullError, RequestError, truncated
from minisrv.logs import REQUEST_ID
from minisrv.server.anthropic_responses import is_anthropic
from minisrv.server.auth import OPEN_PATHS, ApiKeys
from minisrv.server.errors import JSON, error_response, http_error_response
from minisrv.server.hosts import HostNames
from minisrv.server.paths import route_path

access = logging.getLogger("minisrv.access")

_POLLED = OPEN_PATHS | {"/metrics"}
"""Paths that machines poll: they are logged only if the response is an unexpected error."""
_NOT_READY = 503
"""A status that the polled paths use as a regular answer."""

CLIENT_CLOSED_REQUEST = 499
"""The status by which a client that disconnected is counted; nginx uses this number."""

MAX_UNREAD_BYTES = 64 << 20
"""Maximum number of bytes of all bodies that a worker is receiving or parsing at a time: sixteen
bodies of the largest size."""

SMALL_BODY_BYTES = 64 << 10
"""Bytes of each body that do not count towards MAX_UNREAD_BYTES, so that large bodies which never
end leave room for most requests."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class OuterMiddleware:
    """The outermost middleware.

    Paths may begin with `root_path`, which everything that goes by a path leaves out. A request for
    another host, or without a key that it needs, is refused. `scope["key"]` is set to the index of
    the request's API key, or None. Every response carries `x-request-id` (and `request-id`, where
    its clients look for that): the client's own, if it is short and plain, or a new one. If a
    client waits for `100 Continue` before it sends its body and gets the final response instead,
    the connection is closed after that response. A body of more than `max_body_bytes` is answered
    with 413, whether its length was declared or not; a POST to one of `json_paths`, or from a web
    page to one of `command_paths`, that is not plain JSON with 415; and a large body that exceeds
    MAX_UNREAD_BYTES with 503. An unexpected exception is logged and answered with 500. Each request
    is logged as one line when it has ended, with the fields that the response has put into
    `scope["log_fields"]`, unless `access_log` is off. `arrived` is called for every request, and
    `failed` with the status of every response from 400 on under `/v1/` or of `json_paths`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        root_path: str,
        hosts: HostNames,
        keys: ApiKeys,
        max_body_bytes: int,
        json_paths: frozenset[str],
        command_paths: frozenset[str],
        arrived: Callable[[], None],
        failed: Callable[[int], None],
        access_log: bool = True,
    ) -> None:
        self._app = app
        self._root_path = root_path
        self._hosts = hosts
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._json_paths = json_paths
        self._command_paths = command_paths
        self._arrived = arrived
        self._failed = failed
        self._access_log = access_log
        self._unread_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._arrived()
        if self._root_path:
            scope["root_path"] = self._root_path
        path = route_path(scope)
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        # If the client got no 100, it may leave the body out, and the next request would be read as
        # the body.
        holds_back = "expect" in headers
        began = time.perf_counter()
        status = 0

        async def receive_body() -> Message:
            nonlocal holds_back
            holds_back = False
            return await receive()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer_headers = MutableHeaders(scope=message)
                answer_headers["x-request-id"] = request_id
                if is_anthropic(path):
                    answer_headers["request-id"] = request_id
                if holds_back:
                    answer_headers["connection"] = "close"
                is_asked = path.startswith("/v1/") or path in self._json_paths
                if message["status"] >= 400 and is_asked:
                    self._failed(message["status"])
            await send(message)

        try:
            if refusal := self._refusal(scope, headers):
                await refusal(scope, receive, send_with_id)
                return
            try:
                with self._limited(receive_body) as limited:
                    await self._app(scope, limited, send_with_id)
            except Exception as error:
                if status:
                    raise  # the status has been sent: the server closes the connection
                await error_response(error, path)(scope, receive, send_with_id)
        finally:
            if self._access_log:
                _log(scope, status, time.perf_counter() - began)

    def _refusal(self, scope: Scope, headers: Headers) -> JSON | None:
        """Return the response to a request that its headers alone are reason enough to refuse, or
        None."""
        path = route_path(scope)
        try:
            self._hosts.check(scope["http_version"], headers.getlist("host"))
            scope["key"] = self._keys.check(path, headers)
        except RequestError as error:
            return error_response(error, path)
        length = headers.get("content-length", "")
        # Python refuses to parse integers of thousands of digits; 18 digits are too many bytes
        # already.
        if length.isdecimal() and (len(length) > 18 or int(length) > self._max_body_bytes):
            return http_error_response(413, self._too_large(), path)
        # Browsers name the page that sends a POST. They send one of JSON only if the server allows
        # that page to.
        from_page = path in self._command_paths and "origin" in headers
        wants_json = from_page or path in self._json_paths
        if scope["method"] != "POST" or not wants_json:
            return None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return http_error_response(
                415, f"The content type must be application/json, not {kind or 'absent'}.", path
            )
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            return http_error_response(
                415, f"The content encoding must be absent or identity, not {coding}.", path
            )
        return None

    @contextmanager
    def _limited(self, receive: Receive) -> Iterator[Receive]:
        """Yield a `receive` that counts the bytes of the body, whose length may not be declared.
        The body counts as unread until the application asks for the message after it, or has
        ended."""
        size = counted = 0
        whole = False

        def count(number: int) -> None:
            nonlocal counted
            self._unread_bytes += number - counted
            counted = number

        async def limited() -> Message:
            nonlocal size, whole
            if whole:
                count(0)
                return await receive()
            message = await receive()
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._max_body_bytes:
                raise HTTPException(413, self._too_large())
            count(max(0, size - SMALL_BODY_BYTES))
            if counted and self._unread_bytes > MAX_UNREAD_BYTES:
                count(0)
                raise BodiesFullError(
                    "Too many large request bodies arrive at the moment; try again later."
                )
            return message

        try:
            yield limited
        finally:
            count(0)

    def _too_large(self) -> str:
        return f"The request body must have at most {self._max_body_bytes} bytes."


def _log(scope: Scope, status: int, seconds: float) -> None:
    """Log one line for a request that has ended. The path is logged as it was sent, with special
    characters escaped, as it may hold anything."""
    response_fields = scope.get("log_fields", {})
    status = response_fields.pop("status", None) or status or CLIENT_CLOSED_REQUEST
    if route_path(scope) in _POLLED and (status < 400 or status == _NOT_READY):
        return
    fields = {"status": status, "ms": round(1e3 * seconds, 1), **response_fields}
    path = truncated(scope["path"].encode("unicode_escape").decode())
    access.info("%s %s", scope["method"], path, extra={"fields": fields})
