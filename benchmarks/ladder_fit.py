"""Measures what a ladder that was fitted to the batches of a server saves under the same load.

    python benchmarks/ladder_fit.py --shapes chat --json ladder-fit.json

For each shape of traffic a server with the default ladder gets a load of `loadgen`, `minisrv
ladder` reads the sizes of its batches and fits as many graphs to them, and a second server with
these capture sizes gets the same load, by the same seed. Padding is counted by each server. Both
capture their whole ladder before they are ready. Exits with status 1 if a request fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

SHAPES = {
    "chat": "--concurrency 11 --requests 180 --input-tokens lognormal:48:20:120 "
    "--output-tokens uniform:40:120",
    "bursty": "--request-rate 6 --requests 70 --burstiness 0.2 --input-tokens 64 "
    "--output-tokens uniform:20:60",
    "long-prompts": "--concurrency 5 --requests 50 --input-tokens uniform:200:400 "
    "--output-tokens 24",
}
"""The options of `loadgen run` for each shape: steady chats, requests that come in bursts, and long
prompts beside a few that decode."""


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="minisrv serve --cudagraph-capture whole")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--json", type=Path, help="write the measurements to a file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for shape in options.shapes:
        load = f"{SHAPES[shape]} --seed 7 --warmup 0"
        before, fit = measure(options.server, load, fits=True)
        sizes = " ".join(map(str, fit["fitted"]["sizes"]))
        after, _ = measure(f"{options.server} --cudagraph-capture-sizes {sizes}", load, fits=False)
        found[shape] = {
            "load": load,
            "sizes": sizes,
            "before": before,
            "fit": fit,
            "after": after,
        }
        for name, each in (("before", before), ("after", after)):
            print(
                f"{shape:12} {name:6} {each['graphs']:3} graphs, {each['steps']:6,.0f} steps, "
                f"padding {each['padding']:6.1%}, {each['tokens_per_s']:7.1f} tokens/s, "
                f"ITL {each['itl_ms']:.2f} ms"
            )
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(server: str, load: str, *, fits: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a server under a load, and return what it and its client counted, and the fit of a ladder
    to its batches if that is wanted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        report, fitted = Path(folder) / "load.json", Path(folder) / "fit.json"
        process = subprocess.Popen(shlex.split(f"{server} --port {port}"))
        try:
            wait_until_ready(url, process)
            run = ["loadgen", "run", url, *shlex.split(load), "--json", str(report)]
            subprocess.run(run, check=True)
            counted = metrics(url)
            if fits:
                command = ["minisrv", "ladder", "--url", url, "--json", str(fitted)]
                subprocess.run(command, check=True)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
        client = json.loads(report.read_text())
        fit = json.loads(fitted.read_text()) if fits else {}
    (level,) = (each["summary"] for each in client["levels"])
    if level["failed"]:
        raise SystemExit(f"{level['failed']} requests failed: {level['failures']}")
    steps = total(counted, "graph_steps_total")
    padding = total(counted, "padded_tokens_total")
    return {
        "command": server,
        "graphs": counted['graphs{state="serving"}'],
        "steps": steps,
        "tokens": total(counted, "step_tokens_total"),
        "padded_tokens": padding,
        "padding": padding / (padding + total(counted, "step_tokens_total")),
        "tokens_per_s": level["output_tokens_per_s"],
        "itl_ms": level["itl_ms"]["mean"],
        "load": os.getloadavg()[0],
        "client": level,
    }, fit


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when a server is ready. Raises RuntimeError if it ends before."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server ended with status {process.returncode}")


def metrics(url: str) -> dict[str, float]:
    """Return the metrics of a server by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found = (re.fullmatch(r"minisrv:(\S+(?: [^ ]+\})?) (\S+)", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def total(counted: dict[str, float], name: str) -> float:
    """Return the sum of a counter over its labels, for steps that ran by a graph."""
    return sum(
        value
        for key, value in counted.items()
        if key.startswith(f"{name}{{") and 'mode="NONE"' not in key
    )


if __name__ == "__main__":
    main()
