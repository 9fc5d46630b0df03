"""The graphs of a start-up: capture, certification, installation, and a memory probe.

Knows: in which order graphs are captured, on which batch each is certified, and what a probe has to
try. Knows nothing of how a graph is compared (see `compare`), nor of how memory is divided. Nothing
here disturbs requests: between two of their steps, a graph can be captured, certified and installed
while they run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from functools import partial

from minisrv.certification.batches import full_batch, short_batch
from minisrv.certification.compare import InitialState, certify
from minisrv.certification.trial import StepTrial, TrialSpace, reserved_space
from minisrv.core.kv_cache import BlockPool
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Stage, StageOutput
from minisrv.runner.model_runner import ModelRunner

DRIVER_BYTES = 2 << 20
"""Number of bytes in which CUDA's driver allocates memory for graphs; several graphs share a
piece."""

CaptureProgress = Callable[[int, int], None]
"""Function that is called with the number of graphs captured so far and the number of all."""


def capture_graphs(
    runner: ModelRunner,
    pool: BlockPool,
    keys: Collection[GraphKey],
    on_progress: CaptureProgress,
) -> None:
    """Capture, certify and install graphs.

    pool: the blocks of the runner's cache, of which the free ones are used meanwhile.
    keys: the keys of the graphs, those of epilogues before those of the steps that they complete.

    Raises GraphCaptureError, CertificationError.
    """
    if not keys:
        return
    # A garbage collection in the middle of a capture would free objects that the capture does not
    # expect to be freed, and scanning every object between two graphs takes longer than capturing
    # one (vLLM#21146).
    frozen_before = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        with reserved_space(runner, pool) as space:
            for done, key in enumerate(keys):
                on_progress(done, len(keys))
                add_graph(runner, space, key)
    finally:
        # All objects are unfrozen at once, so they stay frozen if the process had frozen its own
        # before. A few hundred frozen objects do not say so: from Python 3.12 on, those that are
        # never freed are counted among them.
        if 2 * frozen_before < gc.get_freeze_count():
            gc.unfreeze()
    on_progress(len(keys), len(keys))


def add_graph(runner: ModelRunner, space: TrialSpace, key: GraphKey) -> None:
    """Capture a graph, certify it and install it.

    It may be called between the steps of running requests, when every step that was started has
    been finished (`ModelRunner.sample_tokens`). Raises GraphCaptureError and CertificationError;
    the graph is not installed then.
    """
    trial = StepTrial(runner, space, key, short_batch(key[1], space.limits(runner)))
    try:
        graph = certify(trial, partial(runner.capture, key))
    finally:
        trial.clear()
    runner.install(key, graph)


def probe(runner: ModelRunner, pool: BlockPool) -> int:
    """Return the number of bytes that all graphs will take, after a trial that takes all the memory
    that serving will need except for the smaller graphs.

    The trial runs the largest step eagerly, and captures and certifies the two largest graphs of
    each kind. The prediction is the size of the largest graph, and for each other graph the size of
    the second or of one piece of the driver's memory, whichever is larger.
    """
    kinds: dict[tuple[CUDAGraphMode, Stage, int | None, StageOutput], list[GraphKey]] = {}
    for mode, key in runner.ladders.keys():  # noqa: SIM118  (not a mapping)
        kind = (mode, key.stage, key.query_len, key.output)
        kinds.setdefault(kind, []).append((mode, key))
    predicted = 0
    with reserved_space(runner, pool) as space:
        largest = BatchDescriptor(runner.ladders.max_num_batched_tokens)
        batch = full_batch(largest, space.limits(runner))
        trial = StepTrial(runner, space, (CUDAGraphMode.NONE, largest), batch)
        trial.reset(InitialState.CLEAN)
        trial.run(None)
        for keys in kinds.values():
            for graph in keys[:2]:
                add_graph(runner, space, graph)
            largest_bytes, *others = (runner.graphs[graph].nbytes for graph in keys[:2])
            predicted += largest_bytes + (len(keys) - 1) * max(DRIVER_BYTES, *others, 0)
    return predicted
