"""GuideLLM against a server: chat and completions, streamed and not.

    python benchmarks/clients/run_guidellm.py http://127.0.0.1:8000 [--json out.json]

Runs in an environment with guidellm, whose command it runs. Exits with 1 if a request fails, or if
the number of tokens is not the one that was asked for.

Knows: GuideLLM's command line and its report. Knows nothing of HTTP.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from needs import needs

MODEL = Path(__file__).resolve().parents[2] / "models" / "minisrv-default"
PATHS = ("/v1/chat/completions", "/v1/completions")


def run(
    url: str, path: str, stream: bool, streams: int, requests: int, output_tokens: int
) -> dict[str, Any]:
    """Run one load, and return the results that GuideLLM reports. Latencies are in milliseconds.

    path: the path of the API.
    stream: whether answers are streamed.
    streams: number of requests at a time.
    requests: number of requests.
    output_tokens: number of tokens of each answer.
    Raises CalledProcessError if GuideLLM fails.
    """
    backend = f"kind=openai_http,target={url},request_format={path},stream={str(stream).lower()}"
    data = f"kind=synthetic_text,prompt_tokens=64,output_tokens={output_tokens}"
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--backend", backend]
        command += ["--tokenizer", f"kind=huggingface_auto,model={MODEL}", "--data", data]
        command += ["--profile", f"kind=concurrent,streams={streams}"]
        command += ["--constraint", f"kind=max_requests,count={requests}"]
        command += ["--output", f"kind=json,path={report}", "--disable-console"]
        subprocess.run(command, check=True)
        [benchmark] = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    metrics = benchmark["metrics"]
    told = {
        name: metrics[metric]["successful"]
        for name, metric in (
            ("prompt", "prompt_token_count"),
            ("output", "output_token_count"),
            ("ttft", "time_to_first_token_ms"),
            ("itl", "inter_token_latency_ms"),
        )
    }
    totals = metrics["request_totals"]
    return {
        "path": path,
        "stream": stream,
        "streams": streams,
        "requests": totals["successful"],
        "errors": totals["errored"] + totals["incomplete"],
        "prompt_tokens": told["prompt"]["total_sum"],
        "output_tokens": told["output"]["total_sum"],
        "output_tokens_asked_for": requests * output_tokens,
        "median_ttft_ms": round(told["ttft"]["median"], 2) if stream else None,
        "median_itl_ms": round(told["itl"]["median"], 2) if stream else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="GuideLLM against a server.")
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with needs("pip install guidellm"):
        versions = {"guidellm": version("guidellm")}
    load = (args.streams, args.requests, args.output_tokens)
    runs = [run(args.url, path, stream, *load) for path in PATHS for stream in (True, False)]
    report = {"versions": versions, "runs": runs}
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    good = all(not r["errors"] and r["output_tokens"] == r["output_tokens_asked_for"] for r in runs)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
