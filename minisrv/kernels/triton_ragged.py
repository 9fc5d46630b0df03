"""The division of a step into tiles of queries, for attention: each tile lies in one row.

Row r's tiles begin at tile query_start_loc[r] // BLOCK_Q + r. So a row has as many tiles as it
needs, or one more, which has no token, and the number of tiles follows from the numbers of tokens
and rows alone, as a captured launch must. A graph has as many rows as a batch can have, so most of
its tiles may be empty: a survey of the rows, made on the device, tells the kernels where there is
work. Knows nothing of what is computed for a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEXT_TILE, SINGLES, FIRST_TILE, END_TILE, FIRST_ROW, END_ROW = (
    tl.constexpr(place) for place in range(6)
)
"""Places in a survey of a step's rows. NEXT_TILE is 0, for programs that count the tiles that they
take. SINGLES is the number of rows up to the last one that has one token; where decode rows come
first it is their number. All tiles with work lie from FIRST_TILE to before END_TILE, and their rows
from FIRST_ROW to before END_ROW; where there are none, these four are 0."""

SURVEY = 6
"""Number of int32 in a survey."""

SURVEYED = tl.constexpr(128)
"""Number of rows that a survey looks at together."""


def num_tiles(tokens: int, rows: int, block_q: int) -> int:
    """Return the number of tiles of a step whose tiles hold `block_q` tokens."""
    return tokens // block_q + rows


@triton.jit
def locate(tile, first_row, end_row, query_start_loc, BLOCK_Q: tl.constexpr):
    """Return the row of a tile, its first token in the step, its number of tokens, and the place of
    the tile's first token in the row; the tile is empty if that is beyond the row's tokens.

    first_row, end_row: the row is from the first to before the last of these.
    """
    row, behind = tl.cast(first_row, tl.int32), end_row
    while behind - row > 1:
        middle = (row + behind) // 2
        before = tl.load(query_start_loc + middle) // BLOCK_Q + middle <= tile
        row = tl.where(before, middle, row)
        behind = tl.where(before, behind, middle)
    first = tl.load(query_start_loc + row)
    count = tl.load(query_start_loc + row + 1) - first
    begin = (tile - first // BLOCK_Q - row) * BLOCK_Q
    return row, first, count, begin


@triton.jit
def survey_rows(query_start_loc, survey, rows, fewest, BLOCK_Q: tl.constexpr):
    """Write the survey of rows, of which those of `fewest` tokens or more have tiles."""
    most: tl.constexpr = 2147483647
    singles, first_tile, end_tile, first_row, end_row = 0, most, 0, most, 0
    for start in range(0, rows, SURVEYED):
        row = start + tl.arange(0, SURVEYED)
        first = tl.load(query_start_loc + row, row < rows, other=0)
        count = tl.load(query_start_loc + row + 1, row < rows, other=0) - first
        singles = tl.maximum(singles, tl.max(tl.where(count == 1, row + 1, 0)))
        tile = first // BLOCK_Q + row
        tiled = (count > 0) & (count >= fewest)
        first_tile = tl.minimum(first_tile, tl.min(tl.where(tiled, tile, most)))
        end_tile = tl.maximum(end_tile, tl.max(tl.where(tiled, tile + tl.cdiv(count, BLOCK_Q), 0)))
        first_row = tl.minimum(first_row, tl.min(tl.where(tiled, row, most)))
        end_row = tl.maximum(end_row, tl.max(tl.where(tiled, row + 1, 0)))
    tl.store(survey + NEXT_TILE, 0)
    tl.store(survey + SINGLES, singles)
    tl.store(survey + FIRST_TILE, tl.minimum(first_tile, end_tile))
    tl.store(survey + END_TILE, end_tile)
    tl.store(survey + FIRST_ROW, tl.minimum(first_row, end_row))
    tl.store(survey + END_ROW, end_row)
