"""The wrapper that replays a graph where the forward context says so.

Knows: the runtime mode that it stands for, and the graphs that are installed, by descriptor. A
graph is captured first and installed when it has passed its certification; until then it can be
replayed only by a context that names it. The wrapper trusts the context: choosing a graph is the
dispatcher's work. A wrapper whose mode is not the context's passes through, so wrappers can be
nested: a FULL one around a step or the model, the PIECEWISE one around the model inside it. Knows
nothing of how a backend records, nor of what the runnable computes.

A capture is ended at every attention op and begun again after it (PIECEWISE), or contains it
(FULL). A runnable returns nothing: it reads static buffers and leaves its results in static
buffers, so that no result lies in memory which another graph reuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from torch import Tensor

from minisrv.errors import GraphCaptureError, GraphError
from minisrv.graph.backend import GraphBackend, Replay
from minisrv.graph.captured import CapturedGraph
from minisrv.graph.forward_context import ForwardContext, get_forward_context, set_forward_context
from minisrv.graph.observer import entered
from minisrv.modes import BatchDescriptor, CUDAGraphMode


class CUDAGraphWrapper:
    """Runs `runnable`, by a graph where the context's mode is `mode`. The name is vLLM's.

    check_addresses: whether to compare the addresses and numbers with those of the capture before
        each replay; for tests, and for finding a tensor that is not static but should be.
    graphs: the installed graphs.
    """

    def __init__(
        self,
        runnable: Callable[..., None],
        mode: CUDAGraphMode,
        backend: GraphBackend,
        *,
        check_addresses: bool = False,
    ) -> None:
        self.runnable = runnable
        self.mode = mode
        self.backend = backend
        self.check_addresses = check_addresses
        self.graphs: dict[BatchDescriptor, CapturedGraph] = {}

    def __call__(self, *args: Tensor) -> None:
        """Replay the graph of the context's descriptor, or pass through. Raises GraphError for a
        key whose graph is not installed."""
        context = get_forward_context()
        if context.mode is not self.mode:
            self.runnable(*args)
            return
        graph = context.graph or self.graphs.get(context.descriptor)
        if graph is None:
            raise GraphError(f"no {self.mode.name} graph is installed for {context.descriptor}.")
        if self.check_addresses:
            _compare(graph.captured_inputs, self._describe_inputs(context, args))
        launches = len(graph.calls)
        contexts = [made for observer in context.observers if (made := observer.replay(launches))]
        if not contexts:
            graph.replay()
        else:
            with entered(contexts):
                graph.replay()

    def install(self, descriptor: BatchDescriptor, graph: CapturedGraph) -> None:
        """Put a captured graph into service, in place of an earlier one of that descriptor."""
        self.graphs[descriptor] = graph

    def capture(self, *args: Tensor) -> CapturedGraph:
        """Capture one run of the runnable for the context's descriptor, and return the graph, which
        is not installed.

        Raises GraphCaptureError if the runnable does something that a graph cannot hold.
        """
        context = get_forward_context()
        backend = self.backend
        memory_before = backend.memory_used()
        calls: list[Replay] = []

        def graph_break(between: Replay) -> None:
            calls.append(backend.end())
            calls.append(between)
            for observer in context.observers:
                observer.piece()
            backend.begin()

        pieces = self.mode is CUDAGraphMode.PIECEWISE
        # A graph that contains attention keeps this context, and no observer.
        captured_in = replace(context, graph_break=graph_break if pieces else None, observers=())
        backend.begin()
        try:
            with set_forward_context(captured_in):
                self.runnable(*args)
                calls.append(backend.end())
            backend.finish()
        except BaseException as error:
            backend.abandon()
            if isinstance(error, RuntimeError):
                raise GraphCaptureError(
                    f"{context.descriptor} cannot be captured: {error}\n--enforce-eager serves "
                    "the model without graphs."
                ) from error
            raise
        nbytes = backend.memory_used() - memory_before
        captured, calls[:] = tuple(calls), ()  # a recorded context leads back to the list
        return CapturedGraph(captured, self._describe_inputs(context, args), nbytes)

    def _describe_inputs(self, context: ForwardContext, args: tuple[Tensor, ...]) -> dict[str, int]:
        """Return the addresses of the arguments and of the attention metadata, and the numbers
        among the metadata if the graph contains attention. An empty tensor has no address: while
        pieces are captured, on padding only, there are no rows."""
        inputs: dict[str, Tensor | int] = {f"argument {n}": arg for n, arg in enumerate(args)}
        if (metadata := context.attn_metadata) is not None:
            inputs |= {f"attn.{f.name}": getattr(metadata, f.name) for f in fields(metadata)}
        described: dict[str, int] = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                if value.numel():
                    described[name] = value.data_ptr()
            elif self.mode is CUDAGraphMode.FULL:
                described[name] = value
        return described


def _compare(captured: dict[str, int], given: dict[str, int]) -> None:
    changed = [name for name, value in captured.items() if given.get(name) != value]
    if changed:
        raise GraphError(
            f"{', '.join(changed)} changed since the capture: a graph keeps the addresses and "
            "numbers that it was captured with."
        )
