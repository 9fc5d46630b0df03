"""The state of one request in the scheduler: its tokens, its blocks and request index, and its
progress.

Knows: numbers of tokens, including those in flight. Knows nothing of other requests nor of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minisrv.core.kv_cache import Salt, hash_block
from minisrv.core.step import PromptLogprobsRequest
from minisrv.request import SamplingParams


@dataclass(slots=True, eq=False)
class RequestState:
    """One request inside the scheduler.

    max_num_tokens: the number of prompt and completion tokens together at which it stops by length.
    priority: lower numbers come before higher ones; -inf once the scheduler has given the request a
        turn because it waited long.
    arrival_order: the position of the request in the order in which all requests first joined the
        waiting queue.
    use_structured_output: whether a grammar restricts its next token, which then depends on all its
        tokens so far.
    has_logits_processors: whether its logits are changed before its tokens are sampled.
    num_computed_tokens: the number of tokens whose cache entries are written once every scheduled
        step has run.
    num_in_flight: the number of tokens sampled by scheduled steps that have not been reported yet.
    prefill_target: the number of tokens that must be in the cache before the request decodes; all
        its tokens that were known when it was admitted.
    last_step_id: the id of the last step that uses its request index and blocks.
    block_hashes: the hashes of its first full blocks, as far as they have been needed.
    num_cached_blocks: the number of blocks, counted from the first, that are in the prefix cache
        because the request entered them or found them there.
    num_cached_tokens: the number of prompt tokens found in the prefix cache when the request was
        first admitted; None before that.
    num_scored_tokens: the number of prompt tokens whose results are reported by scheduled steps, or
        need not be.
    is_finished: whether it has its finish reason; tokens that steps in flight sample for it are
        dropped.

    While the request is a member of the current `DecodeRun`, num_computed_tokens, num_in_flight and
    last_step_id keep the values from the beginning of the run, until `Scheduler._end_run`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    max_num_tokens: int
    cache_salt: Salt = (None, None)
    priority: float = 0
    arrival_order: int = 0
    use_structured_output: bool = False
    has_logits_processors: bool = False
    output_token_ids: list[int] = field(default_factory=list)
    req_index: int = 0
    blocks: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    prefill_target: int = 0
    last_step_id: int = -1
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_blocks: int = 0
    num_cached_tokens: int | None = None
    num_scored_tokens: int = 0
    is_finished: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, including those in flight."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_in_flight

    @property
    def is_decoding(self) -> bool:
        """Whether its prefill is complete. This state, and not the shape of a step, decides whether
        a batch is pure decode."""
        return self.num_computed_tokens >= self.prefill_target

    @property
    def max_cache_hit_length(self) -> int:
        """Number of tokens, counted from the first, that need not be computed if they are cached.
        The last token is always computed, because its result is the next token; where
        results of the prompt are still due, so is every token from which one of them follows."""
        unscored = self.num_scored_tokens < self._num_to_score
        return self.num_scored_tokens if unscored else self.num_tokens - 1

    @property
    def _num_to_score(self) -> int:
        """Number of prompt tokens, counted from the first, whose results are reported."""
        if self.params.pooling is not None:
            return len(self.prompt_token_ids)
        return 0 if self.params.prompt_logprobs is None else len(self.prompt_token_ids) - 1

    def next_prompt_logprobs(self, start: int, stop: int) -> PromptLogprobsRequest | None:
        """Return the prompt tokens whose results a row of tokens `start` to `stop` has to report,
        or None, and count them as scored."""
        first, last = max(start, self.num_scored_tokens), min(stop, self._num_to_score)
        if first >= last:
            return None
        self.num_scored_tokens = last
        behind = self.params.pooling is None  # log-probabilities are those of the tokens behind
        token_ids = self.prompt_token_ids[first + behind : last + behind]
        return PromptLogprobsRequest(first - start, token_ids, self.params.prompt_logprobs)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Return the ids of the known tokens `start` to `stop`; positions count the prompt, then
        the output."""
        length = len(self.prompt_token_ids)
        output = self.output_token_ids[max(0, start - length) : max(0, stop - length)]
        return self.prompt_token_ids[start:stop] + output

    def get_block_hashes(self, count: int, block_size: int) -> list[bytes]:
        """Return the hashes of its first `count` blocks, whose tokens must be known. Each hash is
        computed once."""
        known = self.block_hashes
        while len(known) < count:
            start = len(known) * block_size
            parent = known[-1] if known else None
            ids = self.token_ids(start, start + block_size)
            known.append(hash_block(self.cache_salt, parent, ids))
        return known[:count]
