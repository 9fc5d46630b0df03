"""Finds the tiles with which this GPU multiplies a model's weights by a few rows fastest.

    python -m benchmarks.tiles benchmarks/configs/qwen3-0.6b --rows 1,8,32 --json F

First all candidate tiles are compiled, by many processes. Then each projection in turn gets the
candidate with which a graph of all layers is fastest (coordinate descent in two rounds, which take
half a minute for each number of rows). The script prints lines for
`minisrv.kernels.tiles.MEASURED`, each with the tile that `minisrv.kernels.tiles.tile` chooses now.
A shape needs such a line if that choice is slower by more than the noise, which is about 1%.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.layers import Layers, median_us
from minisrv.checkpoint import describe_model
from minisrv.kernels import tiles
from minisrv.kernels.tiles import (
    IN_FLIGHT,
    MAX_SUMS,
    SLICE,
    GemvTile,
    SlicedTile,
    TallTile,
    Tile,
    part_registers,
)
from minisrv.tools.environment import environment
from minisrv.tools.plan import Product, products

CONTEXT = 120
WORKERS = 14


def candidates(rows: int, product: Product) -> Iterator[Tile | None]:
    """Yield the tiles that may be fast for a product with so many rows: those with enough of the
    weight in flight, and enough registers for that. None stands for cuBLAS."""
    matrices = 1 + product.gated
    if rows == 1:
        for outputs in (1, 2, 4, 8, 16):
            for depth in (128, 256, 512, 1024, 2048, 4096, 8192):
                for warps in (1, 2, 4, 8):
                    elements = matrices * outputs * depth // (32 * warps)
                    wide = depth < 2 * product.k and 128 * warps <= depth <= 1024 * warps
                    if wide and 16 <= elements <= MAX_SUMS:
                        yield GemvTile(outputs, depth, warps)
        return
    yield None
    outputs_in_all = product.n // matrices
    for outputs in (16, 32, 64):
        for warps in (4, 8):
            parts = -(-product.k // (warps * SLICE))
            each = part_registers(outputs, rows, product.gated)
            for ahead in {min(parts, ahead) for ahead in (2, 3, 4, 6, 8)}:
                if outputs_in_all >= 40 * outputs and each * ahead <= IN_FLIGHT:
                    yield SlicedTile(outputs, warps, ahead)
    shapes = ((64, 128, 4), (64, 256, 4), (32, 128, 4), (32, 256, 4), (16, 256, 4), (128, 128, 8))
    for outputs, depth, warps in shapes:
        for stages in (2, 3, 4):
            for splits in (1, 2, 4, 8):
                programs = -(-outputs_in_all // outputs) * splits
                if splits * depth <= product.k and (programs <= 600 or splits == 1):
                    yield TallTile(outputs, depth, warps, stages, splits)


def compiled(job: tuple[int, Product, Tile | None]) -> bool:
    """Whether the kernel of a tile compiles and runs; if so, it is in Triton's cache afterwards.

    job: the number of rows, the product, and the tile.
    """
    from minisrv.kernels.triton_linear import multiply

    rows, (name, n, k, gated, add), tile = job
    if tile is None:
        return True
    draw = partial(torch.zeros, device="cuda", dtype=torch.bfloat16)
    norm = None if add or name == "lm_head" else draw(k)
    try:
        x, weight, out = draw(rows, k), draw(n, k), draw(rows, n // 2 if gated else n)
        multiply(x, weight, None, norm, out, 1e-6, "silu" if gated else None, add, tile)
        torch.cuda.synchronize()
    except Exception:  # the compiler's, e.g. for too many registers or too much shared memory
        return False
    return True


def descend(layers: Layers, rows: int, found: dict[Product, list[Tile | None]]) -> dict[str, Any]:
    """Find the best tiles for so many rows by coordinate descent. Each product begins with the
    choice of `tile`.

    found: the candidates for each product.
    """
    chosen = {p[1:]: tiles.tile(rows, p.n, p.k, 2, gated=p.gated, add=p.add) for p in found}
    rule = tiles.tile
    tiles.tile = lambda rows, n, k, itemsize, *, gated, add, normed=True: chosen[n, k, gated, add]
    first = best = median_us(layers.capture(rows, CONTEXT))
    own, log = dict(chosen), []
    for _ in range(2):
        for product, choices in found.items():
            key = product[1:]
            for candidate in choices:
                before, chosen[key] = chosen[key], candidate
                us = median_us(layers.capture(rows, CONTEXT))
                log.append((product.name, tiles.describe(candidate), round(us, 1)))
                if us < best:
                    best = us
                else:
                    chosen[key] = before
    tiles.tile = rule
    names = {
        product.name: {
            "shape": product[1:],
            "own": tiles.describe(own[product[1:]]),
            "best": repr(chosen[product[1:]]),
        }
        for product in found
    }
    return {"rows": rows, "own_us": first, "best_us": best, "products": names, "log": log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a directory with a config.json")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch finds none")
    console, model = Console(), describe_model(options.model).model
    numbers = [int(rows) for rows in options.rows.split(",")]
    jobs = [(r, p, tile) for r in numbers for p in products(model) for tile in candidates(r, p)]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        ran = list(track(pool.map(compiled, jobs, chunksize=4), "compiling", len(jobs)))
    layers, results = Layers(options.model), []
    for rows in numbers:
        found: dict[Product, list[Tile | None]] = {product: [] for product in products(model)}
        for (number, product, tile), fits in zip(jobs, ran, strict=True):
            if fits and number == rows:
                found[product].append(tile)
        results.append(result := descend(layers, rows, found))
        own_us, best_us = result["own_us"], result["best_us"]
        console.print(f"{rows} rows: {own_us:.0f} us as chosen, {best_us:.0f} with the best")
        bucket = next(bucket for bucket in tiles.ROW_BUCKETS if rows <= bucket)
        for name, found_here in result["products"].items():
            line = f"{(bucket, *found_here['shape'])}: {found_here['best']},"
            console.print(f"    {line}  # {name}; now {found_here['own']}")
    if options.json is not None:
        report = {"environment": msgspec.to_builtins(environment()), "results": results}
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
