"""`vllm bench serve`'s own request functions against a server.

    python benchmarks/clients/vllm_bench.py http://127.0.0.1:8000 FILE [--json out.json]

FILE is vllm/benchmarks/lib/endpoint_request_func.py of any version of vLLM, unmodified, for
instance from its wheel. Nothing else of vLLM is needed, but the packages aiohttp, regex and tqdm
are. The requests are those of `vllm bench serve --backend openai|openai-chat --ignore-eos
[--logprobs 3]`: streams of a fixed length, a fixed number of them at a time, each with an
X-Request-Id. Exits with 1 if a request fails, or if the number of tokens that the server counts is
not the one that was asked for.

Knows: the interface of that file. Knows nothing of HTTP, which the file does.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from needs import needs

with needs("pip install aiohttp regex tqdm"):
    import aiohttp

PATHS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


def load(path: Path) -> ModuleType:
    """Import the file `path` as a module."""
    spec = importlib.util.spec_from_file_location("endpoint_request_func", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the file's dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


async def run(
    vllm: ModuleType, url: str, model: str, backend: str, logprobs: int | None, args: Any
) -> dict[str, Any]:
    """Run one benchmark, and return the numbers of requests, tokens and errors, the throughput, and
    latencies in milliseconds.

    vllm: the module that `load` returns.
    """
    rng = random.Random(f"{backend}/{logprobs}")
    gate = asyncio.Semaphore(args.concurrency)
    connector = aiohttp.TCPConnector(limit=args.concurrency)
    async with aiohttp.ClientSession(connector=connector, timeout=vllm.AIOHTTP_TIMEOUT) as session:

        async def one(number: int) -> Any:
            words = " ".join(str(rng.randrange(1000)) for _ in range(args.words))
            request = vllm.RequestFuncInput(
                prompt=f"Copy these numbers: {words}",
                api_url=url + PATHS[backend],
                prompt_len=0,
                output_len=args.output_tokens,
                model=model,
                logprobs=logprobs,
                ignore_eos=True,
                extra_body={"temperature": 0.0},
                request_id=f"bench-{number}",
            )
            async with gate:
                return await vllm.ASYNC_REQUEST_FUNCS[backend](request, session=session)

        begin = time.perf_counter()
        outputs = await asyncio.gather(*map(one, range(args.requests)))
        seconds = time.perf_counter() - begin
    gaps = [gap for output in outputs for gap in output.itl]
    return {
        "backend": backend,
        "logprobs": logprobs,
        "requests": len(outputs),
        "errors": sum(not output.success for output in outputs),
        "first_error": next((output.error for output in outputs if not output.success), None),
        "output_tokens": sum(output.output_tokens for output in outputs),
        "output_tokens_asked_for": args.output_tokens * len(outputs),
        "prompt_tokens": sum(output.prompt_len for output in outputs),
        "chunks": len(gaps) + len(outputs),
        "tokens_per_second": round(sum(output.output_tokens for output in outputs) / seconds, 1),
        "median_ttft_ms": round(median(output.ttft for output in outputs) * 1e3, 2),
        "median_itl_ms": round(median(gaps) * 1e3, 2),
    }


async def main_async(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all benchmarks, one after the other, with the first model that the server lists."""
    with needs("pip install aiohttp regex tqdm"):
        vllm = load(args.file)
    async with (
        aiohttp.ClientSession() as session,
        session.get(args.url + "/v1/models") as response,
    ):
        model = (await response.json())["data"][0]["id"]
    return [
        await run(vllm, args.url, model, backend, logprobs, args)
        for backend, logprobs in (("openai", None), ("openai", 3), ("openai-chat", None))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="vllm bench serve's protocol.")
    parser.add_argument("url")
    parser.add_argument("file", type=Path, help="vLLM's endpoint_request_func.py")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=24, help="numbers in a prompt")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = asyncio.run(main_async(args))
    print(json.dumps(runs, indent=1))
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    good = all(not r["errors"] and r["output_tokens"] == r["output_tokens_asked_for"] for r in runs)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
