"""A check that an engine still computes what it computed before.

A few small steps are run and what they gave is kept; later, the same steps must give it again, bit
for bit, as any two replays of a graph do. Every weight takes part in each of them.

Knows: which steps are run. Knows nothing of what may have happened between the two times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisrv.certification.batches import short_batch
from minisrv.certification.compare import InitialState
from minisrv.certification.trial import StepTrial, TrialSpace
from minisrv.errors import CertificationError
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey
from minisrv.runner.model_runner import ModelRunner


class Witness:
    """What the smallest graph of each kind gave, and the smallest step without a graph.

    It is made and asked where no request holds a block, and no step is in flight.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._space = TrialSpace.of(runner, range(1, runner.num_blocks))
        smallest: dict[object, GraphKey] = {}
        for key in sorted(runner.graphs, key=lambda key: -key[1].num_tokens):
            mode, descriptor = key
            smallest[mode, descriptor.stage, descriptor.query_len, descriptor.output] = key
        self._keys = [(CUDAGraphMode.NONE, BatchDescriptor(1)), *smallest.values()]
        self._seen = [self._run(key) for key in self._keys]

    def check(self) -> None:
        """Run the steps again. Raises CertificationError if they give anything else."""
        for key, seen in zip(self._keys, self._seen, strict=True):
            found = self._run(key)
            other = [name for name, value in seen.items() if not torch.equal(value, found[name])]
            if other:
                mode, descriptor = key
                raise CertificationError(
                    f"{mode.name} {descriptor.num_tokens}: {', '.join(other)} are not what they "
                    "were before"
                )

    def _run(self, key: GraphKey) -> dict[str, Tensor]:
        """Run a step, by its graph if it has one, and return on the host what it gave."""
        runner, space = self._runner, self._space
        trial = StepTrial(runner, space, key, short_batch(key[1], space.limits(runner)))
        try:
            trial.reset(InitialState.CLEAN)
            trial.run(runner.graphs.get(key))
            return {name: value.cpu() for name, value in trial.observe().items()}
        finally:
            trial.clear()
