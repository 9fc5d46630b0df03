"""Tests and measures structured output over HTTP: answers, cost of grammars, hostile grammars.

    minisrv serve --max-num-seqs 8 &
    python benchmarks/structured_output.py http://127.0.0.1:8000 --schemas 300 --json F

*Schemas*: random schemas (tests/text/random_schemas.py: nested, enums, arrays, patterns, recursion)
are sent, eight at a time, and each answer is checked by `jsonschema`. A schema forces the end of
its answer within the maximum number of tokens, unless it is recursive, as recursion has no bound.
An answer that was cut off by its length is asked for again with another seed, three times at most,
and counted.

*ITL*: eight streams with a grammar and eight without are measured by turns, at temperature 1. The
ITL of a stream is the time from its first to its last token, divided by the number of its tokens
minus one, as an event may hold several tokens. The eight are sent at once, and the last of them to
begin shows how much a grammar adds to the TTFT.

*Hostile*: grammars that are known to be costly (large, deep, ambiguous, `multipleOf`) are sent, one
after the other and then several at once, while other streams run. Reported are the longest time
that a stream waited for a token, and the same for as long a time without these grammars.

*Crowd*: twelve grammars are sent at once that take almost the second that one may take (the number
that does is searched first), or more, or that take long to read in Python. After them a small new
grammar is sent every tenth of a second: how long does it take, and what happens to the ITL of a
stream? The server needs `--max-num-seqs 8`, so that no request is queued.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.clients.needs import needs
from minisrv.tools.environment import environment

with needs("pip install -e '.[test]'"):
    import httpx
    import jsonschema

    from tests.text.random_schemas import random_schema

STREAMS = 8
STREAM_TOKENS = 300
HOSTILE_AT_ONCE = 4
CROWD = 12
HOSTILE_TOKENS = 64
ATTEMPTS = 4
PROMPT = "Tell me about it:\n"
LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 500}
"""A schema whose answer is longer than the maximum number of tokens."""


def form_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}}
    return schema


HOSTILE: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "(a{1000}){1000}"}},
    {"structured_outputs": {"regex": "(.*a){50}b(.*c){50}"}},
    {"structured_outputs": {"grammar": "start: a\na: a a | a a a | /x?/"}},
    {"structured_outputs": {"choice": [f"{n}" * 20 for n in range(1000)]}},
    {"response_format": form_of({"type": "integer", "multipleOf": 1_000_003})},
    {"response_format": form_of(_deep(8))},
    {"response_format": form_of({"enum": [f"value {n}" for n in range(4000)]})},
    {"response_format": form_of({"enum": [f"value {n}" for n in range(20_000)]})},
    {
        "response_format": form_of(
            {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}}
        )
    },
    {"response_format": form_of({"allOf": [{"type": "string", "pattern": "a.*b"}] * 30})},
]


class Stream(NamedTuple):
    """One stream.

    began: the time in seconds at which the request was sent.
    times: the times in seconds at which events with text came.
    tokens: the number of tokens, by usage.
    """

    began: float
    times: list[float]
    tokens: int

    @property
    def itl(self) -> float:
        """Mean inter-token latency in milliseconds."""
        return 1e3 * (self.times[-1] - self.times[0]) / (self.tokens - 1)

    @property
    def ttft(self) -> float:
        """Time to the first token in milliseconds."""
        return 1e3 * (self.times[0] - self.began)

    @property
    def longest_wait(self) -> float:
        """Longest wait in milliseconds, for the first token or between two events."""
        return 1e3 * max(b - a for a, b in pairwise([self.began, *self.times]))


class Client:
    """Sends completions to one server."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=64)
        self.http = httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False)

    async def answer(self, **fields: Any) -> dict[str, Any]:
        """Return the only choice of a completion.

        fields: fields of the request's body.
        Raises httpx.HTTPStatusError.
        """
        body = {"prompt": PROMPT, "temperature": 1.0, **fields}
        response = await self.http.post("/v1/completions", json=body)
        response.raise_for_status()
        return dict(response.json()["choices"][0])

    async def stream(self, **fields: Any) -> Stream:
        """Stream a completion of at most STREAM_TOKENS tokens.

        fields: fields of the request's body.
        Raises httpx.HTTPStatusError, and RuntimeError for a stream that ends with an error.
        """
        body = {"prompt": PROMPT, "temperature": 1.0, "max_tokens": STREAM_TOKENS, **fields}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        times, tokens, began = [], 0, time.perf_counter()
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if '"choices":[]' in line:
                    tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
                elif line.startswith("data: {") and '"text":""' not in line:
                    times.append(time.perf_counter())
        if not tokens:
            raise RuntimeError(f"a stream ended without its usage: {fields}")
        return Stream(began, times, tokens)


async def check_schemas(client: Client, number: int, max_tokens: int) -> dict[str, Any]:
    """Ask for answers to random schemas, and return the numbers of answers by their outcome;
    `valid` should be all of them."""
    counts = {"schemas": number, "valid": 0, "invalid": 0, "cut": 0}
    counts |= {"ended_at_first": 0, "asked_again": 0}
    cut = []
    bar = tqdm(total=number, desc="schemas", disable=None)
    turn = asyncio.Semaphore(STREAMS)

    async def one(seed: int) -> None:
        schema = random_schema(seed, max_tokens)
        async with turn:
            for attempt in range(ATTEMPTS):
                counts["asked_again"] += attempt > 0
                choice = await client.answer(
                    response_format=form_of(schema), seed=1000 * attempt, max_tokens=max_tokens
                )
                if choice["finish_reason"] == "stop":
                    counts["ended_at_first"] += attempt == 0
                    break
        if choice["finish_reason"] != "stop":
            counts["cut"] += 1
            cut.append(seed)
        else:
            try:
                jsonschema.validate(json.loads(choice["text"]), schema)
                counts["valid"] += 1
            except (ValueError, jsonschema.ValidationError) as error:
                counts["invalid"] += 1
                print(f"schema {seed}: {error}", file=sys.stderr)
        bar.update()

    await asyncio.gather(*map(one, range(number)))
    bar.close()
    return {**counts, "cut_seeds": sorted(cut)}


async def measure_itl(client: Client, rounds: int) -> dict[str, Any]:
    """Measure the ITL in ms with a grammar and without, as the mean over the streams of a round,
    and their ratio; and the longest TTFT in ms of the streams of a round."""
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"ignore_eos": True},
        "grammar": {"response_format": form_of(LIST)},
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    ttft: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind in sorted(kinds, reverse=number % 2 == 0):
            asked = [client.stream(seed=n, **kinds[kind]) for n in range(STREAMS)]
            streams = await asyncio.gather(*asked)
            if number:  # the first round is a warm-up
                found[kind].append(float(np.mean([stream.itl for stream in streams])))
                ttft[kind].append(max(stream.ttft for stream in streams))
    ratio = [a / b for a, b in zip(found["grammar"], found["plain"], strict=True)]
    return {
        "streams": STREAMS,
        "itl_ms": {kind: _spread(values) for kind, values in found.items()},
        "ratio": _spread(ratio),
        "rounds_itl_ms": found,
        "longest_ttft_ms": {kind: _spread(values) for kind, values in ttft.items()},
    }


async def bear_hostile(client: Client) -> dict[str, Any]:
    """Measure the longest time, in ms, that a stream waited for a token while hostile grammars were
    sent (one after the other, then several at once), and, for as long as each of these took,
    without them."""

    async def waits_beside(work: Awaitable[None]) -> dict[str, float]:
        over = asyncio.Event()
        streams: list[Stream] = []

        async def follow(seed: int) -> None:
            while not over.is_set():
                streams.append(await client.stream(seed=seed, ignore_eos=True))

        async with asyncio.TaskGroup() as group:
            for seed in range(STREAMS - HOSTILE_AT_ONCE):
                group.create_task(follow(seed))
            await asyncio.sleep(0.2)
            began = time.perf_counter()
            await work
            seconds = time.perf_counter() - began
            over.set()
        longest = max(stream.longest_wait for stream in streams)
        return {"seconds": seconds, "streams": len(streams), "longest_wait_ms": longest}

    async def send_all(outcomes: list[dict[str, Any]], at_once: int) -> None:
        turn = asyncio.Semaphore(at_once)

        async def send(fields: dict[str, Any]) -> None:
            async with turn:
                began = time.perf_counter()
                body = {"prompt": PROMPT, "max_tokens": HOSTILE_TOKENS, **fields}
                response = await client.http.post("/v1/completions", json=body)
                seconds = time.perf_counter() - began
            what = "served" if response.is_success else response.json()["error"]["message"][:120]
            outcomes.append(
                {
                    "asked": json.dumps(fields)[:80],
                    "status": response.status_code,
                    "seconds": seconds,
                    "outcome": what,
                }
            )

        await asyncio.gather(*map(send, HOSTILE))

    found: dict[str, Any] = {}
    for name, at_once in {"one_by_one": 1, "at_once": HOSTILE_AT_ONCE}.items():
        outcomes: list[dict[str, Any]] = []
        beside = await waits_beside(send_all(outcomes, at_once))
        alone = await waits_beside(asyncio.sleep(beside["seconds"]))
        found[name] = {"beside": beside, "alone": alone, "outcomes": outcomes}
    return found


def _multiple(number: int) -> dict[str, Any]:
    return form_of({"type": "integer", "multipleOf": number})


def _bounds(number: int) -> dict[str, Any]:
    return form_of({"anyOf": [{"minimum": number + n} for n in range(2000)]})


async def meet_crowd(client: Client) -> dict[str, Any]:
    """Measure, for each kind of crowd, the seconds that each of its grammars took, and each small
    grammar that was sent meanwhile; and the mean ITL and the longest wait for a token, in ms, of
    streams that ran meanwhile."""
    costly = 1_000_003
    while costly > 10_000:  # the first number that is served takes more than half of a second
        body = {"prompt": PROMPT, "max_tokens": 1, "response_format": _multiple(costly)}
        if (await client.http.post("/v1/completions", json=body)).is_success:
            break
        costly = costly * 2 // 3
    kinds = {
        "refused": lambda n: _multiple(1_000_003 + n),
        "almost": lambda n: _multiple(costly - 2 * n),
        "python": lambda n: _bounds(10_000 * n),
    }

    async def ask(**fields: Any) -> float:
        began = time.perf_counter()
        body = {"prompt": PROMPT, "max_tokens": 1, **fields}
        await client.http.post("/v1/completions", json=body)
        return time.perf_counter() - began

    found: dict[str, Any] = {}
    for kind, form in kinds.items():
        streams: list[Stream] = []
        small: list[float] = []
        over = asyncio.Event()

        async def follow(streams: list[Stream] = streams, over: asyncio.Event = over) -> None:
            while not over.is_set():
                streams.append(await client.stream(seed=0, ignore_eos=True))

        follower = asyncio.create_task(follow())
        await asyncio.sleep(0.5)
        crowd = [asyncio.create_task(ask(response_format=form(n + 1))) for n in range(CROWD)]
        await asyncio.sleep(0.05)
        while not small or not all(task.done() for task in crowd):
            small.append(await ask(structured_outputs={"choice": [f"at {time.time()}"]}))
            await asyncio.sleep(0.1)
        over.set()
        await follower
        found[kind] = {
            "crowd_s": [task.result() for task in crowd],
            "small_s": small,
            "itl_ms": float(np.mean([stream.itl for stream in streams])),
            "longest_wait_ms": max(stream.longest_wait for stream in streams),
        }
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


async def run(options: argparse.Namespace) -> dict[str, Any]:
    client = Client(options.url)
    async with client.http:
        return {
            "schemas": await check_schemas(client, options.schemas, options.max_tokens),
            "itl": await measure_itl(client, options.rounds),
            "hostile": await bear_hostile(client),
            "crowd": await meet_crowd(client),
        }


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=1000, help="of an answer to a schema")
    parser.add_argument("--rounds", type=int, default=5, help="of the ITL's measurement (5)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    found = asyncio.run(run(options))
    table = Table("what", "found", box=None)
    table.add_row(
        "schemas", ", ".join(f"{name} {value}" for name, value in found["schemas"].items())
    )
    for kind, values in found["itl"]["itl_ms"].items():
        table.add_row(f"ITL {kind}, ms", ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
    for kind, values in found["itl"]["longest_ttft_ms"].items():
        table.add_row(f"TTFT {kind}, ms", ", ".join(f"{k} {v:.1f}" for k, v in values.items()))
    ratio = found["itl"]["ratio"]
    table.add_row("grammar / plain", ", ".join(f"{k} {v:.2f}" for k, v in ratio.items()))
    for name, hostile in found["hostile"].items():
        beside, alone = hostile["beside"], hostile["alone"]
        table.add_row(
            "longest wait, ms",
            f"{beside['longest_wait_ms']:.0f} in {beside['streams']} streams beside hostile "
            f"grammars, {name}; {alone['longest_wait_ms']:.0f} in {alone['streams']} without",
        )
        for outcome in hostile["outcomes"]:
            table.add_row(
                f"  {outcome['status']} in {outcome['seconds']:.2f} s",
                f"{outcome['asked'][:48]}: {outcome['outcome'][:60]}",
            )
    for kind, crowd in found["crowd"].items():
        table.add_row(
            f"beside {CROWD}: {kind}",
            f"a small grammar takes {1e3 * np.median(crowd['small_s']):.0f} ms (median), the "
            f"first {1e3 * crowd['small_s'][0]:.0f}, the longest {1e3 * max(crowd['small_s']):.0f};"
            f" ITL {crowd['itl_ms']:.2f} ms, longest wait {crowd['longest_wait_ms']:.0f}; all "
            f"{CROWD} took {max(crowd['crowd_s']):.1f} s",
        )
    Console(highlight=False, soft_wrap=True).print(table)
    if options.json is not None:
        report = {
            "environment": environment("llguidance", "jsonschema"),
            "options": vars(options),
            **found,
        }
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
