"""A browser, a server with an API key, and pages whose console is watched."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.server import SMALL, Server
from tests.waiting import GUARD_SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
KEY = "a-key"

_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def _missing() -> str | None:
    if not CHROMIUM.exists():
        return f"no {CHROMIUM}: install Debian's package chromium"
    if importlib.util.find_spec("playwright") is None:
        return "no playwright: pip install '.[test]'"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = _missing()
    for item in items:
        if item.path.parent == here:
            item.add_marker(pytest.mark.browser)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server of the default model on the CPU, which asks for `KEY`. Its metrics have vLLM's
    names, for whoever does not ask for ours."""
    server = Server(*SMALL, "--device", "cpu", "--api-key", KEY, "--metrics-names", "vllm")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * GUARD_SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=_ARGUMENTS, env=dict(os.environ)
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A function that opens a URL in a browser of its own, with options of Playwright's contexts.
    If `key` is given, the page has it already. At the end no page may have broken its content
    security policy, nor raised an error."""
    contexts = []
    problems: list[str] = []

    def open_page(url: str, *, key: str | None = None, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(1000 * GUARD_SECONDS)
        if key is not None:
            context.add_init_script(
                f"if (location.protocol === 'http:') sessionStorage['minisrv-key'] = '{key}'"
            )
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: _collect(message.text, problems))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.unroute_all(behavior="ignoreErrors")  # the page asks every two seconds
        context.close()
    assert not problems


def _collect(text: str, problems: list[str]) -> None:
    if "Content Security Policy" in text or "TrustedHTML" in text:
        problems.append(text)
