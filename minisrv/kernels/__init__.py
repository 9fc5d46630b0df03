"""Kernels: custom ops and the plain functions under them.

A dispatch mode, a graph's recorder or a compiler sees one op (`torch.ops.minisrv.*`). Code that
replays a recorded op calls the plain function instead, because going through the dispatcher costs
more than a small ATen op.
"""

from __future__ import annotations

from collections.abc import Callable

from torch._ops import OpOverload

from minisrv.kernels.attention import attention, attention_op
from minisrv.kernels.elementwise import (
    rms_norm,
    rms_norm_op,
    silu_and_mul,
    silu_and_mul_op,
    take_rows,
    take_rows_op,
)
from minisrv.kernels.sampling import ALL, apply_bitmask, apply_bitmask_op, sample, sample_op
from minisrv.kernels.slots import (
    Write,
    gather_decode,
    gather_decode_op,
    gather_mixed_op,
    scatter,
    scatter_op,
    write_values,
)

DIRECT: dict[OpOverload, Callable[..., None]] = {
    attention_op: attention,
    rms_norm_op: rms_norm,
    silu_and_mul_op: silu_and_mul,
    take_rows_op: take_rows,
    apply_bitmask_op: apply_bitmask,
    sample_op: sample,
    gather_decode_op: gather_decode,
    scatter_op: scatter,
}
"""The plain function under each op; it takes the op's arguments and does the same."""

__all__ = [
    "ALL",
    "DIRECT",
    "Write",
    "apply_bitmask",
    "apply_bitmask_op",
    "attention",
    "attention_op",
    "gather_decode",
    "gather_decode_op",
    "gather_mixed_op",
    "rms_norm",
    "rms_norm_op",
    "sample",
    "sample_op",
    "scatter",
    "scatter_op",
    "silu_and_mul",
    "silu_and_mul_op",
    "take_rows",
    "take_rows_op",
    "write_values",
]
