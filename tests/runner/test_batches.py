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
    blocks_for_any_batch,
    describe,
    full_batch,
    long_chunk,
    long_decodes,
    plain_batch,
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
        max_num_reqs=rows,
        max_num_tokens=draw(st.integers(rows, 80)),
        max_model_len=context,
        num_blocks=draw(st.integers(1, 2 + rows * -(-context // block_size))),
        block_size=block_size,
    )


@settings(max_examples=150)
@given(
    limits=limits(),
    capture_size=st.integers(1, 96),
    below=st.integers(0, 95),
    kind=st.sampled_from(["decode", "pieces", "one graph"]),
)
def test_every_batch_could_be_scheduled(limits, capture_size, below, kind):
    """Every batch of certification keeps to the limits of rows, tokens, context and blocks, and has
    its decode rows first."""
    decode = kind == "decode"
    rows = min(capture_size, limits.max_num_reqs) if kind == "one graph" else None
    key = (
        decode_descriptor(capture_size, StageOutput.TOKENS)
        if decode
        else BatchDescriptor(capture_size, rows)
    )
    most = min(capture_size, limits.max_num_reqs if decode else limits.max_num_tokens)
    below = min(below, most - 1)
    batches = sweep_batches(key, below, limits)
    assert batches
    timed = [plain_batch(key, limits), long_decodes(key, limits)]
    timed += [] if decode else [long_chunk(key, 77, limits)]
    for batch in (short_batch(key, limits), full_batch(key, limits), *timed, *batches):
        assert 1 <= len(batch) <= limits.max_num_reqs
        assert sum(row.num_tokens for row in batch) <= most
        assert all(row.num_computed_tokens >= 0 and row.num_tokens >= 1 for row in batch)
        lengths = [row.num_computed_tokens + row.num_tokens for row in batch]
        assert max(lengths) <= limits.max_model_len
        assert sum(-(-length // limits.block_size) for length in lengths) <= limits.num_blocks
        decodes = [row.is_decode for row in batch]
        assert decodes == sorted(decodes, reverse=True), "decode rows come first"
        if decode:
            assert all(decodes)
            assert all(row.num_tokens == 1 for row in batch)


@settings(max_examples=150)
@given(limits=limits(), capture_size=st.integers(1, 96), decode=st.booleans())
def test_borrowed_blocks_hold_what_the_whole_cache_holds(limits, capture_size, decode):
    """A trial that borrows `blocks_for_any_batch` blocks runs the batches for which it would borrow
    the whole cache, and leaves a block that no batch uses. Once there was room for only one row as
    long as the context, and the other long rows of a sweep lost their history."""
    key = (
        decode_descriptor(capture_size, StageOutput.TOKENS)
        if decode
        else BatchDescriptor(capture_size)
    )
    whole = replace(limits, num_blocks=1 << 20)
    borrowed = replace(limits, num_blocks=blocks_for_any_batch(limits))
    for make in (short_batch, full_batch, lambda key, limits: sweep_batches(key, 0, limits)):
        assert make(key, borrowed) == make(key, whole)
    for batch in sweep_batches(key, 0, borrowed):
        lengths = [row.num_computed_tokens + row.num_tokens for row in batch]
        used = sum(-(-length // limits.block_size) for length in lengths)
        assert used < borrowed.num_blocks


ROOMY = BatchLimits(
    max_num_reqs=20, max_num_tokens=64, max_model_len=100, num_blocks=1000, block_size=16
)


@pytest.mark.parametrize("capture_size", [1, 2, 4, 8, 16, 20])
def test_every_decode_graph_meets_every_length_and_only_sizes_of_its_own(capture_size):
    """The sweep of a decode graph has lengths around block edges and the context's end, and only
    batch sizes that would be padded to that graph."""
    ladder = build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, 20, 64).decode
    below = max((r for r in ladder if r < capture_size), default=0)
    batches = sweep_batches(decode_descriptor(capture_size, StageOutput.LOGITS), below, ROOMY)
    lengths = {row.num_computed_tokens + 1 for batch in batches for row in batch}
    assert lengths == {1, 2, 15, 16, 17, 32, 33, 99, 100}
    sizes = {len(batch) for batch in batches}
    if capture_size <= 8:
        assert sizes == set(range(below + 1, capture_size + 1))
    else:
        assert sizes == {below + 1, capture_size - 1, capture_size}
    assert any({row.num_computed_tokens for row in batch} == {0} for batch in batches), (
        "nothing but length 1"
    )


@pytest.mark.parametrize("capture_size", [8, 32, 64])
def test_every_mixed_graph_meets_every_composition(capture_size):
    batches = sweep_batches(BatchDescriptor(capture_size), capture_size // 2, ROOMY)

    def some(condition) -> bool:
        return any(condition(batch) for batch in batches)

    assert some(lambda b: len(b) == 1 and b[0].num_computed_tokens == 0), "one prompt"
    assert some(lambda b: sum(row == BatchRow(0, 1) for row in b) >= min(6, capture_size - 2)), (
        "many prompts of one token"
    )
    assert some(
        lambda b: any(
            not r.is_decode and r.num_computed_tokens > 0 and r.num_tokens == 1 for r in b
        )
    ), "chunks of one token"
    assert some(
        lambda b: any(
            r.num_computed_tokens > 0
            and r.num_tokens > 1
            and r.num_computed_tokens + r.num_tokens == 100
            for r in b
        )
    ), "a chunk that ends where the context does"
    assert some(lambda b: b[0].is_decode and not b[-1].is_decode), "decode and prefill"
    assert some(lambda b: any(r.is_decode and r.num_computed_tokens == 99 for r in b)), (
        "the longest decode"
    )


def test_the_full_batch_fills_the_graph():
    assert len(full_batch(decode_descriptor(16, StageOutput.TOKENS), ROOMY)) == 16
    for tokens in (1, 16, 20, 64):
        batch = full_batch(BatchDescriptor(tokens), ROOMY)
        assert sum(row.num_tokens for row in batch) == tokens
        assert len(batch) == min(tokens, ROOMY.max_num_reqs)
        key = BatchDescriptor(tokens, min(tokens, ROOMY.max_num_reqs))
        assert full_batch(key, ROOMY) in sweep_batches(key, tokens - 1, ROOMY)


@pytest.mark.parametrize("rows", [2, 3, 20])
@pytest.mark.parametrize("tokens", [2, 4, 64])
def test_the_short_batch_of_a_graph_with_rows_leaves_one_empty(tokens, rows):
    """The short batch of a graph that pads rows leaves at least one row and exactly one token of
    padding."""
    limits = replace(ROOMY, max_num_reqs=rows)
    batch = short_batch(BatchDescriptor(tokens, min(tokens, rows)), limits)
    assert 1 <= len(batch) < min(tokens, rows)
    assert sum(row.num_tokens for row in batch) == tokens - 1


def test_batches_in_words():
    batch = (*[BatchRow(n, 1, is_decode=True) for n in range(8)], BatchRow(5, 3))
    assert describe(batch) == "decode at length 1, 2, 3, 4, 5, 6, 2 more; prefill 5+3"
