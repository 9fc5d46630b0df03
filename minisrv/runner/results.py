"""The result of a step, which reaches the host without making anybody wait.

Knows: the ring of pinned memory into which sampled tokens are copied, and the events, or on a CPU
the clock, that tell when a step began and ended on the device. Knows nothing of what a step
computes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minisrv.runner.logprobs import LogprobReport

RING_SIZE = 4
"""Number of entries in the ring. With one step launched ahead two are in use, and the events of the
step before them are still read."""


@dataclass(frozen=True)
class DeviceTime:
    """The time of a step on the device, in milliseconds.

    busy_ms: the time from its launch to its end, including a wait for grammar masks between its
        parts.
    idle_ms: the time from the end of the step before it to its launch, including copies of its
        inputs; None for the first step, and on a CPU.
    """

    busy_ms: float
    idle_ms: float | None


@dataclass(slots=True, eq=False)
class StepResult:
    """The result of a step that has been launched. Its values are copies, which later steps do not
    change.

    token_ids: [R] int64 on the host, valid once `tokens` has returned.
    logprobs: the log-probabilities; None if no row asked for any.
    end_event: the event at the end of the step; None where the host does the work itself.
    start_event: the event at the launch of the step.
    previous_end_event: the event at the end of the step before it.
    host_ms: the milliseconds from the launch of the step to its end, where the host does the work
        itself.
    """

    token_ids: Tensor
    logprobs: LogprobReport | None
    end_event: torch.cuda.Event | None = None
    start_event: torch.cuda.Event | None = None
    previous_end_event: torch.cuda.Event | None = None
    host_ms: float = 0.0
    _ids: list[list[int]] | None = field(default=None, repr=False)

    def tokens(self) -> list[list[int]]:
        """Return the sampled tokens of every row, one each, after waiting for the step."""
        if self._ids is None:
            if self.end_event is not None:
                self.end_event.synchronize()
            ids: list[list[int]] = self.token_ids.unsqueeze(1).tolist()
            self._ids = ids
        return self._ids

    def device_time(self) -> DeviceTime:
        """Return the time that the device took.

        It must be called after `tokens`, and before more than one other step has been launched: the
        events of the ring are reused.
        """
        if self.start_event is None or self.end_event is None:
            return DeviceTime(self.host_ms, None)
        previous_end = self.previous_end_event
        idle_ms = None if previous_end is None else previous_end.elapsed_time(self.start_event)
        return DeviceTime(self.start_event.elapsed_time(self.end_event), idle_ms)


class _RingEntry:
    """One entry of the ring: pinned memory for the tokens of a step, and its two events."""

    def __init__(self, rows: int) -> None:
        self.host_token_ids = torch.empty(rows, dtype=torch.int64, pin_memory=True)
        self.start_event, self.end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.result: StepResult | None = None


class ResultRing:
    """The ring into which results of at most `rows` rows go, each to the next place. On a CPU there
    is no ring, because results are complete at once."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._entries = (
            [_RingEntry(rows) for _ in range(RING_SIZE)] if device.type == "cuda" else []
        )
        self._step = -1
        self._began = 0.0

    def begin(self) -> None:
        """Begin the next step, which is launched after everything launched so far."""
        self._step += 1
        if self._entries:
            entry = self._entries[self._step % RING_SIZE]
            if entry.result is not None:
                entry.result.tokens()  # it has been read by now, or it would be lost
            entry.start_event.record()
        else:
            self._began = time.perf_counter()

    def end(self, tokens: Tensor, logprobs: LogprobReport | None) -> StepResult:
        """Return the result of the step, which has been launched; its `tokens` may still be on
        their way."""
        if not self._entries:
            host_ms = 1000 * (time.perf_counter() - self._began)
            return StepResult(tokens.clone(), logprobs, host_ms=host_ms)
        entry, previous = (self._entries[step % RING_SIZE] for step in (self._step, self._step - 1))
        host = entry.host_token_ids[: len(tokens)].copy_(tokens, non_blocking=True)
        entry.end_event.record()
        previous_end = None if previous.result is None else previous.end_event
        entry.result = StepResult(host, logprobs, entry.end_event, entry.start_event, previous_end)
        return entry.result
