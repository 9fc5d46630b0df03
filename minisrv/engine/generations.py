"""How a generation takes the place of another one.

Knows: how much memory its graphs may take, and in which order one comes and the other goes. Knows
nothing of how a generation is built (`certification.generation`), nor of why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing

from minisrv.certification.startup import DRIVER_BYTES
from minisrv.engine.background import Turn, Work
from minisrv.graph.captured import CapturedGraph
from minisrv.modes import GraphKey
from minisrv.runner.generation import Generation
from minisrv.runner.model_runner import ModelRunner


def predicted_bytes(keys: Collection[GraphKey], captured: Mapping[GraphKey, CapturedGraph]) -> int:
    """Return the number of bytes that graphs may take together (`graph_bytes`)."""
    nbytes = {key: graph.nbytes for key, graph in captured.items()}
    return sum(graph_bytes(key, nbytes) for key in keys)


def graph_bytes(key: GraphKey, nbytes: Mapping[GraphKey, int]) -> int:
    """Return the number of bytes that a graph may take: no more than the next larger one of its
    kind, or than one of its size, or a piece of the driver's memory. A larger one may have been
    taken out of service.

    nbytes: the number of bytes of graphs that are captured.
    """
    mode, own = key
    alike = [
        (other.num_tokens, taken)
        for (runtime, other), taken in nbytes.items()
        if (runtime, other.stage, other.query_len, other.output)
        == (mode, own.stage, own.query_len, own.output)
        and other.num_tokens >= own.num_tokens
    ]
    return max(DRIVER_BYTES, min(alike)[1] if alike else 0)


def take_over(runner: ModelRunner, new: Generation, follow: Callable[[], None]) -> Generation:
    """Put a generation into service between two steps, in place of another one, which is returned.

    follow: lets those follow who choose by what serves. If it fails, the other one serves on.
    """
    old = Generation.in_service(runner)
    try:
        new.serve(runner)
        for observer in runner.observers:
            observer.swapped()
        follow()
    except BaseException:
        old.serve(runner)
        raise
    return old


def compiled_kernels(
    compiling: Generator[None, None, str], turn: Turn
) -> Generator[bool, None, str]:
    """Wait until other processes have compiled kernels (`engine.kernels.compiled_meanwhile`), and
    return why they could not, or an empty text. A kernel that was compiled when it first ran would
    make requests wait for seconds."""
    with closing(compiling):
        while True:
            turn.begin_part("the processes that compile kernels")
            try:
                next(compiling)
            except StopIteration as stop:
                why: str = stop.value
                return why
            turn.waits = True
            yield True


def freed(old: Generation, turn: Turn, release: Callable[[], None]) -> Work:
    """Free the graphs of a generation that serves no more.

    release: returns memory that nobody uses any more to the device.
    """
    turn.begin_part("the end of a generation")
    for graphs in old.graphs:
        while graphs:
            graphs.popitem()  # a graph of many operations takes a while to be freed
            if turn.is_over:
                yield False
    yield False
    release()
