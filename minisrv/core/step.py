"""A step as the scheduler hands it out, and what comes back from it: plain data.

Nothing here refers to a request, a queue or a tensor, so a step could go to another process as it
is. Knows: the shape of a step. Knows nothing of who makes it or runs it.
"""

from __future__ import annotations

from itertools import count

import msgspec

from minisrv.request import FinishReason, SamplingParams


class PromptScore(msgspec.Struct, frozen=True):
    """Prompt tokens whose log-probabilities a row is to report.

    offset: of the row's token behind which the first of them stands.
    token_ids: themselves, one behind the other. The last may be the first of the next chunk.
    num_top: how many alternatives to report beside each.
    """

    offset: int
    token_ids: list[int]
    num_top: int


class ScheduledRow(msgspec.Struct, frozen=True):
    """One request's part of a step.

    start: position of its first token.
    num_tokens: tokens it computes.
    token_ids: their ids, for prefill. Empty for decode: the device has sampled it already, and
        under lag the host does not know it yet.
    samples: whether the step's token for this row is the request's next; a prefill chunk that
        does not reach the end samples for nothing.
    logprobs: how many alternatives to report beside the sampled token; None for no report.
    masked: it samples one of some tokens, which follow from all tokens of the request before.
    processed: its logits are changed before its token is sampled.
    score: what it is to report of the prompt.
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
    """What changing a request's logits needs to know of it: its tokens so far, all of which are
    known when it is given a slot, and those that do not come before `min_tokens`."""

    prompt: list[int]
    output: list[int]
    stop_token_ids: frozenset[int]


class SlotStart(msgspec.Struct, frozen=True):
    """A slot changed hands: its sampling state is to be written before the step.

    processors: None for a request whose logits stay as they are.
    """

    slot: int
    params: SamplingParams
    seed: int
    processors: ProcessorStart | None = None


class SchedulerOutput(msgspec.Struct, frozen=True):
    """One step. Decode rows come first.

    A batch is a list of rows. The steps of one batch have the same requests in the same order, and
    in each of them every request is further than in the one before.

    batch_id: names the batch: steps with the same one differ in how far they are, and in nothing
        else that `batch_rows` says.
    batch_rows: the rows as they are in the batch's first step.
    advance: tokens by which every row is further than in the batch's first step; 0 in that one.
    new_slots: slots whose state must be written before the step.
    freed_slots: those with `processors` that nobody has had since some step before it, or that
        change hands with it.
    new_blocks: (slot, index in its block table, block) to be written before the step.
    needs_logits: some request has its logits read or changed outside the graph.
    masked: some row is: what it may sample follows from its last token, on the host.
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

    @property
    def num_rows(self) -> int:
        """How many requests take part."""
        return len(self.batch_rows)

    @property
    def rows(self) -> list[ScheduledRow]:
        """The rows as they are in this step. They are made when asked for, which is seldom."""
        if not self.advance:
            return self.batch_rows
        return [
            msgspec.structs.replace(row, start=row.start + self.advance) for row in self.batch_rows
        ]

    @property
    def uniform_decode(self) -> bool:
        """Whether every request of the step is decoding."""
        return self.num_decodes == len(self.batch_rows)


_unscheduled = count(-1, -1)


def unscheduled_id() -> int:
    """A step or batch id that nothing else has, for a step that no scheduler has made, such as the
    one a graph is captured or tried on."""
    return next(_unscheduled)


class TokenEvent(msgspec.Struct, frozen=True, gc=False):
    """What a step added to one request. `token` is None for an abort, for a request that asked for
    no token, and where there is nothing but a report of the prompt.

    row: index of the step's row it comes from; None for an abort.
    num_cached_tokens: with the request's first token, how much of its prompt was not computed.
    """

    request_id: str
    token: int | None
    finish_reason: FinishReason | None
    row: int | None = None
    num_cached_tokens: int = 0
