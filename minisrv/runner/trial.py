"""A batch on which a graph is certified.

Knows: how to make a step by hand from the rows of a batch, which values poison the buffers, and
what the step must and must not change. It is the `Trial` that `graph.certify` runs. Knows nothing
of which batches are worth a trial: `runner.batches` does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisrv.core.dispatcher import Dispatch
from minisrv.core.kv_cache import NULL_BLOCK, NULL_SLOT
from minisrv.core.step import ScheduledRow, SchedulerOutput, SlotStart, unscheduled_id
from minisrv.graph.certify import Start
from minisrv.kernels import ALL
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Epilogue, Reason
from minisrv.request import SamplingParams
from minisrv.runner.batches import Batch
from minisrv.runner.input_buffers import Upload
from minisrv.runner.timing import LaunchTimer

if TYPE_CHECKING:
    from minisrv.runner.model_runner import ModelRunner

NAN = float("nan")
GREEDY = SamplingParams(temperature=0.0)
PARAMS = (
    GREEDY,
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=20, min_p=0.02),
)
"""Sampling parameters of the rows, in turn."""


class StepTrial:
    """One step at the padded shape of a descriptor, on real slots and blocks of an empty cache.

    For an epilogue, hidden states and masks are made by hand. An epilogue at the end of a step runs
    as it does in service: by its graph if the step runs by a graph.

    Blocks other than those of the batch are watched, so that any write to them is found.

    before: the trial of a full batch in the same graph, which `Start.STALE` replays first; without
        one, that start is left out.
    params: the sampling parameters of the rows, in turn.
    """

    def __init__(
        self,
        runner: ModelRunner,
        mode: CUDAGraphMode,
        descriptor: BatchDescriptor,
        batch: Batch,
        before: StepTrial | None = None,
        params: Sequence[SamplingParams] = PARAMS,
    ) -> None:
        step = "" if descriptor.forward else " alone"
        self.name = f"{mode.name} {descriptor.num_tokens} {descriptor.epilogue.name}{step}"
        self.starts: Sequence[Start] = [
            start for start in Start if before or start is not Start.STALE
        ]
        self.runner = runner
        self.mode = mode
        self.descriptor = descriptor
        self.before = before
        # All random choices depend on the batch only, so a trial can be repeated.
        draw = random.Random(repr(batch))
        self.output = _step(batch, runner.limits.block_size, runner.vocab_size, draw, params)
        used, last = len(self.output.new_blocks), runner.limits.blocks
        device = runner.kv_caches[0].device
        watched = sorted({*range(1 + used), min(1 + used, last), last})
        self.watched = torch.tensor(watched, device=device)
        ends = {row.slot: row.start + row.num_tokens for row in self.output.rows}
        starts = {row.slot: row.start for row in self.output.rows}
        self.slots = torch.tensor([*starts.keys()], dtype=torch.int64, device=device)
        self.next_position = torch.tensor([*starts.values()], dtype=torch.int64, device=device)
        self.live = self._positions(dict.fromkeys(ends, 0), ends)
        written = self._positions(starts, ends)
        self.entries = self._entries(written)
        outside = ~written
        outside[NULL_BLOCK] = False  # padding writes there
        self.outside, self.outside_entries = outside, self._entries(outside)
        # The values are made on the device that uses them: on the host those of the cache alone
        # would take longer than everything else.
        generator = torch.Generator(device).manual_seed(draw.getrandbits(63))
        shape = (len(self.watched), *runner.kv_caches[0].shape[1:])
        cache = torch.rand(shape, generator=generator, device=device) - 0.5
        self.cache = cache.to(runner.kv_caches[0].dtype)
        self.last_token = torch.randint(
            runner.vocab_size,
            self.slots.shape,
            generator=generator,
            dtype=torch.int64,
            device=device,
        )
        hidden = (len(self.slots), runner.buffers.hidden.shape[1])
        self.hidden = torch.rand(hidden, generator=generator, device=device) - 0.5
        # The masks allow about half of the tokens in every other row, and all in the rest.
        masks = (len(self.slots), runner.buffers.bitmask.shape[1])
        self.masks = torch.randint(
            -(2**31), 2**31, masks, generator=generator, dtype=torch.int32, device=device
        )
        self.masks[::2] = ALL

    def _positions(self, starts: dict[int, int], ends: dict[int, int]) -> Tensor:
        """Return [watched, block_size] bool, which marks the cache positions of tokens `starts` to
        `ends` by slot.

        The batch has the first blocks, so the number of one of its blocks is also its index among
        the watched ones.
        """
        size = self.runner.limits.block_size
        found = torch.zeros(len(self.watched), size, dtype=torch.bool)
        for slot, index, block in self.output.new_blocks:
            first, end = starts[slot] - index * size, ends[slot] - index * size
            found[block, max(0, first) : max(0, min(size, end))] = True
        return found.to(self.watched.device)

    def _entries(self, positions: Tensor) -> Tensor:
        """Return the indices, in a cache with all blocks, of the entries that `positions` [watched,
        block_size] marks."""
        block, offset = positions.nonzero().unbind(dim=1)
        return self.watched[block] * self.runner.limits.block_size + offset

    # ---- graph.certify.Trial -----------------------------------------------------------------

    def reset(self, start: Start) -> None:
        """See `graph.certify.Trial`."""
        poison, state = start is Start.POISONED, self.runner.state
        if start is not Start.STALE:
            self._fill_buffers(poison)
            state.block_table[1:] = self.watched[-1] if poison else 0
            state.last_token.zero_()
            state.next_position.zero_()
        else:
            assert self.before is not None, "no full batch to be behind"
            self.before.reset(Start.CLEAN)
            self.before.run(graph=True)
        initial = self.cache
        if poison:
            initial = initial.masked_fill(~self.live[:, :, None, None, None], NAN)
        for cache in self.runner.kv_caches:
            cache[self.watched] = initial
        state.last_token[self.slots] = self.last_token
        state.next_position[self.slots] = self.next_position
        if not self.descriptor.forward:
            buffers, rows = self.runner.buffers, len(self.slots)
            buffers.hidden[:rows] = self.hidden
            buffers.seq_lens[:rows] = self.next_position + 1
            buffers.bitmask[:rows] = self.masks
        upload = Upload()
        state.apply(self.output, upload)
        upload.send(self.slots.device)
        self.initial_cache = initial
        self.initial_state = {name: tensor.clone() for name, tensor in vars(state).items()}

    def _fill_buffers(self, poison: bool) -> None:
        buffers = self.runner.buffers
        for buffer in (buffers.qkv, buffers.attn_out, buffers.hidden, buffers.logits):
            buffer.fill_(NAN if poison else 0.0)
        buffers.bitmask.fill_(ALL)
        buffers.logits_indices.fill_(buffers.sizes.tokens - 1 if poison else 0)
        # Where there is padding the last slot belongs to nobody, so a stale row writes to a watched
        # block.
        buffers.slots.fill_(buffers.sizes.slots - 1 if poison else NULL_SLOT)
        for name in ("input_ids", "positions", "slot_mapping", "block_table"):
            getattr(buffers, name).fill_(1 if poison else 0)
        buffers.seq_lens.fill_(buffers.sizes.block_size if poison else 0)
        buffers.query_start_loc.fill_(buffers.sizes.tokens if poison else 0)
        buffers.tokens.fill_(0)

    def run(self, *, graph: bool) -> None:
        """See `graph.certify.Trial`."""
        mode = self.mode if graph else CUDAGraphMode.NONE
        epilogue = None
        if not self.descriptor.forward:
            epilogue = mode, self.descriptor
        elif self.descriptor.epilogue is Epilogue.HIDDEN:
            behind, key = self.runner.ladders.epilogue_key(len(self.slots), needs_logits=False)
            # the probe captures some graphs without their epilogue
            there = key in self.runner.epilogue_step.graphs
            epilogue = behind if graph and there else CUDAGraphMode.NONE, key
        dispatch = Dispatch(mode, self.descriptor, Reason.PURE_DECODE, epilogue)
        self.runner.execute(self.output, dispatch)

    def time_replay(self) -> float:
        """Return the duration of a replay on a clean batch, in milliseconds."""
        self.reset(Start.CLEAN)
        with LaunchTimer(self.runner) as timer:
            self.run(graph=True)
        return timer.ms

    def observe(self) -> dict[str, Tensor]:
        """See `graph.certify.Trial`."""
        buffers, state = self.runner.buffers, self.runner.state
        rows, tokens = len(self.output.rows), self.output.num_tokens
        # otherwise they are not written
        logits = rows if self.descriptor.epilogue is Epilogue.LOGITS else 0
        return {
            "hidden states": buffers.hidden[:tokens].clone(),
            "logits": buffers.logits[:logits].clone(),
            "tokens": buffers.tokens[:rows].clone(),
            "last tokens": state.last_token[self.slots],
            "next positions": state.next_position[self.slots],
            "cache": torch.stack(
                [c.flatten(0, 1).index_select(0, self.entries) for c in self.runner.kv_caches]
            ),
        }

    def touched(self) -> list[str]:
        """See `graph.certify.Trial`."""
        expected = self.initial_cache[self.outside].nan_to_num()
        changed: dict[str, Tensor] = {}  # compared on the device, with one wait at the end
        for layer, cache in enumerate(self.runner.kv_caches):
            found = cache.flatten(0, 1).index_select(0, self.outside_entries).nan_to_num()
            changed[f"cache entries of layer {layer} outside of the step"] = found != expected
        for name, tensor in vars(self.runner.state).items():
            before = self.initial_state[name]
            if name in ("last_token", "next_position"):  # the step writes these for its own slots
                before, tensor = (t.index_fill(0, self.slots, 0) for t in (before, tensor))
            changed[f"{name} of a slot"] = before != tensor
        flags = torch.stack([difference.any() for difference in changed.values()]).tolist()
        return [what for what, flag in zip(changed, flags, strict=True) if flag]

    def clear(self) -> None:
        """Leave the state and the buffers as in a new server, with no poison in the cache."""
        self.reset(Start.CLEAN)
        self.runner.state.last_token.zero_()
        self.runner.state.next_position.zero_()
        self.runner.state.block_table.zero_()
        self.runner.buffers.bitmask.fill_(ALL)


def _step(
    batch: Batch,
    block_size: int,
    vocab_size: int,
    draw: random.Random,
    params: Sequence[SamplingParams],
) -> SchedulerOutput:
    """Return a step with the rows of the batch: slots are assigned in order, and the first blocks
    in random order."""
    needed = [-(-(row.start + row.num_tokens) // block_size) for row in batch]
    blocks = draw.sample(range(1, 1 + sum(needed)), sum(needed))
    rows: list[ScheduledRow] = []
    new_slots: list[SlotStart] = []
    new_blocks: list[tuple[int, int, int]] = []
    turn = draw.randrange(len(params))
    for slot, (row, count) in enumerate(zip(batch, needed, strict=True), start=1):
        new_blocks += [(slot, index, blocks.pop()) for index in range(count)]
        own = params[(slot + turn) % len(params)]
        new_slots.append(SlotStart(slot, own, seed=draw.getrandbits(63)))
        prompt = [] if row.decoding else draw.choices(range(vocab_size), k=row.num_tokens)
        rows.append(
            ScheduledRow(
                request_id=f"trial-{slot}",
                slot=slot,
                start=row.start,
                num_tokens=row.num_tokens,
                token_ids=prompt,
                decoding=row.decoding,
                samples=True,
                logprobs=None,
            )
        )
    unscheduled = unscheduled_id()
    return SchedulerOutput(
        step_id=unscheduled,
        batch_id=unscheduled,
        batch_rows=rows,
        new_slots=new_slots,
        new_blocks=new_blocks,
        num_decodes=sum(row.decoding for row in batch),
        num_tokens=sum(row.num_tokens for row in batch),
    )
