"""Continuous batching: which requests run in the next step, and with how many tokens.

Knows: requests, their tokens, request indices and blocks, what the prefix cache has of them, and
which steps are in flight. It hands out steps (`schedule`) and takes their sampled tokens back
(`update`), at once or one step late: with one step launched ahead, the host prepares step N+1 while
step N runs. Knows nothing of tensors, of graphs, of text or of sockets.

Policy, by priority, and first come first served among equals:
- every decoding request gets one token; then as many prompt tokens as the prefill budget says
  (`budget`) are computed, in chunks, the oldest request first; waiting requests come last;
- a request gets the blocks of its whole prompt when it is admitted, and one more whenever it has
  filled its last one. Blocks of its beginning that the prefix cache has are shared, not computed,
  and those that a running request computes now are waited for. At least one token is computed,
  because its result is the next token, and its cache entry goes to a block that the request does
  not share;
- when no block is free, the last of the running requests is preempted, which is the newest among
  the least important: its blocks are freed, and its tokens are later computed again or found in
  the prefix cache. So the first request always advances, and with it the whole queue. No request
  is preempted to make room for a waiting one;
- no request waits for ever: when more important requests have been admitted before others, or
  others have been preempted for them, `MAX_OVERTAKES` times, the oldest waiting request gets a
  turn. From then on it comes before all requests that have had no turn, waiting and running, and is
  preempted only for requests whose turn came earlier. So at most `MAX_OVERTAKES` requests that come
  later are admitted before a request for each request that was there when it came, and
  `MAX_OVERTAKES` more.

In steady decode, which is most of the time, the next step is the previous one with every request
one token further: a `DecodeRun` hands it out and looks only at requests that need a block.

Invariants while steps are launched ahead: request indices and blocks become free only when the last
step that uses them has retired; a request that a step in flight uses is not preempted; a stop by
length is known in advance, while a stop by token is seen one step late, and whatever was sampled
after it is dropped; a full block enters the prefix cache when the step that filled it retires, so
its tokens are known and its entries are written. A block that is shared or can be found in the
prefix cache is never written.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import MutableSequence, Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from minisrv.core.budget import Chunk, PrefillBudget
from minisrv.core.decode_run import DecodeRun
from minisrv.core.kv_cache import BlockPool, FreeList
from minisrv.core.request_state import RequestState
from minisrv.core.step import SchedulerOutput
from minisrv.core.step_builder import StepBuilder, new_request_data
from minisrv.errors import QueueFullError
from minisrv.request import EngineOutput, EngineRequest, FinishReason, Pooling

MAX_OVERTAKES = 8
"""Number of times that more important requests go before others until the oldest waiting request
gets a turn."""


class _InFlight(NamedTuple):
    """A step that has not retired, and the run of decode steps that it belongs to, if any."""

    step: SchedulerOutput
    run: DecodeRun | None


class Scheduler:
    """The scheduler; the docstring of the module states its policy.

    All calls come from one thread. `schedule` returns a step, and `update` retires the oldest step
    that has not been retired.

    block_pool: the blocks of the KV cache.
    budget: chooses the number of prompt tokens of each step.
    max_num_seqs: the maximum number of running requests.
    max_model_len: the maximum number of tokens of a request, prompt and completion together.
    max_waiting: the maximum number of requests beyond `max_num_seqs`.
    eos_token_ids: the end-of-sequence tokens of the model.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        budget: PrefillBudget,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_waiting: int,
        eos_token_ids: Sequence[int] = (),
        enable_prefix_caching: bool = True,
    ) -> None:
        self.block_pool = block_pool
        self.budget = budget
        self.enable_prefix_caching = enable_prefix_caching
        self.req_indices = FreeList(max_num_seqs + 1)
        self.max_model_len = max_model_len
        self.max_waiting = max_waiting
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[RequestState] = deque()
        self.waiting_for_grammar: dict[str, RequestState] = {}
        self.running: list[RequestState] = []
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._retiring: list[RequestState] = []
        self._freed_req_indices: list[int] = []
        self._requests: dict[str, RequestState] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._next_step = 0
        self._num_queued = 0
        self._num_overtakes = 0
        self._run: DecodeRun | None = None

    # ---- requests ----------------------------------------------------------------------------

    def add(self, request: EngineRequest, seed: int, *, waiting_for_grammar: bool = False) -> None:
        """Queue a request, which must fit the context and the whole cache.

        seed: the seed of its sampling noise. The caller draws it if the request has none; it stays
            the same through preemptions.
        waiting_for_grammar: whether its grammar is not compiled yet. The request then counts as
            waiting, but cannot run until `grammar_ready` is called.

        Raises QueueFullError when too many wait.
        """
        assert request.request_id not in self._requests, "request ids are unique"
        if not self.has_room:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting, and {self.max_waiting} may; "
                "try again later."
            )
        params = request.params
        num_prompt, max_tokens = len(request.prompt_token_ids), params.max_tokens
        limit = min(self.max_model_len, self.block_pool.capacity)
        assert num_prompt, "a request has a prompt"
        assert num_prompt + (1 if max_tokens is None else max_tokens) <= limit, "a request fits"
        stop_token_ids = frozenset(params.stop_token_ids).union(
            () if params.ignore_eos else self.eos_token_ids
        )
        use_structured_output = request.structured_output is not None
        state = RequestState(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            params=params,
            seed=seed,
            stop_token_ids=stop_token_ids,
            max_num_tokens=limit if max_tokens is None else num_prompt + max_tokens,
            cache_salt=(request.api_key_index, request.cache_salt),
            priority=request.priority,
            use_structured_output=use_structured_output,
            num_scored_tokens=num_prompt - 1 if params.pooling is Pooling.LAST else 0,
            has_logits_processors=bool(
                params.changes_logits
                or (params.min_tokens and stop_token_ids and not use_structured_output)
            ),
        )
        self._requests[state.request_id] = state
        if waiting_for_grammar:
            self.waiting_for_grammar[state.request_id] = state
        else:
            self._enqueue(state)

    def grammar_ready(self, request_id: str) -> None:
        """Let a request that waited for its grammar, and has not ended, join the waiting queue."""
        self._enqueue(self.waiting_for_grammar.pop(request_id))

    def _enqueue(self, request: RequestState) -> None:
        self._num_queued += 1
        request.arrival_order = self._num_queued
        _insert_by_priority(self.waiting, request)

    @property
    def has_room(self) -> bool:
        """Whether another request may be queued. Waiting requests for which a request index is free
        do not count against `max_waiting`, and a request index counts as free as soon as its
        request has ended, even if a step in flight still uses it."""
        return len(self._requests) < self.max_waiting + self.req_indices.total - 1

    def abort(self, request_id: str) -> EngineOutput | None:
        """Drop a request and return its last output, or None if it has ended already.

        Tokens that its steps in flight sample are dropped, and its request index and blocks become
        free when these steps have retired.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        if request.req_index:
            self._finish_running(request)
        else:
            if not self.waiting_for_grammar.pop(request_id, None):
                self.waiting.remove(request)
            self._finish(request)
        return EngineOutput(request_id, finish_reason=FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether there is a request that has not ended."""
        return bool(self._requests)

    # ---- steps -------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Return the next step, or None if nothing can run before a step in flight is retired."""
        output = self._continue_run() or self._schedule_new_batch()
        if output is not None:
            self._next_step += 1
            self._in_flight.append(_InFlight(output, self._run))
        return output

    def _continue_run(self) -> SchedulerOutput | None:
        """Return the next step of the current run of decode steps, or None if there is no run or
        the next step cannot be the same batch: a request is at its maximum length, a waiting
        request can be admitted, or blocks are missing."""
        run = self._run
        if (
            run is None
            or run.step_index == run.last_step_index
            or self._cached_blocks_of_next() is not None
        ):
            return None
        rows = run.rows_starting_a_block(run.step_index + 1)
        if len(rows) > self.block_pool.num_free:
            return None
        new_blocks = []
        for index in rows:
            request = run.requests[index]
            column = len(request.blocks)
            new_blocks.append((request.req_index, column, self._allocate_block(request)))
        return run.next_step(self._next_step, new_blocks)

    def _schedule_new_batch(self) -> SchedulerOutput | None:
        self._end_run()
        step = StepBuilder(self._next_step)
        to_preempt = self._schedule_decodes(step)
        prefills = [r for r in self.running if not (r.is_decoding or r is to_preempt)]
        step.num_prefill_tokens = self.budget.max_num_batched_tokens - len(step.decodes)
        somebody_waits = step.decodes or len(prefills) + len(self.waiting) > 1
        if somebody_waits and self.budget.has_target:
            self._choose_budget(step, prefills)
        for request in prefills:
            if step.num_prefill_tokens:
                step.add(request)
        # The request admitted here is never one that was preempted in this step: what that one
        # freed is less than it needs.
        self._admit(step)
        output = step.build(self._freed_req_indices)
        if output is not None:
            self._freed_req_indices = []
            if output.query_len == 1 and output.num_rows == len(self.running):
                self._run = DecodeRun.begin(output, [*self.running], self.block_pool.block_size)
        return output

    def _end_run(self) -> None:
        """End the current run: write the progress that its requests have in common to each of
        them."""
        run, self._run = self._run, None
        if run is not None:
            for request in run.requests:
                request.num_computed_tokens += run.step_index
                request.num_in_flight += run.step_index - run.num_retired_steps
                request.last_step_id += run.step_index

    def _schedule_decodes(self, step: StepBuilder) -> RequestState | None:
        """Add a decode row for every decoding request that gets a block for its next token, and
        preempt the newest requests where no block is free.

        Returns the request that does not take part in this step so that it can be preempted in the
        next one, or None.
        """
        to_preempt: RequestState | None = None
        for request in list(self.running):
            if not request.req_index or not request.is_decoding or request is to_preempt:
                continue
            if request.num_tokens >= request.max_num_tokens:
                continue  # its last token is in flight
            if request.num_tokens > len(request.blocks) * self.block_pool.block_size:
                while request.req_index and not self.block_pool.num_free and to_preempt is None:
                    newest = self.running[-1]
                    if self._is_in_flight(newest):
                        to_preempt = newest
                    else:
                        self._preempt(newest)
                if not request.req_index or not self.block_pool.num_free:
                    continue
                column = len(request.blocks)
                step.new_blocks.append((request.req_index, column, self._allocate_block(request)))
            step.add(request)
        return to_preempt

    def _is_in_flight(self, request: RequestState) -> bool:
        return bool(self._in_flight) and request.last_step_id >= self._in_flight[0].step.step_id

    def _choose_budget(self, step: StepBuilder, prefills: Sequence[RequestState]) -> None:
        """Let the budget choose the number of prompt tokens, from those of the requests in prefill
        and of those that can be admitted."""
        chunks = [
            Chunk(request.num_computed_tokens, request.prefill_target - request.num_computed_tokens)
            for request in prefills
        ]
        most = step.num_prefill_tokens - sum(chunk.num_tokens for chunk in chunks)
        if most > 0 and self.req_indices.num_free:
            self._give_turn_if_due()
            chunks += self._admissible_chunks(most)
        if chunks:
            step.set_budget(self.budget, chunks)
        else:
            step.num_prefill_tokens = 0

    def _admissible_chunks(self, most: int) -> list[Chunk]:
        """Return the prompts of the waiting requests that could be admitted now: the first of them
        that have `most` tokens together."""
        chunks: list[Chunk] = []
        others, num_free = [*self.running], self.block_pool.num_free
        for request in islice(self.waiting, self.req_indices.num_free):
            cached_blocks = self._blocks_to_share(request, others, num_free) if most > 0 else None
            if cached_blocks is None:
                break
            start = len(cached_blocks) * self.block_pool.block_size
            chunks.append(Chunk(start, request.num_tokens - start))
            num_free -= self._num_blocks_needed(request, cached_blocks)
            most -= chunks[-1].num_tokens
            others.append(request)
        return chunks

    def _num_blocks_needed(self, request: RequestState, cached_blocks: Sequence[int]) -> int:
        """Return by how much the number of free blocks falls when a request is admitted. A cached
        block that nobody holds is itself free, so these are all its blocks but those that others
        already hold."""
        num_in_use = sum(map(self.block_pool.is_in_use, cached_blocks))
        return self.block_pool.num_blocks_for(request.num_tokens) - num_in_use

    def _cached_blocks_of_next(self) -> list[int] | None:
        """Return the cached blocks of the request that is admitted next; None if none can be."""
        if not self.waiting or not self.req_indices.num_free:
            return None
        self._give_turn_if_due()
        return self._blocks_to_share(self.waiting[0], self.running, self.block_pool.num_free)

    def _admit(self, step: StepBuilder) -> None:
        while step.num_prefill_tokens and (cached := self._cached_blocks_of_next()) is not None:
            request = self.waiting.popleft()
            if self.waiting and request.priority < self.waiting[-1].priority:
                self._num_overtakes += 1
            _insert_by_priority(self.running, request)
            request.req_index = self.req_indices.allocate()
            request.prefill_target = request.num_tokens
            step.new_reqs.append(new_request_data(request))
            self._use_cached_blocks(request, cached)
            while len(request.blocks) < self.block_pool.num_blocks_for(request.prefill_target):
                self._allocate_block(request)
            step.new_blocks += [(request.req_index, i, b) for i, b in enumerate(request.blocks)]
            step.add(request)

    def _give_turn_if_due(self) -> None:
        """After `MAX_OVERTAKES` overtakes, put the oldest waiting request that has had no turn
        before all requests that have had none."""
        if self._num_overtakes < MAX_OVERTAKES:
            return
        self._num_overtakes = 0
        others = [request for request in self.waiting if request.priority > -math.inf]
        if oldest := min(others, key=attrgetter("arrival_order"), default=None):
            self.waiting.remove(oldest)
            oldest.priority = -math.inf
            _insert_by_priority(self.waiting, oldest)

    def _blocks_to_share(
        self, request: RequestState, others: Sequence[RequestState], num_free: int
    ) -> list[int] | None:
        """Return the cached blocks of the beginning of the request, which never include its last
        token; None if it cannot be admitted beside others, or one of them computes its next block,
        which it can share soon."""
        size, blocks = self.block_pool.block_size, list[int]()
        if self.enable_prefix_caching:
            hashes = request.get_block_hashes(request.max_cache_hit_length // size, size)
            blocks = self.block_pool.get_cached_blocks(hashes)
            index, wanted = len(blocks), hashes[len(blocks) : len(blocks) + 1]
            soon = (each for each in others if wanted and each.num_cached_blocks <= index)
            if any(each.block_hashes[index : index + 1] == wanted for each in soon):
                return None
        needed = self._num_blocks_needed(request, blocks)
        return blocks if _fits(needed, num_free, num_others=len(others)) else None

    def _use_cached_blocks(self, request: RequestState, cached_blocks: list[int]) -> None:
        """Give the request the blocks that `_blocks_to_share` returned. This must be done
        before other blocks are allocated for it, because these blocks may themselves be free."""
        for block in cached_blocks:
            self.block_pool.touch(block)
        request.blocks = cached_blocks
        request.num_cached_blocks = len(cached_blocks)
        request.num_computed_tokens = len(cached_blocks) * self.block_pool.block_size
        if self.enable_prefix_caching and request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
            self.prefix_cache_queries += len(request.prompt_token_ids)
            self.prefix_cache_hits += request.num_computed_tokens

    def _cache_full_blocks(self, request: RequestState, num_written: int) -> None:
        """Enter the blocks that the first `num_written` tokens fill into the prefix cache."""
        count = num_written // self.block_pool.block_size
        if self.enable_prefix_caching and count > request.num_cached_blocks:
            hashes = request.get_block_hashes(count, self.block_pool.block_size)
            for index in range(request.num_cached_blocks, count):
                self.block_pool.cache_full_block(request.blocks[index], hashes[index])
            request.num_cached_blocks = count

    def _allocate_block(self, request: RequestState) -> int:
        block = self.block_pool.allocate()
        request.blocks.append(block)
        return block

    def _preempt(self, request: RequestState) -> None:
        assert not self._is_in_flight(request), "a step in flight writes its blocks"
        self._num_overtakes += self.running[0].priority < request.priority
        self.running.remove(request)
        self._free(request)
        _insert_by_priority(self.waiting, request, first=True)
        self.num_preemptions += 1

    def update(self, step_id: int, token_ids: Sequence[list[int]]) -> list[EngineOutput]:
        """Retire the oldest step in flight and return its outputs, in the order of the rows. A
        row that added nothing to its request has none.

        token_ids: the sampled tokens of every row, in the order of the rows. The lists become part
            of the outputs.
        """
        step, run = self._in_flight.popleft()
        assert step.step_id == step_id, "steps retire in the order they were scheduled"
        assert len(token_ids) == step.num_rows
        if run is None:
            outputs = self._retire_rows(step, token_ids)
        else:
            outputs = self._retire_decodes(step, run, token_ids)
        for request in [r for r in self._retiring if r.last_step_id <= step_id]:
            self._retiring.remove(request)
            self._free(request)
        return outputs

    def _retire_rows(
        self, step: SchedulerOutput, token_ids: Sequence[list[int]]
    ) -> list[EngineOutput]:
        outputs = []
        for row, sampled in zip(step.rows, token_ids, strict=True):
            request = self._requests.get(row.request_id)
            if request is None:
                continue  # it has ended
            self._cache_full_blocks(request, row.num_computed_tokens + row.num_tokens)
            if not row.samples_token:  # a prefill chunk that does not reach the end of the prompt
                if row.prompt_logprobs is not None:
                    outputs.append(EngineOutput(request.request_id))
                continue
            request.num_in_flight -= 1
            cached = 0 if request.output_token_ids else request.num_cached_tokens or 0
            if request.max_num_tokens == len(request.prompt_token_ids):  # it asked for no token
                self._finish_running(request)
                outputs.append(EngineOutput(request.request_id, [], FinishReason.LENGTH, cached))
                continue
            reason = self._extend(request, sampled)
            outputs.append(EngineOutput(request.request_id, sampled, reason, cached))
        return outputs

    def _retire_decodes(
        self, step: SchedulerOutput, run: DecodeRun, token_ids: Sequence[list[int]]
    ) -> list[EngineOutput]:
        for index in run.rows_filling_a_block(step.position_offset):
            if not run.requests[index].is_finished:
                position = step.batch_rows[index].num_computed_tokens + step.position_offset
                self._cache_full_blocks(run.requests[index], position + 1)
        if run is self._run:
            run.num_retired_steps += 1
        else:
            for request in run.requests:
                request.num_in_flight -= 1
        outputs = []
        for request, sampled in zip(run.requests, token_ids, strict=True):
            if not request.is_finished:
                reason = self._extend(request, sampled)
                outputs.append(EngineOutput(request.request_id, sampled, reason))
        return outputs

    def _extend(self, request: RequestState, token_ids: list[int]) -> FinishReason | None:
        """Append sampled tokens to the output of a request. If the request ends with one of them,
        end it, drop the tokens behind that one from `token_ids`, and return the reason."""
        output = request.output_token_ids
        max_tokens = request.max_num_tokens - len(request.prompt_token_ids)
        before = len(output)
        for token in token_ids:
            output.append(token)
            if token in request.stop_token_ids:
                reason = FinishReason.STOP
            elif len(output) >= max_tokens:
                reason = FinishReason.LENGTH
            else:
                continue
            del token_ids[len(output) - before :]
            self._finish_running(request)
            return reason
        return None

    def _finish_running(self, request: RequestState) -> None:
        """End a request that is running."""
        self._end_run()
        self.running.remove(request)
        self._finish(request)

    def _finish(self, request: RequestState) -> None:
        request.is_finished = True
        del self._requests[request.request_id]
        if self._is_in_flight(request):
            self._retiring.append(request)
        else:
            self._free(request)

    def _free(self, request: RequestState) -> None:
        # The last block first, so that it is evicted first: without a block, those after it are not
        # found.
        for block in reversed(request.blocks):
            self.block_pool.free(block)
        request.blocks = []
        if request.req_index:
            if request.has_logits_processors:
                self._freed_req_indices.append(request.req_index)
            self.req_indices.free(request.req_index)
            request.req_index = 0

    def check_integrity(self) -> None:
        """Assert that every request index is held once or free, that every block is held as often
        as the pool counts, and that no request writes to a block which is shared or can be found.
        For tests."""
        holders = [*self.running, *self._retiring]
        self.block_pool.check_integrity(
            (r.blocks, r.block_hashes[: r.num_cached_blocks]) for r in holders
        )
        req_indices = [request.req_index for request in holders]
        assert len(set(req_indices)) == len(req_indices) == self.req_indices.num_used
        assert 0 not in req_indices
        run_offsets = dict.fromkeys(self._run.requests, self._run.step_index) if self._run else {}
        for request in holders:
            written = request.num_computed_tokens + run_offsets.get(request, 0)
            assert request.num_cached_blocks * self.block_pool.block_size <= written
        queued = [*self.waiting, *self.waiting_for_grammar.values()]
        assert all(not request.blocks and not request.req_index for request in queued)
        assert set(self._requests.values()) == {*self.running, *queued}


def _fits(needed: int, num_free: int, *, num_others: int) -> bool:
    """Return whether a request that needs so many blocks may be admitted beside others. One block
    for each of them stays free: otherwise the new request would be preempted as soon as they
    grow."""
    return needed + num_others <= num_free


def _insert_by_priority(
    queue: MutableSequence[RequestState], request: RequestState, *, first: bool = False
) -> None:
    """Insert a request into a queue after those of its own priority, or before them if `first`.
    Lower numbers come earlier."""
    if not first and (not queue or queue[-1].priority <= request.priority):
        queue.append(request)
        return
    place = bisect_left if first else bisect_right
    queue.insert(place(queue, request.priority, key=lambda each: each.priority), request)
