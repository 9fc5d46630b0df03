"""Continuous batching: which requests run in the next step, and with how many tokens.

Knows: requests, their tokens, slots and blocks, what the prefix cache has of them, and which steps
are in flight. It hands out steps (`schedule`) and takes their sampled tokens back (`update`), at
once or one step late: with a *lag* of one, the host prepares step N+1 while step N runs. Knows
nothing of tensors, of graphs, of text or of sockets.

Policy, by priority, and first come first served among equals:
- every decoding request gets one token; the rest of the token budget goes to prefill, in chunks,
  the oldest request first; then to waiting requests;
- a request gets the blocks of its whole prompt when it is admitted, and one more whenever it has
  filled its last one. Blocks of its beginning that the prefix cache has are shared, not computed;
  at least one token is computed, because its result is the next token, and its cache entry goes to
  a block that the request does not share;
- when no block is free, the last of the running requests is preempted, which is the newest among
  the least important: its blocks are freed, and its tokens are later computed again or found in
  the prefix cache. So the first request always advances, and with it the whole queue. No request
  is preempted to make room for a waiting one;
- no request waits for ever: when more important requests have been admitted before others, or
  others have been preempted for them, `PASSES` times, the oldest waiting request gets a turn. From
  then on it comes before all requests that have had no turn, waiting and running, and is preempted
  only for requests whose turn came earlier. So at most `PASSES` requests that come later are
  admitted before a request for each request that was there when it came, and `PASSES` more.

In steady decode, which is most of the time, the next step is the previous one with every request
one token further: a `DecodeRun` hands it out and looks only at requests that need a block.

Invariants while steps are launched ahead (lag): slots and blocks become free only when the last
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
from operator import attrgetter
from typing import NamedTuple

from minisrv.core.decode_run import DecodeRun
from minisrv.core.kv_cache import BlockPool, FreeList
from minisrv.core.request_state import RequestState
from minisrv.core.step import (
    ProcessorStart,
    ScheduledRow,
    SchedulerOutput,
    SlotStart,
)
from minisrv.errors import QueueFullError
from minisrv.request import EngineOutput, EngineRequest, FinishReason

PASSES = 8
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

    pool: the blocks of the KV cache.
    max_num_seqs: the maximum number of running requests.
    max_num_batched_tokens: the maximum number of tokens in a step.
    max_model_len: the maximum number of tokens of a request, prompt and completion together.
    max_waiting: the maximum number of requests beyond `max_num_seqs`.
    eos_token_ids: the end-of-sequence tokens of the model.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_waiting: int,
        eos_token_ids: Sequence[int] = (),
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.enable_prefix_caching = enable_prefix_caching
        self.slots = FreeList(max_num_seqs + 1)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_waiting = max_waiting
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[RequestState] = deque()
        self.held: dict[str, RequestState] = {}
        self.running: list[RequestState] = []
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._retiring: list[RequestState] = []
        self._freed_slots: list[int] = []
        self._requests: dict[str, RequestState] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._next_step = 0
        self._num_queued = 0
        self._num_passes = 0
        self._run: DecodeRun | None = None

    # ---- requests ----------------------------------------------------------------------------

    def add(self, request: EngineRequest, seed: int, *, held: bool = False) -> None:
        """Queue a request, which must fit the context and the whole cache.

        seed: the seed of its sampling noise. The caller draws it if the request has none; it stays
            the same through preemptions.
        held: whether the request is held back (until its grammar is compiled). It counts as
            waiting, but cannot run until `release` is called.

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
        limit = min(self.max_model_len, self.pool.capacity)
        assert num_prompt, "a request has a prompt"
        assert num_prompt + (1 if max_tokens is None else max_tokens) <= limit, "a request fits"
        stop_token_ids = frozenset(params.stop_token_ids).union(
            () if params.ignore_eos else self.eos_token_ids
        )
        masked = request.structured_output is not None
        state = RequestState(
            request_id=request.request_id,
            prompt=request.prompt_token_ids,
            params=params,
            seed=seed,
            stop_token_ids=stop_token_ids,
            max_total=limit if max_tokens is None else num_prompt + max_tokens,
            cache_salt=(request.cache_key, request.cache_salt),
            priority=request.priority,
            masked=masked,
            processed=bool(
                params.has_penalties
                or params.logit_bias
                or (params.min_tokens and stop_token_ids and not masked)
            ),
        )
        self._requests[state.request_id] = state
        if held:
            self.held[state.request_id] = state
        else:
            self._wait(state)

    def release(self, request_id: str) -> None:
        """Let a request that was held back, and has not ended, join the waiting queue."""
        self._wait(self.held.pop(request_id))

    def _wait(self, request: RequestState) -> None:
        self._num_queued += 1
        request.number = self._num_queued
        _queue(self.waiting, request)

    @property
    def has_room(self) -> bool:
        """Whether another request may be queued. Waiting requests for which a slot is free do not
        count against `max_waiting`, and a slot counts as free as soon as its request has ended,
        even if a step in flight still uses it."""
        return len(self._requests) < self.max_waiting + self.slots.total - 1

    def abort(self, request_id: str) -> EngineOutput | None:
        """Drop a request and return its last output, or None if it has ended already.

        Tokens that its steps in flight sample are dropped, and its slot and blocks become free when
        these steps have retired.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        if request.slot:
            self._end(request)
        else:
            if not self.held.pop(request_id, None):
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
        output = self._continue_run() or self._schedule_anew()
        if output is not None:
            self._next_step += 1
            self._in_flight.append(_InFlight(output, self._run))
        return output

    def _continue_run(self) -> SchedulerOutput | None:
        """Return the next step of the current run of decode steps, or None if there is no run or
        the next step cannot be the same batch: a request is at its maximum length, a waiting
        request could be admitted, or blocks are missing."""
        run = self._run
        if run is None or run.age == run.oldest_age or (self.waiting and self.slots.num_free):
            return None
        needing = run.beginning_a_block(run.age + 1)
        if len(needing) > self.pool.num_free:
            return None
        new_blocks = []
        for index in needing:
            request = run.requests[index]
            new_blocks.append((request.slot, len(request.blocks), self._block(request)))
        return run.advance(self._next_step, new_blocks)

    def _schedule_anew(self) -> SchedulerOutput | None:
        self._settle()
        step = _StepBuilder(self._next_step, self.max_num_batched_tokens)
        held = self._schedule_decodes(step)
        for request in self.running:
            if not request.decoding and request is not held and step.budget:
                step.add(request)
        # The request admitted here is never one that was preempted in this step: what that one
        # freed is less than it needs.
        self._admit(step)
        output = step.build(self._freed_slots)
        if output is not None:
            self._freed_slots = []
            if output.query_len == 1 and output.num_rows == len(self.running):
                self._run = DecodeRun.begin(output, [*self.running], self.pool.block_size)
        return output

    def _settle(self) -> None:
        """End the current run: write the progress that its requests have in common to each of
        them."""
        run, self._run = self._run, None
        if run is not None:
            for request in run.requests:
                request.num_scheduled += run.age
                request.num_in_flight += run.age - run.retired
                request.last_step += run.age

    def _schedule_decodes(self, step: _StepBuilder) -> RequestState | None:
        """Add a decode row for every decoding request that gets a block for its next token, and
        preempt the newest requests where no block is free.

        Returns the request that does not take part in this step so that it can be preempted in the
        next one, or None.
        """
        held: RequestState | None = None
        for request in list(self.running):
            if not request.slot or not request.decoding or request is held:
                continue
            if request.total >= request.max_total:
                continue  # its last token is in flight
            if request.total > len(request.blocks) * self.pool.block_size:
                while request.slot and not self.pool.num_free and held is None:
                    newest = self.running[-1]
                    if self._named_in_flight(newest):
                        held = newest
                    else:
                        self._preempt(newest)
                if not request.slot or not self.pool.num_free:
                    continue
                step.new_blocks.append((request.slot, len(request.blocks), self._block(request)))
            step.add(request)
        return held

    def _named_in_flight(self, request: RequestState) -> bool:
        return bool(self._in_flight) and request.last_step >= self._in_flight[0].step.step_id

    def _admit(self, step: _StepBuilder) -> None:
        while self.waiting and step.budget and self.slots.num_free:
            if self._num_passes >= PASSES:
                self._give_turn()
            request = self.waiting[0]
            target = request.total
            found = self._find_prefix(request)
            # A found block that nobody holds is itself free. So the number of free blocks falls by
            # all blocks but those that others already hold.
            needed = self.pool.blocks_for(target) - sum(map(self.pool.is_held, found))
            # NOTE: one block for each running request stays free. Otherwise the new request would
            # be preempted as soon as they grow.
            if needed + len(self.running) > self.pool.num_free and (
                self.running or needed > self.pool.num_free
            ):
                return
            self.waiting.popleft()
            self._num_passes += bool(self.waiting) and request.priority < self.waiting[-1].priority
            _queue(self.running, request)
            request.slot = self.slots.take()
            request.prefill_target = target
            step.new_slots.append(_slot_start(request))
            self._share(request, found)
            while len(request.blocks) < self.pool.blocks_for(target):
                self._block(request)
            step.new_blocks += [(request.slot, i, b) for i, b in enumerate(request.blocks)]
            step.add(request)

    def _give_turn(self) -> None:
        """Put the oldest waiting request that has had no turn before all requests that have had
        none."""
        self._num_passes = 0
        others = [request for request in self.waiting if request.priority > -math.inf]
        if others:
            oldest = min(others, key=attrgetter("number"))
            self.waiting.remove(oldest)
            oldest.priority = -math.inf
            _queue(self.waiting, oldest)

    def _find_prefix(self, request: RequestState) -> list[int]:
        """Return the cached blocks of the beginning of the request. They never include its last
        token."""
        if not self.enable_prefix_caching:
            return []
        size = self.pool.block_size
        return self.pool.find(request.hashes(request.num_skippable // size, size))

    def _share(self, request: RequestState, found: list[int]) -> None:
        """Give the request the blocks that `_find_prefix` returned. This must be done before other
        blocks are taken for it, because found blocks may themselves be free."""
        for block in found:
            self.pool.hold(block)
        request.blocks = found
        request.num_published = len(found)
        request.num_scheduled = len(found) * self.pool.block_size
        if self.enable_prefix_caching and request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_scheduled
            self.prefix_cache_queries += len(request.prompt)
            self.prefix_cache_hits += request.num_scheduled

    def _publish(self, request: RequestState, num_written: int) -> None:
        """Enter the blocks that the first `num_written` tokens fill into the prefix cache."""
        count = num_written // self.pool.block_size
        if self.enable_prefix_caching and count > request.num_published:
            hashes = request.hashes(count, self.pool.block_size)
            for index in range(request.num_published, count):
                self.pool.publish(request.blocks[index], hashes[index])
            request.num_published = count

    def _block(self, request: RequestState) -> int:
        block = self.pool.take()
        request.blocks.append(block)
        return block

    def _preempt(self, request: RequestState) -> None:
        assert not self._named_in_flight(request), "a step in flight writes its blocks"
        self._num_passes += self.running[0].priority < request.priority
        self.running.remove(request)
        self._release(request)
        _queue(self.waiting, request, first=True)
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
        retired = [r for r in self._retiring if r.last_step <= step_id]
        if retired:
            self._retiring = [r for r in self._retiring if r.last_step > step_id]
            for request in retired:
                self._release(request)
        return outputs

    def _retire_rows(
        self, step: SchedulerOutput, token_ids: Sequence[list[int]]
    ) -> list[EngineOutput]:
        outputs = []
        for row, sampled in zip(step.rows, token_ids, strict=True):
            request = self._requests.get(row.request_id)
            if request is None:
                continue  # it has ended
            self._publish(request, row.start + row.num_tokens)
            if not row.samples:  # a prefill chunk that does not reach the end of the prompt
                if row.score is not None:
                    outputs.append(EngineOutput(request.request_id))
                continue
            request.num_in_flight -= 1
            if request.max_total == len(request.prompt):  # the request asked for no token
                self._end(request)
                cached = request.num_cached_tokens or 0
                outputs.append(EngineOutput(request.request_id, [], FinishReason.LENGTH, cached))
                continue
            cached = 0 if request.output else request.num_cached_tokens or 0
            reason = self._extend(request, sampled)
            outputs.append(EngineOutput(request.request_id, sampled, reason, cached))
        return outputs

    def _retire_decodes(
        self, step: SchedulerOutput, run: DecodeRun, token_ids: Sequence[list[int]]
    ) -> list[EngineOutput]:
        for index in run.filling_a_block(step.advance):
            if not run.requests[index].ended:
                start = step.batch_rows[index].start + step.advance
                self._publish(run.requests[index], start + 1)
        if run is self._run:
            run.retired += 1
        else:
            for request in run.requests:
                request.num_in_flight -= 1
        outputs = []
        for request, sampled in zip(run.requests, token_ids, strict=True):
            if not request.ended:
                reason = self._extend(request, sampled)
                outputs.append(EngineOutput(request.request_id, sampled, reason))
        return outputs

    def _extend(self, request: RequestState, token_ids: list[int]) -> FinishReason | None:
        """Append sampled tokens to the output of a request. If the request ends with one of them,
        end it, drop the tokens behind that one from `token_ids`, and return the reason."""
        output, left = request.output, request.max_total - len(request.prompt)
        before = len(output)
        for token in token_ids:
            output.append(token)
            if token in request.stop_token_ids:
                reason = FinishReason.STOP
            elif len(output) >= left:
                reason = FinishReason.LENGTH
            else:
                continue
            del token_ids[len(output) - before :]
            self._end(request)
            return reason
        return None

    def _end(self, request: RequestState) -> None:
        """End a request that is running."""
        self._settle()
        self.running.remove(request)
        self._finish(request)

    def _finish(self, request: RequestState) -> None:
        request.ended = True
        del self._requests[request.request_id]
        if self._named_in_flight(request):
            self._retiring.append(request)
        else:
            self._release(request)

    def _release(self, request: RequestState) -> None:
        # The last block first, so that it is evicted first: without a block, those after it are not
        # found.
        for block in reversed(request.blocks):
            self.pool.give_back(block)
        request.blocks = []
        if request.slot:
            if request.processed:
                self._freed_slots.append(request.slot)
            self.slots.give_back(request.slot)
            request.slot = 0

    def check_integrity(self) -> None:
        """Assert that every slot is held once or free, that every block is held as often as the
        pool counts, and that no request writes to a block which is shared or can be found. For
        tests."""
        holders = [*self.running, *self._retiring]
        self.pool.check_integrity((r.blocks, r.block_hashes[: r.num_published]) for r in holders)
        slots = [request.slot for request in holders]
        assert len(set(slots)) == len(slots) == self.slots.num_used
        assert 0 not in slots
        ahead = dict.fromkeys(self._run.requests, self._run.age) if self._run else {}
        for request in holders:
            written = request.num_scheduled + ahead.get(request, 0)
            assert request.num_published * self.pool.block_size <= written
        idle = [*self.waiting, *self.held.values()]
        assert all(not request.blocks and not request.slot for request in idle)
        assert set(self._requests.values()) == {*self.running, *idle}


class _StepBuilder:
    """Collects the rows of one step within the token budget; decode rows come before prefill
    rows."""

    def __init__(self, step_id: int, budget: int) -> None:
        self.step_id = step_id
        self.budget = budget
        self.decodes: list[ScheduledRow] = []
        self.prefills: list[ScheduledRow] = []
        self.new_slots: list[SlotStart] = []
        self.new_blocks: list[tuple[int, int, int]] = []

    def add(self, request: RequestState) -> None:
        """Add the decode token of `request`, or as much of its prefill as the budget allows."""
        start = request.num_scheduled
        decoding = request.decoding
        count = 1 if decoding else min(self.budget, request.prefill_target - start)
        samples = decoding or start + count == request.prefill_target
        row = ScheduledRow(
            request_id=request.request_id,
            slot=request.slot,
            start=start,
            num_tokens=count,
            token_ids=[] if decoding else request.tokens(start, start + count),
            decoding=decoding,
            samples=samples,
            logprobs=request.params.logprobs,
            masked=samples and request.masked,
            processed=request.processed,
            score=request.score(start, start + count),
        )
        (self.decodes if decoding else self.prefills).append(row)
        request.num_scheduled += count
        request.num_in_flight += samples
        request.last_step = self.step_id
        self.budget -= count

    def _query_len(self) -> int | None:
        """Return the `query_len` of the step."""
        lengths = {row.num_tokens for row in self.decodes}
        return lengths.pop() if len(lengths) == 1 and not self.prefills else None

    def build(self, freed_slots: list[int]) -> SchedulerOutput | None:
        """Return the step, which is the first of a new batch; None if no request was added."""
        rows = self.decodes + self.prefills
        if not rows:
            return None
        return SchedulerOutput(
            step_id=self.step_id,
            batch_id=self.step_id,
            batch_rows=rows,
            new_slots=self.new_slots,
            new_blocks=self.new_blocks,
            num_decodes=len(self.decodes),
            num_tokens=sum(row.num_tokens for row in rows),
            query_len=self._query_len(),
            freed_slots=freed_slots,
            needs_logits=any(
                row.logprobs is not None or row.processed or row.score is not None for row in rows
            ),
            masked=any(row.masked for row in rows),
        )


def _queue(
    queue: MutableSequence[RequestState], request: RequestState, *, first: bool = False
) -> None:
    """Insert a request into a queue after those of its own priority, or before them if `first`.
    Lower numbers come earlier."""
    if not first and (not queue or queue[-1].priority <= request.priority):
        queue.append(request)
        return
    place = bisect_left if first else bisect_right
    queue.insert(place(queue, request.priority, key=lambda each: each.priority), request)


def _slot_start(request: RequestState) -> SlotStart:
    processors = None
    if request.processed:
        output = list(request.output)  # a copy, because the output of the request grows
        # For a request with a grammar, the mask implements `min_tokens`: it knows whether any other
        # token may follow.
        stops = frozenset[int]() if request.masked else request.stop_token_ids
        processors = ProcessorStart(request.prompt, output, stops)
    return SlotStart(request.slot, request.params, request.seed, processors)
