"""The batches that graphs are certified on, as rows of tokens.

Knows: what a scheduler can put into one step, and the shapes that have broken graphs elsewhere:
rows of one token, lengths around block edges and at the context's end, chunks behind a history,
prefill that looks like decode. Start-up takes one batch a graph, `minisrv certify` all of them.
Knows nothing of tensors: `runner.trial` gives a batch its slots, blocks and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice

from minisrv.modes import BatchDescriptor

SMALL_RUNG = 8
"""Up to here a rung is certified with every batch size that it holds."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one step can hold.

    rows: requests. tokens: of all rows together. context: tokens of one request, those in the
    cache included. blocks: of the cache, without the null block.
    """

    rows: int
    tokens: int
    context: int
    blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class BatchRow:
    """`num_tokens` tokens behind `start` that are in the cache. One token is prefill or decode:
    the shape does not tell."""

    start: int
    num_tokens: int
    decoding: bool = False


Batch = tuple[BatchRow, ...]
"""Decode rows come first."""


def describe(batch: Batch) -> str:
    """For people: lengths of decode rows, history+tokens of the others."""
    decodes = [str(row.start + 1) for row in batch if row.decoding]
    prefills = [f"{row.start}+{row.num_tokens}" for row in batch if not row.decoding]
    parts = (("decode at length", decodes), ("prefill", prefills))
    return "; ".join(f"{what} {_listed(rows)}" for what, rows in parts if rows)


def _listed(rows: list[str], most: int = 6) -> str:
    more = [f"{len(rows) - most} more"] if len(rows) > most else []
    return ", ".join(rows[:most] + more)


# ---- the batches of a graph ----------------------------------------------------------------------


def short_batch(key: BatchDescriptor, limits: BatchLimits) -> Batch:
    """One row (decode) or token (mixed) short of the padded size, so that there is padding,
    unless the size is one; a row short too where the graph pads rows of a mixed batch. Lengths lie
    around block edges."""
    size = max(1, min(key.num_tokens - 1, _most(key, limits)))
    if key.uniform_decode:
        return _fitted(_decodes(islice(cycle(_edges(limits)), size)), limits)
    if key.num_reqs is not None:
        limits = replace(limits, rows=max(1, min(key.num_reqs, limits.rows) - 1))
    return _fitted(_mixture(size, limits), limits)


def full_batch(key: BatchDescriptor, limits: BatchLimits) -> Batch:
    """As many tokens and rows as the graph holds: what it leaves behind is a smaller batch's stale
    tail."""
    size = min(key.num_tokens, _most(key, limits))
    rows = next(_decode_batches(size, limits)) if key.uniform_decode else _spread(size, limits)
    return _fitted(rows, limits)


def sweep_batches(key: BatchDescriptor, below: int, limits: BatchLimits) -> list[Batch]:
    """Everything that a graph is certified on: each composition, at every size of a small rung, at
    one of a larger rung's smallest, largest and next to largest in turn, and the full batch.

    below: the next smaller rung; its batches never come here. 0 if there is none.
    """
    least, top = below + 1, min(key.num_tokens, _most(key, limits))
    small = top <= SMALL_RUNG
    sizes = range(least, top + 1) if small else sorted({least, top, max(least, top - 1)})
    compose = _decode_batches if key.uniform_decode else _mixed_batches
    batches = [full_batch(key, limits)]
    for turn, size in enumerate(sizes):
        composed = list(compose(size, limits))
        some = composed if small else composed[turn :: len(sizes)]
        batches += [_fitted(rows, limits) for rows in some]
    return list(dict.fromkeys(batches))


def _most(key: BatchDescriptor, limits: BatchLimits) -> int:
    return limits.rows if key.uniform_decode else limits.tokens


def _edges(limits: BatchLimits) -> list[int]:
    """Lengths at which a row begins, fills and overflows a block."""
    size = limits.block_size
    lengths = (1, 2, size - 1, size, size + 1, 2 * size, 2 * size + 1)
    return sorted({length for length in lengths if 1 <= length <= limits.context})


def _lengths(limits: BatchLimits) -> list[int]:
    """The longest and the shortest beside each other, then the rest of the edges."""
    context = limits.context
    return list(dict.fromkeys((context, 1, context - 1, *_edges(limits))))


def _decodes(lengths: Iterable[int]) -> list[BatchRow]:
    return [BatchRow(length - 1, 1, decoding=True) for length in lengths]


def _decode_batches(count: int, limits: BatchLimits) -> Iterator[list[BatchRow]]:
    """`count` decodes. Every length comes once, in as many batches as that takes, among short
    rows; then all rows are as short as can be; then the longest comes last."""
    lengths = _lengths(limits)
    for first in range(0, len(lengths), count):
        some = lengths[first : first + count]
        yield _decodes([*some, *islice(cycle(_edges(limits)), count - len(some))])
    yield _decodes([1] * count)
    yield _decodes([*islice(cycle(_edges(limits)), count - 1), limits.context])


def _mixed_batches(tokens: int, limits: BatchLimits) -> Iterator[list[BatchRow]]:
    """`tokens` tokens of prefill, with decodes before it and without."""
    lengths, context = _lengths(limits), limits.context
    rows = min(tokens, limits.rows)
    decodes = islice(chain(lengths[:3], cycle(_edges(limits))), rows - 1)
    yield [*_decodes(decodes), BatchRow(0, tokens - rows + 1)]
    yield [*[BatchRow(0, 1)] * (rows - 1), BatchRow(0, tokens - rows + 1)]
    # One-token chunks behind a history at every edge, and a chunk that ends where the context does.
    tails = [BatchRow(length - 1, 1) for length in lengths[: rows // 2]]
    chunk = min(tokens - len(tails), context)
    yield [BatchRow(context - chunk, chunk), *tails]
    prompts = [BatchRow(0, context)] * (tokens // context)
    yield [*prompts, *([BatchRow(0, rest)] if (rest := tokens % context) else [])]
    yield _mixture(tokens, limits)
    if rows == tokens:
        yield next(_decode_batches(tokens, limits))


def _mixture(tokens: int, limits: BatchLimits) -> list[BatchRow]:
    """Two decodes, then prefill: each row half of what is left, every other behind a history."""
    lengths, context = cycle(_edges(limits)), limits.context
    decodes = min(2, limits.rows - 1) if tokens > 2 else 0
    rows = _decodes(islice(lengths, decodes))
    left = tokens - decodes
    while left and len(rows) < limits.rows:
        last = len(rows) == limits.rows - 1
        count = min(left if last else -(-left // 2), context)
        rows.append(BatchRow(min(next(lengths), context - count) if len(rows) % 2 else 0, count))
        left -= count
    return rows


def _spread(tokens: int, limits: BatchLimits) -> list[BatchRow]:
    """Prefill in as many rows as there may be, all about as long, behind histories."""
    lengths, context, rows = cycle(_edges(limits)), limits.context, min(tokens, limits.rows)
    counts = [min(context, (tokens + row) // rows) for row in range(rows)]
    return [BatchRow(min(next(lengths), context - count), count) for count in counts]


def _fitted(rows: list[BatchRow], limits: BatchLimits) -> Batch:
    """`rows` as far as slots and blocks go. A row too long for the blocks that the others leave
    loses history, then tokens."""
    rows = rows[: min(limits.rows, limits.blocks)]
    left, fitted = limits.blocks, []
    for others, row in zip(reversed(range(len(rows))), rows, strict=True):
        longest = min(limits.context, (left - others) * limits.block_size)
        count = min(row.num_tokens, longest)
        start = min(row.start, longest - count)
        left -= -(-(start + count) // limits.block_size)
        fitted.append(BatchRow(start, count, row.decoding))
    return tuple(fitted)
