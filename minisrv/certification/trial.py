"""A batch on which a graph is certified.

A trial runs on request indices and blocks that no request has, so it may run between the steps of
real requests; that it changes nothing of theirs is part of what it checks.

Knows: how to make a step by hand from the rows of a batch, which values poison the buffers, and
what the step must and must not change. It is the `Trial` that `certification.compare` runs. Knows
nothing of which batches are worth a trial: `certification.batches` does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from minisrv.certification.batches import (
    Batch,
    BatchLimits,
    BatchMaker,
    blocks_for_any_batch,
    short_batch,
)
from minisrv.certification.compare import InitialState
from minisrv.certification.digest import digest_
from minisrv.core.attention_work import AttentionWork
from minisrv.core.kv_cache import NULL_BLOCK, NULL_REQ_INDEX, BlockPool
from minisrv.core.ladder import epilogue_descriptor
from minisrv.core.step import (
    NewRequestData,
    ScheduledRow,
    SchedulerOutput,
    unscheduled_id,
)
from minisrv.graph.captured import CapturedGraph
from minisrv.graph.observer import observing
from minisrv.kernels import ALL
from minisrv.modes import CUDAGraphMode, GraphKey, Stage, StageOutput
from minisrv.request import SamplingParams
from minisrv.runner.input_buffers import Upload
from minisrv.runner.model_runner import ModelRunner
from minisrv.runner.timing import LaunchTimer

NAN = float("nan")
GREEDY = SamplingParams(temperature=0.0)
PARAMS = (
    GREEDY,
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=20, min_p=0.02),
)
"""Sampling parameters of the rows, in turn."""

SAMPLED_ROWS = 12
"""Number of rows that are sampled by `PARAMS`; beyond it rows between them are greedy. On a CPU a
random row takes as long as a small model's layers, and each row is sampled by itself."""


@dataclass(frozen=True)
class TrialSpace:
    """The request indices and the blocks of the KV cache on which trials run. No request has any of
    them.

    blocks: ascending.
    """

    req_indices: range
    blocks: Sequence[int]

    @classmethod
    def of(cls, runner: ModelRunner, blocks: Sequence[int]) -> TrialSpace:
        """Return the request indices that a runner reserves for trials, with the given blocks."""
        most = runner.ladders.max_num_seqs
        return cls(range(1 + most, 1 + 2 * most), blocks)

    def limits(self, runner: ModelRunner) -> BatchLimits:
        """Return the limits of a step that runs here."""
        return BatchLimits(
            max_num_reqs=len(self.req_indices),
            max_num_tokens=runner.ladders.max_num_batched_tokens,
            max_model_len=runner.max_model_len,
            num_blocks=len(self.blocks),
            block_size=runner.block_size,
        )


@contextmanager
def reserved_space(runner: ModelRunner, pool: BlockPool) -> Iterator[TrialSpace]:
    """Take free blocks, as many as any trial needs, from the pool of the cache for the block. At
    least one block must be free; with few of them, batches are short."""
    assert pool.num_free, "a trial needs a block"
    blocks = pool.reserve(blocks_for_any_batch(_everything(runner)))
    try:
        yield TrialSpace.of(runner, blocks)
    finally:
        pool.give_back(blocks)


def borrow_space(
    runner: ModelRunner,
    pool: BlockPool,
    key: GraphKey,
    make_batch: BatchMaker = short_batch,
    spare: int = 0,
) -> TrialSpace | None:
    """Take as many free blocks as a batch of a graph needs, but no more than half of the free ones,
    and return them with the request indices for trials. They are of the prefix cache only where the
    others are too few. With few blocks, the batch is shorter; None if there are none to take.
    `BlockPool.give_back` takes the blocks back.

    spare: the number of blocks that stay free.
    """
    everything = _everything(runner)
    rows = make_batch(key[1], everything)
    size = runner.block_size
    needed = 1 + sum(-(-(row.num_computed_tokens + row.num_tokens) // size) for row in rows)
    most = max(0, min(needed, -(-pool.num_free // 2), pool.num_free - spare))
    blocks = pool.reserve(most)
    blocks = sorted([*blocks, *pool.evict(most - len(blocks))])
    return TrialSpace.of(runner, blocks) if blocks else None


def _everything(runner: ModelRunner) -> BatchLimits:
    return TrialSpace.of(runner, range(1, runner.num_blocks)).limits(runner)


class BufferedTrial:
    """A step on the runner's own buffers and on request indices that no request has. It can make
    way for steps of requests in the middle of a run.

    name: the step, in words.
    space: the request indices, and blocks that no request has.
    req_indices: [R] int64, those of the step's rows.
    key: the mode and the padded shape of the stage that the trial is about.
    is_replayed: whether its graph is being replayed.
    """

    def __init__(
        self, name: str, runner: ModelRunner, space: TrialSpace, key: GraphKey, req_indices: Tensor
    ) -> None:
        self.name = name
        self.runner = runner
        self.space = space
        self.key = key
        self.req_indices = req_indices
        self.is_replayed = False
        self._saved: list[Tensor] = []
        self._unexpected: list[str] = []

    def suspend(self, *others: Tensor) -> None:
        """Leave the buffers as in a new server, so that steps of requests may run before `resume`,
        even in the middle of a run.

        others: other memory that these steps overwrite.
        """
        self._unexpected += true_of(self._changed_request_tensors())
        self._saved = [tensor.clone() for tensor in (*self._buffers, *others)]
        self._fill_buffers(poison=False)

    def resume(self, *others: Tensor) -> None:
        """Put back what the buffers and the other memory held at `suspend`."""
        for tensor, saved in zip((*self._buffers, *others), self._saved, strict=True):
            tensor.copy_(saved)
        self._saved = []
        self.runner.buffers.forget_last_step()
        self._keep_request_tensors()

    @property
    def _buffers(self) -> list[Tensor]:
        """All static buffers."""
        model, found = self.runner.model, vars(self.runner.buffers).values()
        return [model.qkv, model.attn_out, *(t for t in found if isinstance(t, Tensor))]

    def clear(self) -> None:
        """Leave the rows of the request indices and the buffers as in a new server."""
        self._fill_buffers(poison=False)
        self._fill_request_tensors(poison=False)

    def _keep_request_tensors(self) -> None:
        tensors = vars(self.runner.request_tensors)
        self.tensors_before = {name: tensor.clone() for name, tensor in tensors.items()}

    def _changed_request_tensors(self) -> dict[str, Tensor]:
        """Return where the tensors of the requests have changed since they were kept, except for
        what the step writes for its own request indices."""
        changed = {}
        for name, tensor in vars(self.runner.request_tensors).items():
            before = self.tensors_before[name]
            if name in ("last_token", "next_position"):
                before, tensor = (t.index_fill(0, self.req_indices, 0) for t in (before, tensor))
            changed[f"{name} of a request index"] = before != tensor
        return changed

    def _fill_buffers(self, *, poison: bool) -> None:
        buffers, model = self.runner.buffers, self.runner.model
        for buffer in (model.qkv, model.attn_out, buffers.hidden, buffers.logits):
            buffer.fill_(NAN if poison else 0.0)
        buffers.bitmask.fill_(ALL)
        buffers.logits_indices.fill_(buffers.sizes.max_num_tokens - 1 if poison else 0)
        # Where there is padding the last request index belongs to nobody, so a stale row writes to
        # a watched block.
        buffers.req_indices.fill_(self.space.req_indices[-1] if poison else NULL_REQ_INDEX)
        for name in ("input_ids", "positions", "slot_mapping", "block_table"):
            getattr(buffers, name).fill_(1 if poison else 0)
        buffers.seq_lens.fill_(buffers.sizes.block_size if poison else 0)
        buffers.query_start_loc.fill_(buffers.sizes.max_num_tokens if poison else 0)
        buffers.sampled_token_ids.fill_(0)
        buffers.forget_last_step()

    def _fill_request_tensors(self, *, poison: bool) -> None:
        tensors, own = self.runner.request_tensors, self.space.req_indices
        rows = slice(own.start, own.stop)
        tensors.block_table[rows] = self.space.blocks[-1] if poison else NULL_BLOCK
        tensors.last_token[rows] = 0
        tensors.next_position[rows] = 0


class StepTrial(BufferedTrial):
    """One stage of a step, at its padded shape, on request indices and blocks that no request has.

    For an epilogue, hidden states and masks are made by hand. An epilogue that follows the stage of
    a model runs as it does in service: by its graph if the model runs by a graph.

    Blocks other than those of the batch are watched, so that any write to them is found.

    full_batch_trial: the trial of a full batch in the same graph, which is replayed first for
        `InitialState.STALE`; without one, that initial state is left out.
    params: the sampling parameters of `SAMPLED_ROWS` rows, in turn; others are greedy.
    """

    def __init__(
        self,
        runner: ModelRunner,
        space: TrialSpace,
        key: GraphKey,
        batch: Batch,
        full_batch_trial: StepTrial | None = None,
        params: Sequence[SamplingParams] = PARAMS,
    ) -> None:
        mode, descriptor = key
        alone = " alone" if descriptor.stage is Stage.EPILOGUE else ""
        name = f"{mode.name} {descriptor.num_tokens} {descriptor.output.name}{alone}"
        self.initial_states: Sequence[InitialState] = [
            state for state in InitialState if full_batch_trial or state is not InitialState.STALE
        ]
        self.full_batch_trial = full_batch_trial
        # All random choices depend on the batch only, so a trial can be repeated.
        draw = random.Random(repr(batch))
        self.output = make_step(batch, space, runner, draw, params)
        used, blocks = len(self.output.new_blocks), space.blocks
        device = runner.kv_caches[0].device
        watched_blocks = sorted({NULL_BLOCK, *blocks[: used + 1], blocks[-1]})
        self.watched_blocks = torch.tensor(watched_blocks, device=device)
        self._index_of = {block: index for index, block in enumerate(watched_blocks)}
        ends = {row.req_index: row.num_computed_tokens + row.num_tokens for row in self.output.rows}
        starts = {row.req_index: row.num_computed_tokens for row in self.output.rows}
        req_indices = torch.tensor([*starts.keys()], dtype=torch.int64, device=device)
        super().__init__(name, runner, space, key, req_indices)
        self.next_position = torch.tensor([*starts.values()], dtype=torch.int64, device=device)
        self.live_positions = self._positions(dict.fromkeys(ends, 0), ends)
        written = self._positions(starts, ends)
        self.written_entries = self._entries(written)
        protected_positions = ~written
        protected_positions[NULL_BLOCK] = False  # padding writes there
        self.protected_positions = protected_positions
        self.protected_entries = self._entries(protected_positions)
        # The values are made on the device that uses them: on the host those of the cache alone
        # would take longer than everything else.
        generator = torch.Generator(device).manual_seed(draw.getrandbits(63))
        shape = (len(self.watched_blocks), *runner.kv_caches[0].shape[1:])
        cache = torch.rand(shape, generator=generator, device=device).sub_(0.5)
        self.cache = cache.to(runner.kv_caches[0].dtype)
        self.last_token = torch.randint(
            runner.vocab_size,
            self.req_indices.shape,
            generator=generator,
            dtype=torch.int64,
            device=device,
        )
        hidden = (len(self.req_indices), runner.buffers.hidden.shape[1])
        self.hidden = torch.rand(hidden, generator=generator, device=device) - 0.5
        # The masks allow about half of the tokens in every other row, and all in the rest.
        masks = (len(self.req_indices), runner.buffers.bitmask.shape[1])
        self.masks = torch.randint(
            -(2**31), 2**31, masks, generator=generator, dtype=torch.int32, device=device
        )
        self.masks[::2] = ALL

    def _positions(self, starts: dict[int, int], ends: dict[int, int]) -> Tensor:
        """Return [watched, block_size] bool, which marks the cache positions of tokens `starts` to
        `ends` by request index."""
        size = self.runner.block_size
        found = torch.zeros(len(self.watched_blocks), size, dtype=torch.bool)
        of_blocks = [
            (
                self._index_of[block],
                starts[req_index] - index * size,
                ends[req_index] - index * size,
            )
            for req_index, index, block in self.output.new_blocks
        ]
        at, first, end = torch.tensor(of_blocks, dtype=torch.int64).reshape(-1, 3, 1).unbind(dim=1)
        place = torch.arange(size)
        found[at[:, 0]] = (first <= place) & (place < end)
        return found.to(self.watched_blocks.device)

    def _entries(self, positions: Tensor) -> Tensor:
        """Return the indices, in a cache with all blocks, of the entries that `positions` [watched,
        block_size] marks."""
        block, offset = positions.nonzero().unbind(dim=1)
        return self.watched_blocks[block] * self.runner.block_size + offset

    # ---- certification.compare.Trial ---------------------------------------------------------

    def reset(self, initial_state: InitialState, graph: CapturedGraph | None = None) -> None:
        """See `compare.Trial`."""
        poison, tensors = initial_state is InitialState.POISONED, self.runner.request_tensors
        if initial_state is not InitialState.STALE:
            self._fill_buffers(poison=poison)
            self._fill_request_tensors(poison=poison)
        else:
            assert self.full_batch_trial is not None, "there is no full batch to replay first"
            self.full_batch_trial.reset(InitialState.CLEAN)
            self.full_batch_trial.run(graph)
        initial = self.cache
        if poison:
            initial = initial.masked_fill(~self.live_positions[:, :, None, None, None], NAN)
        for cache in self.runner.kv_caches:
            cache[self.watched_blocks] = initial
        tensors.last_token[self.req_indices] = self.last_token
        tensors.next_position[self.req_indices] = self.next_position
        if self.key[1].stage is Stage.EPILOGUE:
            buffers, rows = self.runner.buffers, len(self.req_indices)
            buffers.hidden[:rows] = self.hidden
            buffers.seq_lens[:rows] = self.next_position + 1
            buffers.bitmask[:rows] = self.masks
        upload = Upload()
        tensors.apply(self.output, upload)
        upload.send(self.req_indices.device)
        self.initial_cache = initial
        self._unexpected = []
        self._keep_request_tensors()

    @torch.no_grad()
    def run(self, graph: CapturedGraph | None) -> None:
        """See `compare.Trial`."""
        runner, (mode, descriptor) = self.runner, self.key
        stages = [(CUDAGraphMode.NONE if graph is None else mode, descriptor)]
        if descriptor.stage is Stage.MODEL and descriptor.output is StageOutput.HIDDEN:
            installed, epilogue = self._epilogue()
            replayed = graph is not None and installed
            stages.append(epilogue if replayed else (CUDAGraphMode.NONE, epilogue[1]))
        attn = runner.prepare(self.output, tuple(stages))
        first, *rest = stages
        self.is_replayed = graph is not None
        try:
            runner.launch(first, self.output, attn, graph)
            for key in rest:
                runner.launch(key, self.output)
        finally:
            self.is_replayed = False

    def _epilogue(self) -> tuple[bool, GraphKey]:
        """Return the key of the smallest installed epilogue that holds the rows, or else of the
        smallest of the ladder, and whether it is installed. A probe captures some graphs without
        their epilogue, and while a server fills its ladders some are missing."""
        ladders, rows = self.runner.ladders, len(self.req_indices)
        graphs = self.runner.epilogue_step.graphs
        for size in ladders.epilogues:
            key = epilogue_descriptor(size, StageOutput.TOKENS)
            if size >= rows and key in graphs:
                return True, (CUDAGraphMode.FULL, key)
        return False, ladders.epilogue_key(rows, needs_logits=False)

    def time(self, graph: CapturedGraph | None) -> float:
        """Return the duration of a replay on a clean batch, or of an eager run without a graph, in
        milliseconds."""
        self.reset(InitialState.CLEAN)
        timer = LaunchTimer(self.req_indices.device)
        with observing(self.runner.observers, timer):
            self.run(graph)
        return timer.ms

    def observe(self) -> dict[str, Tensor]:
        """See `compare.Trial`."""
        buffers, tensors = self.runner.buffers, self.runner.request_tensors
        rows, tokens = len(self.output.rows), self.output.num_tokens
        # otherwise they are not written
        logits = rows if self.key[1].output is StageOutput.LOGITS else 0
        cache_sums, cache_digests = self._written_cache()
        return {
            "hidden states": buffers.hidden[:tokens].clone(),
            "logits": buffers.logits[:logits].clone(),
            "tokens": buffers.sampled_token_ids[:rows].clone(),
            "last tokens": tensors.last_token[self.req_indices],
            "next positions": tensors.next_position[self.req_indices],
            "sums of the cache": cache_sums,
            "bits of the cache": cache_digests,
        }

    def _written_cache(self) -> tuple[Tensor, Tensor]:
        """Return the sums and the digests, [layers, written], of the cache entries that the step
        writes. Their copy is that of one layer at a time: all layers of a large step would take
        more memory than the step itself."""
        sums, digests = [], []
        for cache in self.runner.kv_caches:
            entries = cache.flatten(0, 1).index_select(0, self.written_entries)
            sums.append(entries.flatten(1).sum(dim=1, dtype=torch.float32))
            digests.append(digest_(entries))
        return torch.stack(sums), torch.stack(digests)

    def unexpected_writes(self) -> list[str]:
        """See `compare.Trial`."""
        expected = _bits(self.initial_cache[self.protected_positions])
        changed: dict[str, Tensor] = {}  # found on the device, with one wait at the end
        for layer, cache in enumerate(self.runner.kv_caches):
            found = _bits(cache.flatten(0, 1).index_select(0, self.protected_entries))
            changed[f"cache entries of layer {layer} outside of the step"] = (
                found != expected
            ).any()
        changed |= self._changed_request_tensors()
        return [*self._unexpected, *true_of(changed)]

    def clear(self) -> None:
        """See `BufferedTrial`. No poison stays in the cache either."""
        self.reset(InitialState.CLEAN)
        self._fill_request_tensors(poison=False)
        self.runner.buffers.bitmask.fill_(ALL)


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of numbers, by which those that are not numbers can be compared too."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def true_of(flags: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors of which any element is true."""
    found = torch.stack([flag.any() for flag in flags.values()]).tolist()
    return [name for name, flag in zip(flags, found, strict=True) if flag]


def make_step(
    batch: Batch,
    space: TrialSpace,
    runner: ModelRunner,
    draw: random.Random,
    params: Sequence[SamplingParams],
) -> SchedulerOutput:
    """Return a step with the rows of the batch: request indices of the space are assigned in order,
    and the first blocks in random order.

    params: the sampling parameters of `SAMPLED_ROWS` rows, in turn; others are greedy.
    """
    block_size, vocab_size = runner.block_size, runner.vocab_size
    needed = [-(-(row.num_computed_tokens + row.num_tokens) // block_size) for row in batch]
    blocks = draw.sample(space.blocks[: sum(needed)], sum(needed))
    rows: list[ScheduledRow] = []
    new_reqs: list[NewRequestData] = []
    new_blocks: list[tuple[int, int, int]] = []
    turn = draw.randrange(len(params))
    distance = -(-len(batch) // SAMPLED_ROWS)
    for place, (row, count) in enumerate(zip(batch, needed, strict=True)):
        req_index = space.req_indices[place]
        new_blocks += [(req_index, index, blocks.pop()) for index in range(count)]
        number, between = divmod(place, distance)
        own = GREEDY if between else params[(number + turn) % len(params)]
        new_reqs.append(NewRequestData(req_index, own, seed=draw.getrandbits(63)))
        prompt = [] if row.is_decode else draw.choices(range(vocab_size), k=row.num_tokens)
        rows.append(
            ScheduledRow(
                request_id=f"trial-{req_index}",
                req_index=req_index,
                num_computed_tokens=row.num_computed_tokens,
                num_tokens=row.num_tokens,
                token_ids=prompt,
                is_decode=row.is_decode,
                samples_token=True,
                num_logprobs=None,
            )
        )
    unscheduled = unscheduled_id()
    return SchedulerOutput(
        step_id=unscheduled,
        batch_id=unscheduled,
        batch_rows=rows,
        new_reqs=new_reqs,
        new_blocks=new_blocks,
        num_decodes=sum(row.is_decode for row in batch),
        num_tokens=sum(row.num_tokens for row in batch),
        batch_work=AttentionWork.of(batch),
    )
