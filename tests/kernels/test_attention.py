"""The CPU's attention against a float64 reference, over random batches in a cache filled with
poison.

Both ways to run it are tested: compiled, and by torch's operations as where there is no compiler.
"""

from __future__ import annotations

import importlib
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from minisrv.kernels import attention
from tests.kernels.attention_cases import (
    OPTIONS,
    Case,
    assert_equal_to_reference,
    make_case,
    with_padding_rows,
)

# In the package this name is the function and not the module.
module = sys.modules[attention.__module__]


def check(case: Case) -> None:
    for by_torch in (False, True):
        ran = case.copy()
        with pytest.MonkeyPatch.context() as patch:
            if by_torch:
                patch.setattr(module, "_compiled", lambda *_: None)
            ran.run(attention)
        assert_equal_to_reference(ran, case)


ROWS = st.lists(
    st.tuples(st.integers(0, 20), st.one_of(st.just(1), st.integers(1, 12))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150)
@given(
    rows=ROWS,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 16, 48, 64, 128, 256]),
    block_size=st.sampled_from([1, 4, 5, 16]),
    pad_tokens=st.integers(0, 5),
    pad_rows=st.integers(0, 3),
    norm=st.booleans(),
    rotate=st.booleans(),
    scale=st.sampled_from([None, 0.25]),
    sliding_window=st.one_of(st.none(), st.integers(1, 24)),
    logit_soft_cap=st.sampled_from([None, 0.5, 5.0]),
    sinks=st.booleans(),
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


@pytest.mark.parametrize("head_dim", [1, 7, 20, 40, 72, 112, 120, 192])
def test_heads_of_any_size(head_dim: int) -> None:
    """Heads need not fill a vector or a tile, and those that are not rotated may be odd."""
    for rotate in {False, head_dim % 2 == 0}:
        shape = {"head_dim": head_dim, "rotate": rotate}
        check(make_case([(50, 1), (3, 1)], **shape))
        check(make_case([(20, 9), (0, 1), (7, 3)], pad_tokens=2, **shape))


@pytest.mark.parametrize("heads", [(200, 1, 16), (3, 70, 16), (2, 8, 256), (96, 2, 64)])
def test_more_heads_than_a_task_holds(heads: tuple[int, int, int]) -> None:
    num_kv_heads, group, head_dim = heads
    check(make_case([(3, 1), (40, 1)], num_kv_heads=num_kv_heads, group=group, head_dim=head_dim))


@pytest.mark.parametrize("sliding_window", [None, 1, 16, 50, 256])
def test_long_rows_beside_short_ones(sliding_window: int | None) -> None:
    rows = [(600, 1), (2, 1), (300, 1), (40, 70), (400, 30)]
    check(make_case(rows, block_size=16, sliding_window=sliding_window))


def test_scores_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row may have more scores than are held at once, even with a single query."""
    monkeypatch.setattr(module, "MAX_SCORES", 300)
    check(make_case([(20, 9), (100, 3)], logit_soft_cap=2.0, sliding_window=10))
    check(make_case([(20, 9), (100, 3)], sinks=True))


@pytest.mark.parametrize("sliding_window", [None, 7])
@pytest.mark.parametrize("model", ["gemma2", "gpt_oss"])
def test_options_mean_what_they_mean_to_transformers(
    model: str, sliding_window: int | None
) -> None:
    """The window, the soft cap of Gemma 2 and the sinks of gpt-oss are those of transformers."""
    capped = model == "gemma2"
    case = make_case(
        [(0, 20)],
        norm=False,
        rotate=False,
        scale=0.7,
        sliding_window=sliding_window,
        logit_soft_cap=1.5 if capped else None,
        sinks=not capped,
    )
    layer, found = case.layer, case.copy().run(attention)
    heads = case.args["qkv"].view(1, 20, -1, layer.head_dim).transpose(1, 2)
    q, k, v = heads.split((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), dim=1)
    kind = masking_utils.causal_mask_function
    if sliding_window is not None:
        kind = masking_utils.sliding_window_causal_mask_function(sliding_window)
    position = torch.arange(20)
    seen = kind(0, 0, position[:, None], position)
    mask = torch.zeros(1, 1, 20, 20).masked_fill_(~seen, torch.finfo(torch.float32).min)
    groups = layer.num_heads // layer.num_kv_heads
    attrs = {"num_key_value_groups": groups, "sinks": layer.sinks, "training": False}
    its = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    options = {"softcap": layer.logit_soft_cap} if capped else {}
    expected, _ = its.eager_attention_forward(
        SimpleNamespace(**attrs), q, k, v, mask, scaling=layer.scale, dropout=0.0, **options
    )
    torch.testing.assert_close(found, expected.reshape(20, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "with options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_row_depends_on_nothing_else(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """A decode row's result is the same bit for bit alone and in a batch."""
    rows = [(200, 1), (31, 1), (16, 1), (5, 1)]
    together = make_case(rows, head_dim=64, block_size=16, dtype=dtype, **options)
    out = together.copy().run(attention)
    for row in range(len(rows)):
        alone = together.copy()
        for name in ("qkv", "positions", "slot_mapping", "block_table", "seq_lens", "out"):
            alone.args[name] = alone.args[name][row : row + 1]
        alone.args["query_start_loc"] = torch.tensor([0, 1], dtype=torch.int32)
        assert torch.equal(alone.run(attention), out[row : row + 1])


def test_the_default_dtype_does_not_matter() -> None:
    case = make_case([(9, 1)] * 4, head_dim=64)
    expected = case.copy().run(attention)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = case.copy().run(attention)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "with options"])
@pytest.mark.parametrize("rows", [[(900, 1)], [(400, 1)] * 5, [(900, 1), (2, 1)]])
def test_threads_change_nothing(rows: list[tuple[int, int]], options: dict[str, Any]) -> None:
    """The number of threads changes no bit: there is enough work for several, and there are more
    threads than heads, or fewer than rows."""
    case = make_case(rows, head_dim=64, **options)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        try:
            found.append(case.copy().run(attention))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("rows", [[(5, 1), (2, 1), (0, 1)], [(5, 1), (3, 6)], [(7, 9)]])
def test_real_rows_do_not_depend_on_what_is_poisoned(
    rows: list[tuple[int, int]], sliding_window: int | None
) -> None:
    """Real rows are the same bit for bit whatever the null block, stale blocks, tails of blocks,
    entries before the window and padding tokens hold."""
    options = {"pad_tokens": 3, "sliding_window": sliding_window}
    for pad_rows in (0, 2):
        clean, poisoned = (
            make_case(rows, pad_rows=pad_rows, poison=poison, **options).run(attention)
            for poison in (0.0, math.nan)
        )
        assert torch.equal(clean, poisoned)


def test_padding_rows_write_before_they_read() -> None:
    """Padding rows of a decode batch, which lie in the null block, write their entry before they
    read it: their results are finite, and those of the real rows do not change."""
    case = make_case([(5, 1), (9, 1)])
    alone = case.copy().run(attention)
    out = with_padding_rows(case, 2, 1.0).run(attention)
    torch.testing.assert_close(out[:2], alone, atol=1e-6, rtol=1e-6)
    assert out.isfinite().all()
