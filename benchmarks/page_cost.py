"""Measures what the open web page costs the streams of a server, and whether the page keeps up.

    minisrv serve &
    python benchmarks/page_cost.py http://127.0.0.1:8000 $! --json page-cost.json

Eight streams run all the time. By turns the page is open in a headless Chromium, where it follows
the steps and draws them, and closed. What is compared is the server's own: the time from step to
step of full decode batches, from the trace of steps, the ITL of /metrics, and the processor time of
all its processes for a token, which says the same on a machine that others use too. The page's long
tasks (over 50 ms, by the browser's own observer) and its frames tell whether it freezes.

A browser without a GPU takes a core for drawing. Where it runs on the cores of the server, it takes
them from the server as any other program would. To see what the page's requests alone cost the
server, keep the two apart: `taskset -c 0 minisrv serve` and `taskset -c 1 python
benchmarks/page_cost.py ...`. The streams' client runs beside the browser, and is not what is
measured.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import threading
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

import msgspec

from benchmarks.clients.needs import needs
from minisrv.tools.environment import environment

SETTLE_SECONDS = 2
"""Seconds that the page has to load and to draw what was recorded before."""

WATCH = """
window.longTasks = []; window.frames_ = 0;
new PerformanceObserver(list => {
    for (const task of list.getEntries()) window.longTasks.push(Math.round(task.duration));
}).observe({entryTypes: ['longtask']});
(function frame() { window.frames_ += 1; requestAnimationFrame(frame); })();
"""


class Streams:
    """Requests that are answered one after the other in each of some threads, and not parsed."""

    def __init__(self, netloc: str, number: int, temperature: float = 0) -> None:
        self._netloc, self._temperature = netloc, temperature
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        body = {"prompt": "Once upon a time", "max_tokens": 1500, "stream": True}
        body |= {"ignore_eos": True, "temperature": self._temperature}
        headers = {"content-type": "application/json"}
        while not self._ended.is_set():
            connection = http.client.HTTPConnection(self._netloc, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            while not self._ended.is_set() and response.read1(1 << 16):
                pass
            connection.close()

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def get(netloc: str, path: str) -> str:
    connection = http.client.HTTPConnection(netloc, timeout=60)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def steps(netloc: str, query: str) -> list[dict[str, Any]]:
    """Return recorded steps."""
    lines = [json.loads(line) for line in get(netloc, f"/debug/steps?{query}").splitlines()]
    return [line for line in lines if line["type"] == "step"]


def latency(netloc: str) -> tuple[float, float]:
    """Return the sum of all inter-token latencies in seconds, and their number."""
    name = "minisrv:inter_token_latency_seconds"
    found = dict(
        line.split(" ") for line in get(netloc, "/metrics").splitlines() if line.startswith(name)
    )
    return float(found[f"{name}_sum"]), float(found[f"{name}_count"])


def window(netloc: str, seconds: float, streams: int, pid: int) -> dict[str, float]:
    """Measure for some seconds.

    pid: the process of the server.
    """
    last = steps(netloc, "limit=1")[-1]["id"]
    total, number = latency(netloc)
    busy = busy_seconds(pid)
    time.sleep(seconds)
    busy = busy_seconds(pid) - busy
    after, more = latency(netloc)
    between = [
        step["wall_ms"]
        for step in steps(netloc, f"since={last}")
        if step["decode_rows"] == streams and not step["prefill_tokens"]
    ]
    return {
        "steps": len(between),
        "step_ms_median": median(between),
        "step_ms_p99": quantiles(between, n=100)[98],
        "server_cpu_ms_per_token": 1000 * busy / (more - number),
        "itl_ms_mean": 1000 * (after - total) / (more - number),
    }


def busy_seconds(root: int, name: str = "") -> float:
    """Return the processor time of a process and of all below it, or of those of them whose names
    contain `name`."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            begin, _, rest = (entry / "stat").read_text().rpartition(")")
        except OSError:
            continue  # it has just ended
        fields = rest.split()
        parents[int(entry.name)] = int(fields[1])
        if name in begin:
            ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
    return sum(used for pid, used in ticks.items() if _is_below(pid, root, parents)) / _TICKS


_TICKS = os.sysconf("SC_CLK_TCK")


def _is_below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid not in (0, root):
        pid = parents.get(pid, 0)
    return pid == root


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url", help="URL of a running server of the default model, without a key")
    parser.add_argument("pid", type=int, help="process id of that server, on this machine")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each window")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with needs("pip install -e '.[test]'"):
        from playwright.sync_api import sync_playwright
    netloc = urlsplit(options.url).netloc
    sides: dict[str, list[dict[str, float]]] = {"closed": [], "open": []}
    long_tasks: list[int] = []
    frames, drawn_seconds, browser_seconds = 0, 0.0, 0.0
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=arguments)
        streams = Streams(netloc, options.streams)
        try:
            time.sleep(SETTLE_SECONDS)
            for number in range(options.rounds):
                order = ("closed", "open") if number % 2 == 0 else ("open", "closed")
                for side in order:
                    page = browser.new_page(viewport={"width": 1280, "height": 1000})
                    page.add_init_script(WATCH)
                    if side == "open":
                        page.goto(options.url)
                    page.wait_for_timeout(1000 * SETTLE_SECONDS)
                    busy, began = busy_seconds(os.getpid(), "chrom"), time.monotonic()
                    before = page.evaluate("[window.longTasks?.length ?? 0, window.frames_ ?? 0]")
                    sides[side].append(
                        window(netloc, options.seconds, options.streams, options.pid)
                    )
                    if side == "open":
                        browser_seconds += busy_seconds(os.getpid(), "chrom") - busy
                        drawn_seconds += time.monotonic() - began
                        long_tasks += page.evaluate("window.longTasks")[before[0] :]
                        frames += page.evaluate("window.frames_") - before[1]
                    page.close()
        finally:
            streams.end()
            browser.close()
    ratios = {
        name: [
            opened[name] / closed[name]
            for opened, closed in zip(sides["open"], sides["closed"], strict=True)
        ]
        for name in ("step_ms_median", "step_ms_p99", "itl_ms_mean", "server_cpu_ms_per_token")
    }
    page_itself = {
        "seconds": drawn_seconds,
        "frames_per_second": frames / drawn_seconds,
        "browser_cores": browser_seconds / drawn_seconds,
        "steps_per_second": sum(one["steps"] for one in sides["open"]) / drawn_seconds,
        "long_tasks_ms": long_tasks,
    }
    for side, found in sides.items():
        middle = {name: median(one[name] for one in found) for name in found[0]}
        print(f"{side}:", " ".join(f"{name}={value:.3f}" for name, value in middle.items()))
    for name, values in ratios.items():
        print(f"open / closed, {name}: {median(values):.3f} ({min(values):.3f}..{max(values):.3f})")
    print(json.dumps(page_itself))
    if options.json:
        report = {
            "environment": msgspec.to_builtins(environment("playwright")),
            "options": {"streams": options.streams, "rounds": options.rounds},
            "sides": sides,
            "ratios": ratios,
            "page": page_itself,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
