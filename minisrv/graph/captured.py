"""A captured graph, as a value: it serves only once a wrapper has it installed."""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.graph.backend import Replay


@dataclass(frozen=True)
class CapturedGraph:
    """A captured graph: its pieces, and what runs between them without being captured.

    calls: the functions that a replay calls, in order: the pieces, of which a PIECEWISE graph has
        one more than the model has attention layers, and attention between them.
    captured_inputs: the address of every tensor that the capture was given, and the numbers that it
        holds; a replay is valid for these only.
    nbytes: the number of bytes that the capture took; 0 if it fits into memory that other graphs
        share.
    """

    calls: tuple[Replay, ...]
    captured_inputs: dict[str, int]
    nbytes: int

    def replay(self) -> None:
        """Run the graph."""
        for run in self.calls:
            run()
