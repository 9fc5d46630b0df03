"""Generations: the code that computes a model and the ladders of captured sizes, with all the
graphs that were captured from the two.

A runner has one generation in service. Another can be built beside it, between two steps, and put
in its place as a whole; the graphs of the two share nothing, so the memory of the one that leaves
is free once nobody refers to it.

Knows: what of a runner belongs to a generation. Knows nothing of how code is compiled, nor of when
a generation may serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from minisrv.compile.decorator import Compiled
from minisrv.core.ladder import Ladders
from minisrv.graph.backend import GraphBackend
from minisrv.graph.captured import CapturedGraph
from minisrv.modes import BatchDescriptor
from minisrv.runner.model_runner import ModelRunner


@dataclass(frozen=True, eq=False)
class Generation:
    """The code of a model, the ladders, and the graphs captured from the two.

    ladders: the sizes for which graphs may be captured.
    program: the compiled code; None for the model's own forward.
    backend: the backend of its graphs, and of no others.
    graphs: the installed graphs of each of `ModelRunner.wrappers`.
    """

    ladders: Ladders
    program: Compiled | None
    backend: GraphBackend
    graphs: tuple[dict[BatchDescriptor, CapturedGraph], ...]

    @classmethod
    def empty(
        cls,
        runner: ModelRunner,
        backend: GraphBackend,
        program: Compiled | None,
        ladders: Ladders | None = None,
    ) -> Generation:
        """Return a generation without graphs, for which graphs can be captured.

        ladders: those in service by default; no size may be larger than the largest of these, for
            which there are buffers.
        """
        graphs = tuple[dict[BatchDescriptor, CapturedGraph], ...]({} for _ in runner.wrappers)
        return cls(ladders or runner.ladders, program, backend, graphs)

    @classmethod
    def in_service(cls, runner: ModelRunner) -> Generation:
        """Return the generation that a runner's steps run by. Graphs that are installed later
        belong to it too."""
        graphs = tuple(wrapper.graphs for wrapper in runner.wrappers)
        program, backend = runner.model.compiled, runner.model_step.backend
        return cls(runner.ladders, program, backend, graphs)

    def serve(self, runner: ModelRunner) -> None:
        """Make it the generation that the runner's steps run by, from the next step on."""
        runner.ladders = self.ladders
        runner.model.compiled = self.program
        for wrapper, graphs in zip(runner.wrappers, self.graphs, strict=True):
            wrapper.backend = self.backend
            wrapper.graphs = graphs


@contextmanager
def serving(runner: ModelRunner, generation: Generation) -> Iterator[None]:
    """Put a generation into service for the block, in which graphs can be captured and installed
    for it. No step of a request may run in the block."""
    before = Generation.in_service(runner)
    generation.serve(runner)
    try:
        yield
    finally:
        before.serve(runner)
