"""Pages for people: `/` is the web page, and `/docs` shows the OpenAPI document.

Neither page loads anything from another host, and their content security policies forbid it. Links
are relative, so that the pages work behind a proxy that adds a prefix. The pages are no part of the
API and are left out of the OpenAPI document. To whoever does not ask for HTML, `/` says in plain
text what is served and how to call it.

If the server asks for API keys, the web page and its files come without one, as a browser cannot
send it; the page asks for the key, and sends it with each of its requests. `/docs` needs one, as
every other path does.

Knows: what a newcomer would type. Knows nothing of generations, nor of what the web page shows.
"""

from __future__ import annotations

import json
import shlex
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from mimetypes import guess_type
from textwrap import indent
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from minisrv.server.auth import missing_key
from minisrv.server.serving import Serving
from minisrv.server.ui_files import (
    COMMON_HEADERS,
    HEADERS,
    LOCKED_POLICY,
    PAGE,
    SETTINGS_URL,
    ui_files,
)

_ASSETS = "docs/assets"
"""Relative URL of Swagger UI's files, as the page `/docs` refers to them."""

_LINKS = [
    ("docs", "the API, to read and to try in a browser"),
    ("v1/models", "the names under which the model is served"),
    ("health", "whether the server lives"),
    ("ready", "whether it takes requests"),
    ("metrics", "counters for Prometheus"),
]

UI_PATHS = frozenset({"/", f"/{SETTINGS_URL}"} | {f"/ui/{name}" for name in ui_files()})
"""Paths of the web page. Browsers ask for them without an API key. They reveal whether requests
need a key and whether the model has a chat template, and nothing else; the text at `/` needs the
key."""

_VARY = {"vary": "accept"}
_TEXT_HEADERS = COMMON_HEADERS | _VARY | {"cache-control": "no-store"}
_DOCS_HEADERS = COMMON_HEADERS | {
    # FastAPI's page starts Swagger UI by an inline script.
    "content-security-policy": (
        "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
        f"script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; {LOCKED_POLICY}"
    ),
}


@cache
def _files() -> dict[str, bytes]:
    """Return the files of Swagger UI, 3 MB, by name. They are kept in memory, because a file would
    take a descriptor for as long as a client reads it."""
    found = files("fastapi_offline") / "static"
    return {entry.name: entry.read_bytes() for entry in found.iterdir() if entry.is_file()}


def add_pages(app: FastAPI, serving: Serving, *, keyed: bool, ui: bool) -> None:
    """Add the routes `/` and `/docs`, and those of the page's files, which must not exist yet.

    keyed: whether requests need an API key.
    ui: whether `/` is the web page for browsers; otherwise it is plain text for everybody.
    """

    async def root(request: Request) -> Response:
        if ui and "text/html" in request.headers.get("accept", "").lower():
            page = ui_files()[PAGE]
            return Response(page.content, media_type=page.media_type, headers=HEADERS | _VARY)
        if keyed and request.scope["key"] is None:
            raise missing_key()
        parts = [_summary(serving)]
        for what, line in _lines(serving, str(request.base_url), keyed):
            parts += [what, indent(line, "    ")]
        parts.append("\n".join(f"/{path:<12}{what}" for path, what in _LINKS))
        return PlainTextResponse("\n\n".join(parts) + "\n", headers=_TEXT_HEADERS)

    async def settings(request: Request) -> Response:
        told = {"keyed": keyed, "chat": serving.tokenizer.has_chat_template, "traces": []}
        return JSONResponse(told, headers=HEADERS)

    async def ui_file(request: Request) -> Response:
        file = ui_files().get(request.path_params["name"])
        if file is None:
            raise HTTPException(404)
        return Response(file.content, media_type=file.media_type, headers=HEADERS)

    async def docs(request: Request) -> Response:
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title="minisrv: the API",
            swagger_js_url=f"{_ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{_ASSETS}/swagger-ui.css",
            swagger_favicon_url="data:,",
            # By default Swagger UI sends the document to a validator on the internet.
            swagger_ui_parameters={"validatorUrl": None},
        )
        page.headers.update(_DOCS_HEADERS)
        return page

    async def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _files():
            raise HTTPException(404)
        return Response(_files()[name], media_type=guess_type(name)[0], headers=COMMON_HEADERS)

    app.add_route("/", root, include_in_schema=False)
    if ui:
        app.add_route(f"/{SETTINGS_URL}", settings, include_in_schema=False)
        app.add_route("/ui/{name}", ui_file, include_in_schema=False)
    app.add_route("/docs", docs, include_in_schema=False)
    app.add_route(f"/{_ASSETS}/{{name}}", asset, include_in_schema=False)


def _summary(serving: Serving) -> str:
    """Return a sentence that says what is served, and whether requests are taken now."""
    client, names = serving.client, " and ".join(serving.served_model_names)
    context = f" Its context is {client.info.max_model_len} tokens." if client.info else ""
    return f"minisrv {version('minisrv')} serves {names}. It is {client.state.value} now.{context}"


def _lines(serving: Serving, base_url: str, keyed: bool) -> list[tuple[str, str]]:
    """Return shell commands, each as a pair of a sentence that introduces it and the command.

    base_url: the server's URL as the client calls it, with a slash at its end.
    """
    lines = []
    if keyed:
        lines.append(("Requests need an API key:", "export MINISRV_API_KEY=KEY"))
    if serving.tokenizer.has_chat_template:
        message = {"role": "user", "content": "Hello!"}
        chat = _curl(f"{base_url}v1/chat/completions", {"messages": [message]}, keyed)
        lines.append(("Ask the model:", chat))
        url = shlex.quote(f"{base_url}v1")
        lines.append(("Chat with it in a terminal:", f"minisrv chat --url {url}"))
    else:
        text = _curl(f"{base_url}v1/completions", {"prompt": "Once upon a time"}, keyed)
        lines.append(("The model has no chat template. Let it complete a text:", text))
    return lines


def _curl(url: str, body: dict[str, Any], keyed: bool) -> str:
    # The URL is quoted, as its host is whatever the client sent.
    arguments = [shlex.quote(url), "-H 'Content-Type: application/json'"]
    if keyed:
        arguments.append('-H "Authorization: Bearer $MINISRV_API_KEY"')
    arguments.append("-d " + shlex.quote(json.dumps(body | {"max_tokens": 64})))
    return "curl " + " \\\n  ".join(arguments)
