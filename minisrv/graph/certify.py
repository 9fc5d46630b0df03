"""A graph enters service after it has passed.

Knows: the order of the runs and what is compared. The reference is an eager run at the same padded
shape with the same kernels; before a capture it is the warm-up too. The graph is then replayed from
several starts: as clean as the reference, with poisoned padding, behind a full batch. Real rows,
the cache entries of live requests and their state must come out bit-equal, and nothing else may
have been touched.
Knows nothing of how a step is filled or of what its results mean: a `Trial` does.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from minisrv.errors import CertificationError


class Start(enum.Enum):
    """What a run finds in the buffers, the cache and the state beside the batch itself."""

    CLEAN = "on a clean batch"
    """Zeros, and finite values in the cache."""
    POISONED = "with poisoned padding"
    """NaN and stale values, wherever no real row may depend on them."""
    STALE = "behind a full batch"
    """What the same graph leaves when it has been replayed on as much as it holds."""


class Trial(Protocol):
    """One batch, shaped so that a graph's padding has something to spoil."""

    name: str
    starts: Sequence[Start]
    """Where replays begin."""

    def reset(self, start: Start) -> None:
        """Put the batch, the cache and the buffers in their initial state. To be behind a full
        batch is to replay one."""

    def run(self, *, graph: bool) -> None:
        """Run the step at the padded shape, eagerly or by replaying the graph."""

    def observe(self) -> dict[str, Tensor]:
        """Copies of what a real row's step leaves behind, by name. Nothing in it may depend on
        the poison."""

    def touched(self) -> list[str]:
        """What the last run changed and had no business to, in words."""


def certify(
    trial: Trial, capture: Callable[[], None] | None = None, *, tolerance: float = 0.0
) -> float:
    """Raise CertificationError unless the trial's graph does what the eager run does. Returns the
    largest absolute difference of any value.

    capture: captures the graph, behind the eager run; it may leave anything in buffers and in the
        null block. None: the graph is there.
    tolerance: largest difference allowed; 0 asks for equal bits.
    """
    trial.reset(Start.CLEAN)
    trial.run(graph=False)
    reference = trial.observe()
    _check_untouched(trial, "the eager run")
    for name, value in reference.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CertificationError(f"{trial.name}: the eager run's {name} is not finite.")
    if capture is not None:
        capture()
    largest = 0.0
    for start in trial.starts:
        try:
            trial.reset(start)
            trial.run(graph=True)
        except Exception as error:
            raise CertificationError(
                f"{trial.name}: the replay {start.value} failed: {error}"
            ) from error
        difference = _compare(trial.name, reference, trial.observe(), start, tolerance)
        largest = max(largest, difference)
        _check_untouched(trial, f"the replay {start.value}")
    return largest


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
    start: Start,
    tolerance: float,
) -> float:
    assert reference.keys() == found.keys(), "a trial observes the same things every time"
    largest = 0.0
    for name, expected in reference.items():
        if not torch.equal(expected, found[name]):
            difference = (expected.double() - found[name].double()).abs()
            largest = max(largest, float(difference.nan_to_num(float("inf")).max()))
            if largest > tolerance:
                raise CertificationError(
                    f"{trial}: {name} of the replay differs from the eager run's {start.value} "
                    f"(largest difference {largest:.3g}, allowed {tolerance:.3g}). The graph may "
                    "not serve; run with --enforce-eager and report this.",
                    difference=largest,
                )
    return largest
