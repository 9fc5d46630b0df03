"""One request as the scheduler has it: its tokens, its place in the cache, and how far it is.

Knows: counts of tokens, those in flight included. Knows nothing of other requests nor of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minisrv.core.kv_cache import Salt, hash_block
from minisrv.core.step import PromptScore
from minisrv.request import SamplingParams


@dataclass(slots=True, eq=False)
class RequestState:
    """One request inside the scheduler.

    num_scheduled: tokens whose cache entries are written once every scheduled step has run.
    num_in_flight: tokens sampled by scheduled steps that have not been reported yet.
    prefill_target: tokens to be in the cache before the request decodes; what was known of it
        when it was admitted.
    max_total: prompt and completion tokens together at which it stops by length.
    priority: lower numbers are before higher ones; -inf since its turn has come.
    number: of its place among all in the order in which they came to wait first.
    processed: its logits are changed before its tokens are sampled.
    last_step: the last step that names its slot and blocks.
    block_hashes: of its first full blocks, as far as they have been needed.
    num_published: blocks from the first that are in the prefix cache, or were found there.
    num_cached_tokens: prompt tokens found there when it was first admitted; None before.
    masked: its next token is one of some that follow from all its tokens.
    num_scored: prompt tokens behind the first whose log-probabilities scheduled steps report.
    ended: it has its finish reason; what steps in flight sample for it is dropped.

    Of a member of the current `DecodeRun`, num_scheduled, num_in_flight and last_step are what they
    were when the run began, until `Scheduler._settle`.
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    max_total: int
    cache_salt: Salt = (None, None)
    priority: float = 0
    number: int = 0
    masked: bool = False
    processed: bool = False
    output: list[int] = field(default_factory=list)
    slot: int = 0
    blocks: list[int] = field(default_factory=list)
    num_scheduled: int = 0
    num_in_flight: int = 0
    prefill_target: int = 0
    last_step: int = -1
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached_tokens: int | None = None
    num_scored: int = 0
    ended: bool = False

    @property
    def total(self) -> int:
        """Tokens so far, those in flight included."""
        return len(self.prompt) + len(self.output) + self.num_in_flight

    @property
    def decoding(self) -> bool:
        """Whether the prefill is behind it. This state, not the shape of a step, is what makes a
        batch pure decode."""
        return self.num_scheduled >= self.prefill_target

    @property
    def num_skippable(self) -> int:
        """Tokens from the first that need not be computed if they are cached: of the last the
        result is the next token, and of others the next one's log-probability may be due."""
        unscored = self.params.prompt_logprobs is not None and (
            self.num_scored < len(self.prompt) - 1
        )
        return self.num_scored if unscored else self.total - 1

    def score(self, start: int, stop: int) -> PromptScore | None:
        """What a row of tokens `start` to `stop` is to report of the prompt; then it is scored."""
        num_top = self.params.prompt_logprobs
        if num_top is None:
            return None
        first, last = max(start, self.num_scored), min(stop, len(self.prompt) - 1)
        if first >= last:
            return None
        self.num_scored = last
        return PromptScore(first - start, self.prompt[first + 1 : last + 1], num_top)

    def tokens(self, start: int, stop: int) -> list[int]:
        """The ids of known tokens `start` to `stop`, prompt and output counted through."""
        behind = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(0, start - behind) : max(0, stop - behind)]

    def hashes(self, count: int, block_size: int) -> list[bytes]:
        """The hashes of its first `count` blocks, whose tokens are known; each is computed once."""
        known = self.block_hashes
        while len(known) < count:
            start = len(known) * block_size
            parent = known[-1] if known else None
            ids = self.tokens(start, start + block_size)
            known.append(hash_block(self.cache_salt, parent, ids))
        return known[:count]
