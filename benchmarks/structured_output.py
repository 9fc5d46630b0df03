"""Structured output over HTTP: are all answers what was asked, what does a grammar cost, and do
hostile ones hold anybody up?

    minisrv serve --max-num-seqs 8 &
    python benchmarks/structured_output.py http://127.0.0.1:8000 --schemas 300 --json F

*Schemas*: random ones (tests/text/random_schemas.py: nested, enums, arrays, patterns, recursion),
eight at a time, each answer checked by `jsonschema`. An answer that was cut by its length is asked
for again with another seed, three times at most, and counted. *ITL*: eight streams with a grammar
and eight without, by turns, at temperature 1. *Hostile*: streams run while grammars that are known
to hurt (too large, too deep, ambiguous, `multipleOf`) are sent one after the other; reported is the
longest gap between two tokens of a stream, and without them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from minisrv.environment import environment
from tests.text.random_schemas import random_schema

STREAMS = 8
STREAM_TOKENS = 300
ATTEMPTS = 4
PROMPT = "Tell me about it:\n"
LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 500}
"""What lasts as long as it is let."""


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
    {"response_format": form_of(_deep(14))},
    {"response_format": form_of({"enum": [f"value {n}" for n in range(20_000)]})},
    {
        "response_format": form_of(
            {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}}
        )
    },
    {"response_format": form_of({"allOf": [{"type": "string", "pattern": "a.*b"}] * 30})},
]


class Client:
    """Asks one server."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=64)
        self.http = httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False)

    async def answer(self, **fields: Any) -> dict[str, Any]:
        """The one choice of a completion. Raises httpx.HTTPStatusError."""
        body = {"prompt": PROMPT, "temperature": 1.0, **fields}
        response = await self.http.post("/v1/completions", json=body)
        response.raise_for_status()
        return dict(response.json()["choices"][0])

    async def stream(self, **fields: Any) -> list[float]:
        """When each event with a token came."""
        body = {"prompt": PROMPT, "temperature": 1.0, "max_tokens": STREAM_TOKENS, **fields}
        body["stream"] = True
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            return [
                time.perf_counter()
                async for line in response.aiter_lines()
                if line.startswith("data: {") and '"text":""' not in line
            ]


async def check_schemas(client: Client, number: int, max_tokens: int) -> dict[str, Any]:
    """Counts of answers by what came of them; `valid` should be all."""
    counts = {"schemas": number, "valid": 0, "invalid": 0, "cut": 0, "asked_again": 0}
    bar = tqdm(total=number, desc="schemas", disable=None)
    turn = asyncio.Semaphore(STREAMS)

    async def one(seed: int) -> None:
        schema = random_schema(seed)
        async with turn:
            for attempt in range(ATTEMPTS):
                counts["asked_again"] += attempt > 0
                choice = await client.answer(
                    response_format=form_of(schema), seed=1000 * attempt, max_tokens=max_tokens
                )
                if choice["finish_reason"] == "stop":
                    break
        if choice["finish_reason"] != "stop":
            counts["cut"] += 1
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
    return counts


async def measure_itl(client: Client, rounds: int) -> dict[str, Any]:
    """ITL in ms with a grammar and without, percentiles over the gaps of all streams and rounds."""
    gaps: dict[str, list[float]] = {"grammar": [], "plain": []}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"ignore_eos": True},
        "grammar": {"response_format": form_of(LIST)},
    }
    for number in range(rounds + 1):
        for kind, fields in kinds.items():
            streams = [client.stream(seed=n, **fields) for n in range(STREAMS)]
            for times in await asyncio.gather(*streams):
                if number:  # the first warms up
                    gaps[kind] += [1e3 * (b - a) for a, b in pairwise(times)]
    found = {kind: _percentiles(values) for kind, values in gaps.items()}
    ratio = {p: found["grammar"][p] / found["plain"][p] for p in ("p50", "mean", "p99")}
    return {"streams": STREAMS, "itl_ms": found, "ratio": ratio}


async def bear_hostile(client: Client) -> dict[str, Any]:
    """The longest gaps of streams, in ms, beside hostile grammars and without them."""

    async def gaps_beside(work: Any) -> float:
        streams = [client.stream(seed=n, ignore_eos=True) for n in range(STREAMS // 2)]
        running = asyncio.gather(*streams)
        await asyncio.sleep(0.2)
        await work
        return max(1e3 * (b - a) for times in await running for a, b in pairwise(times))

    outcomes = []

    async def send_all() -> None:
        for fields in HOSTILE:
            began = time.perf_counter()
            body = {"prompt": PROMPT, "max_tokens": 4, **fields}
            response = await client.http.post("/v1/completions", json=body)
            what = "served" if response.is_success else response.json()["error"]["message"][:120]
            outcomes.append(
                {
                    "asked": json.dumps(fields)[:80],
                    "status": response.status_code,
                    "seconds": time.perf_counter() - began,
                    "outcome": what,
                }
            )

    alone = await gaps_beside(asyncio.sleep(0))
    beside = await gaps_beside(send_all())
    return {"longest_gap_ms": beside, "longest_gap_alone_ms": alone, "outcomes": outcomes}


def _percentiles(values: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "mean": float(np.mean(values))}


async def run(options: argparse.Namespace) -> dict[str, Any]:
    client = Client(options.url)
    async with client.http:
        return {
            "schemas": await check_schemas(client, options.schemas, options.max_tokens),
            "itl": await measure_itl(client, options.rounds),
            "hostile": await bear_hostile(client),
        }


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=400, help="of an answer to a schema")
    parser.add_argument("--rounds", type=int, default=3, help="of the ITL's measurement (3)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    found = asyncio.run(run(options))
    table = Table("what", "found", box=None)
    table.add_row(
        "schemas", ", ".join(f"{value} {name}" for name, value in found["schemas"].items())
    )
    for kind, values in found["itl"]["itl_ms"].items():
        table.add_row(f"ITL {kind}, ms", ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
    ratio = found["itl"]["ratio"]
    table.add_row("grammar / plain", ", ".join(f"{k} {v:.2f}" for k, v in ratio.items()))
    hostile = found["hostile"]
    table.add_row(
        "longest gap, ms",
        f"{hostile['longest_gap_ms']:.0f} beside hostile grammars, "
        f"{hostile['longest_gap_alone_ms']:.0f} without",
    )
    for outcome in hostile["outcomes"]:
        table.add_row(
            f"  {outcome['status']} in {outcome['seconds']:.2f} s",
            f"{outcome['asked'][:48]}: {outcome['outcome'][:60]}",
        )
    Console(highlight=False, soft_wrap=True).print(table)
    if options.json is not None:
        report = {"environment": environment(), "options": vars(options), **found}
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
