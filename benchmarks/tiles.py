"""Finds the tiles with which this GPU multiplies a model's weights by a few rows fastest.

    python -m benchmarks.tiles benchmarks/configs/qwen3-0.6b --rows 1,8,32 --json F

The products are those of a decode step, for a model in transformers' code of the compiled one.
First all candidate tiles are compiled, by many processes. Then each product in turn gets the
candidate with which the graph of the step is fastest (coordinate descent in two rounds, which take
half a minute for each number of rows). The script prints lines for
`minisrv.kernels.tiles.MEASURED`, each with the tile that `minisrv.kernels.tiles.tile` chooses now.
A shape needs such a line if that choice is slower by more than the noise, which is about 1%.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.layers import DecodeSteps
from minisrv.errors import MinisrvError
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

CONTEXT = 120
WORKERS = 14


class Product(NamedTuple):
    """A product of a step: the shape [n, k] of its weight, and whether its result is gated, or
    added to what its output holds, and its rows are normed (see `skinny_gemm_op` in
    `kernels.linear`)."""

    n: int
    k: int
    gated: bool
    add: bool
    normed: bool


@contextmanager
def choosing(choose: Callable[..., Tile | None]) -> Iterator[None]:
    """Let `choose` have the arguments of `tiles.tile` in its place for the block."""
    rule = tiles.tile
    tiles.tile = choose
    try:
        yield
    finally:
        tiles.tile = rule


def products(steps: DecodeSteps, rows: int) -> list[Product]:
    """Return the products of so many rows in a decode step, in their order."""
    rule, normed_by = tiles.tile, dict[tuple[int, int, bool, bool], bool]()

    def record(
        rows: int, n: int, k: int, itemsize: int, *, gated: bool, add: bool, normed: bool = True
    ) -> Tile | None:
        key = n, k, gated, add
        normed_by[key] = normed_by.get(key, True) and normed
        return rule(rows, n, k, itemsize, gated=gated, add=add, normed=normed)

    with choosing(record):
        steps.capture(rows, CONTEXT)
    return [Product(*key, normed) for key, normed in normed_by.items()]


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

    rows, (n, k, gated, add, normed), tile = job
    if tile is None:
        return True
    draw = partial(torch.zeros, device="cuda", dtype=torch.bfloat16)
    norm = draw(k) if normed and not add else None
    try:
        x, weight, out = draw(rows, k), draw(n, k), draw(rows, n // 2 if gated else n)
        multiply(x, weight, None, norm, out, 1e-6, "silu" if gated else None, add, tile)
        torch.cuda.synchronize()
    except Exception:  # the compiler's, e.g. for too many registers or too much shared memory
        return False
    return True


def descend(
    steps: DecodeSteps, rows: int, found: dict[Product, list[Tile | None]]
) -> dict[str, Any]:
    """Find the best tiles for so many rows by coordinate descent. Each product begins with the
    choice of `tile`.

    found: the candidates for each product.
    """
    own = {
        p: tiles.tile(rows, p.n, p.k, 2, gated=p.gated, add=p.add, normed=p.normed) for p in found
    }
    chosen = {product[:4]: tile for product, tile in own.items()}
    log = []

    def choose(
        rows: int, n: int, k: int, itemsize: int, *, gated: bool, add: bool, normed: bool = True
    ) -> Tile | None:
        return chosen[n, k, gated, add]

    with choosing(choose):
        first = best = steps.capture(rows, CONTEXT).median_us()
        for _ in range(2):
            for product, choices in found.items():
                key = product[:4]
                for candidate in choices:
                    before, chosen[key] = chosen[key], candidate
                    us = steps.capture(rows, CONTEXT).median_us()
                    log.append((product, tiles.describe(candidate), round(us, 1)))
                    if us < best:
                        best = us
                    else:
                        chosen[key] = before
    shown = [
        {"shape": p[:4], "own": tiles.describe(own[p]), "best": repr(chosen[p[:4]])} for p in found
    ]
    return {"rows": rows, "own_us": first, "best_us": best, "products": shown, "log": log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a directory with a config.json")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch finds none")
    console, numbers = Console(), [int(rows) for rows in options.rows.split(",")]
    try:
        steps = DecodeSteps(options.model, numbers)
    except MinisrvError as error:
        parser.error(error.message)
    jobs = [(r, p, tile) for r in numbers for p in products(steps, r) for tile in candidates(r, p)]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        ran = list(track(pool.map(compiled, jobs, chunksize=4), "compiling", len(jobs)))
    results = []
    for rows in numbers:
        found: dict[Product, list[Tile | None]] = {
            product: [] for r, product, _ in jobs if r == rows
        }
        for (number, product, tile), fits in zip(jobs, ran, strict=True):
            if fits and number == rows:
                found[product].append(tile)
        results.append(result := descend(steps, rows, found))
        own_us, best_us = result["own_us"], result["best_us"]
        console.print(f"{rows} rows: {own_us:.0f} us as chosen, {best_us:.0f} with the best")
        bucket = next(bucket for bucket in tiles.ROW_BUCKETS if rows <= bucket)
        for product in result["products"]:
            line = f"{(bucket, *product['shape'])}: {product['best']},"
            console.print(f"    {line}  # now {product['own']}", highlight=False, soft_wrap=True)
    if options.json is not None:
        report = {"environment": msgspec.to_builtins(environment()), "results": results}
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
