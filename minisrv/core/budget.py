"""The prefill budget: how many prompt tokens the next step takes, as a pure function.

A step in which requests decode makes them wait for the prompts that share it, and makes those wait
that come meanwhile. A large share of prompt tokens uses the device better, because what a step
costs at least (weights, launches) is paid once for more tokens; from some size on a larger one
hardly helps. The budget takes the smallest share whose step computes nearly as many tokens per
millisecond as any (`MARGIN`), among those predicted to stay within the target, which is a bound for
the time between two tokens of a decoding request (inter-token latency, ITL).

What attention costs does not count there. A prompt's pairs of a query and a key cost the same in
whichever step they are computed, and a decode row reads its keys and values once for each token
that it generates, whatever is beside it. Where prompts wait all the time, the time of a request
is the number of steps for its prompt times what is left of a step's cost; this is what becomes
smaller with a better size.

Only sizes are tried that fill a step up to a captured size, so that no padding is computed while
prompt tokens wait, and all tokens that wait, if a step may have so many. A prompt that is alone,
beside no request that decodes, is computed in as few steps as possible. If no step with prompt
tokens stays within the target, prompts still advance, and decode steps become at most
`MOST_SLOWDOWN` times as long as the shortest step with prompt tokens.

Knows: predicted times, and how many prompt tokens wait behind how much history. Knows nothing of
requests, nor of how times are predicted (see `cost_model`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from minisrv.core.attention_work import NO_WORK, AttentionWork
from minisrv.modes import BudgetReason

MARGIN = 0.05
"""Share of the largest number of tokens per millisecond that a smaller step may lack to be
preferred."""

MOST_SLOWDOWN = 1.25
"""The longest step, as a multiple of the shortest with prompt tokens, where none stays within the
target."""

MIN_MS = 1e-6
"""The time below which no step is taken to be, in milliseconds."""

ITL_TARGET_STEPS = 32
"""Default target on a GPU, as a multiple of the step in which as many requests as possible decode
with short contexts. It leaves room for prompts that make good use of the device."""

PredictMs = Callable[[int, AttentionWork], float]
"""Predicts the milliseconds of a step with prefill from its number of tokens, before padding, and
the work of its attention."""


class Chunk(NamedTuple):
    """The tokens of one prompt that wait to be computed.

    num_computed_tokens: the number of tokens of the request before them.
    num_tokens: their number, at least 1.
    """

    num_computed_tokens: int
    num_tokens: int


class Budget(NamedTuple):
    """The number of prompt tokens that a step takes, the reason for it, and the predicted time of
    the step in milliseconds."""

    tokens: int
    reason: BudgetReason
    ms: float


class PrefillBudget:
    """Chooses the number of prompt tokens of each step.

    max_num_batched_tokens: the maximum number of tokens in a step, decode rows included.
    sizes: the numbers of tokens to which steps with prefill are filled, ascending.
    predict_ms: predicts the time of a step. Without it, steps are taken to cost nothing, and take
        as many tokens as they may have.
    itl_target_ms: the time in milliseconds that a step for which requests wait should not exceed;
        infinite for no target.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        *,
        sizes: Sequence[int] = (),
        predict_ms: PredictMs = lambda num_tokens, work: 0.0,
        itl_target_ms: float = math.inf,
    ) -> None:
        self.max_num_batched_tokens = max_num_batched_tokens
        self.itl_target_ms = itl_target_ms
        self.sizes = sizes
        self._predict_ms = predict_ms

    @property
    def has_target(self) -> bool:
        """Whether a step in which requests decode may have to take less than it could."""
        return math.isfinite(self.itl_target_ms)

    @property
    def target_or_zero(self) -> float:
        """The target in milliseconds; 0 for none."""
        return self.itl_target_ms if self.has_target else 0.0

    def choose(self, num_decodes: int, decode_context: int, chunks: Sequence[Chunk]) -> Budget:
        """Return how many of the waiting prompt tokens the next step takes.

        num_decodes: the number of decode rows in the step, which has room for more tokens.
        decode_context: the number of tokens whose keys and values they read together.
        chunks: the prompts that wait, at least one, in the order in which they are served. Those
            that a step cannot reach may be left out.
        """
        waiting = sum(chunk.num_tokens for chunk in chunks)
        most = min(waiting, self.max_num_batched_tokens - num_decodes)
        assert most > 0, "every request that runs fits a step"
        at_most = BudgetReason.ALL_WAITING if most == waiting else BudgetReason.STEP_LIMIT
        somebody_waits = num_decodes or len(chunks) > 1
        sizes = self.sizes if somebody_waits else ()
        steps = self._steps(sizes, num_decodes, decode_context, chunks, most)
        first = next(steps)
        limit_ms, over_limit = self.itl_target_ms, BudgetReason.ITL_TARGET
        if first.ms > limit_ms:
            limit_ms, over_limit = MOST_SLOWDOWN * first.ms, BudgetReason.OVER_ITL_TARGET
        allowed = [first]
        for step in steps:
            if step.ms > limit_ms:
                break
            allowed.append(step)
        fastest = max(step.tokens_per_ms for step in allowed)
        chosen = next(step for step in allowed if step.tokens_per_ms >= (1 - MARGIN) * fastest)
        last = allowed[-1]
        if last.tokens == waiting and chosen is not last:
            # What a smaller step leaves costs another step.
            rest = num_decodes + waiting - chosen.tokens
            rest_ms = self._shared_ms(rest, last.work, self._predict_ms(rest, last.work))
            if last.shared_ms < (1 - MARGIN) * (chosen.shared_ms + rest_ms):
                chosen = last
        if chosen.tokens == most:
            reason = at_most
        else:
            reason = BudgetReason.FAST_ENOUGH if chosen is not last else over_limit
        return Budget(chosen.tokens, reason, chosen.ms)

    def _steps(
        self,
        sizes: Sequence[int],
        num_decodes: int,
        decode_context: int,
        chunks: Sequence[Chunk],
        most: int,
    ) -> Iterator[_Step]:
        """Yield the steps that fill one of the sizes, the smallest first, and last the one with
        `most` prompt tokens."""
        filled = (size - num_decodes for size in sizes)
        remaining = iter(chunks)
        chunk = next(remaining)
        before, work_before = 0, AttentionWork(decode_context)  # of the chunks before this one
        for tokens in [*(tokens for tokens in filled if 0 < tokens < most), most]:
            while before + chunk.num_tokens < tokens:
                before += chunk.num_tokens
                work_before = work_before.beside(AttentionWork.of_chunk(*chunk))
                chunk = next(remaining)
            last = AttentionWork.of_chunk(chunk.num_computed_tokens, tokens - before)
            work = work_before.beside(last)
            size = num_decodes + tokens
            ms = self._predict_ms(size, work)
            shared_ms = self._shared_ms(size, work, ms)
            yield _Step(tokens, work, ms, shared_ms, size / shared_ms)

    def _shared_ms(self, size: int, work: AttentionWork, ms: float) -> float:
        """Return the predicted time of a step without the part in proportion to the work of its
        attention, in milliseconds; more than 0. What it takes longer than its pairs because of its
        longest prompt is a part of it.

        ms: the predicted time of the whole step.
        """
        in_proportion = self._predict_ms(size, work._replace(longest_prefill=0))
        return max(ms - in_proportion + self._predict_ms(size, NO_WORK), MIN_MS)


class _Step(NamedTuple):
    """A step that could be next.

    tokens: the number of its prompt tokens.
    work: the work of its attention.
    ms: its predicted time.
    shared_ms: the time that its tokens share (`PrefillBudget._shared_ms`).
    tokens_per_ms: its tokens, decode included, for each millisecond of that time.
    """

    tokens: int
    work: AttentionWork
    ms: float
    shared_ms: float
    tokens_per_ms: float
