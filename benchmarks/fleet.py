"""What several replicas give behind a router, simulated from the measured steps of one.

    python -m benchmarks.fleet validate run.json --trace run-0.ndjson
    python -m benchmarks.fleet sweep --trace run-0.ndjson --replicas 1,2,4,8 --rate 6 --plot F

A simulated replica has the scheduler and the prefix cache of a real one. Its steps take the time
that a cost model predicts which is fitted to a step trace, times a factor by which a traced step of
the same kind, which is drawn, took longer than predicted. `validate` repeats a run of
`kv_routing.py`, with the same requests and router, and says by how much it is off. `sweep` serves a
load by each number of replicas behind each router, with the same rate for each replica, and for
each share of requests with a shared prefix. Its requests come at random times, or with `--arrivals`
at those of a file of `loadgen run --jsonl`, with the lengths recorded there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arrivals import Arrival, Sharing, bounds, drawn, recorded
from benchmarks.kv_routing import IDLE_TOKENS, seen
from benchmarks.routers import ROUTERS, Replica, block_hashes, make_router
from benchmarks.simulation import EngineShape, SimulatedEngine, model_budget
from minisrv.core.attention_work import AttentionWork
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey
from minisrv.request import EngineRequest, SamplingParams


@dataclass(frozen=True)
class MeasuredReplica:
    """A replica as its step trace describes it.

    deviations: the factors by which traced steps took longer than the costs say, of those with
        prompts (False) and of pure decode (True).
    itl_target_ms: infinite for none.
    """

    shape: EngineShape
    costs: CostModel
    deviations: dict[bool, list[float]]
    itl_target_ms: float

    @classmethod
    def of(cls, lines: Iterable[str], num_kv_blocks: int | None = None) -> MeasuredReplica:
        """Read a step trace.

        num_kv_blocks: another number of blocks than the replica had.
        """
        header, *rest = map(json.loads, lines)
        found = header["ladders"]
        ladders = Ladders(
            CUDAGraphMode(header["mode"]),
            tuple(found["decode"]),
            tuple(found["mixed"]),
            tuple(found["epilogue"]),
            header["max_num_seqs"],
            header["max_num_batched_tokens"],
        )
        shape = EngineShape(
            ladders=ladders,
            num_kv_blocks=num_kv_blocks or header["kv_blocks"],
            block_size=header["block_size"],
            max_model_len=header["max_model_len"],
            ahead=header["async_scheduling"],
        )
        steps = [line for line in rest if line["type"] == "step"]
        samples = [*samples_of(steps, ladders)]
        costs = CostModel(samples)
        deviations: dict[bool, list[float]] = {False: [], True: []}
        for key, work, ms in samples:
            deviations[key[1].uniform_decode].append(ms / costs.predict(key, work))
        return cls(shape, costs, deviations, header["itl_target_ms"] or math.inf)

    def start(self, draw: random.Random) -> SimulatedEngine:
        """Return an engine of it, whose steps deviate as `draw` says."""
        budget = model_budget(self.shape, self.costs, self.itl_target_ms)
        device = _Device(self.costs, self.deviations, draw)
        return SimulatedEngine(self.shape, device, budget, enable_prefix_caching=True)


class _Device(CostModel):
    """A device whose steps take the predicted times, but for deviations that are drawn."""

    def __init__(
        self, costs: CostModel, deviations: dict[bool, list[float]], draw: random.Random
    ) -> None:
        self._costs, self._deviations, self._draw = costs, deviations, draw

    def predict(self, key: GraphKey, work: AttentionWork) -> float:
        """Return the time of the next step."""
        deviations = self._deviations[key[1].uniform_decode]
        if not deviations:
            sys.exit(f"the trace has no step like one of {key[1].num_tokens} tokens, {key[0].name}")
        return self._costs.predict(key, work) * self._draw.choice(deviations)


def samples_of(steps: Iterable[dict[str, Any]], ladders: Ladders) -> Iterator[StepSample]:
    """Yield the steps of a trace as samples. The time of each is that from the end of the one
    before it, so it has the host's work in it.

    A trace tells how many tokens all requests of a step have together. Those of each follow from
    its steps before; what new requests have beyond them, they found in the prefix cache. Where
    several are new, they are taken to have found as much. A step with a request that has been
    preempted is left out.
    """
    lengths: dict[str, int] = {}
    for step in steps:
        rows = step["requests"]
        new = [name for name, _ in rows if name not in lengths]
        for name, tokens in rows:
            lengths[name] = lengths.get(name, 0) + tokens
        found_in_cache = step["context"] - sum(lengths[name] for name, _ in rows)
        if found_in_cache and not new:
            continue
        for name in new:
            lengths[name] += found_in_cache // len(new)
        work = AttentionWork(sum(lengths[name] for name, _ in rows[: step["decode_rows"]]))
        for name, tokens in rows[step["decode_rows"] :]:
            work = work.beside(AttentionWork.of_chunk(lengths[name] - tokens, tokens))
        rung, mode = step["rung"], CUDAGraphMode[step["mode"]]
        is_decode = not step["prefill_tokens"] and mode is CUDAGraphMode.FULL
        if is_decode and rung in ladders.decode:
            key = BatchDescriptor(rung, rung, 1)
        else:
            key = BatchDescriptor(rung, step["rung_requests"])
        yield StepSample((mode, key), work, step["wall_ms"])


class CachedBlocks:
    """The prefix cache of a simulated replica, of which its router knows everything."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def __contains__(self, block_hash: bytes) -> bool:
        return bool(self._pool.get_cached_blocks([block_hash]))


def serve(
    replica: MeasuredReplica,
    number: int,
    router: str,
    arrivals: Sequence[Arrival],
    *,
    request_ms: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Serve requests by a number of replicas behind a router, and return for each what
    `kv_routing.measure` does.

    request_ms: the time of a request outside the engine, which is part of its TTFT.
    """
    choose = make_router(router, seed)
    engines = [replica.start(random.Random(f"{seed} {index}")) for index in range(number)]
    known = [Replica(CachedBlocks(engine.block_pool)) for engine in engines]
    size = replica.shape.block_size
    waiting = sorted(arrivals, key=lambda arrival: arrival.due_ms)[::-1]
    found: dict[str, dict[str, Any]] = {}
    hashes_of: dict[str, list[bytes]] = {}
    while waiting or any(engine.has_work for engine in engines):
        index = min(range(number), key=lambda index: engines[index].next_ms)
        engine = engines[index]
        if waiting and waiting[-1].due_ms <= engine.next_ms:
            arrival = waiting.pop()
            name, hashes = str(len(found)), block_hashes(arrival.prompt, size)
            index = choose(known, hashes)
            told, expected = known[index].num_cached(hashes), known[index].num_expected(hashes)
            known[index].sent(hashes)
            hashes_of[name] = hashes
            found[name] = {
                "due_ms": arrival.due_ms,
                "late_ms": 0.0,
                "replica": index,
                "prompt_tokens": len(arrival.prompt),
                "told_tokens": told * size,
                "expected_tokens": expected * size,
                "cached_tokens": 0,
                "tokens": arrival.output_tokens,
                "chunk_ms": [],
            }
            params = SamplingParams(
                max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True
            )
            engine = engines[index]
            engine.add(
                EngineRequest(request_id=name, prompt_token_ids=list(arrival.prompt), params=params)
            )
            if engine.next_ms == math.inf:
                engine.now_ms = arrival.due_ms
                engine.launch()
            continue
        if engine.next_ms == math.inf:
            sys.exit("a request does not fit the KV cache")
        for output in engine.retire():
            known[index].stepped()
            request = found[output.request_id]
            if output.token_ids:
                if not request["chunk_ms"]:
                    known[index].computed(hashes_of[output.request_id])
                    request["cached_tokens"] = output.num_cached_tokens
                request["chunk_ms"].append(engine.now_ms - request["due_ms"] + request_ms)
            if output.finish_reason is not None:
                known[index].ended()
        engine.launch()
    return [*found.values()]


def idle_ttft_ms(replica: MeasuredReplica, prompt_tokens: int) -> float:
    """Return the median time to the first token of requests to an idle replica."""
    apart_ms = 1e6
    arrivals = [Arrival(apart_ms * n, [n] * prompt_tokens, 2) for n in range(IDLE_REPEATS)]
    return median(each["chunk_ms"][0] for each in serve(replica, 1, "random", arrivals))


IDLE_REPEATS = 99
"""Number of requests of which the median is taken."""


# ---- commands ------------------------------------------------------------------------------------


def validate(options: argparse.Namespace) -> dict[str, Any]:
    """Simulate runs of `kv_routing.py`, and return what was measured and what was simulated."""
    found = []
    for path in options.runs:
        run = json.loads(path.read_text())
        chosen = argparse.Namespace(**run["options"])
        sharing = Sharing(chosen.fraction, chosen.prefixes, chosen.prefix_tokens)
        lengths = tuple(chosen.own_tokens), tuple(chosen.output_tokens)
        arrivals = drawn(chosen.requests, chosen.rate, sharing, *lengths, chosen.seed)
        replica = MeasuredReplica.of(options.trace.read_text().splitlines())
        request_ms = max(0.0, run["idle"] - idle_ttft_ms(replica, IDLE_TOKENS))
        requests = serve(
            replica,
            chosen.replicas,
            chosen.router,
            arrivals,
            request_ms=request_ms,
            seed=chosen.seed,
        )
        measured, simulated = seen(run["requests"]), seen(requests)
        found.append(
            {
                "run": path.name,
                "replicas": chosen.replicas,
                "router": chosen.router,
                "request_ms": request_ms,
                "measured": measured,
                "simulated": simulated,
                "ratio": {name: simulated[name] / measured[name] for name in measured},
            }
        )
    return {"runs": found}


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """Serve a load by each number of replicas behind each router."""
    replica = MeasuredReplica.of(options.trace.read_text().splitlines(), options.kv_blocks)
    found = []
    for fraction in options.fractions:
        sharing = Sharing(fraction, options.prefixes, options.prefix_tokens)
        for number in options.replicas:
            if options.arrivals is None:
                arrivals = drawn(
                    number * options.requests,
                    number * options.rate,
                    sharing,
                    options.own_tokens,
                    options.output_tokens,
                    options.seed,
                )
            else:
                arrivals = recorded(options.arrivals, sharing, options.seed, number)
            for router in options.routers:
                requests = serve(replica, number, router, arrivals, seed=options.seed)
                found.append(
                    {"fraction": fraction, "replicas": number, "router": router, **seen(requests)}
                )
    return {"rows": found}


def save_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the median TTFT and the hit rate by the number of replicas: a row of panels for each,
    with a column for each share of requests with a shared prefix."""
    from matplotlib.figure import Figure

    fractions = sorted({row["fraction"] for row in rows})
    figure = Figure(figsize=(3.2 * len(fractions) + 1, 6), layout="constrained")
    panels = figure.subplots(2, len(fractions), sharey="row", squeeze=False)
    for column, fraction in enumerate(fractions):
        for router in ROUTERS:
            some = [row for row in rows if row["fraction"] == fraction and row["router"] == router]
            x = [row["replicas"] for row in some]
            for panel, name in zip(panels[:, column], ("ttft_p50_ms", "hit_rate"), strict=True):
                if some:
                    panel.plot(x, [row[name] for row in some], "o-", ms=3, label=router)
        panels[0, column].set(title=f"{fraction:.0%} with a shared prefix", yscale="log")
        panels[1, column].set(xlabel="replicas", ylim=(0, 1))
        for panel in panels[:, column]:
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("median TTFT, ms")
    panels[1, 0].set_ylabel("prefix hit rate")
    panels[0, -1].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def table(report: dict[str, Any]) -> Table:
    """Return the table of a report."""
    if "rows" in report:
        rows = report["rows"]
    else:
        rows = [
            {"run": run["run"], "": kind, **run[kind]}
            for run in report["runs"]
            for kind in ("measured", "simulated", "ratio")
        ]
    found = Table(*rows[0], box=None)
    for row in rows:
        found.add_row(
            *(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    return found


def numbers(text: str) -> list[int]:
    """Read "1,2,4"."""
    return [int(part) for part in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("validate", help="compare with runs of kv_routing.py")
    compare.add_argument("runs", nargs="+", type=Path)
    grow = commands.add_parser("sweep", help="routers, numbers of replicas and shares of prefixes")
    grow.add_argument("--replicas", type=numbers, default=[1, 2, 4, 8], metavar="N,N")
    grow.add_argument("--routers", nargs="+", choices=ROUTERS, default=[*ROUTERS])
    grow.add_argument("--fractions", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    grow.add_argument("--requests", type=int, default=300, help="for each replica")
    grow.add_argument("--rate", type=float, default=4, help="requests per second and replica")
    grow.add_argument("--arrivals", type=Path, metavar="FILE", help="of loadgen run --jsonl")
    grow.add_argument("--kv-blocks", type=int, help="blocks of a replica, if not those traced")
    grow.add_argument("--prefixes", type=int, default=64)
    grow.add_argument("--prefix-tokens", type=int, default=256)
    grow.add_argument("--own-tokens", type=bounds, default=(8, 64), metavar="LOW:HIGH")
    grow.add_argument("--output-tokens", type=bounds, default=(8, 32), metavar="LOW:HIGH")
    grow.add_argument("--seed", type=int, default=1)
    grow.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    for command in (compare, grow):
        command.add_argument("--trace", type=Path, required=True, help="steps of one replica")
        command.add_argument("--json", type=Path, metavar="FILE", help="a file for all results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Simulate, print the table, and write the files."""
    options = parse(argv)
    report = validate(options) if options.command == "validate" else sweep(options)
    Console(highlight=False, soft_wrap=True).print(table(report))
    if options.command == "sweep" and options.plot is not None:
        save_plot(report["rows"], options.plot)
    if options.json is not None:
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
