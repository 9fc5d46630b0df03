"""Pages for people: `/` says what is served, and `/docs` shows the OpenAPI document.

Neither page loads anything from another host, and their content security policies forbid it. Links
are relative, so that the pages work behind a proxy that adds a prefix. The pages are no part of the
API and are left out of the OpenAPI document. If the server asks for API keys, these pages need one
as every other path does.

Knows: HTML, and what a newcomer would type. Knows nothing of generations.
"""

from __future__ import annotations

import base64
import hashlib
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
from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from minisrv.server.serving import Serving

_ASSETS = "docs/assets"
"""Relative URL of Swagger UI's files, as the page `/docs` refers to them."""

_LINKS = [
    ("docs", "the API, to read and to try in a browser"),
    ("v1/models", "the names under which the model is served"),
    ("health", "whether the server lives"),
    ("ready", "whether it takes requests"),
    ("metrics", "counters for Prometheus"),
]

_STYLE = "body{font-family:sans-serif;max-width:50em;margin:2em auto;padding:0 1em;line-height:1.5}\
pre{background:#eee;color:#111;padding:1em;white-space:pre-wrap;overflow-wrap:anywhere}"

_TEMPLATES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

_HTML = _TEMPLATES.from_string(f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>minisrv</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<h1>minisrv</h1>
<p>{{{{ summary }}}}</p>
{{% for what, line in lines %}}
<p>{{{{ what }}}}</p>
<pre>{{{{ line }}}}</pre>
{{% endfor %}}
<ul>
{{% for path, what in links %}}
<li><a href="{{{{ path }}}}">/{{{{ path }}}}</a>: {{{{ what }}}}</li>
{{% endfor %}}
</ul>
</body>
</html>
""")

_LOCKED = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def _style_hash() -> str:
    return base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


_ROOT_HEADERS = _HEADERS | {
    "cache-control": "no-store",  # its text describes the state of this moment
    "content-security-policy": (
        f"default-src 'none'; style-src 'sha256-{_style_hash()}'; img-src data:; {_LOCKED}"
    ),
    "vary": "accept",
}
_DOCS_HEADERS = _HEADERS | {
    # FastAPI's page starts Swagger UI by an inline script.
    "content-security-policy": (
        "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
        f"script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; {_LOCKED}"
    ),
}


@cache
def _files() -> dict[str, bytes]:
    """Return the files of Swagger UI, 3 MB, by name. They are kept in memory, because a file would
    take a descriptor for as long as a client reads it."""
    found = files("fastapi_offline") / "static"
    return {entry.name: entry.read_bytes() for entry in found.iterdir() if entry.is_file()}


def add_pages(app: FastAPI, serving: Serving, *, keyed: bool) -> None:
    """Add the routes `/` and `/docs`, which must not exist yet.

    keyed: whether requests need an API key.
    """

    async def root(request: Request) -> Response:
        summary, lines = _summary(serving), _lines(serving, str(request.base_url), keyed)
        if "text/html" in request.headers.get("accept", "").lower():
            html = _HTML.render(summary=summary, lines=lines, links=_LINKS)
            return HTMLResponse(html, headers=_ROOT_HEADERS)
        parts = [summary]
        for what, line in lines:
            parts += [what, indent(line, "    ")]
        parts.append("\n".join(f"/{path:<12}{what}" for path, what in _LINKS))
        return PlainTextResponse("\n\n".join(parts) + "\n", headers=_ROOT_HEADERS)

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
        return Response(_files()[name], media_type=guess_type(name)[0], headers=_HEADERS)

    app.add_route("/", root, include_in_schema=False)
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
