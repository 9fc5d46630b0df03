"""Which tiles multiply a model's weights by a few rows fastest, on this GPU.

    python -m benchmarks.tiles benchmarks/configs/qwen3-0.6b --rows 1,8,32 --json F

Candidates are compiled by many processes first. Then each projection in turn gets the one with
which a graph of all layers is fastest (coordinate descent, two rounds; about a minute for a number
of rows). Printed are lines for `minisrv.kernels.tiles.MEASURED`, beside what `tile` has chosen:
a shape needs a line where that is slower by more than the noise, some 1%.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.layers import Layers, median_us
from minisrv.checkpoint import read_model_config
from minisrv.config import ModelConfig
from minisrv.environment import environment
from minisrv.kernels import tiles
from minisrv.kernels.tiles import GemvTile, SlicedTile, TallTile, Tile

CONTEXT = 120
WORKERS = 14


class Weight(NamedTuple):
    """One projection of a layer, or the output projection: [n, k], gated or added."""

    name: str
    n: int
    k: int
    gated: bool
    add: bool


def weights(model: ModelConfig) -> list[Weight]:
    """A decoder's, the ones that take longest first."""
    hidden, intermediate = model.hidden_size, model.intermediate_size
    return [
        Weight("gate_up", 2 * intermediate, hidden, True, False),
        Weight("down", hidden, intermediate, False, True),
        Weight("qkv", model.qkv_size, hidden, False, False),
        Weight("o", hidden, model.q_size, False, True),
        Weight("lm_head", model.vocab_size, hidden, False, False),
    ]


def candidates(rows: int, weight: Weight) -> Iterator[Tile]:
    """What may be fast: enough of the weight in flight, and registers for it."""
    matrices = 1 + weight.gated
    if rows <= 2:
        for outputs in (1, 2, 4, 8, 16):
            for depth in (512, 1024, 2048, 4096, 8192):
                for warps in (1, 2, 4, 8):
                    elements = matrices * outputs * depth // (32 * warps)
                    wide = depth < 2 * weight.k and 256 * warps <= depth <= 1024 * warps
                    if wide and 16 <= elements <= 128:
                        yield GemvTile(outputs, depth, warps)
    if rows == 1:
        return
    outputs_in_all = weight.n // matrices
    for outputs, depth, warps in ((64, 128, 4), (64, 256, 4), (32, 128, 4), (32, 256, 4),
                                  (16, 256, 4), (128, 128, 8)):  # fmt: skip
        for stages in (2, 3, 4):
            for splits in (1, 2, 4, 8):
                programs = -(-outputs_in_all // outputs) * splits
                if splits * depth <= weight.k and (programs <= 600 or splits == 1):
                    yield TallTile(outputs, depth, warps, stages, splits)
    if rows <= 16 and weight.k <= 4096:
        for outputs, depth, warps in ((16, 256, 4), (32, 256, 4), (16, 256, 8), (8, 256, 8)):
            yield SlicedTile(outputs, depth, warps)


def compiled(job: tuple[int, Weight, Tile]) -> bool:
    """Whether the tile's kernel compiles and runs; it is in Triton's cache then."""
    from minisrv.kernels import triton_linear

    rows, weight, tile = job
    draw = partial(torch.zeros, device="cuda", dtype=torch.bfloat16)
    out = draw(rows, weight.n // 2 if weight.gated else weight.n)
    norm = None if weight.add or weight.name == "lm_head" else draw(weight.k)
    kernel: Any = {
        GemvTile: triton_linear.gemv,
        SlicedTile: triton_linear.sliced,
        TallTile: triton_linear.tall,
    }[type(tile)]
    try:
        x, matrix = draw(rows, weight.k), draw(weight.n, weight.k)
        kernel(x, matrix, None, norm, out, 1e-6, weight.gated, weight.add, tile)
        torch.cuda.synchronize()
    except Exception:  # of the compiler, for too many registers or too much shared memory
        return False
    return True


def descend(layers: Layers, rows: int, found: dict[Weight, list[Tile]]) -> dict[str, Any]:
    """The best tiles for so many rows, the first choice of each weight being `tile`'s own."""
    from minisrv.kernels import triton_linear

    chosen = {(w.n, w.k): tiles.tile(rows, w.n, w.k, 2, gated=w.gated, add=w.add) for w in found}
    triton_linear.tile = lambda rows, n, k, itemsize, **_: chosen[n, k]
    first = best = median_us(layers.capture(rows, CONTEXT))
    own, log = dict(chosen), []
    for _ in range(2):
        for weight, choices in found.items():
            key = weight.n, weight.k
            for candidate in choices:
                before, chosen[key] = chosen[key], candidate
                us = median_us(layers.capture(rows, CONTEXT))
                log.append((weight.name, tiles.describe(candidate), round(us, 1)))
                if us < best:
                    best = us
                else:
                    chosen[key] = before
    triton_linear.tile = tiles.tile
    return {
        "rows": rows,
        "own_us": first,
        "best_us": best,
        "weights": [
            {
                "name": weight.name,
                "shape": [weight.n, weight.k],
                "own": tiles.describe(own[weight.n, weight.k]),
                "best": repr(chosen[weight.n, weight.k]),
            }
            for weight in found
        ],
        "log": log,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a directory with a config.json")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    console, model = Console(), read_model_config(options.model)
    numbers = [int(rows) for rows in options.rows.split(",")]
    jobs = [(r, w, tile) for r in numbers for w in weights(model) for tile in candidates(r, w)]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        ran = list(track(pool.map(compiled, jobs, chunksize=4), "compiling", len(jobs)))
    layers, results = Layers(options.model), []
    for rows in numbers:
        found: dict[Weight, list[Tile]] = {weight: [] for weight in weights(model)}
        for (number, weight, tile), fits in zip(jobs, ran, strict=True):
            if fits and number == rows:
                found[weight].append(tile)
        results.append(result := descend(layers, rows, found))
        own_us, best_us = result["own_us"], result["best_us"]
        console.print(f"{rows} rows: {own_us:.0f} us as chosen, {best_us:.0f} with the best")
        rung = next(rung for rung in tiles.RUNGS if rows <= rung)
        for weight in result["weights"]:
            n, k = weight["shape"]
            console.print(f"    ({rung}, {n}, {k}): {weight['best']},  # own: {weight['own']}")
    if options.json is not None:
        report = {"environment": msgspec.to_builtins(environment()), "results": results}
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
