"""Kernels: custom ops and the plain functions under them.

A dispatch mode, a graph's recorder or a compiler sees one op (`torch.ops.minisrv.*`). The op of
attention is defined in `graph.attention`, and the function under it here. Code that
replays a recorded op calls the plain function instead, because going through the dispatcher costs
more than a small ATen op.
"""

from __future__ import annotations

from minisrv.kernels.attention import attention
from minisrv.kernels.attention_arguments import AttentionLayer, AttentionMetadata
from minisrv.kernels.elementwise import (
    add_rms_norm,
    add_rms_norm_op,
    gelu_tanh_and_mul,
    gelu_tanh_and_mul_op,
    rms_norm,
    rms_norm_op,
    silu_and_mul,
    silu_and_mul_op,
    take_rows,
    take_rows_op,
)
from minisrv.kernels.linear_op import linear_op
from minisrv.kernels.registration import DIRECT
from minisrv.kernels.sampling import ALL, apply_bitmask, apply_bitmask_op, sample, sample_op
from minisrv.kernels.step_inputs import (
    Write,
    gather_decode,
    gather_decode_op,
    gather_mixed_op,
    scatter,
    scatter_op,
    write_values,
)

__all__ = [
    "ALL",
    "DIRECT",
    "AttentionLayer",
    "AttentionMetadata",
    "Write",
    "add_rms_norm",
    "add_rms_norm_op",
    "apply_bitmask",
    "apply_bitmask_op",
    "attention",
    "gather_decode",
    "gather_decode_op",
    "gather_mixed_op",
    "gelu_tanh_and_mul",
    "gelu_tanh_and_mul_op",
    "linear_op",
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
