"""The static buffers of a step, the persistent tensors of the requests, and the one place that
fills them.

Knows: addresses. Every tensor that a graph reads or writes, except for the cache and those of the
model itself, lives here, allocated once at its largest size. `RequestTensors` outlives steps: a
request owns a request index, and the inputs of its next step (last token, position, block table,
sampling parameters) are written there, by the host when the request starts and by the step itself
from then on. `InputBuffers` holds one step. Knows nothing of graphs or of the model.

A padding row uses request index 0, whose state is token 0, position 0 and block table 0. In a
decode step it is computed like any other row, in any other step it is empty. An epilogue may have
more padding rows than the step before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisrv.core.kv_cache import NULL_REQ_INDEX
from minisrv.core.ladder import Ladders
from minisrv.core.step import SchedulerOutput
from minisrv.kernels import (
    ALL,
    AttentionMetadata,
    Write,
    gather_decode_op,
    gather_mixed_op,
    scatter_op,
    write_values,
)
from minisrv.model_config import ModelConfig
from minisrv.modes import BatchDescriptor


@dataclass(frozen=True)
class BufferSizes:
    """The sizes of the static buffers.

    max_num_reqs: the number of rows of the largest padded step.
    max_num_tokens: the number of tokens of the largest padded step.
    num_req_indices: the number of request indices: the null index, one for each request that runs,
        and as many that are reserved for the certification of graphs.
    max_num_blocks_per_req: the width of the block table, in blocks.
    block_size: the number of tokens in a block.
    query_len: the number of tokens of a request in a step of pure decode.
    """

    max_num_reqs: int
    max_num_tokens: int
    num_req_indices: int
    max_num_blocks_per_req: int
    block_size: int
    query_len: int

    @classmethod
    def of(cls, ladders: Ladders, max_model_len: int, block_size: int) -> BufferSizes:
        """Return the sizes that the steps and the graphs of `ladders` need."""
        return cls(
            max_num_reqs=max(ladders.max_num_seqs, *ladders.decode, *ladders.epilogues, 1),
            max_num_tokens=max(ladders.max_num_batched_tokens, *ladders.decode, *ladders.mixed, 1),
            num_req_indices=2 * ladders.max_num_seqs + 1,
            max_num_blocks_per_req=-(-max_model_len // block_size),
            block_size=block_size,
            query_len=ladders.query_len,
        )

    def bytes_of_rows(self, model: ModelConfig, itemsize: int) -> int:
        """Return the minimum number of bytes that the requests of a step take: the buffers that are
        allocated for them here, and logits once more in float32, which sampling makes.

        itemsize: the size of an element of the model's dtype, in bytes.
        """
        block_table = 4 * self.max_num_blocks_per_req
        per_row = block_table + model.vocab_size // 8 + model.vocab_size * (itemsize + 4)
        return self.max_num_reqs * per_row + self.num_req_indices * block_table

    def bytes_of_tokens(self, model: ModelConfig, itemsize: int) -> int:
        """Return the minimum number of bytes that tokens take: the buffers that are allocated for
        them here and in the model, and the widest activation in the model, gate and up."""
        wide = model.qkv_size + model.q_size + model.hidden_size + 2 * model.intermediate_size
        return self.max_num_tokens * (4 * 8 + wide * itemsize)


def to_device(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return a copy of the values on the device. The copy is ordered after the work launched so
    far, and the host does not wait for it.

    A copy to a GPU goes through pinned memory of torch's host allocator, which does not reuse the
    memory before the copy from it has finished, as the host may be a step ahead.
    """
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Upload:
    """The host's values of one step on their way to the device: one copy, and one launch that
    writes each value to its place (`kernels.step_inputs.write_values`)."""

    def __init__(self) -> None:
        self._writes: list[Write] = []

    def add(
        self,
        target: Tensor,
        values: NDArray[np.int64] | NDArray[np.float64],
        indices: NDArray[np.int64] | None = None,
    ) -> None:
        """Add values to write. In one step no two values may go to the same place.

        target: a contiguous tensor; int64 or int32 for integers, float32 for floats.
        indices: the index of each value in the flattened target; with None the values go to its
            beginning, in order.
        """
        self._writes.append(Write(target, values, indices))

    def send(self, device: torch.device) -> None:
        """Copy and write the values; if there are none, launch nothing."""
        if self._writes:
            write_values(self._writes, lambda packed: to_device(packed, device))


class RequestTensors:
    """The inputs of a request's next step, by request index. There are S request indices; 0 is the
    null index.

    last_token, next_position: [S] int64, the input of the next decode step.
    block_table: [S, max_num_blocks_per_req] int32; entries beyond a request's blocks are stale.
    temperature, top_p, min_p: [S] float32, sampling parameters.
    top_k, seed: [S] int64, sampling parameters.
    """

    def __init__(self, sizes: BufferSizes, device: torch.device) -> None:
        count, width = sizes.num_req_indices, sizes.max_num_blocks_per_req
        self.last_token = torch.zeros(count, dtype=torch.int64, device=device)
        self.next_position = torch.zeros(count, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(count, width, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(count, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(count, dtype=torch.int64, device=device)
        self.top_p = torch.ones(count, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(count, dtype=torch.float32, device=device)
        self.seed = torch.zeros(count, dtype=torch.int64, device=device)

    def apply(self, output: SchedulerOutput, upload: Upload) -> None:
        """Write the sampling parameters of new requests, and new entries of block tables."""
        if new := output.new_reqs:
            req_indices = np.array([req.req_index for req in new], np.int64)
            floats = [(r.params.temperature, r.params.top_p, r.params.min_p) for r in new]
            temperature, top_p, min_p = np.array(floats, np.float64).T.copy()
            upload.add(self.top_k, np.array([r.params.top_k for r in new], np.int64), req_indices)
            upload.add(self.seed, np.array([r.seed for r in new], np.int64), req_indices)
            upload.add(self.temperature, temperature, req_indices)
            upload.add(self.top_p, top_p, req_indices)
            upload.add(self.min_p, min_p, req_indices)
        if output.new_blocks:
            req_indices, columns, blocks = np.array(output.new_blocks, np.int64).T.copy()
            upload.add(self.block_table, blocks, req_indices * self.block_table.shape[1] + columns)


class InputBuffers:
    """The arguments and results of one step at fixed addresses, for at most R rows and T tokens.

    req_indices: [R] int64, the request index of each row.
    input_ids, positions, slot_mapping: [T] int64.
    token_rows: [T] int64, the row that each token belongs to.
    block_table: [R, max_num_blocks_per_req] int32.
    seq_lens: [R] int32.
    query_start_loc: [R + 1] int32.
    hidden: [T, hidden] in the model's dtype.
    logits: [R, vocab] in the model's dtype.
    sampled_token_ids: [R] int64, the sampled tokens.
    logits_indices: [R] int64, the index of the hidden state that each row samples from.
    bitmask: [R, vocab / 32] int32, the tokens that each row may sample, as
        `kernels.apply_bitmask_op` takes them; between steps it allows all tokens.
    """

    def __init__(
        self,
        model: ModelConfig,
        sizes: BufferSizes,
        request_tensors: RequestTensors,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rows, tokens = sizes.max_num_reqs, sizes.max_num_tokens

        def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.sizes = sizes
        self.request_tensors = request_tensors
        self.device = device
        self.req_indices = ints(rows)
        self.input_ids = ints(tokens)
        self.positions = ints(tokens)
        self.slot_mapping = ints(tokens)
        self.token_rows = ints(tokens)
        self.block_table = ints(rows, sizes.max_num_blocks_per_req, dtype=torch.int32)
        self.seq_lens = ints(rows, dtype=torch.int32)
        self.query_start_loc = ints(rows + 1, dtype=torch.int32)
        self.sampled_token_ids = ints(rows)
        self.logits_indices = ints(rows)
        self.bitmask = ints(rows, -(-model.vocab_size // 32), dtype=torch.int32).fill_(ALL)
        self.hidden = torch.zeros(tokens, model.hidden_size, dtype=dtype, device=device)
        self.logits = torch.zeros(rows, model.vocab_size, dtype=dtype, device=device)
        # Decode rows are all of the same length, so this never changes.
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._decode_query_start_loc = starts * sizes.query_len
        self._decode_metadata: dict[BatchDescriptor, AttentionMetadata] = {}
        self._last_prepared: tuple[int, BatchDescriptor, int] | None = None

    def prepare_inputs(
        self, output: SchedulerOutput, descriptor: BatchDescriptor, epilogue_rows: int
    ) -> AttentionMetadata:
        """Write a step into the persistent tensors and the buffers, padded to the descriptor, and
        return its description for attention.

        epilogue_rows: the padded number of rows of the epilogue that follows the hidden states; 0
            if none follows.

        For a uniform decode step only the request indices, and `logits_indices` for its epilogue,
        are written: the step itself gathers the rest (`gather_decode`), because only the device
        knows the last tokens when the step is launched ahead. A step of the same batch as the step
        before it needs neither.
        """
        upload, previous = Upload(), self._last_prepared
        tokens, num_rows = descriptor.num_tokens, output.num_rows
        rows = num_rows if descriptor.num_reqs is None else descriptor.num_reqs
        self.request_tensors.apply(output, upload)
        self._last_prepared = (output.batch_id, descriptor, epilogue_rows)
        if not (output.position_offset and previous == self._last_prepared):
            req_indices = np.full(max(rows, epilogue_rows), NULL_REQ_INDEX, np.int64)
            req_indices[:num_rows] = [row.req_index for row in output.batch_rows]
            upload.add(self.req_indices, req_indices)
            if epilogue_rows:
                indices = np.zeros(epilogue_rows, np.int64)
                lengths = [row.num_tokens for row in output.batch_rows]
                indices[:num_rows] = np.cumsum(lengths, dtype=np.int64) - 1
                upload.add(self.logits_indices, indices)
        if (query_len := descriptor.query_len) is not None:
            upload.send(self.device)
            assert query_len == self.sizes.query_len, "the ladder of decode graphs has one length"
            if descriptor not in self._decode_metadata:  # the same for every batch of this shape
                metadata = self._metadata(tokens, rows, self._decode_query_start_loc, query_len)
                self._decode_metadata[descriptor] = metadata
            return self._decode_metadata[descriptor]
        self._prepare_tokens(output, tokens, rows, upload)
        # A row that is not padding has at least one token. A capture must be valid for any batch.
        one_each = descriptor.num_reqs is None and tokens == rows
        return self._metadata(tokens, rows, self.query_start_loc, 1 if one_each else tokens)

    def _prepare_tokens(
        self, output: SchedulerOutput, padded: int, rows: int, upload: Upload
    ) -> None:
        """Write the tokens of a step that is not uniform decode.

        padded: the number of tokens of the padded step.
        rows: the number of rows, including those of padding, which are empty.
        """
        step_rows, total, decodes = output.rows, output.num_tokens, output.num_decodes
        lengths, starts = np.zeros((2, rows), np.int64)
        lengths[: len(step_rows)] = [row.num_tokens for row in step_rows]
        starts[: len(step_rows)] = [row.num_computed_tokens for row in step_rows]
        ends = np.cumsum(lengths)
        ids, positions, token_rows = np.zeros((3, padded), np.int64)
        token_rows[:total] = np.repeat(np.arange(rows), lengths)
        positions[:total] = np.arange(total) + np.repeat(starts - ends + lengths, lengths)
        prompt_ids = chain.from_iterable(row.token_ids for row in step_rows)
        ids[decodes:total] = np.fromiter(prompt_ids, np.int64, total - decodes)
        upload.add(self.query_start_loc, np.concatenate(([0], ends)))
        upload.add(self.seq_lens, starts + lengths)
        upload.add(self.positions, positions)
        upload.add(self.token_rows, token_rows)
        upload.add(self.input_ids, ids)
        upload.send(self.device)
        request_tensors = self.request_tensors
        gather_mixed_op(
            self.req_indices[:rows],
            request_tensors.last_token,
            request_tensors.block_table,
            self.positions[:padded],
            self.token_rows[:padded],
            self.seq_lens[:rows],
            self.input_ids[:padded],
            self.slot_mapping[:padded],
            self.block_table[:rows],
            num_decodes=decodes,
            num_tokens=total,
            block_size=self.sizes.block_size,
        )

    def forget_last_step(self) -> None:
        """Let the next step write all of its inputs, because the buffers have been changed."""
        self._last_prepared = None

    def gather_decode(self, rows: int) -> None:
        """Gather the inputs of `rows` decode rows by request index. This runs inside the FULL
        graph."""
        request_tensors = self.request_tensors
        gather_decode_op(
            self.req_indices[:rows],
            request_tensors.last_token,
            request_tensors.next_position,
            request_tensors.block_table,
            self.input_ids[:rows],
            self.positions[:rows],
            self.seq_lens[:rows],
            self.slot_mapping[:rows],
            self.block_table[:rows],
            block_size=self.sizes.block_size,
        )

    def scatter(self, rows: int) -> None:
        """Write the sampled tokens and the next positions as the input of each row's next step.
        This runs inside the FULL graph."""
        request_tensors = self.request_tensors
        scatter_op(
            self.req_indices[:rows],
            self.sampled_token_ids[:rows],
            self.seq_lens[:rows],
            request_tensors.last_token,
            request_tensors.next_position,
        )

    def next_positions(self, rows: int) -> Tensor:
        """Return [rows] int32, the position of the token that each row samples."""
        return self.seq_lens[:rows]

    def _metadata(
        self, tokens: int, rows: int, starts: Tensor, max_query_len: int
    ) -> AttentionMetadata:
        return AttentionMetadata(
            slot_mapping=self.slot_mapping[:tokens],
            block_table=self.block_table[:rows],
            seq_lens=self.seq_lens[:rows],
            query_start_loc=starts[: rows + 1],
            max_query_len=max_query_len,
        )
