"""Certification: a graph enters service only after it has reproduced an eager run.

Knows: the order of the runs and what is compared. The reference is an eager run at the same padded
shape with the same kernels; before a capture it is also the warm-up. The graph is then replayed
from several initial states: as clean as the reference, with poisoned padding, and after a full
batch. Real rows, the cache entries of live requests and their state must be equal bit for bit, and
nothing else may have been changed. Knows nothing of how a step is filled or of what its results
mean: a `Trial` does.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minisrv.errors import CertificationError
from minisrv.graph.captured import CapturedGraph


class InitialState(enum.Enum):
    """The initial contents of the buffers, the cache and the state besides the batch itself."""

    CLEAN = "on a clean batch"
    """Zeros, and finite values in the cache."""
    POISONED = "with poisoned padding"
    """NaN and stale values wherever no real row may depend on them."""
    STALE = "behind a full batch"
    """The values that the same graph leaves behind when it has been replayed on as much as it
    holds."""


class Difference(NamedTuple):
    """A value that differs: its name, where and by how much in words, and the largest difference of
    a number, 0 for what is no number."""

    name: str
    words: str
    largest: float


class Trial(Protocol):
    """One batch, with a shape that leaves padding in the graph, whose values could spoil the
    results."""

    name: str
    initial_states: Sequence[InitialState]
    """The initial states from which the graph is replayed."""

    def reset(self, initial_state: InitialState, graph: CapturedGraph | None = None) -> None:
        """Put the batch, the cache and the buffers into their initial state. For
        `InitialState.STALE` this replays `graph` on a full batch."""

    def run(self, graph: CapturedGraph | None) -> None:
        """Run the step at the padded shape by replaying a graph, or eagerly without one."""

    def observe(self) -> dict[str, Tensor]:
        """Return the values that the step of a real row computes, by name, as copies or digests.
        None of them may depend on the poison."""

    def unexpected_writes(self) -> list[str]:
        """Return descriptions of everything that the last run changed although it must not."""


def certify(
    trial: Trial,
    graph: Callable[[], CapturedGraph],
    *,
    between: Callable[[str], None] = lambda part: None,
) -> CapturedGraph:
    """Compare a graph with the eager run of the trial's step, and return the graph.

    graph: returns the graph. It is called after the eager run, which is the warm-up for a capture;
        it may leave any values in the buffers and in the null block.
    between: is called before each run and each look at what it has left, with these words. The
        trial has been reset once by then.

    Raises CertificationError for any difference, for a run that changes what it must not, for
    values of the eager run that are not finite, and for a replay that fails.
    """
    trial.reset(InitialState.CLEAN)
    between("the eager run")
    trial.run(None)
    between("the results of the eager run")
    reference = trial.observe()
    between("what the eager run has changed")
    _check_no_unexpected_writes(trial, "the eager run")
    for name, value in reference.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CertificationError(f"{trial.name}: the eager run's {name} is not finite.")
    between("the capture")
    candidate = graph()
    for initial_state in trial.initial_states:
        between(f"the replay {initial_state.value}")
        try:
            trial.reset(initial_state, candidate)
            trial.run(candidate)
        except Exception as error:
            raise CertificationError(
                f"{trial.name}: the replay {initial_state.value} failed: {error}"
            ) from error
        between(f"the results of the replay {initial_state.value}")
        _compare(trial.name, reference, trial.observe(), initial_state)
        between(f"what the replay {initial_state.value} has changed")
        _check_no_unexpected_writes(trial, f"the replay {initial_state.value}")
    return candidate


def _check_no_unexpected_writes(trial: Trial, run: str) -> None:
    if writes := trial.unexpected_writes():
        raise CertificationError(
            f"{trial.name}: {run} changed {', '.join(writes)}, which no row of it owns. It would "
            "change the results of other requests; report this."
        )


def compare_values(reference: dict[str, Tensor], found: dict[str, Tensor]) -> Difference | None:
    """Return the first difference between the values of an eager run and of a replay; None if they
    are equal bit for bit."""
    assert reference.keys() == found.keys(), "a trial observes the same things every time"
    for name, expected in reference.items():
        if torch.equal(expected, found[name]):
            continue
        number = int((expected != found[name]).sum())
        words, largest = f"in {number} of {expected.numel()} places", 0.0
        if expected.is_floating_point():  # a token or a digest is not larger or smaller
            difference = (expected.double() - found[name].double()).abs()
            largest = float(difference.nan_to_num(float("inf")).max())
            words += f", by at most {largest:.3g}"
        return Difference(name, words, largest)
    return None


def _compare(
    trial: str,
    reference: dict[str, Tensor],
    found: dict[str, Tensor],
    initial_state: InitialState,
) -> None:
    """Raise CertificationError for the first value that differs."""
    difference = compare_values(reference, found)
    if difference is not None:
        raise CertificationError(
            f"{trial}: {difference.name} of the replay differs from the eager run's "
            f"{initial_state.value}: {difference.words}. The graph may not serve; run with "
            "--enforce-eager and report this.",
            difference=difference.largest,
        )
