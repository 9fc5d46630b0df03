"""A router that listens to the KV events of several servers: how well it predicts what the prefix
cache of each then reports, and what clients see.

    python -m benchmarks.kv_routing --replicas 2 --router kv-events --requests 200 --json F

Starts servers with `--kv-events-endpoint`, sends requests with shared prefixes at random times
(a Poisson process), each to the replica that the router chooses, and compares for each the number
of cached tokens that was predicted when it was sent with the one that its usage reports. "told" is
what the events have told by then; "expected" adds the prompts that the replica is computing.
`--trace` keeps the steps of each server, which `fleet.py` learns from.

Needs `pip install httpx`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import msgspec
import zmq
import zmq.asyncio

from benchmarks.arrivals import Arrival, Sharing, bounds, drawn
from benchmarks.routers import ROUTERS, Replica, block_hashes, make_router
from benchmarks.streams import free_port
from minisrv.core.kv_cache import hash_block
from minisrv.core.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from minisrv.tools.environment import environment

START_SECONDS = 120
IDLE_REQUESTS = 5
"""Number of requests that are sent to each idle server, one after the other."""


class Batch(msgspec.Struct, array_like=True):
    """The events of one message."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class KnownCache:
    """What is in the prefix cache of a server, as its events tell. The hashes of events are names:
    what is in a block is told by its tokens and its parent.

    block_size: that of the server; 0 before the first event.
    num_missed: the number of batches that were lost.
    """

    def __init__(self) -> None:
        self.block_size = 0
        self.num_missed = 0
        self._next_number = 0
        self._hash_of: dict[int, bytes] = {}
        self._cached: set[bytes] = set()
        self._decode = msgspec.msgpack.Decoder(Batch).decode

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._cached

    def __len__(self) -> int:
        return len(self._cached)

    def read(self, frames: Sequence[bytes]) -> None:
        """Take note of a batch."""
        _, number, payload = frames
        self.num_missed += int.from_bytes(number, "big") - self._next_number
        self._next_number = int.from_bytes(number, "big") + 1
        for event in self._decode(payload).events:
            match event:
                case BlockStored():
                    self._store(event)
                case BlockRemoved(block_hashes=names):
                    self._cached -= {self._hash_of[name] for name in names}
                case AllBlocksCleared():
                    self._cached.clear()

    def _store(self, event: BlockStored) -> None:
        size = self.block_size = event.block_size
        parent = event.parent_block_hash
        before = None if parent is None else self._hash_of[parent]
        for index, name in enumerate(event.block_hashes):
            tokens = event.token_ids[index * size : (index + 1) * size]
            before = self._hash_of[name] = hash_block((None, None), before, tokens)
            self._cached.add(before)


class Server:
    """A server, what is known of its cache, and what the router knows of it."""

    def __init__(self, command: str, index: int, cores: int, context: zmq.asyncio.Context) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.cache = KnownCache()
        self.replica = Replica(self.cache)
        self._events = context.socket(zmq.SUB)
        self._events.set_hwm(0)
        self._events.subscribe(b"")
        port = self._events.bind_to_random_port("tcp://127.0.0.1")
        self._process = subprocess.Popen(
            [
                *("taskset", "-c", str(index % cores), *shlex.split(command)),
                *("--port", self.url.rsplit(":", 1)[1]),
                *("--kv-events-endpoint", f"tcp://127.0.0.1:{port}"),
            ],
            stderr=subprocess.DEVNULL,
        )

    async def ready(self, client: httpx.AsyncClient) -> None:
        """Wait until it is ready."""
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit and self._process.poll() is None:
            try:
                if (await client.get(f"{self.url}/ready")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.2)
        sys.exit("a server has not become ready")

    async def listen(self) -> None:
        """Read its events."""
        while True:
            self.cache.read(await self._events.recv_multipart())

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait()


async def ask(
    client: httpx.AsyncClient,
    url: str,
    arrival: Arrival,
    replica: Replica | None = None,
    hashes: Sequence[bytes] = (),
) -> dict[str, Any]:
    """Send a request, and return its times in milliseconds from now, and what its usage says.

    replica: told when it steps, if a router has to know.
    hashes: those of the blocks that the router takes to be computed until the first token comes.
    """
    body = {
        "prompt": arrival.prompt,
        "max_tokens": arrival.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = msgspec.json.decode(line[6:])
            if chunk["choices"]:
                if replica is not None:
                    replica.stepped()
                    if not times:
                        replica.computed(hashes)
                times.append(round(1000 * (time.perf_counter() - began), 3))
            usage = chunk.get("usage") or usage
    cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
    return {"chunk_ms": times, "cached_tokens": cached, "tokens": usage["completion_tokens"]}


async def measure(options: argparse.Namespace, servers: Sequence[Server]) -> dict[str, Any]:
    """Send the load, and return the report."""
    sharing = Sharing(options.fraction, options.prefixes, options.prefix_tokens)
    lengths = options.own_tokens, options.output_tokens
    arrivals = drawn(options.requests, options.rate, sharing, *lengths, options.seed)
    choose = make_router(options.router, options.seed)
    replicas = [server.replica for server in servers]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        await asyncio.gather(*(server.ready(client) for server in servers))
        listeners = [asyncio.create_task(server.listen()) for server in servers]
        idle = await asyncio.gather(*(measure_idle(client, server) for server in servers))
        size = servers[0].cache.block_size
        if not size:
            sys.exit("no event has come from a server that has computed prompts")
        began = time.perf_counter()

        async def send(arrival: Arrival) -> dict[str, Any]:
            await asyncio.sleep(began + arrival.due_ms / 1000 - time.perf_counter())
            late_ms = 1000 * (time.perf_counter() - began) - arrival.due_ms
            hashes = block_hashes(arrival.prompt, size)
            index = choose(replicas, hashes)
            replica = replicas[index]
            told, expected = replica.num_cached(hashes), replica.num_expected(hashes)
            replica.sent(hashes)
            found = await ask(client, servers[index].url, arrival, replica, hashes)
            replica.ended()
            return {
                "due_ms": round(arrival.due_ms, 3),
                "late_ms": round(late_ms, 3),
                "replica": index,
                "prompt_tokens": len(arrival.prompt),
                "told_tokens": told * size,
                "expected_tokens": expected * size,
                **found,
            }

        requests = await asyncio.gather(*map(send, arrivals))
        await asyncio.sleep(0.5)
        for listener in listeners:
            listener.cancel()
        if options.trace is not None:
            for index, server in enumerate(servers):
                steps = await client.get(f"{server.url}/debug/steps")
                Path(f"{options.trace}-{index}.ndjson").write_text(steps.text)
    return {
        "environment": msgspec.to_builtins(environment("httpx", "pyzmq")),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "idle": median(each for some in idle for each in some),
        "num_missed": [server.cache.num_missed for server in servers],
        "blocks_known": [len(server.cache) for server in servers],
        "requests": requests,
    }


async def measure_idle(client: httpx.AsyncClient, server: Server) -> list[float]:
    """Return the milliseconds to the first token of requests to an idle server."""
    found = []
    for number in range(IDLE_REQUESTS):
        prompt = [10 + number] * IDLE_TOKENS
        answer = await ask(client, server.url, Arrival(0, prompt, 2), server.replica)
        found.append(answer["chunk_ms"][0])
    return found


IDLE_TOKENS = 32
"""Number of prompt tokens of these requests."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def seen(requests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return what clients see of requests: those of `measure`, and those of a simulation."""
    first = [each["chunk_ms"][0] + each["late_ms"] for each in requests]
    gaps = [b - a for each in requests for a, b in pairwise(each["chunk_ms"])]
    begin = min(each["due_ms"] for each in requests)
    end = max(each["due_ms"] + each["late_ms"] + each["chunk_ms"][-1] for each in requests)
    return {
        "tokens_per_s": 1000 * sum(each["tokens"] for each in requests) / (end - begin),
        "ttft_p50_ms": percentile(first, 0.5),
        "ttft_p99_ms": percentile(first, 0.99),
        "itl_p50_ms": percentile(gaps, 0.5),
        "itl_p99_ms": percentile(gaps, 0.99),
        "hit_rate": sum(each["cached_tokens"] for each in requests)
        / sum(each["prompt_tokens"] for each in requests),
    }


def predictions(requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return by how much each prediction is off: in all tokens together, and the number of requests
    for which it is not exact."""
    reported = sum(each["cached_tokens"] for each in requests)
    found: dict[str, Any] = {"reported_tokens": reported}
    for name in ("told", "expected"):
        differences = [each[f"{name}_tokens"] - each["cached_tokens"] for each in requests]
        found[name] = {
            "tokens": sum(each[f"{name}_tokens"] for each in requests),
            "absolute_error": round(sum(map(abs, differences)) / max(1, reported), 5),
            "wrong": sum(map(bool, differences)),
        }
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--command", default="minisrv serve", help="how a server is started")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2, help="server N runs on core N modulo these")
    parser.add_argument("--router", choices=ROUTERS, default="kv-events")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=4, help="requests per second")
    parser.add_argument("--fraction", type=float, default=0.75, help="that has a shared prefix")
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--prefix-tokens", type=int, default=256)
    parser.add_argument("--own-tokens", type=bounds, default=(8, 64), metavar="LOW:HIGH")
    parser.add_argument("--output-tokens", type=bounds, default=(8, 32), metavar="LOW:HIGH")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", metavar="NAME", help="write steps to NAME-REPLICA.ndjson")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for all results")
    return parser.parse_args(argv)


@contextmanager
def running(options: argparse.Namespace) -> Iterator[list[Server]]:
    """Run the servers while the block does."""
    context = zmq.asyncio.Context()
    servers: list[Server] = []
    try:
        for index in range(options.replicas):
            servers += [Server(options.command, index, options.cores, context)]
        yield servers
    finally:
        for server in servers:
            server.stop()
        context.destroy(linger=0)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the servers, and measure."""
    with running(options) as servers:
        return await measure(options, servers)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the results, and write the JSON."""
    options = parse(argv)
    report = asyncio.run(run(options))
    report["seen"] = seen(report["requests"])
    report["predictions"] = predictions(report["requests"])
    for name, value in report["seen"].items():
        print(f"{name:>14} {value:10.3f}")
    print(json.dumps(report["predictions"]))
    if options.json is not None:
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
