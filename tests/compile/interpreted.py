"""A piece that torch's operations run, so that tests need no compiler."""

from __future__ import annotations

from itertools import count

from torch import Tensor

from minisrv.compile.program import LoadedPiece, pieces_by_number
from minisrv.compile.split import Piece

_numbers = count(-1, -1)


class InterpretedPiece(LoadedPiece):
    """Takes the place of a piece that is loaded."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.read, self.written = list(range(len(piece.arguments))), []
        self.number = next(_numbers)
        pieces_by_number[self.number] = self

    def run(self, read: list[Tensor], written: list[Tensor]) -> None:
        self.piece.graph(*read)
