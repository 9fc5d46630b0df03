"""Random batches for attention in a cache filled with poison, and the float64 results that are
expected of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from minisrv.graph.attention import attention_op
from minisrv.graph.forward_context import ForwardContext, set_forward_context
from minisrv.kernels import AttentionLayer, AttentionMetadata
from minisrv.modes import BatchDescriptor, CUDAGraphMode

EPS = 1e-6
TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
}
STALE = 2**31 - 1

OPTIONS: list[dict[str, Any]] = [
    {},
    {
        "rotate": False,
        "norm": False,
        "sliding_window": 100,
        "logit_soft_cap": 30.0,
        "sinks": True,
    },
]
"""Options of `make_case`: those of Qwen3's attention, and everything that others have."""


@dataclass
class Case:
    """Arguments of attention, by name: those that change with a step, and those of a layer. `rows`
    holds for each row (tokens in the cache before the step, tokens of the step)."""

    rows: Sequence[tuple[int, int]]
    args: dict[str, Tensor]
    options: dict[str, Any]

    def run(self, attention: Callable[..., None]) -> Tensor:
        args = self.args
        with torch.inference_mode():
            attention(self.layer, args["qkv"], args["positions"], self.metadata, args["out"])
        return args["out"]

    @property
    def layer(self) -> AttentionLayer:
        return AttentionLayer(**chosen(AttentionLayer, self.args | self.options))

    @property
    def metadata(self) -> AttentionMetadata:
        return AttentionMetadata(**chosen(AttentionMetadata, self.args | self.options))

    @property
    def context(self) -> ForwardContext:
        """The forward context in which the attention op runs this case, for layer 0."""
        return ForwardContext(
            CUDAGraphMode.NONE, BatchDescriptor(len(self.args["qkv"])), self.metadata, [self.layer]
        )

    def run_op(self) -> Tensor:
        with torch.inference_mode(), set_forward_context(self.context):
            attention_op(self.args["qkv"], self.args["positions"], self.args["out"], 0)
        return self.args["out"]

    def copy(self, device: str = "cpu") -> Case:
        def moved(values: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }

        return Case(self.rows, moved(self.args), moved(self.options))


def chosen(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `values` that are fields of the dataclass `kind`."""
    return {field.name: values[field.name] for field in fields(kind)}


def make_case(
    rows: Sequence[tuple[int, int]],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    block_size: int = 4,
    pad_tokens: int = 0,
    pad_rows: int = 0,
    norm: bool = True,
    rotate: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    poison: float = math.nan,
    seed: int = 0,
) -> Case:
    """Make a case of random tensors. Everything in the cache that no row may read is `poison`, and
    block table entries that no row may follow point outside of all memory; both also hold for what
    lies before the window of a row's first query.

    pad_tokens: number of padding tokens behind those of all rows.
    scale: the factor of scores; None is the usual one.
    sinks: whether there are sinks; one of them is so high that nearly all weight goes to it.
    pad_rows: number of padding rows behind all rows; they are empty, and no kernel may look at
        their lengths or blocks.
    """
    g = torch.Generator().manual_seed(seed)
    heads = num_kv_heads * group
    max_blocks = max(-(-(h + n) // block_size) for h, n in rows) + 1
    num_blocks = 1 + len(rows) * max_blocks
    order = (torch.randperm(num_blocks - 1, generator=g) + 1).view(len(rows), max_blocks)
    table = torch.full((len(rows), max_blocks), STALE, dtype=torch.int32)
    cache = torch.full((num_blocks * block_size, 2, num_kv_heads, head_dim), poison)
    slots, positions, starts = [], [], [0]
    for r, (history, n) in enumerate(rows):
        used = -(-(history + n) // block_size)
        table[r, :used] = order[r, :used]
        places = torch.arange(history + n)
        row_slots = order[r][places // block_size] * block_size + places % block_size
        entries = torch.randn(history, 2, num_kv_heads, head_dim, generator=g)
        unseen = 0 if sliding_window is None else max(history - sliding_window + 1, 0)
        cache[row_slots[unseen:history]] = entries[unseen:]
        table[r, : unseen // block_size] = STALE
        slots.append(row_slots[history:])
        positions.append(places[history:])
        starts.append(starts[-1] + n)
    lengths = [h + n for h, n in rows] + [STALE] * pad_rows
    table = torch.cat((table, table.new_full((pad_rows, max_blocks), STALE)))
    pad = torch.zeros(pad_tokens, dtype=torch.int64)
    tokens = starts[-1] + pad_tokens
    qkv = torch.randn(tokens, (heads + 2 * num_kv_heads) * head_dim, generator=g)
    qkv[starts[-1] :] = poison
    angles = torch.rand(max(h + n for h, n in rows), head_dim // 2, generator=g) * 6.3
    weights = [1 + 0.3 * torch.randn(head_dim, generator=g).to(dtype) for _ in range(2)]
    sink_scores = torch.randn(heads, generator=g) * 2
    sink_scores[-1] += 20
    cos_sin = torch.cat((angles.cos(), angles.cos(), -angles.sin(), angles.sin()), dim=-1)
    args = {
        "qkv": qkv.to(dtype),
        "positions": torch.cat([*positions, pad]),
        "kv_cache": cache.view(num_blocks, block_size, 2, num_kv_heads, head_dim).to(dtype),
        "slot_mapping": torch.cat([*slots, pad]),
        "block_table": table,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "query_start_loc": torch.tensor(starts + starts[-1:] * pad_rows, dtype=torch.int32),
        "out": torch.full((tokens, heads * head_dim), math.nan, dtype=dtype),
    }
    one_each = pad_tokens == pad_rows == 0 and all(n == 1 for _, n in rows)
    options = {
        "max_query_len": 1 if one_each else max(2, tokens),
        "cos_sin": cos_sin.to(dtype) if rotate else None,
        "q_norm": weights[0] if norm else None,
        "k_norm": weights[1] if norm else None,
        "eps": EPS,
        "scale": head_dim**-0.5 if scale is None else scale,
        "num_heads": heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "sliding_window": sliding_window,
        "logit_soft_cap": logit_soft_cap,
        "sinks": sink_scores.to(dtype) if sinks else None,
    }
    return Case(rows, args, options)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """Return out and kv_cache as attention should leave them, computed in float64 token by token,
    head by head."""
    a, o = case.args, case.options
    heads, kv_heads, dim = o["num_heads"], o["num_kv_heads"], o["head_dim"]
    cache = a["kv_cache"].double().flatten(0, 1)
    block_size = a["kv_cache"].shape[1]
    out = torch.zeros_like(a["out"], dtype=torch.float64).view(-1, heads, dim)

    def prepare(x: Tensor, weight: Tensor | None, position: int) -> Tensor:
        if weight is not None:
            x = x / math.sqrt(float(x.square().mean()) + EPS) * weight.double()
        if o["cos_sin"] is None:
            return x
        cos, _, _, sin = o["cos_sin"][position].double().chunk(4)
        first, second = x.chunk(2)
        return torch.cat((first * cos - second * sin, second * cos + first * sin))

    packed = a["qkv"].double().view(-1, heads + 2 * kv_heads, dim)
    for token, (slot, position) in enumerate(
        zip(a["slot_mapping"].tolist(), a["positions"].tolist(), strict=True)
    ):
        for head in range(kv_heads):
            k = packed[token, heads + head]
            cache[slot, 0, head] = prepare(k, o["k_norm"], position)
            cache[slot, 1, head] = packed[token, heads + kv_heads + head]
    token = 0
    for row, (history, n) in enumerate(case.rows):
        for position in range(history, history + n):
            window, cap, sinks = o["sliding_window"], o["logit_soft_cap"], o["sinks"]
            first = 0 if window is None else max(position - window + 1, 0)
            places = torch.arange(first, position + 1)
            blocks = a["block_table"][row][places // block_size].long()
            seen = cache[blocks * block_size + places % block_size]
            for head in range(heads):
                q = prepare(packed[token, head], o["q_norm"], position)
                kv = seen[:, :, head // (heads // kv_heads)]
                scores = kv[:, 0] @ q * o["scale"]
                if cap is not None:
                    scores = cap * (scores / cap).tanh()
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head, None].double()))
                out[token, head] = scores.softmax(0)[: len(kv)] @ kv[:, 1]
            token += 1
    return out.flatten(1), cache.view_as(a["kv_cache"])


def assert_equal_to_reference(ran: Case, case: Case) -> None:
    """Check `out` everywhere, every slot of the cache except those of the null block, and that
    `qkv` is unchanged.

    ran: a copy of `case`, on any device, that attention has been run on.
    """
    out, cache = reference(case)
    args = ran.copy().args
    tolerance = TOLERANCE[args["out"].dtype]
    torch.testing.assert_close(args["out"].double(), out, **tolerance)
    torch.testing.assert_close(
        args["kv_cache"][1:].double(), cache[1:], equal_nan=True, **tolerance
    )
    torch.testing.assert_close(args["qkv"], case.args["qkv"], rtol=0, atol=0, equal_nan=True)


def with_padding_rows(case: Case, count: int, value: float) -> Case:
    """Return a decode batch with `count` padding rows more, each of one token whose qkv is filled
    with `value`."""
    args, rows = dict(case.args), len(case.rows)
    null = {"qkv": value, "positions": 0, "slot_mapping": 0, "block_table": 0, "seq_lens": 1}
    for name, number in null.items():
        shape = (count, *args[name].shape[1:])
        args[name] = torch.cat((args[name], torch.full(shape, number, dtype=args[name].dtype)))
    args["query_start_loc"] = torch.arange(rows + count + 1, dtype=torch.int32)
    args["out"] = args["out"].new_full((rows + count, args["out"].shape[1]), math.nan)
    return Case([*case.rows, *[(0, 1)] * count], args, case.options)
