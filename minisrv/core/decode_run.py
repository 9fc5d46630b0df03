"""Steady decode: the same requests, a token further with each step.

Knows: at which step which of the requests fills a block. Knows nothing of queues, nor of when a run
ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.core.request_state import RequestState
from minisrv.core.step import SchedulerOutput


@dataclass(slots=True, eq=False)
class DecodeRun:
    """Steps of one batch of decode rows, one behind another.

    A step moves each request on by one token, so what has happened to all of them is one number,
    the run's age. By the phase of a request, its position within a block when the run began, it is
    known which of them fill a block at which age and which need another.

    first: the step with which it began.
    requests: in the order of the rows.
    phases: indices of requests by position within a block at age 0.
    oldest_age: at which some request has all its tokens scheduled.
    age: of the last step; the first one has 0.
    retired: steps of the run that have retired while it was the current one.
    """

    first: SchedulerOutput
    requests: list[RequestState]
    phases: list[list[int]]
    oldest_age: int
    age: int = 0
    retired: int = 0

    @classmethod
    def begin(
        cls, first: SchedulerOutput, requests: list[RequestState], block_size: int
    ) -> DecodeRun:
        """Begin with a step that has been scheduled and has a decode row for each request."""
        phases: list[list[int]] = [[] for _ in range(block_size)]
        for index, row in enumerate(first.batch_rows):
            phases[row.start % block_size].append(index)
        oldest = min(request.max_total - request.total for request in requests)
        return cls(first, requests, phases, oldest)

    def advance(self, step_id: int, new_blocks: list[tuple[int, int, int]]) -> SchedulerOutput:
        """Grow older by one, and return the step that does it."""
        self.age += 1
        first = self.first
        return SchedulerOutput(
            step_id=step_id,
            batch_id=first.batch_id,
            batch_rows=first.batch_rows,
            new_slots=[],
            new_blocks=new_blocks,
            num_decodes=first.num_decodes,
            num_tokens=first.num_tokens,
            needs_logits=first.needs_logits,
            masked=first.masked,
            advance=self.age,
        )

    def beginning_a_block(self, age: int) -> list[int]:
        """Indices of the requests whose token of that step is the first of a block."""
        return self.phases[-age % len(self.phases)]

    def filling_a_block(self, age: int) -> list[int]:
        """Indices of the requests whose token of that step is the last of a block."""
        return self.phases[(-age - 1) % len(self.phases)]
