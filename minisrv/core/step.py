"""A step as the scheduler hands it out: plain data.

Nothing here refers to a request object, a queue or a tensor, so a step could be sent to another
process as it is. Knows: the shape of a step. Knows nothing of who makes it or runs it.
"""

from __future__ import annotations

from itertools import count

import msgspec

from minisrv.request import SamplingParams


class PromptScore(msgspec.Struct, frozen=True):
    """The prompt tokens whose log-probabilities a row has to report.

    offset: the index, within the row, of the token that stands before the first of them.
    token_ids: their ids, which are consecutive in the prompt. The last may be the first token of
        the next chunk.
    num_top: the number of alternatives to report for each.
    """

    offset: int
    token_ids: list[int]
    num_top: int


class ScheduledRow(msgspec.Struct, frozen=True):
    """One request's part of a step.

    start: the position of its first token.
    num_tokens: the number of tokens that it computes.
    token_ids: their ids, for prefill. Empty for decode: the token is already on the device, and the
        host does not know it yet if the step is launched ahead.
    samples: whether the token that the step samples for this row is the request's next token. For a
        prefill chunk that does not reach the end of the prompt it is not, and is ignored.
    logprobs: the number of alternatives to report besides the sampled token; None for no report.
    masked: whether a grammar restricts the sampled token, depending on all earlier tokens of the
        request.
    processed: whether its logits are changed before its token is sampled.
    score: the prompt tokens whose log-probabilities it has to report.
    """

    request_id: str
    slot: int
    start: int
    num_tokens: int
    token_ids: list[int]
    decoding: bool
    samples: bool
    logprobs: int | None
    masked: bool = False
    processed: bool = False
    score: PromptScore | None = None


class ProcessorStart(msgspec.Struct, frozen=True):
    """The data needed to change the logits of a request.

    prompt, output: its tokens so far, all of which are known when it is given a slot.
    stop_token_ids: the tokens that must not be sampled before `min_tokens`.
    """

    prompt: list[int]
    output: list[int]
    stop_token_ids: frozenset[int]


class SlotStart(msgspec.Struct, frozen=True):
    """A slot that has a new request. Its sampling state must be written before the step.

    processors: the data for changing the request's logits; None if they are not changed.
    """

    slot: int
    params: SamplingParams
    seed: int
    processors: ProcessorStart | None = None


class SchedulerOutput(msgspec.Struct, frozen=True):
    """One step. Decode rows come first.

    A batch is a list of rows. All steps of one batch have the same requests in the same order, and
    each step is further in every request than the step before.

    batch_id: the id of the batch. Steps with the same one differ in their progress only, and in
        nothing else that `batch_rows` says.
    batch_rows: the rows as they are in the first step of the batch.
    advance: the number of tokens by which every row is further than in the first step of the batch;
        0 in that step.
    new_slots: the slots whose state must be written before the step.
    freed_slots: the slots with `processors` that have become free since the last such list; this
        step may already use them for other requests.
    new_blocks: (slot, index in its block table, block) entries to be written before the step.
    needs_logits: whether the logits of some request are read or changed outside the graph.
    masked: whether a grammar restricts some row, whose allowed tokens the host finds out from the
        request's last token.
    query_len: the number of tokens of each row, if every request is decoding and has as many; None
        for any other batch.
    """

    step_id: int
    batch_id: int
    batch_rows: list[ScheduledRow]
    new_slots: list[SlotStart]
    new_blocks: list[tuple[int, int, int]]
    num_decodes: int
    num_tokens: int
    freed_slots: list[int] = []
    needs_logits: bool = False
    masked: bool = False
    advance: int = 0
    query_len: int | None = None

    @property
    def num_rows(self) -> int:
        """Number of requests that take part."""
        return len(self.batch_rows)

    @property
    def rows(self) -> list[ScheduledRow]:
        """The rows as they are in this step. They are made whenever they are asked for, which is
        rare."""
        if not self.advance:
            return self.batch_rows
        return [
            msgspec.structs.replace(row, start=row.start + self.advance) for row in self.batch_rows
        ]


_unscheduled = count(-1, -1)


def unscheduled_id() -> int:
    """Return a step or batch id that no other step has, for a step that does not come from a
    scheduler, such as one on which a graph is captured or tested."""
    return next(_unscheduled)
