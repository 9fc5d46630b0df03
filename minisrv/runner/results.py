"""The result of a step, which reaches the host without making anybody wait.

Knows: the ring of pinned memory into which sampled tokens are copied, and the events that tell when
a step began and ended on the device. Knows nothing of what a step computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minisrv.runner.logprobs import LogprobReport

PLACES = 4
"""Number of places in the ring. With one step launched ahead two are in use, and the events of the
step before them are still read."""


@dataclass(frozen=True)
class DeviceTime:
    """The time of a step on a GPU, in milliseconds.

    busy: the time from its launch to its end, including a wait for grammar masks between its parts.
    idle: the time from the end of the step before it to its launch, including copies of its inputs;
        None for the first step.
    """

    busy: float
    idle: float | None


@dataclass(slots=True, eq=False)
class StepResult:
    """The result of a step that has been launched. Its values are copies, which later steps do not
    change.

    token_ids: [R] int64 on the host, valid once `tokens` has returned.
    logprobs: the log-probabilities; None if no row asked for any.
    done: the event at the end of the step; None where the host does the work itself.
    began: the event at the launch of the step.
    before: the event at the end of the step before it.
    """

    token_ids: Tensor
    logprobs: LogprobReport | None
    done: torch.cuda.Event | None = None
    began: torch.cuda.Event | None = None
    before: torch.cuda.Event | None = None
    _ids: list[list[int]] | None = field(default=None, repr=False)

    def tokens(self) -> list[list[int]]:
        """Return the sampled tokens of every row, one each, after waiting for the step."""
        if self._ids is None:
            if self.done is not None:
                self.done.synchronize()
            ids: list[list[int]] = self.token_ids.unsqueeze(1).tolist()
            self._ids = ids
        return self._ids

    def device_time(self) -> DeviceTime | None:
        """Return the time that the GPU took, or None on a CPU.

        It must be called after `tokens`, and before more than one other step has been launched: the
        events of the ring are reused.
        """
        if self.began is None or self.done is None:
            return None
        idle = None if self.before is None else self.before.elapsed_time(self.began)
        return DeviceTime(self.began.elapsed_time(self.done), idle)


class _Place:
    """One place in the ring: pinned memory for the tokens of a step, and its two events."""

    def __init__(self, rows: int) -> None:
        self.host = torch.empty(rows, dtype=torch.int64, pin_memory=True)
        self.began, self.done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.result: StepResult | None = None


class ResultRing:
    """The ring into which results of at most `rows` rows go, each to the next place. On a CPU there
    is no ring, because results are complete at once."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._places = [_Place(rows) for _ in range(PLACES)] if device.type == "cuda" else []
        self._step = -1

    def begin(self) -> None:
        """Begin the next step, which is launched after everything launched so far."""
        self._step += 1
        if self._places:
            place = self._places[self._step % PLACES]
            if place.result is not None:
                place.result.tokens()  # it has been read by now, or it would be lost
            place.began.record()

    def end(self, tokens: Tensor, logprobs: LogprobReport | None) -> StepResult:
        """Return the result of the step, which has been launched; its `tokens` may still be on
        their way."""
        if not self._places:
            return StepResult(tokens.clone(), logprobs)
        place, before = (self._places[step % PLACES] for step in (self._step, self._step - 1))
        host = place.host[: len(tokens)].copy_(tokens, non_blocking=True)
        place.done.record()
        first = before.result is None
        place.result = StepResult(
            host, logprobs, place.done, place.began, None if first else before.done
        )
        return place.result
