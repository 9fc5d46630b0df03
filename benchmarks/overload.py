"""Sends many times more requests than a server can serve, and measures how they end.

    python benchmarks/overload.py --minutes 10 --times 10 --json overload.json \\
        'minisrv serve --max-num-seqs 8 --max-waiting 64 --request-timeout 5'

There are three phases against one server. *At capacity*: twice `--max-num-seqs` clients send one
request after the other, so that the batch is always full. *Overload*: requests arrive at
`--times` the rate that was served at capacity, evenly, whether or not earlier ones have ended (an
open loop). *At capacity again*: shows how much the machine itself has changed meanwhile. Every
request must end with tokens, a 429 or the error of a deadline; any other end makes the exit status
1.

The time of a step is the seconds of the phase divided by the steps that /metrics counts in it: the
engine always has work, so the time includes nothing else but its waiting for the machine's cores,
which the client shares. Memory is the resident set (VmRSS) of each process, read every five
seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.memory import processes
from loadgen.client import find_model, send
from loadgen.http import Client
from loadgen.prompts import Conversation, endpoint
from loadgen.records import PromptKind, RequestRecord, RunConfig
from loadgen.samples import Distribution, itl_samples_ms
from loadgen.servers import Server
from minisrv.tools.environment import environment

SETTLE_S = 3.0
"""Seconds from the start of a phase to the first reading of its number of steps."""
SAMPLE_S = 5.0
PATIENCE_S = 120.0
_DEADLINE = "has not ended within"
_STEPS = re.compile(r"^minisrv:graph_steps_total\{.*\} (\S+)$", re.MULTILINE)


def outcome(record: RequestRecord) -> str:
    """Return how a request ended: "tokens", "429", "deadline", or else its failure, which it should
    not have."""
    failure = record.failure
    if failure is None:
        return "tokens"
    if failure.status == 429:
        return "429"
    if _DEADLINE in failure.message:
        return "deadline"
    return f"{failure.kind} {failure.status or ''} {failure.message}"


class Watch:
    """Reads the server's counters and the memory of its processes."""

    def __init__(self, server: Server, client: Client) -> None:
        self._server = server
        self._client = client
        self._began = time.perf_counter()
        self.memory: list[dict[str, Any]] = []

    async def steps(self) -> float:
        """Return the number of steps since the server's start."""
        text = bytearray()

        def receive(status: int, data: bytes, now_s: float) -> bool:
            text.extend(data)
            return True

        await self._client.exchange("GET", f"{self._server.url}/metrics", b"", receive)
        return sum(map(float, _STEPS.findall(text.decode())))

    def sample(self, phase: str) -> None:
        """Record the resident memory of each process of the server."""
        found = {name: one["rss_mib"] for name, one in processes(self._server.pid).items()}
        seconds = round(time.perf_counter() - self._began, 1)
        self.memory.append({"phase": phase, "seconds": seconds, "mib": found})

    async def sample_on(self, phase: str) -> None:
        """Call `sample` every SAMPLE_S seconds until the task is cancelled."""
        while True:
            self.sample(phase)
            await asyncio.sleep(SAMPLE_S)


Ask = Callable[[], Awaitable[None]]


async def closed_loop(clients: int, seconds: float, ask: Ask) -> None:
    """Run `clients` clients, each of which sends one request after the other."""
    end = time.perf_counter() + seconds

    async def one() -> None:
        while time.perf_counter() < end:
            await ask()

    await asyncio.gather(*(one() for _ in range(clients)))


async def open_loop(rate: float, seconds: float, ask: Ask) -> None:
    """Send a request every 1/rate seconds, whether or not those before have ended."""
    began = time.perf_counter()
    number = 0
    async with asyncio.TaskGroup() as group:
        while number < rate * seconds:
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            group.create_task(ask())
            number += 1


async def phase(
    name: str, watch: Watch, ask: Callable[[], Awaitable[RequestRecord]], load: Callable[[Ask], Any]
) -> dict[str, Any]:
    """Run a phase, and return its results.

    name: the name of the phase.
    watch: reads the counters and the memory of the server.
    ask: sends one request.
    load: runs the load of the phase, given a function that sends and counts one request.
    """
    ended: Counter[str] = Counter()
    gaps: list[tuple[float, float]] = []
    first: list[tuple[float, float]] = []

    async def one() -> None:
        record = await ask()
        ended[outcome(record)] += 1
        if record.failure is None:
            gaps.extend(itl_samples_ms(record))
            first.append((1e3 * (record.ttft_s or 0.0), 1.0))

    sampler = asyncio.create_task(watch.sample_on(name))
    began = time.perf_counter()
    running = asyncio.create_task(load(one))
    await asyncio.sleep(SETTLE_S)
    steps, since = await watch.steps(), time.perf_counter()
    until, last = since, steps
    while not running.done():  # so that the last reading is one before the load ended
        until, last = time.perf_counter(), await watch.steps()
        await asyncio.wait((running,), timeout=SAMPLE_S)
    await running
    sampler.cancel()
    seconds = time.perf_counter() - began
    return {
        "phase": name,
        "seconds": round(seconds, 1),
        "requests": ended.total(),
        "ended": dict(ended),
        "served_per_s": round(ended["tokens"] / seconds, 2),
        "steps": last - steps,
        "step_ms": round(1000 * (until - since) / (last - steps), 3) if last > steps else None,
        "itl_ms": _percentiles(gaps),
        "ttft_ms": _percentiles(first),
    }


def _percentiles(samples_ms: list[tuple[float, float]]) -> dict[str, float]:
    found = Distribution.of(samples_ms)
    return {p: round(getattr(found, p), 2) if found else 0.0 for p in ("p50", "p90", "p99")}


async def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Run all phases, one after the other."""
    with Client(None) as client:
        base = f"{server.url}/v1"
        config = RunConfig(
            base_url=base,
            model=await find_model(base, None, None, PATIENCE_S),
            concurrencies=(1,),
            prompt_kind=PromptKind.TOKENS,
            input_tokens=options.input_tokens,
            token_range=(100, 1000),
            output_tokens=options.output_tokens,
            ignore_eos=True,
            requests=None,
            duration_s=None,
            warmup=None,
            processes=None,
            seed=0,
            timeout_s=PATIENCE_S,
            label="overload",
        )
        watch = Watch(server, client)
        number = 0

        async def ask() -> RequestRecord:
            nonlocal number
            number += 1
            request = Conversation(config, 0, False, number).request()
            return await send(client, endpoint(config), request, config)

        def at_capacity(one: Ask) -> Any:
            return closed_loop(2 * options.max_num_seqs, options.capacity_seconds, one)

        found = [await phase("at capacity", watch, ask, at_capacity)]
        _tell(found[-1])
        rate = options.times * found[0]["served_per_s"]
        found.append(
            await phase(
                "overload", watch, ask, lambda one: open_loop(rate, 60 * options.minutes, one)
            )
        )
        _tell(found[-1])
        found.append(await phase("at capacity again", watch, ask, at_capacity))
        _tell(found[-1])
        watch.sample("end")
    return {"rate_per_s": round(rate, 1), "phases": found, "memory": watch.memory}


def _tell(found: dict[str, Any]) -> None:
    print(f"{found['phase']}: {found['ended']}", file=sys.stderr)


def print_report(report: dict[str, Any]) -> None:
    """Print the tables of the phases and of the memory."""
    # Without a terminal rich assumes a small width, at which rows would be broken.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    shown = Table(
        "phase", "requests", "tokens", "429", "deadline", "other", "served/s", "step ms",
        "ITL p50/p99 ms", "TTFT p50/p99 ms", box=None,
    )  # fmt: skip
    for one in report["phases"]:
        ended = Counter(one["ended"])
        known = [ended.pop(name, 0) for name in ("tokens", "429", "deadline")]
        shown.add_row(
            one["phase"],
            str(one["requests"]),
            *map(str, known),
            str(ended.total()),
            str(one["served_per_s"]),
            "too short" if one["step_ms"] is None else f"{one['step_ms']:.2f}",
            *(f"{one[key]['p50']:.1f} / {one[key]['p99']:.1f}" for key in ("itl_ms", "ttft_ms")),
        )
    console.print(shown)
    memory = Table("process", "first MiB", "most", "last", box=None)
    for name in report["memory"][0]["mib"]:
        values = [sample["mib"].get(name, 0.0) for sample in report["memory"]]
        memory.add_row(name, *(f"{value:.0f}" for value in (values[0], max(values), values[-1])))
    console.print(memory)


def main() -> int:
    """Measure, print, and write the JSON. Returns the exit status: 1 if a request ended in another
    way than it should."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("server", metavar="COMMAND", help="with --max-num-seqs as below")
    parser.add_argument("--max-num-seqs", type=int, default=8, help="of the command (8)")
    parser.add_argument("--times", type=float, default=10.0, help="the rate at capacity (10)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of overload (10)")
    parser.add_argument("--capacity-seconds", type=float, default=30.0, help="each time (30)")
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    where = environment()
    with (
        TemporaryDirectory(prefix="overload-") as directory,
        Server("the server", options.server, Path(directory, "log")) as server,
    ):
        server.wait_ready(PATIENCE_S)
        report = asyncio.run(measure(server, options))
        server.check()
    print_report(report)
    if options.json is not None:
        whole = {
            "environment": msgspec.to_builtins(where),
            "server": shlex.join(server.command),
            **report,
        }
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    known = {"tokens", "429", "deadline"}
    return int(any(set(one["ended"]) - known for one in report["phases"]))


if __name__ == "__main__":
    sys.exit(main())
