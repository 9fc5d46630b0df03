"""Measures what metrics cost: for each step in the engine, for each token in an API worker, and for
each scrape.

    python benchmarks/metrics_cost.py --rows 8 --itl-ms 4 --json F

The same calls as in a server are made without a model: those of the counters for a step of steady
decode, those of a choice for a token. Their time is compared with that of a step at which a client
would see such an ITL. Medians of rounds that take turns; nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from minisrv.core.dispatcher import Dispatch
from minisrv.core.step import ScheduledRow, SchedulerOutput
from minisrv.engine.messages import EngineInfo
from minisrv.engine.step_counters import StepCounters
from minisrv.metrics import Metrics, MetricsNames
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Reason
from minisrv.request import EngineOutput
from minisrv.tools.environment import environment

INFO = EngineInfo(
    max_model_len=8192,
    vocab_size=1000,
    num_kv_blocks=1000,
    block_size=16,
    max_num_seqs=256,
    max_num_batched_tokens=512,
    max_waiting=100,
    dtype="float32",
    device="cpu",
    cudagraph_mode="full-and-piecewise",
    startup_seconds={},
)
ROUNDS = 15


def calls(rows: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Return what is measured: a call, and how often it is made in a round."""
    counters = StepCounters()
    names = [f"request-{index}" for index in range(rows)]
    for name in names:
        counters.open(name)
    batch = [
        ScheduledRow(name, index, 9, 1, [], is_decode=True, samples_token=True, num_logprobs=None)
        for index, name in enumerate(names, 1)
    ]
    step = SchedulerOutput(1, 1, batch, [], [], num_decodes=rows, num_tokens=rows, query_len=1)
    descriptor = BatchDescriptor(rows, rows, query_len=1)
    dispatch = Dispatch(CUDAGraphMode.FULL, descriptor, Reason.PURE_DECODE)
    outputs = [EngineOutput(name, [5]) for name in names]

    def count_step() -> None:
        counters.count(step, dispatch, compiled=False)
        counters.count_outputs(outputs)

    metrics = Metrics()

    def count_tokens() -> None:
        for _ in range(rows):
            metrics.gap(0.0042)

    def scrape(names: MetricsNames) -> Callable[[], object]:
        return lambda: metrics.render(
            counters.stats(), INFO, "ready", ["ready", "dead"], model_name="m", names=names
        )

    return {
        "a step, in the engine": (count_step, 2000),
        "the tokens of a step, in a worker": (count_tokens, 2000),
        **{f"a scrape, names {names}": (scrape(names), 10) for names in MetricsNames},
    }


def measure(measured: dict[str, tuple[Callable[[], object], int]]) -> dict[str, float]:
    """Return the microseconds of each call."""
    found: dict[str, list[float]] = {what: [] for what in measured}
    for _ in range(ROUNDS):
        for what, (call, number) in measured.items():
            began = time.process_time()
            for _ in range(number):
                call()
            found[what].append(1e6 * (time.process_time() - began) / number)
    return {what: median(times) for what, times in found.items()}


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8, help="decoding requests")
    parser.add_argument("--itl-ms", type=float, default=4.0, help="time of a step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(calls(options.rows))
    table = Table("what", "us", f"share of {options.itl_ms:g} ms")
    for what, took in found.items():
        share = "" if what.startswith("a scrape") else f"{took / options.itl_ms / 10:.3f}%"
        table.add_row(what, f"{took:.2f}", share)
    Console().print(table)
    if options.json is not None:
        result: dict[str, Any] = {
            "environment": environment(),
            "rows": options.rows,
            "itl_ms": options.itl_ms,
            "us": found,
        }
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")


if __name__ == "__main__":
    main()
