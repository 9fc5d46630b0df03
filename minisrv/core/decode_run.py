"""Steady decode: consecutive steps of the same requests, each one token further.

Knows: which requests fill a block at which step. Knows nothing of queues, nor of when a run of such
steps ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.core.request_state import RequestState
from minisrv.core.step import SchedulerOutput


@dataclass(slots=True, eq=False)
class DecodeRun:
    """Consecutive steps of one batch in which every row decodes.

    Every step advances each request by one token, so a single number, the run's age, says how far
    all of them are. The phase of a request is its position within a block when the run began. From
    it follows at which age the request fills a block and at which it needs another.

    first: the step with which the run began.
    requests: the requests, in the order of the rows.
    phases: the indices of the requests, grouped by position within a block at age 0.
    oldest_age: the age at which the first of the requests has all its tokens scheduled.
    age: the age of the last step; the first step has age 0.
    retired: the number of steps of the run that were retired while the run was the current one.
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
        """Return a run that begins with `first`, a scheduled step that has a decode row of one
        token for each request."""
        phases: list[list[int]] = [[] for _ in range(block_size)]
        for index, row in enumerate(first.batch_rows):
            phases[row.start % block_size].append(index)
        oldest = min(request.max_total - request.total for request in requests)
        return cls(first, requests, phases, oldest)

    def advance(self, step_id: int, new_blocks: list[tuple[int, int, int]]) -> SchedulerOutput:
        """Increase the age by one and return the step of that age."""
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
            query_len=first.query_len,
        )

    def beginning_a_block(self, age: int) -> list[int]:
        """Return the indices of the requests whose token in the step of that age is the first of a
        block."""
        return self.phases[-age % len(self.phases)]

    def filling_a_block(self, age: int) -> list[int]:
        """Return the indices of the requests whose token in the step of that age is the last of a
        block."""
        return self.phases[(-age - 1) % len(self.phases)]
