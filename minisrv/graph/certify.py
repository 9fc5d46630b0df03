"""A graph enters service after it has passed.

Knows: the order of the runs and what is compared. The reference is the warm-up before the capture,
an eager run at the same padded shape with the same kernels. Then the graph is captured, and
replayed twice: once as clean as the reference, once with poisoned padding and stale tails. Real
rows, the cache entries of live requests and their state must come out bit-equal, and nothing else
may have been touched.
Knows nothing of how a step is filled or of what its results mean: a `Trial` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from minisrv.errors import CertificationError


class Trial(Protocol):
    """One batch, shaped so that a graph's padding has something to spoil."""

    name: str

    def reset(self, *, poison: bool) -> None:
        """Put the batch, the cache and the buffers in their initial state.

        poison: fill with NaN and stale values whatever no real row may depend on.
        """

    def run(self, *, graph: bool) -> None:
        """Run the step at the padded shape, eagerly or by replaying the graph."""

    def observe(self) -> dict[str, Tensor]:
        """Copies of what a real row's step leaves behind, by name. Nothing in it may depend on
        the poison."""

    def touched(self) -> list[str]:
        """What the last run changed and had no business to, in words."""


def certify(trial: Trial, capture: Callable[[], None], *, tolerance: float = 0.0) -> None:
    """Capture a graph, and raise CertificationError unless it does what the eager run does.

    capture: captures it; it may leave anything in buffers and in the null block.
    tolerance: largest absolute difference allowed; 0 asks for equal bits.
    """
    trial.reset(poison=False)
    trial.run(graph=False)
    reference = trial.observe()
    _check_untouched(trial, "the eager run")
    for name, value in reference.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CertificationError(f"{trial.name}: the eager run's {name} is not finite.")
    capture()
    for poison in (False, True):
        trial.reset(poison=poison)
        trial.run(graph=True)
        _compare(trial.name, reference, trial.observe(), poison, tolerance)
        _check_untouched(trial, "the replay")


def _check_untouched(trial: Trial, run: str) -> None:
    if touched := trial.touched():
        raise CertificationError(
            f"{trial.name}: {run} changed {', '.join(touched)}, which no row of it owns. It would "
            "change the results of other requests; report this."
        )


def _compare(
    trial: str,
    reference: dict[str, Tensor],
    found: dict[str, Tensor],
    poison: bool,
    tolerance: float,
) -> None:
    assert reference.keys() == found.keys(), "a trial observes the same things every time"
    for name, expected in reference.items():
        if not torch.equal(expected, found[name]):
            difference = (expected.double() - found[name].double()).abs()
            worst = float(difference.nan_to_num(float("inf")).max())
            if worst > tolerance:
                raise CertificationError(
                    f"{trial}: {name} of the replay differs from the eager run's "
                    f"{'with poisoned padding' if poison else 'on a clean batch'} "
                    f"(largest difference {worst:.3g}, allowed {tolerance:.3g}). The graph may "
                    "not serve; run with --enforce-eager and report this."
                )
