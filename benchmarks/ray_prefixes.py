"""How routers of Ray Serve share prompts with common prefixes among replicas: how many tokens of
them the prefix caches had, and what clients see.

    python -m benchmarks.ray_prefixes --router prefix-hash --requests 300 --rate 8 --json F

Starts Ray on this machine, and an application with the default model behind one router.
`two-choices` is Ray's default, which knows no prefixes; `prefix-hash` is minisrv's, and
`ray-prefix-tree` is Ray's `PrefixCacheAffinityRouter`. These two have the deployment in front that
reads bodies. Sends the same requests as `kv_routing.py` with the same options, at random times (a
Poisson process).

Needs `pip install '.[ray]' httpx`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.arrivals import Arrival, Sharing, bounds, drawn
from benchmarks.kv_routing import ask, seen
from benchmarks.ray_serve import EXPORTED_SECONDS, Application
from minisrv.tools.environment import environment

FLAGS = {"compilation-mode": 0, "cudagraph-capture": "whole", "max-num-seqs": 8}
ROUTERS = {
    "two-choices": None,
    "prefix-hash": "minisrv.deploy.prefix_routing:PrefixRouter",
    "ray-prefix-tree": "ray.llm._internal.serve.routing_policies.prefix_aware."
    "prefix_aware_router:PrefixCacheAffinityRouter",
}
"""The class of each router; None is Ray's own choice."""
WARM_UP = 16
"""Number of requests that are sent before, so that every replica has begun."""


async def measure(application: Application, options: argparse.Namespace) -> dict[str, Any]:
    """Send the load, and return the report."""
    sharing = Sharing(options.fraction, options.prefixes, options.prefix_tokens)
    lengths = options.own_tokens, options.output_tokens
    arrivals = drawn(options.requests, options.rate, sharing, *lengths, options.seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def send(arrival: Arrival) -> dict[str, Any]:
            await asyncio.sleep(began + arrival.due_ms / 1000 - time.perf_counter())
            late_ms = 1000 * (time.perf_counter() - began) - arrival.due_ms
            found = await ask(client, application.url, arrival)
            prompt = {"prompt_tokens": len(arrival.prompt)}
            return (
                {"due_ms": round(arrival.due_ms, 3), "late_ms": round(late_ms, 3)} | prompt | found
            )

        for _ in range(2):  # the second time, what the first request of a process does is done
            began = time.perf_counter()
            await asyncio.gather(*(send(Arrival(0, [9] * i, 2)) for i in range(1, WARM_UP + 1)))
        began = time.perf_counter()
        requests = await asyncio.gather(*map(send, arrivals))
    await asyncio.sleep(EXPORTED_SECONDS)
    return {
        "environment": msgspec.to_builtins(environment("httpx", "ray")),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "flags": FLAGS,
        "finished_by_replica": await application.finished(),
        "seen": seen(requests),
        "requests": requests,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the replicas, and measure."""
    from ray.serve.config import RequestRouterConfig

    chosen: dict[str, Any] = {}
    if router := ROUTERS[options.router]:
        chosen = {"request_router_config": RequestRouterConfig(request_router_class=router)}
    flags = {**FLAGS, "prefix-routing": router is not None}
    application = Application(options.replicas, flags)
    try:
        application.deploy({}, num_replicas=options.replicas, **chosen)
        return asyncio.run(measure(application, options))
    finally:
        application.close()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--router", choices=ROUTERS, default="prefix-hash")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rate", type=float, default=8, help="requests per second")
    parser.add_argument("--fraction", type=float, default=0.75, help="that has a shared prefix")
    parser.add_argument("--prefixes", type=int, default=64)
    parser.add_argument("--prefix-tokens", type=int, default=256)
    parser.add_argument("--own-tokens", type=bounds, default=(8, 64), metavar="LOW:HIGH")
    parser.add_argument("--output-tokens", type=bounds, default=(8, 32), metavar="LOW:HIGH")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for all results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the results, and write the JSON."""
    options = parse(argv)
    try:
        import ray  # noqa: F401
    except ImportError:
        sys.exit("ray is not installed; this script needs: pip install '.[ray]' httpx")
    report = run(options)
    for name, value in report["seen"].items():
        print(f"{name:>14} {value:10.3f}")
    print("finished by each replica:", report["finished_by_replica"])
    if options.json is not None:
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
