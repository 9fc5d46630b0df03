"""The batches on which graphs are certified, as rows of tokens.

Knows: what a scheduler can put into one step, and the shapes that have broken graphs elsewhere:
rows of one token, lengths around block edges and at the end of the context, prefill chunks after a
history, prefill that looks like decode. Start-up uses one batch for each graph, `minisrv certify`
all of them. Knows nothing of tensors: `certification.trial` gives a batch its request indices,
blocks and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice

from minisrv.modes import BatchDescriptor

SMALL_CAPTURE_SIZE = 8
"""Largest padded size whose graph is certified with every batch size that it holds."""

LONG_TOKENS = 32768
"""Number of tokens that decode rows of a long batch have in the cache together. More would show no
other times, and take more memory than there may be when the cache has been allocated."""


PLAIN_PROMPT = 1024
"""Maximum number of tokens of a prompt in a plain batch. The time of its attention is little beside
that of the other tokens, which a model of costs is to learn from the batch."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The limits of one step.

    max_num_reqs: the maximum number of requests.
    max_num_tokens: the maximum number of tokens of all rows together.
    max_model_len: the maximum number of tokens of one request, including those in the cache.
    num_blocks: the number of blocks that the rows may use together.
    block_size: the number of tokens in a block.
    """

    max_num_reqs: int
    max_num_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row of `num_tokens` tokens that follow `num_computed_tokens` tokens in the cache.

    is_decode: whether the row is a decode. The shape does not tell: a row of one token may be
        prefill too.
    """

    num_computed_tokens: int
    num_tokens: int
    is_decode: bool = False


Batch = tuple[BatchRow, ...]
"""The rows of one step. Decode rows come first."""

BatchMaker = Callable[[BatchDescriptor, BatchLimits], Batch]
"""Makes a batch of a graph within limits."""


def blocks_for_any_batch(limits: BatchLimits) -> int:
    """Return a number of blocks that is enough for every batch within the limits: up to three rows
    about as long as the context; the tokens of a step; and for each row two blocks, which a history
    around the edges of a block fills, with the one after them. One more is left for nobody, to be
    watched."""
    size = limits.block_size
    return (
        1
        + 3 * -(-limits.max_model_len // size)
        + -(-limits.max_num_tokens // size)
        + 3 * limits.max_num_reqs
    )


def describe(batch: Batch) -> str:
    """Return the batch as text for people: the lengths of decode rows, and history+tokens of the
    others."""
    decodes = [str(row.num_computed_tokens + 1) for row in batch if row.is_decode]
    prefills = [f"{row.num_computed_tokens}+{row.num_tokens}" for row in batch if not row.is_decode]
    parts = (("decode at length", decodes), ("prefill", prefills))
    return "; ".join(f"{what} {_listed(rows)}" for what, rows in parts if rows)


def _listed(rows: list[str], most: int = 6) -> str:
    more = [f"{len(rows) - most} more"] if len(rows) > most else []
    return ", ".join(rows[:most] + more)


# ---- the batches of a graph ----------------------------------------------------------------------


def short_batch(key: BatchDescriptor, limits: BatchLimits) -> Batch:
    """Return a batch that leaves padding in the graph.

    It is one row (decode) or one token (mixed) smaller than the padded size, unless that is one.
    Where the graph also pads the rows of a mixed batch, it is one row short too. Lengths lie around
    block edges.
    """
    size = max(1, min(key.num_tokens - 1, _most(key, limits)))
    if key.uniform_decode:
        return _fitted(_decodes(islice(cycle(_edges(limits)), size)), limits)
    if key.num_reqs is not None:
        limits = replace(limits, max_num_reqs=max(1, min(key.num_reqs, limits.max_num_reqs) - 1))
    return _fitted(_mixture(size, limits), limits)


def full_batch(key: BatchDescriptor, limits: BatchLimits) -> Batch:
    """Return a batch with as many tokens and rows as the graph holds. The values that it leaves in
    the buffers are the stale values that a smaller batch finds behind its own."""
    size = min(key.num_tokens, _most(key, limits))
    rows = next(_decode_batches(size, limits)) if key.uniform_decode else _spread(size, limits)
    return _fitted(rows, limits)


def plain_batch(key: BatchDescriptor, limits: BatchLimits) -> Batch:
    """Return a batch on which a step by the graph is timed: decode rows with short contexts, or
    beside some of them prompts of at most `PLAIN_PROMPT` tokens."""
    if key.uniform_decode:
        return short_batch(key, limits)
    size = min(key.num_tokens, _most(key, limits))
    decodes = min(size, limits.max_num_reqs) // 4
    tokens, longest = size - decodes, min(PLAIN_PROMPT, limits.max_model_len)
    prompts = [BatchRow(0, min(longest, tokens - begin)) for begin in range(0, tokens, longest)]
    return _fitted([*_decodes(islice(cycle(_edges(limits)), decodes)), *prompts], limits)


def long_decodes(key: BatchDescriptor, limits: BatchLimits) -> Batch:
    """Return a batch whose decode rows have long contexts. They fill a graph for pure decode, and
    half of another one, beside a prompt. They read about `LONG_TOKENS` tokens from the cache, or
    fewer where the context or the blocks are few."""
    size, context = min(key.num_tokens, _most(key, limits)), limits.max_model_len
    if key.uniform_decode:
        return _fitted(_long_decodes(size, limits), limits)
    count = min(size // 2, limits.max_num_reqs - 1)
    prompt = BatchRow(0, min(size - count, context))
    return _fitted([*_long_decodes(count, limits), prompt], limits)


def long_chunk(key: BatchDescriptor, longest: int, limits: BatchLimits) -> Batch:
    """Return a batch of one chunk of a prompt, which fills the graph and ends at most `longest`
    tokens behind the beginning of its request, or where the context or the blocks do."""
    longest = min(longest, limits.max_model_len, limits.num_blocks * limits.block_size)
    size = min(key.num_tokens, limits.max_num_tokens, longest)
    return (BatchRow(longest - size, size),)


def sweep_batches(key: BatchDescriptor, below: int, limits: BatchLimits) -> list[Batch]:
    """Return every batch on which a graph is certified: the full batch, and further each
    composition. A small padded size gets each composition at every batch size. A larger one gets
    each composition at one of three sizes, in turn: the smallest, the next to largest and the
    largest.

    below: the next smaller captured size, whose batches never run in this graph. 0 if there is
        none.
    """
    least, top = below + 1, min(key.num_tokens, _most(key, limits))
    small = top <= SMALL_CAPTURE_SIZE
    sizes = range(least, top + 1) if small else sorted({least, top, max(least, top - 1)})
    compose = _decode_batches if key.uniform_decode else _mixed_batches
    batches = [full_batch(key, limits)]
    for turn, size in enumerate(sizes):
        composed = list(compose(size, limits))
        some = composed if small else composed[turn :: len(sizes)]
        batches += [_fitted(rows, limits) for rows in some]
    return list(dict.fromkeys(batches))


def _most(key: BatchDescriptor, limits: BatchLimits) -> int:
    return limits.max_num_reqs if key.uniform_decode else limits.max_num_tokens


def _edges(limits: BatchLimits) -> list[int]:
    """Return the lengths at which a row begins, fills or overflows a block."""
    size = limits.block_size
    lengths = (1, 2, size - 1, size, size + 1, 2 * size, 2 * size + 1)
    return sorted({length for length in lengths if 1 <= length <= limits.max_model_len})


def _lengths(limits: BatchLimits) -> list[int]:
    """Return the lengths to try: the longest and the shortest one next to each other, then the rest
    of the edges."""
    context = limits.max_model_len
    return list(dict.fromkeys((context, 1, context - 1, *_edges(limits))))


def _decodes(lengths: Iterable[int]) -> list[BatchRow]:
    return [BatchRow(length - 1, 1, is_decode=True) for length in lengths]


def _long_decodes(count: int, limits: BatchLimits) -> list[BatchRow]:
    """Return decode rows of the same length, which have `LONG_TOKENS` tokens together or as many as
    the context and the blocks allow, with a block for another row."""
    size = limits.block_size
    most = min(LONG_TOKENS, (limits.num_blocks - 1) * size) // max(1, count)
    return _decodes([max(1, min(limits.max_model_len, most // size * size))] * count)


def _decode_batches(count: int, limits: BatchLimits) -> Iterator[list[BatchRow]]:
    """Yield batches of `count` decode rows. First every length comes once, in as many batches as
    that takes, among short rows; then all rows have length 1; then the longest row comes last."""
    lengths = _lengths(limits)
    for first in range(0, len(lengths), count):
        some = lengths[first : first + count]
        yield _decodes([*some, *islice(cycle(_edges(limits)), count - len(some))])
    yield _decodes([1] * count)
    yield _decodes([*islice(cycle(_edges(limits)), count - 1), limits.max_model_len])


def _mixed_batches(tokens: int, limits: BatchLimits) -> Iterator[list[BatchRow]]:
    """Yield batches of `tokens` tokens of prefill, with and without decode rows before it."""
    lengths, context = _lengths(limits), limits.max_model_len
    rows = min(tokens, limits.max_num_reqs)
    decodes = islice(chain(lengths[:3], cycle(_edges(limits))), rows - 1)
    yield [*_decodes(decodes), BatchRow(0, tokens - rows + 1)]
    yield [*[BatchRow(0, 1)] * (rows - 1), BatchRow(0, tokens - rows + 1)]
    # Chunks of one token after a history at every edge, and a chunk that ends where the context
    # does.
    tails = [BatchRow(length - 1, 1) for length in lengths[: rows // 2]]
    chunk = min(tokens - len(tails), context)
    yield [BatchRow(context - chunk, chunk), *tails]
    prompts = [BatchRow(0, context)] * (tokens // context)
    yield [*prompts, *([BatchRow(0, rest)] if (rest := tokens % context) else [])]
    yield _mixture(tokens, limits)
    if rows == tokens:
        yield next(_decode_batches(tokens, limits))


def _mixture(tokens: int, limits: BatchLimits) -> list[BatchRow]:
    """Return two decode rows, then prefill rows: each takes half of the remaining tokens, and every
    other one follows a history."""
    lengths, context = cycle(_edges(limits)), limits.max_model_len
    decodes = min(2, limits.max_num_reqs - 1) if tokens > 2 else 0
    rows = _decodes(islice(lengths, decodes))
    left = tokens - decodes
    while left and len(rows) < limits.max_num_reqs:
        last = len(rows) == limits.max_num_reqs - 1
        count = min(left if last else -(-left // 2), context)
        rows.append(BatchRow(min(next(lengths), context - count) if len(rows) % 2 else 0, count))
        left -= count
    return rows


def _spread(tokens: int, limits: BatchLimits) -> list[BatchRow]:
    """Return prefill in as many rows as the limits allow, of about the same length, after
    histories."""
    lengths, context = cycle(_edges(limits)), limits.max_model_len
    rows = min(tokens, limits.max_num_reqs)
    counts = [min(context, (tokens + row) // rows) for row in range(rows)]
    return [BatchRow(min(next(lengths), context - count), count) for count in counts]


def _fitted(rows: list[BatchRow], limits: BatchLimits) -> Batch:
    """Return `rows` cut to the maximum number of requests and the available blocks. A row that is
    too long for the blocks that the others leave loses history first, then tokens."""
    rows = rows[: min(limits.max_num_reqs, limits.num_blocks)]
    left, fitted = limits.num_blocks, []
    for others, row in zip(reversed(range(len(rows))), rows, strict=True):
        longest = min(limits.max_model_len, (left - others) * limits.block_size)
        count = min(row.num_tokens, longest)
        start = min(row.num_computed_tokens, longest - count)
        left -= -(-(start + count) // limits.block_size)
        fitted.append(BatchRow(start, count, row.is_decode))
    return tuple(fitted)
