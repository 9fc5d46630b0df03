"""Compile the kernels that attention launches for an H100, which need not be there, and print how
many bytes of shared memory each takes.

It is a process of its own because Triton's interpreter, in which other tests run kernels without a
GPU, compiles nothing.
Arguments: head_dim, and the options of `make_case` as a JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minisrv.kernels import triton_attention
from tests.kernels.attention_cases import make_case

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


class Compiled:
    """Stands in for a kernel: a launch compiles it for its arguments and its launch options."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False))
        values |= {name: options.pop(name) for name in names if name in options}
        constants = {n: value for n, value in values.items() if n.isupper() or value is None}
        types = {n: "constexpr" if n in constants else type_of(values[n]) for n in names}
        pointers = [n for n in names if types[n].startswith("*")]
        source = ASTSource(
            self.kernel,
            types,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(self.kernel.__name__, compiled.metadata.shared)


def type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


if __name__ == "__main__":
    triton_attention.multiprocessors = lambda _: 132
    for name in ("_decode", "_prepare", "_attend"):
        setattr(triton_attention, name, Compiled(getattr(triton_attention, name)))
    shape = {"head_dim": int(sys.argv[1]), "dtype": torch.bfloat16, **json.loads(sys.argv[2])}
    for rows in ([(300, 1)], [(300, 1)] * 200, [(300, 2)], [(300, 1), (0, 2)]):
        make_case(rows, block_size=16, **shape).run(triton_attention.attention)
