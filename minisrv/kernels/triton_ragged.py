"""The division of a step into tiles of queries, for attention: each tile lies in one row.

Row r's tiles begin at tile query_start_loc[r] // BLOCK_Q + r. So a row has as many tiles as it
needs, or one more, which has no token, and the number of tiles follows from the numbers of tokens
and rows alone, as a captured launch must. Knows nothing of what is computed for a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


def num_tiles(tokens: int, rows: int, block_q: int) -> int:
    """Return the number of tiles of a step whose tiles hold `block_q` tokens."""
    return tokens // block_q + rows


@triton.jit
def locate(tile, rows, query_start_loc, BLOCK_Q: tl.constexpr):
    """Return the row of a tile, its first token in the step, its number of tokens, and the place of
    the tile's first token in the row; the tile is empty if that is beyond the row's tokens."""
    row, behind = tl.cast(0, tl.int32), rows
    while behind - row > 1:
        middle = (row + behind) // 2
        before = tl.load(query_start_loc + middle) // BLOCK_Q + middle <= tile
        row = tl.where(before, middle, row)
        behind = tl.where(before, behind, middle)
    first = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - first
    begin = (tile - first // BLOCK_Q - row) * BLOCK_Q
    return row, first, count, begin
