"""What a step gives back, and how it reaches the host without anybody waiting.

Knows: the ring of pinned places that sampled tokens return to, and the events that tell when a
step began and was done on the device. Knows nothing of what a step computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minisrv.runner.logprobs import LogprobReport

PLACES = 4
"""Of the ring: with one step ahead two are in use, and the events of the one before are read."""


@dataclass(frozen=True)
class DeviceTime:
    """Milliseconds of a GPU. busy: of a step, from its launch on, with a wait for masks between its
    parts. idle: between the end of the step before it and its launch, copies of its inputs
    included; None for the first step."""

    busy: float
    idle: float | None


@dataclass(slots=True, eq=False)
class StepResult:
    """A step that has been launched. Its values are copies: later steps do not change them.

    token_ids: [R] int64 on the host, there once `tokens` has returned.
    logprobs: None if no row asked for any.
    done: None where the host does the work itself. began: when it was launched. before: when the
        step before it was done.
    """

    token_ids: Tensor
    logprobs: LogprobReport | None
    done: torch.cuda.Event | None = None
    began: torch.cuda.Event | None = None
    before: torch.cuda.Event | None = None
    _ids: list[int] | None = field(default=None, repr=False)

    def tokens(self) -> list[int]:
        """The sampled token of every row; waits for the step."""
        if self._ids is None:
            if self.done is not None:
                self.done.synchronize()
            ids: list[int] = self.token_ids.tolist()
            self._ids = ids
        return self._ids

    def device_time(self) -> DeviceTime | None:
        """How long the GPU took, None on a CPU. Asked for behind `tokens`, when no more than one
        other step has been launched: the ring's events are used again."""
        if self.began is None or self.done is None:
            return None
        idle = None if self.before is None else self.before.elapsed_time(self.began)
        return DeviceTime(self.began.elapsed_time(self.done), idle)


class _Place:
    """One of the ring: pinned memory for the tokens of a step, and its two events."""

    def __init__(self, rows: int) -> None:
        self.host = torch.empty(rows, dtype=torch.int64, pin_memory=True)
        self.began, self.done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.result: StepResult | None = None


class ResultRing:
    """Where the results of `rows` at most go, each to the next place. On a CPU there is no ring, as
    there nothing is on its way."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._places = [_Place(rows) for _ in range(PLACES)] if device.type == "cuda" else []
        self._step = -1

    def begin(self) -> None:
        """The next step is launched behind what has been launched."""
        self._step += 1
        if self._places:
            place = self._places[self._step % PLACES]
            if place.result is not None:
                place.result.tokens()  # read by now, or it would be lost
            place.began.record()

    def end(self, tokens: Tensor, logprobs: LogprobReport | None) -> StepResult:
        """The step has been launched; its `tokens` are on their way."""
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
