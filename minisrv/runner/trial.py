"""The batch that a graph is certified on.

Knows: how to make a step by hand that fits a descriptor with padding to spare, what poison is, and
what the step must and must not change. It is the `Trial` that `graph.certify` runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisrv.core.dispatcher import Dispatch
from minisrv.core.kv_cache import NULL_BLOCK, NULL_SLOT
from minisrv.core.scheduler import ScheduledRow, SchedulerOutput, SlotStart
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Epilogue, Reason
from minisrv.request import SamplingParams

if TYPE_CHECKING:
    from minisrv.runner.model_runner import ModelRunner

NAN = float("nan")
MOST_DECODES = 2
"""Decode rows in a mixed trial; the rest of its tokens are prefill."""


class StepTrial:
    """One step at a descriptor's padded shape, on real slots and blocks of an empty cache.

    The batch is one row (FULL) or one token (PIECEWISE) short of the padded size, so that there is
    padding, unless the size is one. Lengths lie before, on and behind block edges. Blocks beyond
    those of the batch are watched: whoever writes there is found out.
    """

    def __init__(self, runner: ModelRunner, mode: CUDAGraphMode, descriptor: BatchDescriptor):
        self.name = f"{mode.name} {descriptor.num_tokens} {descriptor.epilogue.name}"
        self.runner = runner
        self.mode = mode
        self.descriptor = descriptor
        self.output = self._compose()
        used = len(self.output.new_blocks)
        last = len(runner.kv_caches[0]) - 1
        self.watched = torch.tensor(sorted({*range(1 + used), min(1 + used, last), last}))
        self.slots = torch.tensor([row.slot for row in self.output.rows], dtype=torch.int64)
        self.live = self._live_positions()
        generator = torch.Generator().manual_seed(descriptor.num_tokens)
        shape = (len(self.watched), *runner.kv_caches[0].shape[1:])
        self.cache = (torch.rand(shape, generator=generator) - 0.5).to(runner.kv_caches[0].dtype)
        self.last_token = torch.randint(
            runner.vocab_size, self.slots.shape, generator=generator, dtype=torch.int64
        )

    # ---- the batch ---------------------------------------------------------------------------

    def _compose(self) -> SchedulerOutput:
        """Rows of (start, tokens), as many as slots, blocks and the padded size allow."""
        sizes, target = self.runner.buffers.sizes, max(1, self.descriptor.num_tokens - 1)
        free_blocks = len(self.runner.kv_caches[0]) - 1
        longest = min(sizes.blocks_per_row, free_blocks) * sizes.block_size
        most_decodes = min(MOST_DECODES, sizes.slots - 2)
        rows: list[ScheduledRow] = []
        new_slots: list[SlotStart] = []
        new_blocks: list[tuple[int, int, int]] = []
        tokens = decodes = 0
        while tokens < target and len(rows) < sizes.slots - 1:
            slot = len(rows) + 1
            decoding = self.descriptor.uniform_decode or (target > 2 and slot <= most_decodes)
            start = (slot * 7 - 1) % (2 * sizes.block_size) if decoding or slot % 2 else 0
            start = min(start, longest - 1)
            wanted = target - tokens  # half of it, unless this is the last slot
            wanted = wanted if slot == sizes.slots - 1 else -(-wanted // 2)
            count = 1 if decoding else min(wanted, longest - start)
            blocks = -(-(start + count) // sizes.block_size)
            if blocks > free_blocks - len(new_blocks):
                break
            new_blocks += [(slot, index, len(new_blocks) + 1 + index) for index in range(blocks)]
            # Every third row samples, with a seed of its own; the others are greedy.
            params = SamplingParams(temperature=0.8 if slot % 3 == 0 else 0.0, top_p=0.9)
            new_slots.append(SlotStart(slot, params, seed=slot))
            ids = [] if decoding else [(slot + i) % self.runner.vocab_size for i in range(count)]
            rows.append(
                ScheduledRow(
                    request_id=f"trial-{slot}",
                    slot=slot,
                    start=start,
                    num_tokens=count,
                    token_ids=ids,
                    decoding=decoding,
                    samples=True,
                    logprobs=None,
                )
            )
            tokens += count
            decodes += decoding
        return SchedulerOutput(-1, rows, new_slots, new_blocks, decodes, tokens)

    def _live_positions(self) -> Tensor:
        """[watched, block_size] bool: cache positions that belong to the batch's tokens. The
        batch has the first blocks, so its blocks' numbers are their places among the watched."""
        size = self.runner.buffers.sizes.block_size
        live = torch.zeros(len(self.watched), size, dtype=torch.bool)
        ends = {row.slot: row.start + row.num_tokens for row in self.output.rows}
        for slot, index, block in self.output.new_blocks:
            live[block, : max(0, min(size, ends[slot] - index * size))] = True
        return live

    # ---- graph.certify.Trial -----------------------------------------------------------------

    def reset(self, *, poison: bool) -> None:
        """See `graph.certify.Trial`."""
        buffers, state = self.runner.buffers, self.runner.state
        initial = self.cache.masked_fill(~self.live[:, :, None, None, None], NAN)
        for cache in self.runner.kv_caches:
            cache[self.watched] = initial if poison else self.cache
        state.block_table[1:] = self.watched[-1] if poison else 0
        state.last_token.zero_()[self.slots] = self.last_token
        state.next_position.zero_()
        for row in self.output.rows:
            state.next_position[row.slot] = row.start
        state.apply(self.output)
        self.initial_cache = initial if poison else self.cache
        self.initial_state = {name: tensor.clone() for name, tensor in vars(state).items()}
        for buffer in (buffers.qkv, buffers.attn_out, buffers.hidden, buffers.logits):
            buffer.fill_(NAN if poison else 0.0)
        # Where there is padding the last slot is nobody's: a stale row writes to a watched block.
        buffers.slots.fill_(buffers.sizes.slots - 1 if poison else NULL_SLOT)
        for name in ("input_ids", "positions", "slot_mapping", "block_table"):
            getattr(buffers, name).fill_(1 if poison else 0)
        buffers.seq_lens.fill_(buffers.sizes.block_size if poison else 0)
        buffers.query_start_loc.fill_(buffers.sizes.tokens if poison else 0)
        buffers.tokens.fill_(0)

    def run(self, *, graph: bool) -> None:
        """See `graph.certify.Trial`."""
        mode = self.mode if graph else CUDAGraphMode.NONE
        self.runner.execute(self.output, Dispatch(mode, self.descriptor, Reason.PURE_DECODE))

    def observe(self) -> dict[str, Tensor]:
        """See `graph.certify.Trial`."""
        buffers, state = self.runner.buffers, self.runner.state
        rows, tokens = len(self.output.rows), self.output.num_tokens
        logits = rows if self.descriptor.epilogue is Epilogue.LOGITS else 0  # else not written
        return {
            "hidden states": buffers.hidden[:tokens].clone(),
            "logits": buffers.logits[:logits].clone(),
            "tokens": buffers.tokens[:rows].clone(),
            "last tokens": state.last_token[self.slots],
            "next positions": state.next_position[self.slots],
            "cache": torch.stack([c[self.watched][self.live] for c in self.runner.kv_caches]),
        }

    def touched(self) -> list[str]:
        """See `graph.certify.Trial`."""
        found = []
        outside = ~self.live
        outside[NULL_BLOCK] = False  # padding writes there
        expected = self.initial_cache[outside]
        for layer, cache in enumerate(self.runner.kv_caches):
            if not torch.equal(cache[self.watched][outside].nan_to_num(), expected.nan_to_num()):
                found.append(f"cache entries of layer {layer} outside of the batch")
        for name, tensor in vars(self.runner.state).items():
            before = self.initial_state[name]
            if name in ("last_token", "next_position"):  # the step writes those of its own slots
                before, tensor = (t.index_fill(0, self.slots, 0) for t in (before, tensor))
            if not torch.equal(before, tensor):
                found.append(f"{name} of a slot")
        return found

    def clear(self) -> None:
        """Leave state and buffers as a new server has them, and no poison in the cache."""
        self.reset(poison=False)
        self.runner.state.last_token.zero_()
        self.runner.state.next_position.zero_()
        self.runner.state.block_table.zero_()
