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
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

WITHOUT, ENDED = "without", ("compiled", "refused")
"""The phase of the server that does not compile, and the states in which another one has ended."""


class Phases:
    """The phases of a run: the time at which each began, in order."""

    def __init__(self, first: str) -> None:
        self.began = [(clock(), first)]

    def note(self, phase: str) -> None:
        """Note the phase at this moment."""
        if phase != self.now:
            self.began.append((clock(), phase))

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


async def state(base_url: str, client: Client) -> str:
    """Return the state of the compilation, as `/ready` tells it."""
    body = bytearray()

    def keep(status: int, data: bytes, now_s: float) -> bool:
        body.extend(data)
        return True

    await client.exchange("GET", f"{base_url.removesuffix('/v1')}/ready", b"", keep)
    return str(json.loads(body)["compilation"]["state"])


async def load(config: RunConfig, phases: Phases, seconds: float) -> list[RequestRecord]:
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
        while phases.now != WITHOUT and phases.now not in ENDED:
            await asyncio.sleep(POLL_S)
            phases.note(await state(config.base_url, client))
            if clock() > deadline:
                raise SystemExit(f"compiled code does not serve after {PATIENCE_S:.0f} s")
    await asyncio.sleep(seconds)
    stopping.set()
    return [record for records in await asyncio.gather(*lanes) for record in records]


def run(command: str, first: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start a server with an empty cache, run the load, and return its results."""
    with TemporaryDirectory(prefix="swap-") as directory:
        cache, log = Path(directory, "cache"), Path(directory, "log")
        server = Server(first, f"env XDG_CACHE_HOME={cache} {command}", log)
        try:
            with server:
                ready_s = server.wait_ready(PATIENCE_S)
                records, phases = asyncio.run(_measure(server.url, first, options))
        except LoadgenError as error:
            raise SystemExit(str(error)) from None
        said = log.read_text(errors="replace").splitlines()
    lines = [line for line in said if re.search("generation 1 |times as fast|made requests", line)]
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
    url: str, first: str, options: argparse.Namespace
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
    return await load(config, phases, options.seconds), phases


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
            for gap, at in sorted(gaps, reverse=True)[:LARGEST]
        ],
    }


def table(results: list[dict[str, Any]]) -> Table:
    """Return a table with a row for each phase."""
    shown = Table("phase", "tokens", "ITL p50 ms", "p99", "p99.9", "max", box=None)
    for result in results:
        for phase, found in result["itl_ms"].items():
            shown.add_row(phase, *map(str, found.values()))
    return shown


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="minisrv serve --model-impl transformers")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=15, help="without, and behind the swap")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    where = environment()
    plain = run(f"{options.server} --compilation-mode 0", WITHOUT, options)
    swapped = run(f"{options.server} --compilation-mode 3", "compiling", options)
    results = [plain, swapped]
    answers = [result.pop("answers") for result in results]
    both = sorted(answers[0].keys() & answers[1].keys())
    same = sum(answers[0][index] == answers[1][index] for index in both)
    # Without a terminal rich assumes a small width, at which rows would be broken.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table(results))
    for line in swapped["said"]:
        console.print(line, markup=False)
    failures = [*plain["failures"], *swapped["failures"]]
    console.print(
        f"{plain['requests'] + swapped['requests']} requests, {len(failures)} failures; of "
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
    if failures or swapped["state"] != "compiled":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
