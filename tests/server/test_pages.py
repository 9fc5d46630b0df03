"""Pages for people: `/`, and `/docs`, which works without the internet."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from minisrv.checkpoint import GenerationConfig
from minisrv.config import ServerConfig
from minisrv.engine.client import EngineState
from minisrv.request import FinishReason
from minisrv.server.app import create_app
from minisrv.server.pages import UI_PATHS
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, outputs
from tests.server.live_server import serve

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
CURL = {"accept": "*/*"}
KEYED = {"authorization": "Bearer key"}
WITHOUT_TEMPLATE = Tokenizer(Backend(WordLevel({"Once": 0, "upon": 1}, unk_token="Once")))


def engine() -> FakeEngine:
    return FakeEngine(outputs([65, 2], FinishReason.STOP))


class Page(HTMLParser):
    """What a browser would load at once for a page (`loaded`), whose scripts and styles must all be
    files."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag != "style"
        assert tag != "script" or given.get("src")
        for name, value in attrs:
            assert not name.startswith("on"), "no scripts in attributes"
            assert name != "style"
            if name in ("src", "href") and tag != "a":
                self.loaded.append(value or "")


def commands_of(response: httpx.Response) -> list[str]:
    """The shell commands that the text at `/` shows."""
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    return [part.strip() for part in response.text.split("\n\n") if part.startswith("    ")]


def arguments(command: str) -> list[str]:
    """The arguments that a shell would give to a command, which is not run."""
    name = command.split()[0]
    script = f"{name}() {{ printf '%s\\0' \"$@\"; }}\n{command}\n"
    env = {"MINISRV_API_KEY": "key"}
    ran = subprocess.run(["/bin/sh", "-c", script], env=env, capture_output=True, check=True)
    assert not ran.stderr
    return ran.stdout.decode().split("\0")[:-1]


async def test_the_documentation_needs_no_other_host(connect: Connect) -> None:
    """Every file of the page comes from this server, and its content security policy names no other
    host."""
    async with connect(engine()) as client:
        response = await client.get("/docs", headers=BROWSER)
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert not re.search(r"\bhttps?:|[\"'(]//", response.text)
        loaded = re.findall(r'(?:href|src)="([^"]+)"', response.text)
        loaded = [url for url in loaded if not url.startswith("data:")]
        types = {}
        for url in [*loaded, *re.findall(r"url: '(.*)'", response.text)]:
            asset = await client.get(urljoin("/docs", url))
            assert asset.status_code == 200, url
            assert asset.content
            types[url.rpartition(".")[2]] = asset.headers["content-type"].partition(";")[0]
        assert types == {"css": "text/css", "js": "text/javascript", "json": "application/json"}
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert not re.search(r"[*]|:/|\.", policy), "it names no host"


async def test_a_head_is_answered_and_nothing_else_is(connect: Connect) -> None:
    """HEAD is answered like GET without a body, other methods get 405, and unknown files get
    404."""
    async with connect(engine()) as client:
        for path in ("/", "/ui/app.js", "/docs", "/docs/assets/swagger-ui.css"):
            got, head = await client.get(path), await client.head(path)
            assert head.status_code == 200
            for header in ("content-type", "content-length"):
                assert head.headers[header] == got.headers[header]
            posted = await client.post(path, json={})
            assert posted.status_code == 405
            assert posted.json()["error"]["code"] == "method_not_allowed"
        for path in (
            "/ui/no.js",
            "/ui/..%2fapp.py",
            "/docs/assets/no.js",
            "/docs/assets/",
            "/docs/assets/..%2f__init__.py",
        ):
            missing = await client.get(path)
            assert missing.status_code == 404
            assert missing.json()["error"]["code"] == "unknown_url"


async def test_who_reads_slowly_holds_no_file(tokenizer: Tokenizer) -> None:
    """An open file for each slow reader would be a descriptor that the limit of connections does
    not count."""
    app = create_app(engine(), tokenizer, served_model_names=("x",), generation=GenerationConfig())
    path = "/docs/assets/swagger-ui-bundle.js"
    async with serve(app) as address:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, address)
            await loop.sock_sendall(client, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert (await loop.sock_recv(client, 12)).endswith(b" 200")
            opened = [
                os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.exists()
            ]
    assert not any(file.endswith(".js") for file in opened)


async def test_a_file_comes_as_a_whole(connect: Connect) -> None:
    """Range requests get the whole file with status 200."""
    async with connect(engine()) as client:
        path = "/docs/assets/swagger-ui.css"
        whole = await client.get(path)
        for part in ("bytes=0-1", "bytes=5-1", "bytes=999999999-", "lines=1", "bytes=0-0,2-2", "x"):
            got = await client.get(path, headers={"range": part})
            assert (got.status_code, got.content) == (200, whole.content), part


@pytest.mark.parametrize("ui", [True, False])
@pytest.mark.parametrize("accept", [BROWSER, CURL, {}, {"accept": "application/json"}])
async def test_the_root_says_what_is_served(
    connect: Connect, accept: dict[str, str], ui: bool
) -> None:
    """Only a browser gets the page, and nobody does with `--no-ui`."""
    async with connect(engine(), settings=ServerConfig(ui=ui)) as client:
        response = await client.get("/", headers=accept)
        assert response.status_code == 200
        assert response.headers["vary"] == "accept"
        if ui and accept is BROWSER:
            assert response.headers["content-type"] == "text/html; charset=utf-8"
            return
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        for text in ("tiny and org/tiny", "ready now", "200 tokens", "minisrv chat --url"):
            assert text in response.text
        for path in ("/docs", "/v1/models", "/health", "/ready", "/metrics"):
            assert path in response.text
            assert (await client.get(path)).status_code == 200


async def test_the_page_loads_its_own_files_only(connect: Connect) -> None:
    """All that the page loads is here, by relative URLs, so that it works behind a prefix, and its
    policy allows nothing else."""
    async with connect(engine()) as client:
        response = await client.get("/", headers=BROWSER)
        loaded = [url for url in Page(response.text).loaded if url != "data:,"]
        assert {url.rpartition(".")[2] for url in loaded} == {"css", "js"}
        for url in loaded:
            assert not re.match(r"/|\w+:", url), "relative"
            file = await client.get(urljoin("/", url))
            assert file.status_code == 200
            assert file.headers["content-type"].partition(";")[0] in ("text/css", "text/javascript")
            assert not re.search(r"""url\(|@import|['"`(]https?://(?!www\.w3\.org)""", file.text)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert not re.search(r"[*]|:/|\.", policy), "it names no host"


async def test_the_page_comes_without_a_key(connect: Connect) -> None:
    """A browser cannot send a key for a page. What comes without one says nothing of the model, and
    the text at `/` needs one."""
    async with connect(engine(), settings=ServerConfig(api_keys=("key",))) as client:
        for path in sorted(UI_PATHS):
            response = await client.get(path, headers=BROWSER)
            assert response.status_code == 200, path
            assert "tiny" not in response.text
        settings = await client.get("/ui/settings.json")
        assert settings.json() == {"keyed": True, "chat": True, "traces": []}
        assert (await client.get("/", headers=CURL)).status_code == 401
        assert (await client.get("/", headers=CURL | KEYED)).status_code == 200


async def test_without_the_page_its_paths_are_unknown(connect: Connect) -> None:
    settings = ServerConfig(api_keys=("key",), ui=False)
    async with connect(engine(), settings=settings) as client:
        for path in sorted(UI_PATHS):
            assert (await client.get(path, headers=BROWSER)).status_code == 401
            status = (await client.get(path, headers=BROWSER | KEYED)).status_code
            assert status == (200 if path == "/" else 404), path


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("chats", [False, True])
async def test_its_command_works(
    connect: Connect, tokenizer: Tokenizer, chats: bool, keyed: bool
) -> None:
    """The curl command of the text is answered with 200 by the server."""
    options: dict[str, Any] = {"tokenizer": tokenizer if chats else WITHOUT_TEMPLATE}
    if keyed:
        options["settings"] = ServerConfig(api_keys=("key",))
    async with connect(engine(), **options) as client:
        assert (await client.get("/ui/settings.json")).json()["chat"] is chats
        response = await client.get("/", headers=KEYED if keyed else {})
        commands = commands_of(response)
        assert ("minisrv chat --url http://test/v1" in commands) is chats
        assert ("export MINISRV_API_KEY=KEY" in commands) is keyed
        (command,) = (one for one in commands if one.startswith("curl "))
        url, *flags = arguments(command)
        given = list(zip(flags[::2], flags[1::2], strict=True))
        headers = dict(value.split(": ", 1) for flag, value in given if flag == "-H")
        (data,) = (value for flag, value in given if flag == "-d")
        answer = await client.post(url, headers=headers, content=data)
        assert answer.status_code == 200, answer.text
        assert "messages" in json.loads(data) if chats else "prompt" in json.loads(data)


async def test_a_host_is_text(connect: Connect) -> None:
    """The host comes from the client, and does not end a command of the shell."""
    async with connect(engine()) as client:
        host = "a$(echo b)`echo c`;exit;'d.example"
        response = await client.get("/", headers={"host": host})
        assert response.status_code == 200
        ask, chat = commands_of(response)
        # Starlette may replace a host that is not valid by the server's own address.
        url, *_, data = arguments(ask)
        assert url.startswith("http://")
        assert url.endswith("/v1/chat/completions")
        assert json.loads(data)["messages"]
        assert arguments(chat) == ["chat", "--url", url.removesuffix("/chat/completions")]


@pytest.mark.parametrize("state", list(EngineState))
async def test_the_root_answers_in_every_state(connect: Connect, state: EngineState) -> None:
    fake = engine()
    fake.state = state
    if state is EngineState.LOADING:
        fake.info = None
    async with connect(fake) as client:
        response = await client.get("/")
        assert response.status_code == 200
        assert f"It is {state.value} now." in response.text
        assert ("200 tokens" in response.text) is (state is not EngineState.LOADING)
