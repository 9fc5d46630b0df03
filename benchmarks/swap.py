"""Measures how streams feel that a server compiles its model, certifies the code and swaps to it.

    python benchmarks/swap.py --json swap.json

Two servers run one after the other under the same load: one without compilation, for comparison,
and one that starts with an empty cache and is under load from ready until some seconds after
compiled code serves. The load is a number of streams that each send the next request when the last
one has ended. ITL is the time between two chunks of a stream at the client, by the phase in which
the later one came, as `/ready` tells it: "compiling" while another process compiles, "certifying"
from the load of what it has made until the swap, "compiled" behind the swap. Most of a maximum may
be the prefill of other streams' prompts, which the first server shows.

Answers are greedy; both servers get the same requests in the same order, and the script says how
many answers are the same, token by token. It exits with status 1 if a request fails, gives a wrong
number of tokens, or compiled code does not come into service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from loadgen.client import find_model, send
from loadgen.errors import LoadgenError
from loadgen.http import Client
from loadgen.prompts import Conversation, endpoint
from loadgen.records import PromptKind, RequestRecord, RunConfig, clock
from loadgen.servers import Server
from minisrv.tools.environment import environment

POLL_S = 0.05
APART_S = 0.5
"""Seconds between the first requests of two streams, so that prompts do not come all at once."""
PATIENCE_S = 900.0
LARGEST = 12
"""Number of the largest gaps that are written down."""
TOGETHER_S = 0.01
"""Seconds between the ends of two gaps from which on they are two: one turn between steps makes all
streams wait."""

WITHOUT = "without"
"""The phase of the server that does not compile."""


class Story(NamedTuple):
    """What a server goes through under load.

    phase: returns the phase from the body of `/ready`.
    last: the phases behind which nothing comes.
    """

    phase: Callable[[dict[str, Any]], str]
    last: Sequence[str]


COMPILES = Story(lambda body: str(body["compilation"]["state"]), (WITHOUT, "compiled", "refused"))


class Phases:
    """The phases of a run: the time at which each began, in order."""

    def __init__(self, first: str) -> None:
        self.began = [(clock(), first)]

    def note(self, phase: str) -> None:
        """Note the phase at this moment, and say that it has begun."""
        if phase != self.now:
            now_s = clock()
            self.began.append((now_s, phase))
            print(f"{phase} after {now_s - self.began[0][0]:.1f} s", file=sys.stderr)

    @property
    def seconds(self) -> dict[str, float]:
        """The duration of each phase but the last one."""
        return {phase: round(end - began, 2) for (began, phase), (end, _) in pairwise(self.began)}

    @property
    def now(self) -> str:
        """The last phase."""
        return self.began[-1][1]

    def at(self, time_s: float) -> str:
        """Return the phase at a time."""
        return [phase for began, phase in self.began if began <= time_s][-1]


async def ready(base_url: str, client: Client) -> dict[str, Any]:
    """Return the body of `/ready`."""
    body = bytearray()

    def keep(status: int, data: bytes, now_s: float) -> bool:
        body.extend(data)
        return True

    await client.exchange("GET", f"{base_url.removesuffix('/v1')}/ready", b"", keep)
    found: dict[str, Any] = json.loads(body)
    return found


async def load(
    config: RunConfig, phases: Phases, story: Story, seconds: float
) -> list[RequestRecord]:
    """Run the streams, and return the records of their requests. No more requests are sent
    `seconds` after the last phase has begun."""
    numbers, stopping = count(), asyncio.Event()

    async def lane(place: int) -> list[RequestRecord]:
        records = []
        await asyncio.sleep(APART_S * place)
        with Client(None) as client:
            while not stopping.is_set():
                number = next(numbers)
                request = Conversation(config, 0, False, number).request()
                records.append(await send(client, endpoint(config), request, config))
        return records

    lanes = [asyncio.create_task(lane(place)) for place in range(config.concurrencies[0])]
    deadline = clock() + PATIENCE_S
    with Client(None) as client:
        while phases.now not in story.last:
            await asyncio.sleep(POLL_S)
            phases.note(story.phase(await ready(config.base_url, client)))
            if clock() > deadline:
                raise SystemExit(f"{phases.now} has not ended after {PATIENCE_S:.0f} s")
    await asyncio.sleep(seconds)
    stopping.set()
    return [record for records in await asyncio.gather(*lanes) for record in records]


def run(
    command: str, first: str, options: argparse.Namespace, story: Story = COMPILES
) -> dict[str, Any]:
    """Start a server, run the load, and return its results. One that compiles has an empty
    cache.

    first: the first phase.
    """
    with TemporaryDirectory(prefix="swap-") as directory:
        log = Path(directory, "log")
        if story is COMPILES:
            command = f"env XDG_CACHE_HOME={directory}/cache {command}"
        server = Server(first, command, log)
        try:
            with server:
                ready_s = server.wait_ready(PATIENCE_S)
                print(f"{first}: ready after {ready_s:.1f} s", file=sys.stderr)
                records, phases = asyncio.run(_measure(server.url, first, options, story))
        except LoadgenError as error:
            raise SystemExit(str(error)) from None
        said = log.read_text(errors="replace").splitlines()
    lines = [
        line
        for line in said
        if re.search("generation 1 |times as fast|made requests|graphs serve", line)
    ]
    return {
        "command": command,
        "ready_s": round(ready_s, 2),
        "phases_s": phases.seconds,
        "state": phases.now,
        "said": [line.split("INFO ", 1)[-1] for line in lines],
        **summary(records, phases),
        "answers": {r.index: r.answer.token_ids for r in records if r.answer is not None},
    }


async def _measure(
    url: str, first: str, options: argparse.Namespace, story: Story
) -> tuple[list[RequestRecord], Phases]:
    base_url = f"{url}/v1"
    config = RunConfig(
        base_url=base_url,
        model=await find_model(base_url, None, None, 10.0),
        concurrencies=(options.streams,),
        prompt_kind=PromptKind.TOKENS,
        input_tokens=options.input_tokens,
        token_range=(300, 4000),
        output_tokens=options.output_tokens,
        ignore_eos=True,
        requests=None,
        duration_s=None,
        warmup=0,
        processes=1,
        seed=1,
        timeout_s=PATIENCE_S,
        label=first,
        keep_answers=True,
        return_token_ids=True,
    )
    phases = Phases(first)
    return await load(config, phases, story, options.seconds), phases


def summary(records: list[RequestRecord], phases: Phases) -> dict[str, Any]:
    """Return the number of requests, their failures, and ITL in ms by phase."""
    gaps = [
        (later - earlier, later)
        for record in records
        for earlier, later in pairwise(record.chunk_times_s)
    ]
    by_phase: dict[str, list[float]] = {}
    for gap, at in gaps:
        by_phase.setdefault(phases.at(at), []).append(1000 * gap)
    start = phases.began[0][0]
    return {
        "requests": len(records),
        "tokens": sum(record.tokens for record in records),
        "failures": [r.failure.message for r in records if r.failure is not None],
        "itl_ms": {
            phase: {
                "tokens": len(found),
                **{
                    name: round(float(np.percentile(found, share)), 2)
                    for name, share in (("p50", 50), ("p99", 99), ("p99.9", 99.9), ("max", 100))
                },
            }
            for phase, found in by_phase.items()
        },
        "largest": [
            {"ms": round(1000 * gap, 1), "at_s": round(at - start, 2), "phase": phases.at(at)}
            for gap, at in largest(gaps)
        ],
    }


def largest(gaps: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the largest gaps in seconds, each with its end, beginning with the largest. Of those
    that end together one is returned."""
    found: list[tuple[float, float]] = []
    for gap, at in sorted(gaps, reverse=True):
        if len(found) == LARGEST:
            break
        if all(abs(at - other) > TOGETHER_S for _, other in found):
            found.append((gap, at))
    return found


def table(results: list[dict[str, Any]]) -> Table:
    """Return a table with a row for each phase."""
    shown = Table("phase", "tokens", "ITL p50 ms", "p99", "p99.9", "max", box=None)
    for result in results:
        for phase, found in result["itl_ms"].items():
            shown.add_row(phase, *map(str, found.values()))
    return shown


def compare(
    commands: dict[str, tuple[str, Story]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run the load on two servers, one after the other, print their ITL and how many answers are
    the same, write the JSON, and return the results. Raises SystemExit if a request fails.

    commands: the command of each server by its first phase, and what it goes through.
    """
    where = environment()
    results = [run(command, first, options, story) for first, (command, story) in commands.items()]
    answers = [result.pop("answers") for result in results]
    both = sorted(answers[0].keys() & answers[1].keys())
    same = sum(answers[0][index] == answers[1][index] for index in both)
    # Without a terminal rich assumes a small width, at which rows would be broken.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table(results))
    for line in results[1]["said"]:
        console.print(line, markup=False)
    failures = [failure for result in results for failure in result["failures"]]
    console.print(
        f"{sum(result['requests'] for result in results)} requests, {len(failures)} failures; of "
        f"{len(both)} answers that both servers gave, {same} are the same"
    )
    if options.json is not None:
        report = {
            "environment": msgspec.to_builtins(where),
            "load": {name: getattr(options, name) for name in ("streams", "seconds")}
            | {"input_tokens": options.input_tokens, "output_tokens": options.output_tokens},
            "servers": results,
            "same_answers": [same, len(both)],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if failures:
        raise SystemExit(1)
    return results


def add_load(parser: argparse.ArgumentParser, *, streams: int, output_tokens: int) -> None:
    """Add the arguments of the load, and of the file of the results."""
    parser.add_argument("--streams", type=int, default=streams)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=output_tokens)
    parser.add_argument("--seconds", type=float, default=15, help="behind the last phase")
    parser.add_argument("--json", type=Path, metavar="FILE")


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="minisrv serve --model-impl transformers")
    add_load(parser, streams=16, output_tokens=1000)
    options = parser.parse_args()
    commands = {
        WITHOUT: (f"{options.server} --compilation-mode 0", COMPILES),
        "compiling": (f"{options.server} --compilation-mode 3", COMPILES),
    }
    if compare(commands, options)[1]["state"] != "compiled":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
