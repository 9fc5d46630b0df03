"""The attention op against a float64 reference, over random batches in a poisoned cache.

Both ways that it may run: compiled, and by torch's operations as where there is no compiler.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minisrv.kernels import DIRECT, attention, attention_op

module = sys.modules[attention.__module__]  # the package's name for it is the function

EPS = 1e-6
TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
}


@dataclass
class Case:
    """Arguments of the op; `rows` are (tokens in the cache before the step, tokens of the step)."""

    rows: Sequence[tuple[int, int]]
    args: dict[str, Tensor]
    options: dict[str, Any]

    def run(self, op: Any = attention) -> Tensor:
        with torch.inference_mode():
            op(*self.args.values(), **self.options)
        return self.args["out"]

    def copy(self) -> Case:
        return Case(self.rows, {k: v.clone() for k, v in self.args.items()}, self.options)


def make_case(
    rows: Sequence[tuple[int, int]],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    block_size: int = 4,
    pad_tokens: int = 0,
    norm: bool = True,
    dtype: torch.dtype = torch.float32,
    poison: float = math.nan,
    seed: int = 0,
) -> Case:
    """Random tensors; everything in the cache that no row may read is `poison`."""
    g = torch.Generator().manual_seed(seed)
    heads = num_kv_heads * group
    max_blocks = max(-(-(h + n) // block_size) for h, n in rows) + 1
    num_blocks = 1 + len(rows) * max_blocks
    order = (torch.randperm(num_blocks - 1, generator=g) + 1).view(len(rows), max_blocks)
    table = torch.zeros(len(rows), max_blocks, dtype=torch.int32)
    cache = torch.full((num_blocks * block_size, 2, num_kv_heads, head_dim), poison)
    slots, positions, starts = [], [], [0]
    for r, (history, n) in enumerate(rows):
        used = -(-(history + n) // block_size)
        table[r, :used] = order[r, :used]
        places = torch.arange(history + n)
        row_slots = order[r][places // block_size] * block_size + places % block_size
        cache[row_slots[:history]] = torch.randn(history, 2, num_kv_heads, head_dim, generator=g)
        slots.append(row_slots[history:])
        positions.append(places[history:])
        starts.append(starts[-1] + n)
    pad = torch.zeros(pad_tokens, dtype=torch.int64)
    tokens = starts[-1] + pad_tokens
    qkv = torch.randn(tokens, (heads + 2 * num_kv_heads) * head_dim, generator=g)
    qkv[starts[-1] :] = poison
    angles = torch.rand(max(h + n for h, n in rows), head_dim // 2, generator=g) * 6.3
    weights = [1 + 0.3 * torch.randn(head_dim, generator=g).to(dtype) for _ in range(2)]
    args = {
        "qkv": qkv.to(dtype),
        "positions": torch.cat([*positions, pad]),
        "kv_cache": cache.view(num_blocks, block_size, 2, num_kv_heads, head_dim).to(dtype),
        "slot_mapping": torch.cat([*slots, pad]),
        "block_table": table,
        "seq_lens": torch.tensor([h + n for h, n in rows], dtype=torch.int32),
        "query_start_loc": torch.tensor(starts, dtype=torch.int32),
        "out": torch.full((tokens, heads * head_dim), math.nan, dtype=dtype),
    }
    options = {
        "cos_sin": torch.cat((angles.cos(), angles.cos(), -angles.sin(), angles.sin()), dim=-1).to(
            dtype
        ),
        "q_norm": weights[0] if norm else None,
        "k_norm": weights[1] if norm else None,
        "eps": EPS,
        "num_heads": heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
    }
    return Case(rows, args, options)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """out and kv_cache as they should become: float64, token by token, head by head."""
    a, o = case.args, case.options
    heads, kv_heads, dim = o["num_heads"], o["num_kv_heads"], o["head_dim"]
    cache = a["kv_cache"].double().flatten(0, 1)
    block_size = a["kv_cache"].shape[1]
    out = torch.zeros_like(a["out"], dtype=torch.float64).view(-1, heads, dim)

    def prepare(x: Tensor, weight: Tensor | None, position: int) -> Tensor:
        if weight is not None:
            x = x / math.sqrt(float(x.square().mean()) + EPS) * weight.double()
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
            places = torch.arange(position + 1)
            blocks = a["block_table"][row][places // block_size].long()
            seen = cache[blocks * block_size + places % block_size]
            for head in range(heads):
                q = prepare(packed[token, head], o["q_norm"], position)
                kv = seen[:, :, head // (heads // kv_heads)]
                weights = (kv[:, 0] @ q / math.sqrt(dim)).softmax(0)
                out[token, head] = weights @ kv[:, 1]
            token += 1
    return out.flatten(1), cache.view_as(a["kv_cache"])


def check(case: Case) -> None:
    """`out` everywhere, and every slot of the cache but those of the null block."""
    out, cache = reference(case)
    for by_torch in (False, True):
        ran = case.copy()
        with pytest.MonkeyPatch.context() as patch:
            if by_torch:
                patch.setattr(module, "_compiled", lambda *_: None)
            found = ran.run()
        tolerance = TOLERANCE[found.dtype]
        torch.testing.assert_close(found.double(), out, **tolerance)
        written = ran.args["kv_cache"][1:].double()
        torch.testing.assert_close(written, cache[1:], equal_nan=True, **tolerance)
        torch.testing.assert_close(
            ran.args["qkv"], case.args["qkv"], rtol=0, atol=0, equal_nan=True
        )


ROWS = st.lists(
    st.tuples(st.integers(0, 20), st.one_of(st.just(1), st.integers(1, 12))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=ROWS,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 16, 48, 64, 128]),
    block_size=st.sampled_from([1, 4, 5, 16]),
    pad_tokens=st.integers(0, 5),
    norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    poison=st.sampled_from([math.nan, math.inf, -math.inf]),
    seed=st.integers(0, 1000),
)
def test_any_batch_equals_the_reference(**drawn: Any) -> None:
    check(make_case(**drawn))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([(0, 1)], id="one-token prompt"),
        pytest.param([(3, 1)], id="decode fills a block"),
        pytest.param([(4, 1)], id="decode opens a block"),
        pytest.param([(8, 1), (3, 1), (0, 1)], id="ragged decode"),
        pytest.param([(0, 4), (0, 8)], id="prompts of whole blocks"),
        pytest.param([(4, 4), (5, 3)], id="chunks at and off a block edge"),
        pytest.param([(0, 5), (9, 1), (2, 3), (4, 1)], id="decode rows scattered"),
        pytest.param([(0, 5), (9, 1), (4, 1)], id="decode rows last"),
    ],
)
def test_edges(rows: list[tuple[int, int]]) -> None:
    check(make_case(rows, pad_tokens=2))


@pytest.mark.parametrize("heads", [(200, 1, 16), (3, 70, 16), (2, 8, 256), (96, 2, 64)])
def test_more_heads_than_a_task_holds(heads: tuple[int, int, int]) -> None:
    num_kv_heads, group, head_dim = heads
    check(make_case([(3, 1), (40, 1)], num_kv_heads=num_kv_heads, group=group, head_dim=head_dim))


def test_long_rows_beside_short_ones() -> None:
    check(make_case([(600, 1), (2, 1), (300, 1), (40, 70)], block_size=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_row_depends_on_nothing_else(dtype: torch.dtype) -> None:
    """Bit for bit the same alone and in a batch."""
    rows = [(200, 1), (31, 1), (16, 1), (5, 1)]
    together = make_case(rows, head_dim=64, block_size=16, dtype=dtype)
    out = together.copy().run()
    for row in range(len(rows)):
        alone = together.copy()
        for name in ("qkv", "positions", "slot_mapping", "block_table", "seq_lens", "out"):
            alone.args[name] = alone.args[name][row : row + 1]
        alone.args["query_start_loc"] = torch.tensor([0, 1], dtype=torch.int32)
        assert torch.equal(alone.run(), out[row : row + 1])


@pytest.mark.parametrize("rows", [[(900, 1)], [(400, 1)] * 5, [(900, 1), (2, 1)]])
def test_threads_change_nothing(rows: list[tuple[int, int]]) -> None:
    """Enough work for several; more threads than heads, and fewer than rows."""
    case, before, found = make_case(rows, head_dim=64), torch.get_num_threads(), []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        try:
            found.append(case.copy().run())
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("rows", [[(5, 1), (2, 1), (0, 1)], [(5, 1), (3, 6)], [(7, 9)]])
def test_real_rows_do_not_depend_on_what_is_poisoned(rows: list[tuple[int, int]]) -> None:
    """Bit for bit: null block, stale blocks, block tails and padding tokens."""
    clean, poisoned = (make_case(rows, pad_tokens=3, poison=p).run() for p in (0.0, math.nan))
    assert torch.equal(clean, poisoned)


def test_padding_rows_write_before_they_read() -> None:
    """A decode batch padded with rows of the null block: finite, and the real rows unmoved."""
    case = make_case([(5, 1), (9, 1)])
    alone = case.copy().run()
    a = case.args
    null = {"qkv": 1.0, "positions": 0, "slot_mapping": 0, "block_table": 0, "seq_lens": 1}
    for name, value in null.items():
        shape = (2, *a[name].shape[1:])
        a[name] = torch.cat((a[name], torch.full(shape, value, dtype=a[name].dtype)))
    a["query_start_loc"] = torch.arange(5, dtype=torch.int32)
    a["out"] = torch.full((4, a["out"].shape[1]), math.nan)
    out = case.run()
    torch.testing.assert_close(out[:2], alone, atol=1e-6, rtol=1e-6)
    assert out.isfinite().all()


def test_recorders_see_one_op_and_can_call_what_is_under_it() -> None:
    """The op through the dispatcher, and the plain function: same bits."""
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    case = make_case([(5, 1), (0, 7)], pad_tokens=1)
    direct = case.copy().run(DIRECT[attention_op])
    with Recorder():
        attention_op(*case.args.values(), **case.options)
    assert seen == [attention_op]
    assert torch.equal(case.args["out"], direct)


def test_schema_tells_what_is_written() -> None:
    case = make_case([(5, 1), (0, 7)], poison=0.0)
    torch.library.opcheck(
        attention_op, tuple(case.args.values()), case.options, test_utils="test_schema"
    )
    torch.library.opcheck(
        attention_op, tuple(case.args.values()), case.options, test_utils="test_faketensor"
    )
