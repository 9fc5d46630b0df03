"""By which graph every batch up to the limits runs, as a table.

Knows: the answers of a dispatcher. Knows nothing of how it chooses, nor of how a table is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minisrv.core.dispatcher import Dispatch, Dispatcher
from minisrv.modes import CUDAGraphMode, Reason


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """Batch sizes from `first` to `last` that run alike.

    kind: "decode", where sizes are numbers of requests, or "mixed", where they are numbers of
        tokens.
    padded_size: the size of the graph; None where the batch runs unpadded.
    """

    kind: str
    first: int
    last: int
    mode: CUDAGraphMode
    padded_size: int | None
    reason: Reason


def coverage(dispatcher: Dispatcher) -> list[CoverageRow]:
    """Return the dispatch of every batch size up to the limits, with equal neighbours merged."""
    ladders, rows = dispatcher.ladders, list[CoverageRow]()
    query_len = ladders.query_len
    for size in range(1, ladders.max_num_seqs + 1):
        found = dispatcher.dispatch(size * query_len, size, query_len=query_len)
        _extend(rows, "decode", size, found)
    for size in range(1, ladders.max_num_batched_tokens + 1):
        _extend(rows, "mixed", size, dispatcher.dispatch(size, 1, query_len=None))
    return rows


def _extend(rows: list[CoverageRow], kind: str, size: int, found: Dispatch) -> None:
    padded_size = None if found.mode is CUDAGraphMode.NONE else found.descriptor.num_tokens
    row = CoverageRow(kind, size, size, found.mode, padded_size, found.reason)
    if rows:
        last = replace(rows[-1], last=size)
        if replace(row, first=last.first) == last:  # it runs like the size before it
            row = last
            rows.pop()
    rows.append(row)
