"""The counters of an engine's steps: by mode and reason, by the reason for the number of their
prompt tokens, and by request; and by how much their times differed from the predicted ones.

Knows: what is counted of a step. Knows nothing of how a step is made or run, nor of who reads the
counts.
"""

from __future__ import annotations

from bisect import bisect_left

from minisrv.core.dispatcher import Dispatch
from minisrv.core.step import ScheduledRow, SchedulerOutput
from minisrv.engine.messages import BudgetCount, ErrorHistogram, StepCount
from minisrv.modes import BudgetReason

ERROR_BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Upper bounds of the buckets for relative errors of predicted times."""


class StepCounters:
    """Counts steps since the start of the engine, and the steps of each open request.

    The modes in which a request's steps ran are counted by "MODE/reason", to which "/compiled" is
    added for steps by compiled code. The steps of one batch are counted once, for all of its rows,
    and written to each request when another batch comes or a request ends.

    prefill_tokens: the number of prompt tokens that steps have computed.
    compiled_steps: the number of steps that ran by compiled code.
    """

    def __init__(self) -> None:
        self.prefill_tokens = 0
        self.compiled_steps = 0
        self._steps: dict[tuple[str, str], list[int]] = {}
        self._budgets: dict[BudgetReason, list[int]] = {}
        self._errors = [0] * (len(ERROR_BOUNDS) + 1)
        self._total_error = 0.0
        self._by_request: dict[str, dict[str, int]] = {}
        self._batch_id: int | None = None
        self._rows: list[ScheduledRow] = []
        self._pending: dict[str, int] = {}

    def open(self, request_id: str) -> None:
        """Register a request that has had no step."""
        self._by_request[request_id] = {}

    def count(self, step: SchedulerOutput, dispatch: Dispatch, *, compiled: bool) -> None:
        """Count a step that is launched; `compiled` says whether compiled code runs it."""
        mode, reason = dispatch.mode.name, dispatch.reason.value
        counts = self._steps.setdefault((mode, reason), [0, 0, 0])
        counts[0] += 1
        counts[1] += step.num_tokens
        counts[2] += dispatch.descriptor.num_tokens - step.num_tokens
        num_prefill_tokens = step.num_tokens - step.num_decodes
        self.prefill_tokens += num_prefill_tokens
        if step.budget_reason is not None:
            budget = self._budgets.setdefault(step.budget_reason, [0, 0])
            budget[0] += 1
            budget[1] += num_prefill_tokens
        self.compiled_steps += compiled
        if step.batch_id != self._batch_id:
            self._write()
            self._batch_id, self._rows = step.batch_id, step.batch_rows
        key = f"{mode}/{reason}{'/compiled' if compiled else ''}"
        self._pending[key] = self._pending.get(key, 0) + 1

    def count_error(self, predicted_ms: float, measured_ms: float) -> None:
        """Count by how much the time of a step differed from the predicted one."""
        error = abs(predicted_ms / measured_ms - 1)
        self._errors[bisect_left(ERROR_BOUNDS, error)] += 1
        self._total_error += error

    def close(self, request_id: str) -> dict[str, int]:
        """Return the counts of a request that has ended, and forget it. They include a step that is
        still in flight, whose token is dropped."""
        self._write()
        return self._by_request.pop(request_id)

    def steps(self) -> list[StepCount]:
        """Return the number of steps of each mode and reason."""
        return [StepCount(*key, *counts) for key, counts in self._steps.items()]

    def budgets(self) -> list[BudgetCount]:
        """Return the number of steps and of their prompt tokens for each reason."""
        return [BudgetCount(reason.value, *counts) for reason, counts in self._budgets.items()]

    def errors(self) -> ErrorHistogram:
        """Return the relative errors of the predicted times of steps."""
        return ErrorHistogram(ERROR_BOUNDS, tuple(self._errors), self._total_error)

    def _write(self) -> None:
        for key, steps in self._pending.items():
            for row in self._rows:
                counts = self._by_request.get(row.request_id)
                if counts is not None:  # None if it has ended
                    counts[key] = counts.get(key, 0) + steps
        self._pending = {}
