"""A step as the scheduler hands it out: plain data.

Nothing here refers to a request object, a queue or a tensor, so a step could be sent to another
process as it is. Knows: the shape of a step. Knows nothing of who makes it or runs it.
"""

from __future__ import annotations

from itertools import count

import msgspec

from minisrv.core.attention_work import NO_WORK, AttentionWork
from minisrv.modes import BudgetReason
from minisrv.request import SamplingParams


class PromptLogprobsRequest(msgspec.Struct, frozen=True):
    """The prompt tokens whose log-probabilities, or hidden states, a row has to report.

    offset: the index, within the row, of the token before the first of them, or of the first.
    token_ids: their ids, which are consecutive in the prompt. The last may be the first token of
        the next chunk.
    num_logprobs: the number of alternatives to report for each; None for the sum of hidden states.
    """

    offset: int
    token_ids: list[int]
    num_logprobs: int | None


class ScheduledRow(msgspec.Struct, frozen=True):
    """One request's part of a step.

    num_computed_tokens: the number of tokens before its own, which is the position of its first
        token.
    num_tokens: the number of tokens that it computes.
    token_ids: their ids, for prefill. Empty for decode: the token is already on the device, and the
        host does not know it yet if the step is launched ahead.
    samples_token: whether the token that the step samples for this row is the request's next token.
        For a prefill chunk that does not reach the end of the prompt it is not, and is ignored.
    num_logprobs: the number of alternatives to report besides the sampled token; None for no
        report.
    use_structured_output: whether a grammar restricts the sampled token, depending on all earlier
        tokens of the request.
    has_logits_processors: whether its logits are changed before its token is sampled.
    prompt_logprobs: the prompt tokens whose log-probabilities it has to report; None for none.
    """

    request_id: str
    req_index: int
    num_computed_tokens: int
    num_tokens: int
    token_ids: list[int]
    is_decode: bool
    samples_token: bool
    num_logprobs: int | None
    use_structured_output: bool = False
    has_logits_processors: bool = False
    prompt_logprobs: PromptLogprobsRequest | None = None


class LogitsProcessorData(msgspec.Struct, frozen=True):
    """The data needed to change the logits of a request.

    prompt_token_ids, output_token_ids: its tokens so far, all of which are known when it is given a
        request index.
    stop_token_ids: the tokens that must not be sampled before `min_tokens`.
    """

    prompt_token_ids: list[int]
    output_token_ids: list[int]
    stop_token_ids: frozenset[int]


class NewRequestData(msgspec.Struct, frozen=True):
    """A request that has been given a request index. Its sampling parameters must be written before
    the step.

    logits_processors: the data for changing the request's logits; None if they are not changed.
    """

    req_index: int
    params: SamplingParams
    seed: int
    logits_processors: LogitsProcessorData | None = None


class SchedulerOutput(msgspec.Struct, frozen=True):
    """One step. Decode rows come first.

    A batch is a list of rows. All steps of one batch have the same requests in the same order, and
    each step is further in every request than the step before.

    batch_id: the id of the batch. Steps with the same one differ in their progress only, and in
        nothing else that `batch_rows` says.
    batch_rows: the rows as they are in the first step of the batch.
    position_offset: the number of tokens by which every row is further than in the first step of
        the batch; 0 in that step.
    new_reqs: the requests whose sampling parameters must be written before the step.
    freed_req_indices: the request indices that have become free since the last such list, of
        requests with `logits_processors`; this step may already use them for other requests.
    new_blocks: (request index, index in its block table, block) entries to be written before the
        step.
    needs_logits: whether the logits of some request are read or changed outside the graph.
    has_structured_output_requests: whether a grammar restricts some row, whose allowed tokens the
        host finds out from the request's last token.
    query_len: the number of tokens of each row, if every request is decoding and has as many; None
        for any other batch.
    batch_work: the work of attention in the first step of the batch.
    budget_reason: why the step has as many prompt tokens as it has; None if none waited that could
        be computed.
    """

    step_id: int
    batch_id: int
    batch_rows: list[ScheduledRow]
    new_reqs: list[NewRequestData]
    new_blocks: list[tuple[int, int, int]]
    num_decodes: int
    num_tokens: int
    freed_req_indices: list[int] = []
    needs_logits: bool = False
    has_structured_output_requests: bool = False
    position_offset: int = 0
    query_len: int | None = None
    batch_work: AttentionWork = NO_WORK
    budget_reason: BudgetReason | None = None

    @property
    def work(self) -> AttentionWork:
        """The work of attention in this step. Only a batch of decode rows has later steps."""
        return self.batch_work.reading(self.position_offset * self.num_rows)

    @property
    def num_rows(self) -> int:
        """Number of requests that take part."""
        return len(self.batch_rows)

    @property
    def rows(self) -> list[ScheduledRow]:
        """The rows as they are in this step. They are made whenever they are asked for, which is
        rare."""
        if not self.position_offset:
            return self.batch_rows
        return [
            msgspec.structs.replace(
                row, num_computed_tokens=row.num_computed_tokens + self.position_offset
            )
            for row in self.batch_rows
        ]


_unscheduled = count(-1, -1)


def unscheduled_id() -> int:
    """Return a step or batch id that no other step has, for a step that does not come from a
    scheduler, such as one on which a graph is captured or tested."""
    return next(_unscheduled)
