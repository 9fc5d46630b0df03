"""Compile the kernel `sliced` for an H100, which need not be there, and print the PTX.

It is a process of its own because Triton's interpreter, in which other tests run kernels without a
GPU, has no Gluon.
Arguments: K, outputs of a program, rows, prefetch (see `SlicedTile`).
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from minisrv.kernels.gluon_linear import sliced
from minisrv.kernels.tiles import SLICE

WARPS = 8


def ptx(k: int, outputs: int, rows: int, prefetch: int) -> str:
    """Return the PTX of a product without norm, bias, gate and sum, compiled for programmatic
    dependent launch."""
    constants = {
        **{"bias": None, "norm": None, "K": k, "GATE": None, "ADD": False, "ROWS": rows},
        **{"BLOCK_N": outputs, "BLOCK_K": SLICE, "SLICES": WARPS},
        **{"PREFETCH": prefetch, "PDL": True},
    }
    types = {"rows": "i32", "n": "i32", "eps": "fp32"}
    names = sliced.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16") for name in names
    }
    pointers = [at for at, name in enumerate(names) if signature[name].startswith("*")]
    source = GluonASTSource(
        sliced,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(at,): [["tt.divisibility", 16]] for at in pointers},
    )
    options = {"num_warps": WARPS, "launch_pdl": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code: str = compiled.asm["ptx"]
    return code


if __name__ == "__main__":
    print(ptx(*map(int, sys.argv[1:])))
