"""Loads in which prompts are most of the work: throughput beside latency, and their frontier.

    python benchmarks/prompt_heavy.py run [LABEL=]URL [[LABEL=]URL] --loads 1024/128@8,32,128 \
        3584/64@8,32 --processes 8 --rounds 3 --json FILE
    python benchmarks/prompt_heavy.py plot FILE ... --plot FILE.svg

A load "1024/128@8" keeps 8 requests in flight, each with a prompt of 1,024 random tokens and 128
tokens to generate. With two URLs the servers take turns, A B B A, with the same prompts. A prompt
is sent to each server once, so its prefix cache has none of them.

The plot shows each load of each label as a point: tokens per second beside the p99 of the time
between two tokens (ITL). Where servers with budgets of 512, 2,048 and 8,192 tokens
(`--max-num-batched-tokens` with `--itl-target-ms 0`) and one that chooses by its cost model are
measured, the points of the first three are a frontier.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from loadgen import ab
from loadgen.cli import normalize_url
from loadgen.client import find_model
from loadgen.errors import LoadgenError
from loadgen.records import Leg, PromptKind, RunConfig
from loadgen.report import ProgressBar
from loadgen.runner import run_legs
from loadgen.stats import LevelSummary, summarize
from minisrv.tools.environment import environment

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.clients.needs import needs

DEFAULT_LOADS = ("1024/128@8,32,128", "3584/64@8,32")
TIMEOUT_S = 600.0

METRICS = ("tokens/s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms")


class Load(NamedTuple):
    """A closed loop: requests in flight, and the tokens of each request."""

    input_tokens: int
    output_tokens: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.input_tokens}/{self.output_tokens} x {self.concurrency}"


def loads(text: str) -> list[Load]:
    """Parse "1024/128@8,32". Raises ArgumentTypeError."""
    match = re.fullmatch(r"(\d+)/(\d+)@(\d+(?:,\d+)*)", text)
    if match is None or 0 in (numbers := [int(digits) for digits in re.findall(r"\d+", text)]):
        raise argparse.ArgumentTypeError(f"{text!r} is no load; write 1024/128@8,32")
    input_tokens, output_tokens, *concurrencies = numbers
    return [Load(input_tokens, output_tokens, number) for number in concurrencies]


def server(text: str) -> tuple[str, str]:
    """Parse [LABEL=]URL into the label, by default the URL, and the base URL."""
    label, found, url = text.partition("=")
    return (label, normalize_url(url)) if found else (text, normalize_url(text))


def legs(servers: Sequence[RunConfig]) -> list[Leg]:
    """Return the measurements of a load in their order; two servers take turns."""
    return Leg.of(servers[0]) if len(servers) == 1 else ab.order(*servers)


def metrics(summary: LevelSummary) -> dict[str, float | None]:
    """Return the values of `METRICS` of a run; None for one that it does not have."""
    ttft, itl = summary.ttft_ms, summary.itl_ms
    values = (
        summary.output_tokens_per_s,
        ttft and ttft.p50,
        itl and itl.p50,
        itl and itl.p99,
    )
    return dict(zip(METRICS, values, strict=True))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every load, and return one entry for each load and server, with its summary of each
    round and the medians of their metrics."""
    key = os.environ.get("OPENAI_API_KEY")
    models = {url: asyncio.run(find_model(url, key, None, TIMEOUT_S)) for _, url in options.servers}
    entries: list[dict[str, Any]] = []
    for number, load in enumerate(load for group in options.loads for load in group):
        configs = [
            RunConfig(
                base_url=url,
                model=models[url],
                concurrencies=(load.concurrency,) * options.rounds,
                prompt_kind=PromptKind.TOKENS,
                input_tokens=load.input_tokens,
                token_range=(100, 1000),
                output_tokens=load.output_tokens,
                ignore_eos=True,
                requests=options.requests_per_stream * load.concurrency,
                duration_s=None,
                warmup=None,
                processes=options.processes,
                seed=options.seed + number,
                timeout_s=TIMEOUT_S,
                label=label,
            )
            for label, url in options.servers
        ]
        runs: dict[str, list[LevelSummary]] = {label: [] for label, _ in options.servers}
        order = legs(configs)
        with ProgressBar() as bar, closing(run_legs(order, key, bar)) as results:
            for leg, result in zip(order, results, strict=True):
                runs[leg.config.label].append(summarize(result))
        for label, summaries in runs.items():
            values = [metrics(summary) for summary in summaries]
            medians = {
                name: median(found)
                for name in METRICS
                if (found := [each[name] for each in values if each[name] is not None])
            }
            entry = {"load": load._asdict(), "label": label, "medians": medians}
            entries.append({**entry, "rounds": [msgspec.to_builtins(each) for each in summaries]})
    return entries


def table(entries: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the medians of each load and server."""
    found = Table("load", "server", *METRICS, "failed")
    for column in found.columns[2:]:
        column.justify = "right"
    for entry in entries:
        values = [entry["medians"].get(name) for name in METRICS]
        failed = sum(each["failed"] for each in entry["rounds"])
        cells = ["-" if value is None else f"{value:,.1f}" for value in values]
        found.add_row(str(Load(**entry["load"])), entry["label"], *cells, str(failed))
    return found


def save_plot(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each load: a point for each label, by p99 ITL and tokens/s."""
    with needs("pip install matplotlib"):
        from matplotlib.figure import Figure

    by_load: dict[Load, dict[str, dict[str, float]]] = {}
    for entry in entries:
        by_load.setdefault(Load(**entry["load"]), {})[entry["label"]] = entry["medians"]
    labels = list(dict.fromkeys(entry["label"] for entry in entries))
    figure = Figure(figsize=(3.2 * len(by_load), 3.4), layout="constrained")
    panels = figure.subplots(1, len(by_load), squeeze=False)[0]
    for panel, (load, points) in zip(panels, by_load.items(), strict=True):
        for label, point in points.items():
            x, y = point.get("ITL p99 ms"), point["tokens/s"]
            if x is not None:
                panel.plot(x, y, "o", color=f"C{labels.index(label)}", label=label)
        panel.set(title=str(load), xlabel="ITL p99, ms")
        panel.set(xlim=(0, 1.15 * panel.get_xlim()[1]), ylim=(0, 1.15 * panel.get_ylim()[1]))
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="tokens/s")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure one server, or two that take turns")
    run.add_argument("servers", nargs="+", type=server, metavar="[LABEL=]URL")
    defaults = [loads(text) for text in DEFAULT_LOADS]
    run.add_argument("--loads", nargs="+", type=loads, default=defaults, metavar="IN/OUT@N,N")
    run.add_argument("--requests-per-stream", type=int, default=6, metavar="N")
    run.add_argument("--rounds", type=int, default=1, metavar="N")
    run.add_argument("--processes", type=int, default=8, metavar="N", help="of the client")
    run.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of the prompts")
    run.add_argument("--json", type=Path, metavar="FILE", help="a file for all results")
    plot = commands.add_parser("plot", help="draw tokens/s beside the p99 ITL")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of `run --json`")
    plot.add_argument("--plot", type=Path, required=True, metavar="FILE", help="needs matplotlib")
    options = parser.parse_args()
    if options.command == "run" and len(options.servers) > 2:
        parser.error("at most two servers take turns; measure others by another run.")
    if options.command == "run" and len(dict(options.servers)) < len(options.servers):
        parser.error("the two servers have one label; write LABEL=URL.")
    return options


def main() -> int:
    """Measure or plot, and return the exit status: 1 if a request failed or a server could not be
    used."""
    options = parse()
    if options.command == "plot":
        reports = [json.loads(path.read_text()) for path in options.files]
        save_plot([entry for report in reports for entry in report["loads"]], options.plot)
        return 0
    where = environment()
    try:
        entries = measure(options)
    except LoadgenError as error:
        print(f"prompt_heavy: {error}", file=sys.stderr)
        return 1
    Console().print(table(entries))
    if options.json is not None:
        report = {"environment": msgspec.to_builtins(where), "loads": entries}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(each["failed"] for entry in entries for each in entry["rounds"]))


if __name__ == "__main__":
    sys.exit(main())
