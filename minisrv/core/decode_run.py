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

    Every step advances each request by one token, so a single number, the index of the step within
    the run, says how far all of them are. In which steps a request fills a block and needs another
    follows from its position within a block in the first step.

    first_step: the step with which the run began.
    requests: the requests, in the order of the rows.
    rows_by_block_offset: the indices of the rows, grouped by position within a block in the first
        step.
    last_step_index: the index of the step in which the first of the requests has all its tokens
        scheduled.
    step_index: the index within the run of the last step; the first step has index 0.
    num_retired_steps: the number of steps of the run that were retired while the run was the
        current one.
    """

    first_step: SchedulerOutput
    requests: list[RequestState]
    rows_by_block_offset: list[list[int]]
    last_step_index: int
    step_index: int = 0
    num_retired_steps: int = 0

    @classmethod
    def begin(
        cls, first_step: SchedulerOutput, requests: list[RequestState], block_size: int
    ) -> DecodeRun:
        """Return a run that begins with `first_step`, a scheduled step that has a decode row of one
        token for each request."""
        rows_by_block_offset: list[list[int]] = [[] for _ in range(block_size)]
        for index, row in enumerate(first_step.batch_rows):
            rows_by_block_offset[row.num_computed_tokens % block_size].append(index)
        last_step_index = min(request.max_num_tokens - request.num_tokens for request in requests)
        return cls(first_step, requests, rows_by_block_offset, last_step_index)

    def next_step(self, step_id: int, new_blocks: list[tuple[int, int, int]]) -> SchedulerOutput:
        """Return the step that follows the last one."""
        self.step_index += 1
        first_step = self.first_step
        return SchedulerOutput(
            step_id=step_id,
            batch_id=first_step.batch_id,
            batch_rows=first_step.batch_rows,
            new_reqs=[],
            new_blocks=new_blocks,
            num_decodes=first_step.num_decodes,
            num_tokens=first_step.num_tokens,
            needs_logits=first_step.needs_logits,
            has_structured_output_requests=first_step.has_structured_output_requests,
            position_offset=self.step_index,
            query_len=first_step.query_len,
            batch_work=first_step.batch_work,
        )

    def rows_starting_a_block(self, step_index: int) -> list[int]:
        """Return the indices of the rows whose token in that step is the first of a block."""
        return self.rows_by_block_offset[-step_index % len(self.rows_by_block_offset)]

    def rows_filling_a_block(self, step_index: int) -> list[int]:
        """Return the indices of the rows whose token in that step is the last of a block."""
        return self.rows_by_block_offset[(-step_index - 1) % len(self.rows_by_block_offset)]
