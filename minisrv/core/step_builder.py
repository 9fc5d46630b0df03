"""Puts together one step from the requests that take part.

Knows: what a row says of its request, and how the progress of a request is counted when it gets a
row. Knows nothing of queues and blocks, nor of who takes part.
"""

from __future__ import annotations

from collections.abc import Sequence

from minisrv.core.attention_work import AttentionWork
from minisrv.core.budget import Chunk, PrefillBudget
from minisrv.core.request_state import RequestState
from minisrv.core.step import (
    LogitsProcessorData,
    NewRequestData,
    ScheduledRow,
    SchedulerOutput,
)
from minisrv.modes import BudgetReason


class StepBuilder:
    """Collects the rows of one step. Decode rows are added first, then the number of prefill tokens
    is set, or chosen by what they cost (`set_budget`), then prefill rows are added.

    num_prefill_tokens: the number of prefill tokens that may still be added.
    budget_reason: the reason for the chosen number, if it was chosen by what the tokens cost.
    """

    def __init__(self, step_id: int) -> None:
        self.step_id = step_id
        self.num_prefill_tokens = 0
        self.budget_reason: BudgetReason | None = None
        self.decodes: list[ScheduledRow] = []
        self.prefills: list[ScheduledRow] = []
        self.new_reqs: list[NewRequestData] = []
        self.new_blocks: list[tuple[int, int, int]] = []

    def set_budget(self, budget: PrefillBudget, chunks: Sequence[Chunk]) -> None:
        """Choose how many of the prompt tokens that wait are computed beside the decode rows."""
        context = AttentionWork.of(self.decodes).decode_context
        chosen = budget.choose(len(self.decodes), context, chunks)
        self.num_prefill_tokens, self.budget_reason = chosen.tokens, chosen.reason

    def add(self, request: RequestState) -> None:
        """Add the decode token of `request`, or as much of its prefill as the budget allows."""
        start = request.num_computed_tokens
        is_decode = request.is_decoding
        count = 1 if is_decode else min(self.num_prefill_tokens, request.prefill_target - start)
        samples_token = is_decode or start + count == request.prefill_target
        row = ScheduledRow(
            request_id=request.request_id,
            req_index=request.req_index,
            num_computed_tokens=start,
            num_tokens=count,
            token_ids=[] if is_decode else request.token_ids(start, start + count),
            is_decode=is_decode,
            samples_token=samples_token,
            num_logprobs=request.params.logprobs,
            use_structured_output=samples_token and request.use_structured_output,
            has_logits_processors=request.has_logits_processors,
            prompt_logprobs=request.next_prompt_logprobs(start, start + count),
        )
        (self.decodes if is_decode else self.prefills).append(row)
        request.num_computed_tokens += count
        request.num_in_flight += samples_token
        request.last_step_id = self.step_id
        self.num_prefill_tokens -= 0 if is_decode else count

    def _query_len(self) -> int | None:
        """Return the `query_len` of the step."""
        lengths = {row.num_tokens for row in self.decodes}
        return lengths.pop() if len(lengths) == 1 and not self.prefills else None

    def _reason(self) -> BudgetReason | None:
        """Return the `budget_reason` of the step."""
        if self.budget_reason is not None or not self.prefills:
            return self.budget_reason
        return BudgetReason.ALL_WAITING if self.num_prefill_tokens else BudgetReason.STEP_LIMIT

    def build(self, freed_req_indices: list[int]) -> SchedulerOutput | None:
        """Return the step, which is the first of a new batch; None if no request was added."""
        rows = self.decodes + self.prefills
        if not rows:
            return None
        return SchedulerOutput(
            step_id=self.step_id,
            batch_id=self.step_id,
            batch_rows=rows,
            new_reqs=self.new_reqs,
            new_blocks=self.new_blocks,
            num_decodes=len(self.decodes),
            num_tokens=sum(row.num_tokens for row in rows),
            query_len=self._query_len(),
            batch_work=AttentionWork.of(rows),
            budget_reason=self._reason(),
            freed_req_indices=freed_req_indices,
            needs_logits=any(
                row.num_logprobs is not None
                or row.has_logits_processors
                or row.prompt_logprobs is not None
                for row in rows
            ),
            has_structured_output_requests=any(row.use_structured_output for row in rows),
        )


def new_request_data(request: RequestState) -> NewRequestData:
    """Return what a step says of a request that it admits."""
    processors = None
    if request.has_logits_processors:
        output = list(request.output_token_ids)  # a copy, because the output of the request grows
        # For a request with a grammar, the mask implements `min_tokens`: it knows whether any other
        # token may follow.
        stops = frozenset[int]() if request.use_structured_output else request.stop_token_ids
        processors = LogitsProcessorData(request.prompt_token_ids, output, stops)
    return NewRequestData(request.req_index, request.params, request.seed, processors)
