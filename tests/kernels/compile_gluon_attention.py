"""Compile the kernel of `gluon_attention` for an H100, which need not be there, and print as a JSON
object how many bytes of shared memory it takes, and its PTX.

It is a process of its own because Triton's interpreter, in which other tests run kernels without a
GPU, has no Gluon.
Arguments: head_dim, warp groups, block size.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from minisrv.kernels import gluon_attention
from minisrv.kernels.gluon_attention import COLUMNS, ROWS, SHAPES, SWIZZLED, TILE


def compiled(head_dim: int, groups: int, block_size: int) -> Any:
    kernel = gluon_attention._attend
    constants = {
        **{"GROUP": 4, "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "TILE": TILE},
        **{"STAGES": SHAPES[head_dim].stages, "GROUPS": groups},
    }
    types = {
        **dict.fromkeys(("table_stride", "tokens", "fewest"), "i32"),
        **dict.fromkeys(("block_table", "seq_lens", "query_start_loc", "survey"), "*i32"),
        **{"scale": "fp32", "out": "*bf16"},
        "queries": f"tensordesc<bf16[{ROWS}, {COLUMNS}],{SWIZZLED!r}>",
        "kv_cache": f"tensordesc<bf16[{block_size}, {COLUMNS}],{SWIZZLED!r}>",
    }
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = GluonASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index("out"),): [["tt.divisibility", 16]]},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


if __name__ == "__main__":
    kernel = compiled(*map(int, sys.argv[1:]))
    print(json.dumps({"shared": kernel.metadata.shared, "ptx": kernel.asm["ptx"]}))
