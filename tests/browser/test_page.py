"""The web page in a real browser, on a real server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright", reason="no playwright: pip install '.[test]'")
from playwright.sync_api import Locator, Page, Route, expect

from minisrv.tools.view import ViewServer
from tests.browser.conftest import KEY
from tests.e2e.server import Server, until
from tests.waiting import GUARD_SECONDS

AXE = Path(__file__).parents[2] / "ui" / "node_modules" / "axe-core" / "axe.min.js"

Open = Callable[..., Page]


def trace(name: str, *, steps: int, first: int = 0) -> bytes:
    """A recorded trace. Every tenth step holds a prompt, every fiftieth is above the ladder."""
    lines: list[dict[str, Any]] = [
        {
            **{"type": "header", "version": 1, "server": "minisrv/0.1.0", "model": name},
            **{"time": 1000.0, "device": "cpu", "mode": "full-and-piecewise"},
            "ladders": {"decode": [1, 8, 16], "mixed": [32, 64], "epilogue": [16]},
            "in_service": {"decode": [1, 8], "mixed": [32, 64], "epilogue": [16]},
            "startup": [{"part": "imports", "seconds": 2.5}],
        }
    ]
    for index in range(steps):
        prompt = index % 10 == 9
        above = index % 50 == 49
        mode, reason = ("PIECEWISE", "has_prefill") if prompt else ("FULL", "pure_decode")
        if above:
            mode, reason = "NONE", "above_ladder"
        tokens = 600 if above else 28 if prompt else 5
        padding = 0 if above else 4 if prompt else 3
        lines.append(
            {
                **{"type": "step", "id": first + index, "time": 1000 + index / 100},
                **{"mode": mode, "reason": reason, "tokens": tokens, "padding": padding},
                **{"rung": tokens + padding, "rung_requests": None if prompt else 8, "rows": 5},
                **{"decode_rows": 5, "prefill_tokens": tokens - 5, "sampled": 5, "launches": 1},
                **{"measured_ms": 2.0, "wall_ms": 10.0, "host_ms": {"launch": 2.0, "wait": 0.5}},
                **{"running": 5, "waiting": 0, "requests": [["abc", 1]] * 5},
            }
        )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def complete(page: Page, *, tokens: int = 24) -> None:
    """Have the playground complete a text, and wait for its end."""
    page.get_by_text("Completion", exact=True).click()
    page.locator("#max-tokens").fill(str(tokens))
    page.locator("#temperature").fill("0")
    page.get_by_role("button", name="Complete").click()
    expect(page.locator("#play-status")).to_contain_text("first after")


def wait_for_steps(page: Page, server: Server) -> None:
    """Wait until the page has all steps that the server has recorded by now."""
    newest = recorded(server)[-1]["id"]
    strip = page.locator("#strip .strip")
    until(lambda: int(strip.get_attribute("aria-valuemax") or 0) >= newest, "all steps are drawn")


def open_table(page: Page) -> None:
    """Open the table of steps, and wait until it is filled."""
    page.get_by_text("Steps as a table").first.click()
    page.locator("#step-rows table").wait_for()


def selected(page: Page) -> int:
    """The id of the step whose details are shown."""
    match = re.search(r"#(\d+)", page.locator("#step h3").inner_text())
    assert match
    return int(match[1])


def recorded(server: Server, kind: str = "step") -> list[dict[str, Any]]:
    """The steps that the server has recorded, or the events."""
    headers = {"authorization": f"Bearer {KEY}"}
    response = httpx.get(f"{server.url}/debug/steps", headers=headers, trust_env=False)
    lines = [json.loads(line) for line in response.text.splitlines()]
    return [line for line in lines if line["type"] == kind]


def missing_graphs(server: Server) -> int:
    """The number of graphs that the server has yet to capture."""
    response = httpx.get(f"{server.url}/ready", trust_env=False)
    return int(response.json()["graphs"]["missing"])


def overflow(page: Page) -> int:
    """The pixels by which the page is wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))


def test_a_stream_its_tokens_and_its_steps(server: Server, open_page: Open) -> None:
    page = open_page(server.url, key=KEY)
    page.get_by_role("status").get_by_text("Ready").wait_for()
    complete(page)
    wait_for_steps(page, server)
    tokens = page.locator("#output .token")
    assert tokens.count() > 8
    tokens.nth(3).hover()
    note = page.locator("#token-note")
    assert re.match(r"Token \d+: .* ms after the one before", note.inner_text())
    tokens.first.focus()
    assert "after the request was sent" in note.inner_text()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    # The first token was made by the step that computed the prompt, and the others after it.
    made = []
    for index in (0, 1, 2):
        tokens.nth(index).click()
        made.append(selected(page))
        expect(page.locator("#step .chips .own")).to_have_count(1)
    steps = {step["id"]: step for step in recorded(server)}
    assert [bool(steps[step]["prefill_tokens"]) for step in made] == [True, False, False]
    assert made[1] < made[2]
    assert f"By step {made[2]} " in note.inner_text()
    # The ladder counts what the server has counted.
    full = [step for step in recorded(server) if step["mode"] == "FULL"]
    counted = (
        "[...document.querySelectorAll('.ladder-decode li')]"
        ".reduce((sum, rung) => sum + Number(rung.dataset.steps), 0)"
    )
    until(lambda: page.evaluate(counted) == len(full), "the ladder is drawn")
    expect(page.locator("[data-chart=kv] .value")).to_contain_text("%")
    assert page.locator("#startup li").count() > 3


STOP_AT_THE_THIRD_TOKEN = """
    new MutationObserver((_, observer) => {
        if (document.querySelectorAll("#output .token").length < 3) return;
        observer.disconnect();
        document.getElementById("stop").click();
    }).observe(document.getElementById("output"), { childList: true, subtree: true });
"""
"""This runs in the page, because the answer may have ended before a click from here arrives."""


@pytest.mark.parametrize("whole", [False, True])
def test_a_chat_is_stopped(server: Server, open_page: Open, whole: bool) -> None:
    """An answer is stopped as it comes, or shown no further where all of it has come at once."""
    page = open_page(server.url, key=KEY)
    if whole:
        page.route("**/v1/completions", lambda route: route.fulfill(response=route.fetch()))
    page.get_by_text("Completion", exact=True).click()
    page.locator("#max-tokens").fill("24" if whole else "400")
    page.locator("#temperature").fill("0")
    page.evaluate(STOP_AT_THE_THIRD_TOKEN)
    page.get_by_role("button", name="Complete").click()
    expect(page.locator("#play-status")).to_contain_text("Stopped after")
    page.get_by_text("Chat", exact=True).click()
    page.locator("#prompt").fill("What is 17 + 25?")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#play-status")).to_contain_text("first after")
    assert page.locator("#output .asked").inner_text() == "What is 17 + 25?"


def test_a_step_is_chosen_by_pointer_and_by_keys(server: Server, open_page: Open) -> None:
    page = open_page(server.url, key=KEY)
    complete(page)
    strip = page.get_by_role("slider", name="Recent steps of the server")
    wait_for_steps(page, server)
    strip.click(position={"x": 60, "y": 100})
    clicked = selected(page)
    assert page.get_by_role("button", name="Follow").get_attribute("aria-pressed") == "false"
    assert "every request of the batch was decoding" in page.locator("#step").inner_text() or (
        "prompt token" in page.locator("#step").inner_text()
    )
    page.keyboard.press("ArrowRight")
    assert selected(page) == clicked + 1
    page.keyboard.press("Home")
    first = selected(page)
    assert first == recorded(server)[0]["id"]
    expect(strip).to_have_attribute("aria-valuetext", re.compile(f"^Step {first}: "))
    page.get_by_role("slider", name="Step", exact=True).press("ArrowRight")
    assert selected(page) == first + 1
    open_table(page)
    page.locator("#step-table").get_by_role("button", name=f"#{first}", exact=True).click()
    assert selected(page) == first
    page.get_by_role("button", name="Follow").click()
    assert page.locator("#step h3").inner_text().startswith("Newest step")


def enter(field: Locator, key: str) -> None:
    """Enter an API key."""
    field.fill(key)
    field.press("Enter")


def test_the_key_is_asked_for_and_kept_in_the_tab(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    refused: list[str] = []
    page.on("response", lambda answer: answer.status == 401 and refused.append(answer.url))
    field = page.get_by_label("This server asks for an API key")
    field.wait_for()
    assert not refused, "nothing is asked before there is a key"
    with page.expect_response(lambda answer: answer.status == 401):
        enter(field, "another")
    page.get_by_text("The server did not accept this key.").wait_for()
    enter(field, KEY)
    page.locator("#model").get_by_text("minisrv-default").wait_for()
    assert not field.is_visible()
    assert page.evaluate("sessionStorage.getItem('minisrv-key')") == KEY
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("document.cookie") == ""
    assert KEY not in page.content()
    page.get_by_role("button", name="Forget the key").click()
    assert page.evaluate("sessionStorage.length") == 0
    field.wait_for()


HOLD_REFUSALS = """
    const json = Response.prototype.json;
    const held = new Promise((resolve) => (globalThis.release = resolve));
    Response.prototype.json = async function () {
        if (this.status === 401 && this.url.includes("/debug/steps")) await held;
        return json.call(this);
    };
"""
"""Until `release()` is called, what a refusal of steps says is on its way."""


def test_a_late_answer_to_another_key_refuses_no_key(server: Server, open_page: Open) -> None:
    page = open_page("about:blank")
    page.add_init_script(HOLD_REFUSALS)
    page.goto(server.url)
    field = page.get_by_label("This server asks for an API key")
    with page.expect_response(lambda answer: answer.status == 401 and "steps" in answer.url):
        enter(field, "another")
    page.get_by_text("The server did not accept this key.").wait_for()
    enter(field, KEY)
    page.locator("#model").get_by_text("minisrv-default").wait_for()
    # The answer to the key before makes the page ask again, with the key that it has by now.
    with page.expect_response(lambda answer: answer.ok and "/debug/steps" in answer.url):
        page.evaluate("release()")
    assert not field.is_visible()
    assert page.evaluate("sessionStorage.getItem('minisrv-key')") == KEY


def test_light_and_dark(server: Server, open_page: Open) -> None:
    brightness = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    page = open_page(server.url, key=KEY, color_scheme="dark")
    assert page.evaluate(brightness) < 60
    page.get_by_role("button", name="Light colours").click()
    assert page.evaluate(brightness) > 200
    page.get_by_role("button", name="Dark colours").click()
    assert page.evaluate(brightness) < 60
    page.reload()
    assert page.evaluate(brightness) < 60, "the choice is kept"
    assert open_page(server.url, key=KEY).evaluate(brightness) > 200


LONG_FIGURES = """[...document.querySelectorAll('.figures')].filter(figures => {
    figures.querySelector('.value').textContent = '123 ms';
    figures.querySelector('.more').textContent = ' waiting 1,234';
    return figures.scrollWidth > figures.clientWidth;
}).map(figures => figures.textContent)"""
"""The figures of charts that reach into their neighbours, with texts that are as long as any."""


WIDEST = """
    globalThis.widest = 0;
    const look = () => {
        widest = Math.max(widest, document.documentElement.scrollWidth);
        requestAnimationFrame(look);
    };
    look();
"""
"""From now on, the width of the page in its widest frame is `widest`."""


def test_a_phone_is_wide_enough(server: Server, open_page: Open, tmp_path: Path) -> None:
    size = {"width": 360, "height": 740}
    page = open_page(server.url, key=KEY, viewport=size, has_touch=True)
    complete(page)
    wait_for_steps(page, server)
    page.locator(".strip").tap(position={"x": 60, "y": 100})
    open_table(page)
    assert overflow(page) <= 0
    assert page.evaluate(LONG_FIGURES) == []
    files = [tmp_path / "a.ndjson", tmp_path / "b.ndjson"]
    for path in files:
        path.write_bytes(trace("a-model-with-a-long-name", steps=120))
    page.evaluate(WIDEST)
    page.locator("#files").set_input_files(files)
    page.locator(".viewer .strip[aria-valuemax='119']").last.wait_for()
    assert overflow(page) <= 0
    assert page.evaluate("widest") <= size["width"], "in no frame"


def test_all_urls_are_below_a_prefix(server: Server, open_page: Open) -> None:
    """A proxy that adds a prefix to the path needs no setting."""
    page = open_page("about:blank", key=KEY)
    asked: list[str] = []

    def forward(route: Route) -> None:
        asked.append(route.request.url)
        # The proxy of this test passes whole answers on.
        url = route.request.url.replace("/a/prefix/", "/").replace("follow=true", "limit=1")
        route.fulfill(response=route.fetch(url=url))

    page.route("**/*", forward)
    page.goto(f"{server.url}/a/prefix/")
    expect(page.locator("#model")).to_contain_text("minisrv-default")
    complete(page)
    expect(page.locator("#usage")).to_contain_text(f"{server.url}/a/prefix/v1/")
    assert not [url for url in asked if not url.startswith(f"{server.url}/a/prefix/")]


def answering(answer: dict[str, Any] | None) -> Callable[[Route], None]:
    """A handler that answers 503 with this, or not at all."""
    if answer is None:
        return lambda route: route.abort()
    return lambda route: route.fulfill(status=503, json=answer)


def test_states_say_what_to_do(server: Server, open_page: Open) -> None:
    page = open_page("about:blank", key=KEY)
    page.clock.install()
    page.goto(server.url)
    banner = page.locator("#banner")
    expect(page.locator("#state")).to_have_text("Ready")
    loading = {"phase": "capturing graphs", "done": 3, "total": 9}
    for answer, told in (
        ({"state": "asleep"}, "POST /wake_up wakes it"),
        ({"state": "dead"}, "Look at the log of the server"),
        ({"state": "loading", "loading": loading}, "when it is. capturing graphs (3 of 9)"),
        (None, "The server does not answer"),
    ):
        page.context.route("**/ready", answering(answer))
        page.clock.run_for(2500)
        expect(banner).to_contain_text(told)
        page.context.unroute("**/ready")
    page.clock.run_for(2500)
    expect(page.locator("#state")).to_have_text("Ready")
    expect(banner).to_be_hidden()


def test_a_server_without_a_trace_says_so(server: Server, open_page: Open) -> None:
    page = open_page("about:blank", key=KEY)
    error = {"error": {"message": "No trace: start it without --step-trace 0.", "code": "off"}}
    page.route("**/debug/steps*", lambda route: route.fulfill(status=404, json=error))
    page.goto(server.url)
    page.get_by_text("No trace: start it without --step-trace 0.").wait_for()


DROP = """([name, text, times = 1]) => {
    const files = new DataTransfer();
    files.items.add(new File([text.repeat(times)], name));
    const options = { dataTransfer: files, bubbles: true, cancelable: true };
    document.querySelector('#drop').dispatchEvent(new DragEvent('drop', options));
}"""


def test_dropped_traces_replay(server: Server, open_page: Open) -> None:
    page = open_page(server.url, key=KEY)
    page.locator("body.live").wait_for()  # before that nothing takes a file
    page.evaluate(DROP, ["one.ndjson", trace("one", steps=400).decode()])
    viewer = page.locator(".viewer")
    viewer.get_by_text("one · cpu · full-and-piecewise · 400 steps").wait_for()
    assert viewer.locator("li.missing").all_inner_texts() == ["16\nnot in service"]
    viewer.get_by_role("slider", name="Steps of one.ndjson").press("End")
    expect(viewer.locator(".details h3")).to_contain_text("#399")
    viewer.get_by_role("slider", name="Steps of one.ndjson").press("Home")
    viewer.get_by_role("button", name="Play").click()
    position = viewer.get_by_label("Position in the trace")
    until(lambda: float(position.input_value()) > 3, "it plays")
    viewer.get_by_role("button", name="Pause").click()
    page.evaluate(DROP, ["two.ndjson", trace("two", steps=300, first=7).decode()])
    viewer.get_by_role("columnheader", name="two.ndjson").wait_for()
    viewer.get_by_label("Axis").select_option("time")
    position.evaluate("range => { range.value = 2000; range.dispatchEvent(new Event('input')); }")
    # The same moment of both: two seconds are 200 steps.
    expect(viewer.locator(".details h3")).to_have_text([re.compile("#200"), re.compile("#207")])
    viewer.get_by_role("button", name="Close the trace").click()
    assert not viewer.count()


def test_the_ladders_follow_a_refit(viewed: ViewServer, open_page: Open) -> None:
    ladders = {"decode": [5, 16], "mixed": [32, 64], "epilogue": [16]}
    event = {"type": "event", "time": 1000.5, "event": "refit", "ladders": ladders}
    text = trace("x", steps=40).decode() + json.dumps(event | {"in_service": ladders})
    page = open_page(viewed.url)
    page.locator(".viewer").wait_for()
    page.evaluate(DROP, ["refit.ndjson", text])
    decode = page.locator(".ladder-decode").last
    expect(decode.locator("li:not(.missing) .size")).to_have_text(["5", "16"])
    # A size that has run steps and serves no more.
    expect(decode.locator("li.missing .size")).to_have_text(["8"])
    expect(decode.locator("li.missing .hits")).to_have_text(["36 · 38 % padding, not in service"])


def test_saved_steps_are_a_trace(server: Server, open_page: Open, tmp_path: Path) -> None:
    """The file has the events too, such as that a graph was captured, and so the same ladders."""
    until(lambda: not missing_graphs(server), "the ladders are full")
    before = recorded(server, "event")
    assert before
    page = open_page(server.url, key=KEY)
    complete(page)
    wait_for_steps(page, server)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    path = tmp_path / "steps.ndjson"
    download.value.save_as(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if line["type"] == "step"]
    first, newest = steps[0]["id"], steps[-1]["id"]
    assert steps == [step for step in recorded(server) if first <= step["id"] <= newest]
    events = [line for line in lines if line["type"] == "event"]
    assert events[: len(before)] == before
    assert lines[1:] == sorted(lines[1:], key=lambda line: float(line["time"]))
    page.locator("#files").set_input_files(path)
    page.locator(".viewer").wait_for()
    ladders = "[...document.querySelectorAll('%s .ladder li')].map(rung => rung.innerText)"
    until(
        lambda: page.evaluate(ladders % "#ladder") == page.evaluate(ladders % ".viewer"),
        "both ladders are the same",
    )


def test_a_bad_file_is_named_with_its_line(viewed: ViewServer, open_page: Open) -> None:
    page = open_page(viewed.url)
    page.locator(".viewer").wait_for()
    whole = trace("x", steps=2).decode()
    for text, told in (
        ("", "Line 1: the file is empty"),
        ("no JSON", "Line 1: this is not JSON"),
        ('{"type": "step"}\n', "Line 1: the step has no number"),
        (whole + '{"type": "st', "Line 4: this is not JSON"),
        ('{"type": "header", "version": 2}\n', "Line 1: the format has version 2"),
        (trace("x", steps=0).decode(), "a header and no step"),
        (whole.replace('"abc"', "7"), 'Line 2: the "requests" of the step is not what'),
        (whole.replace("2.0", '"2"'), 'Line 2: the "measured_ms" of the step is not what'),
        (whole.replace("1000.01", "1e999"), "Line 3: the step has no"),
        (whole.replace('"part"', '"x"'), 'Line 1: the "startup" of the header is not what'),
        (whole.replace("[1, 8]", "8"), 'Line 1: the "in_service" of the header is not what'),
        (["0", 1 << 25], "Line 1 has more than 16777216 characters"),
    ):
        page.evaluate(DROP, ["bad.ndjson", *([text] if isinstance(text, str) else text)])
        expect(page.locator("#replay-message")).to_have_text(re.compile(f"^bad.ndjson: .*{told}"))
    assert page.locator(".viewer").is_visible(), "the traces that were open stay open"


DROP_LONG = """(longest) => {
    const line = '{"type": "later", "text": "' + '0'.repeat(1 << 23) + '"}\\n';
    const header = '{"type": "header", "version": 1}\\n';
    const parts = [header, ...Array(longest / (1 << 23)).fill(new Blob([line]))];
    const files = new DataTransfer();
    files.items.add(new File(parts, 'long.ndjson'));
    const options = { dataTransfer: files, bubbles: true, cancelable: true };
    document.querySelector('#drop').dispatchEvent(new DragEvent('drop', options));
}"""


def test_a_trace_is_not_read_beyond_a_size(viewed: ViewServer, open_page: Open) -> None:
    """Each line is one of a trace, and all together would take the memory of the tab."""
    page = open_page(viewed.url)
    page.locator(".viewer").wait_for()
    page.evaluate(DROP_LONG, 1 << 28)
    told = re.compile("^long.ndjson: Line 33: the trace has more than 268435456 characters")
    expect(page.locator("#replay-message")).to_have_text(told, timeout=1000 * GUARD_SECONDS)
    assert page.locator(".viewer").is_visible()


def test_a_hostile_file_is_text_and_stops_nothing(viewed: ViewServer, open_page: Open) -> None:
    """Markup is shown as it is, a step may take a thousand years, and events hold anything."""
    page = open_page(viewed.url)
    page.locator(".viewer").wait_for()
    markup = "<img src=x onerror=document.title='read'>"
    lines = [json.loads(line) for line in trace(markup, steps=300).splitlines()]
    for step in lines[1:]:
        step.update(mode=markup, reason=markup, budget_reason=markup, measured_ms=3e13)
        step.update(requests=[[markup, 1]], host_ms={markup: 1.0})
    event = f'{{"type": "event", "time": 1000.005, "event": "{markup}", "deep": '
    text = [*map(json.dumps, lines), event + "[" * 100_000 + "]" * 100_000 + "}"]
    page.evaluate(DROP, ["hostile.ndjson", "\n".join(text)])
    strip = page.get_by_role("slider", name="Steps of hostile.ndjson")
    strip.wait_for()
    page.get_by_label("Axis").select_option("time")
    strip.press("Home")
    strip.press("ArrowRight")
    expect(page.locator(".details .events").last).to_contain_text(markup)
    expect(page.locator(".details h3").last).to_contain_text("#1")
    assert not page.locator("img").count()
    assert page.title() == "minisrv"


@pytest.fixture
def viewed(tmp_path: Path) -> Iterator[ViewServer]:
    """`minisrv trace --view` of two traces."""
    paths = [tmp_path / "left.ndjson", tmp_path / "right.ndjson"]
    for path in paths:
        path.write_bytes(trace(path.stem, steps=100))
    with ViewServer(paths) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_page_alone_shows_recorded_traces(viewed: ViewServer, open_page: Open) -> None:
    page = open_page(viewed.url)
    page.get_by_role("slider", name="Steps of right.ndjson").wait_for()
    assert not page.locator("#prompt").is_visible()


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: run `npm ci` in ui/")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    server: Server, viewed: ViewServer, open_page: Open, scheme: str
) -> None:
    """All of it: with an answer, a chosen step, the table, and two traces."""
    for url in (server.url, viewed.url):
        page = open_page(url, key=KEY, color_scheme=scheme)
        if url == server.url:
            complete(page)
            wait_for_steps(page, server)
            page.locator(".strip").click(position={"x": 60, "y": 100})
            open_table(page)
        else:
            page.locator(".comparison").wait_for()
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run()")["violations"]
        assert [
            (one["id"], node["target"], node["failureSummary"])
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ] == []
