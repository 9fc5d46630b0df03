"""The batches on which graphs are certified: a scheduler could give every one of them, and they
cover every length."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.certification.batches import (
    BatchLimits,
    BatchRow,
    describe,
    full_batch,
    short_batch,
    sweep_batches,
)
from minisrv.core.ladder import build_ladders, decode_descriptor
from minisrv.modes import BatchDescriptor, CUDAGraphMode, StageOutput


@st.composite
def limits(draw) -> BatchLimits:
    rows = draw(st.integers(1, 20))
    context = draw(st.integers(2, 100))
    block_size = draw(st.sampled_from([1, 2, 5, 16, 128]))
    return BatchLimits(
        rows=rows,
        tokens=draw(st.integers(rows, 80)),
        context=context,
        blocks=draw(st.integers(1, 2 + rows * -(-context // block_size))),
        block_size=block_size,
    )


@settings(max_examples=150)
@given(
    limits=limits(),
    rung=st.integers(1, 96),
    below=st.integers(0, 95),
    kind=st.sampled_from(["decode", "pieces", "one graph"]),
)
def test_every_batch_could_be_scheduled(limits, rung, below, kind):
    """Every batch of certification keeps to the limits of rows, tokens, context and blocks, and has
    its decode rows first."""
    decode = kind == "decode"
    rows = min(rung, limits.rows) if kind == "one graph" else None
    key = decode_descriptor(rung, StageOutput.TOKENS) if decode else BatchDescriptor(rung, rows)
    most = min(rung, limits.rows if decode else limits.tokens)
    below = min(below, most - 1)
    batches = sweep_batches(key, below, limits)
    assert batches
    for batch in (short_batch(key, limits), full_batch(key, limits), *batches):
        assert 1 <= len(batch) <= limits.rows
        assert sum(row.num_tokens for row in batch) <= most
        assert all(row.start >= 0 and row.num_tokens >= 1 for row in batch)
        lengths = [row.start + row.num_tokens for row in batch]
        assert max(lengths) <= limits.context
        assert sum(-(-length // limits.block_size) for length in lengths) <= limits.blocks
        decodes = [row.decoding for row in batch]
        assert decodes == sorted(decodes, reverse=True), "decode rows come first"
        if decode:
            assert all(decodes)
            assert all(row.num_tokens == 1 for row in batch)


ROOMY = BatchLimits(rows=20, tokens=64, context=100, blocks=1000, block_size=16)


@pytest.mark.parametrize("rung", [1, 2, 4, 8, 16, 20])
def test_every_decode_graph_meets_every_length_and_only_sizes_of_its_own(rung):
    """The sweep of a decode graph has lengths around block edges and the context's end, and only
    batch sizes that would be padded to that graph."""
    ladder = build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, 20, 64).decode
    below = max((r for r in ladder if r < rung), default=0)
    batches = sweep_batches(decode_descriptor(rung, StageOutput.LOGITS), below, ROOMY)
    lengths = {row.start + 1 for batch in batches for row in batch}
    assert lengths == {1, 2, 15, 16, 17, 32, 33, 99, 100}
    sizes = {len(batch) for batch in batches}
    if rung <= 8:
        assert sizes == set(range(below + 1, rung + 1))
    else:
        assert sizes == {below + 1, rung - 1, rung}
    assert any({row.start for row in batch} == {0} for batch in batches), "nothing but length 1"


@pytest.mark.parametrize("rung", [8, 32, 64])
def test_every_mixed_graph_meets_every_composition(rung):
    batches = sweep_batches(BatchDescriptor(rung), rung // 2, ROOMY)

    def some(condition) -> bool:
        return any(condition(batch) for batch in batches)

    assert some(lambda b: len(b) == 1 and b[0].start == 0), "one prompt"
    assert some(lambda b: sum(row == BatchRow(0, 1) for row in b) >= min(6, rung - 2)), (
        "many prompts of one token"
    )
    assert some(lambda b: any(not r.decoding and r.start > 0 and r.num_tokens == 1 for r in b)), (
        "chunks of one token"
    )
    assert some(
        lambda b: any(r.start > 0 and r.num_tokens > 1 and r.start + r.num_tokens == 100 for r in b)
    ), "a chunk that ends where the context does"
    assert some(lambda b: b[0].decoding and not b[-1].decoding), "decode and prefill"
    assert some(lambda b: any(r.decoding and r.start == 99 for r in b)), "the longest decode"


def test_the_full_batch_fills_the_graph():
    assert len(full_batch(decode_descriptor(16, StageOutput.TOKENS), ROOMY)) == 16
    for tokens in (1, 16, 20, 64):
        batch = full_batch(BatchDescriptor(tokens), ROOMY)
        assert sum(row.num_tokens for row in batch) == tokens
        assert len(batch) == min(tokens, ROOMY.rows)
        key = BatchDescriptor(tokens, min(tokens, ROOMY.rows))
        assert full_batch(key, ROOMY) in sweep_batches(key, tokens - 1, ROOMY)


@pytest.mark.parametrize("rows", [2, 3, 20])
@pytest.mark.parametrize("tokens", [2, 4, 64])
def test_the_short_batch_of_a_graph_with_rows_leaves_one_empty(tokens, rows):
    """The short batch of a graph that pads rows leaves at least one row and exactly one token of
    padding."""
    limits = replace(ROOMY, rows=rows)
    batch = short_batch(BatchDescriptor(tokens, min(tokens, rows)), limits)
    assert 1 <= len(batch) < min(tokens, rows)
    assert sum(row.num_tokens for row in batch) == tokens - 1


def test_batches_in_words():
    batch = (*[BatchRow(n, 1, decoding=True) for n in range(8)], BatchRow(5, 3))
    assert describe(batch) == "decode at length 1, 2, 3, 4, 5, 6, 2 more; prefill 5+3"
