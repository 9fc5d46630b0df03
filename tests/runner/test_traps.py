"""Mistakes that other servers have made with captured graphs, and tests that would notice them
here.

Each test runs as it is, and once for each *mutant*: the mistake itself, made on purpose, with which
the test must fail. The numbers are those of a list drawn from the issue trackers of vLLM, SGLang
and others; 9 to 12, which need a GPU, are in test_traps_on_cuda.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minisrv import kernels
from minisrv.certification.batches import BatchRow
from minisrv.certification.trial import StepTrial
from minisrv.core.kv_cache import FreeList
from minisrv.core.ladder import decode_descriptor
from minisrv.core.step import SchedulerOutput
from minisrv.graph import cpu_tape
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.graph.cuda import CUDABackend
from minisrv.graph.forward_context import get_forward_context
from minisrv.kernels import AttentionMetadata, attention
from minisrv.modes import BatchDescriptor, CUDAGraphMode, StageOutput
from minisrv.runner import model_runner
from minisrv.runner.input_buffers import InputBuffers, RequestTensors
from minisrv.runner.model_runner import ModelRunner
from minisrv.runner.results import StepResult
from tests.checkpoints import make_checkpoint
from tests.runner.stepping import (
    BLOCK_SIZE,
    BOTH,
    CONTEXT,
    NUM_BLOCKS,
    Model,
    Mutant,
    Patch,
    Step,
    assert_equals_eager,
    attention_buffers,
    fails_with,
    generate,
    graphs_attend_with,
    play,
    poison_the_pool,
    restore,
    saved,
    start,
    submit,
    tensors,
    trial_of,
)

PIECEWISE, FULL = CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


# ---- trap 1: cache slot -1 is a real index -------------------------------------------------------

LAST_ENTRY = NUM_BLOCKS * BLOCK_SIZE - 1
"""The entry of the cache that index -1 means."""


def pads_slot_mapping_with_minus_one(patch: Patch) -> None:
    fill = InputBuffers.prepare_inputs

    def broken(self, output, descriptor, epilogue_rows):
        attn = fill(self, output, descriptor, epilogue_rows)
        if not descriptor.uniform_decode:
            self.slot_mapping[output.num_tokens : descriptor.num_tokens] = LAST_ENTRY
        return attn

    patch.setattr(InputBuffers, "prepare_inputs", broken)


def maps_the_null_slot_to_minus_one(patch: Patch) -> None:
    gather = InputBuffers.gather_decode

    def broken(self, rows):
        gather(self, rows)
        self.slot_mapping[:rows].masked_fill_(self.req_indices[:rows] == 0, LAST_ENTRY)

    patch.setattr(InputBuffers, "gather_decode", broken)


def launch_and_check_writes(step: Step) -> StepResult:
    """Launch the step, and check that it changes the cache entries of its own tokens, and that
    padding changes only those of block 0."""
    runner = step.engine.runner
    before = [cache.clone() for cache in runner.kv_caches]
    result = step.launch()
    own = {
        (
            int(runner.request_tensors.block_table[row.req_index, position // BLOCK_SIZE]),
            position % BLOCK_SIZE,
        )
        for row in step.output.rows
        for position in range(row.num_computed_tokens, row.num_computed_tokens + row.num_tokens)
    }
    for old, cache in zip(before, runner.kv_caches, strict=True):
        # Bits are compared, because memory that nobody has written may hold NaN.
        changed = old.view(torch.int32) != cache.view(torch.int32)
        changed = changed.flatten(2).any(dim=2).nonzero().tolist()
        assert {(block, offset) for block, offset in changed if block} == own
    return result


@fails_with(
    pads_slot_mapping_with_minus_one,
    maps_the_null_slot_to_minus_one,
    on_cuda=(pads_slot_mapping_with_minus_one, maps_the_null_slot_to_minus_one),
    modes=BOTH,
)
def test_trap_01_a_step_writes_the_entries_of_its_own_tokens_and_no_other(model: Model):
    engine = start(model)
    for cache in engine.runner.kv_caches:
        cache.fill_(-7.0)
    submit(engine, [1, 2, 3], [4, 5], [6])
    ran = set()
    for _ in range(6):
        step = Step.next(engine)
        assert step.padded > step.output.num_tokens, "there is padding"
        step.retire(launch_and_check_writes(step))
        ran.add((step.dispatch.mode, step.output.query_len == 1))
    assert ran == {(model.mode.mixed_mode, False), (FULL, True)}


# ---- trap 2: capture dirties the null block ------------------------------------------------------


def certification_leaves_its_poison(patch: Patch) -> None:
    patch.setattr(StepTrial, "clear", lambda self: None)


def padding_scatters_its_position(patch: Patch) -> None:
    """Mutant: the null index is not reset, so its position grows with every step, in the end beyond
    the context."""

    def broken(self, rows):
        state, req_indices = self.request_tensors, self.req_indices[:rows]
        state.last_token.index_copy_(0, req_indices, self.sampled_token_ids[:rows])
        state.next_position.index_copy_(0, req_indices, self.next_positions(rows).long())

    patch.setattr(InputBuffers, "scatter", broken)


@fails_with(
    certification_leaves_its_poison,
    padding_scatters_its_position,
    on_cuda=(certification_leaves_its_poison,),
)
def test_trap_02_null_block_and_null_slot_are_clean_behind_capture_and_steps(model: Model):
    """The null block and the null index are clean behind capture and steps, also after
    certification, which fills the null block with NaN on purpose."""
    for certified in (False, True):
        engine = start(model, certified=certified)
        assert_null_is_clean(engine.runner)
        submit(engine, [1, 2, 3], [4, 5], [6])
        generate(engine)
        assert_null_is_clean(engine.runner)


def assert_null_is_clean(runner: ModelRunner) -> None:
    assert all(cache[0].isfinite().all() for cache in runner.kv_caches)
    state = runner.request_tensors
    for tensor in (state.last_token, state.next_position, state.block_table):
        assert not tensor[0].any()


# ---- trap 3: rows of length 0, and outputs that nobody wrote ------------------------------------


def padding_rows_have_length_0(patch: Patch) -> None:
    gather = InputBuffers.gather_decode

    def broken(self, rows):
        gather(self, rows)
        # The first row is left out: for a batch of padding alone, as at capture, attention would
        # divide by zero.
        self.seq_lens[1:rows].masked_fill_(self.req_indices[1:rows] == 0, 0)

    patch.setattr(InputBuffers, "gather_decode", broken)


def padding_rows_read_beyond_their_token(patch: Patch) -> None:
    gather = InputBuffers.gather_decode

    def broken(self, rows):
        gather(self, rows)
        self.seq_lens[:rows].clamp_(min=3)

    patch.setattr(InputBuffers, "gather_decode", broken)


def attention_skips_the_padding(patch: Patch) -> None:
    def broken(layer, qkv, positions, metadata, out):
        kept, total = out.clone(), metadata.query_start_loc[-1]
        attention(layer, qkv, positions, metadata, out)
        if get_forward_context().mode is PIECEWISE:
            out[total:] = kept[total:]

    patch.setattr(kernels, "attention", broken)


@fails_with(
    padding_rows_have_length_0,
    padding_rows_read_beyond_their_token,
    attention_skips_the_padding,
    on_cuda=(padding_rows_read_beyond_their_token, attention_skips_the_padding),
)
def test_trap_03_nan_in_outputs_and_padding_reaches_no_row(model: Model):
    """Real rows equal those of a run whose buffers are filled with zeros, and padding rows are
    finite, because they are ordinary rows."""
    engine = start(model)
    submit(engine, [1, 2, 3], [4, 5], [6])
    runner, buffers, ran = engine.runner, engine.runner.buffers, set()
    for _ in range(2):
        step = Step.next(engine)
        before, seen = saved(runner), []
        for value in (0.0, float("nan")):
            restore(runner, before)
            poisoned = (*attention_buffers(runner.model).values(), buffers.hidden, buffers.logits)
            for tensor in poisoned:
                tensor.fill_(value)
            for cache in runner.kv_caches:
                cache[0] = value
            result = step.launch()
            seen.append((buffers.hidden[: step.padded].clone(), result.token_ids))
        assert seen[0][0].isfinite().all()
        assert all(torch.equal(zero, nan) for zero, nan in zip(*seen, strict=True))
        if step.dispatch.mode is FULL:
            assert buffers.seq_lens[: step.padded].min() >= 1
        ran.add(step.dispatch.mode)
        step.retire(result)
    assert ran == {PIECEWISE, FULL}


# ---- trap 4: stale tails -------------------------------------------------------------------------


def compare_with_a_fresh_engine(model: Model, step: Step) -> None:
    """Check that the step gives, behind the steps before it, what it gives in an engine that has
    run none: everything up to the padded size is equal, padding included."""
    fresh = start(model)
    values, own = tensors(step.engine.runner), tensors(fresh.runner)
    for name, tensor in own.items():
        if not name.startswith("buffers"):
            tensor.copy_(values[name])
    for runner in (step.engine.runner, fresh.runner):
        step.launch_on(runner)
    rows = step.dispatch.descriptor.num_reqs
    if rows is None:
        rows = len(step.output.rows)
    by_row = ("req_indices", "seq_lens")
    for name in (*by_row, "input_ids", "positions", "slot_mapping", "hidden"):
        size = rows if name in by_row else step.padded
        name = f"buffers.{name}"
        assert torch.equal(values[name][:size], own[name][:size]), name
    # A block table is compared as far as the row has filled it; the entries behind have no meaning.
    tables, expected = values["buffers.block_table"][:rows], own["buffers.block_table"][:rows]
    used = (own["buffers.seq_lens"][:rows] + BLOCK_SIZE - 1) // BLOCK_SIZE
    unused = torch.arange(tables.shape[1], device=tables.device) >= used[:, None]
    assert torch.equal(tables.masked_fill(unused, 0), expected.masked_fill(unused, 0))
    attn, expected = (
        runner.buffers.prepare_inputs(step.output, step.dispatch.descriptor, 0)
        for runner in (step.engine.runner, fresh.runner)
    )
    assert torch.equal(attn.query_start_loc, expected.query_start_loc)
    assert (attn.query_start_loc.diff() >= 0).all(), "monotone"
    assert attn.query_start_loc[len(step.output.rows)] == step.output.num_tokens
    for name, tensor in own.items():
        if name.startswith("state"):
            assert torch.equal(values[name], tensor), name


def keeps_the_slots_of_the_step_before(patch: Patch) -> None:
    fill = InputBuffers.prepare_inputs

    def broken(self, output, descriptor, epilogue_rows):
        tail = self.req_indices[len(output.rows) :].clone()
        attn = fill(self, output, descriptor, epilogue_rows)
        self.req_indices[len(output.rows) :] = tail
        return attn

    patch.setattr(InputBuffers, "prepare_inputs", broken)


@fails_with(keeps_the_slots_of_the_step_before, on_cuda=(keeps_the_slots_of_the_step_before,))
def test_trap_04_five_decodes_behind_eight_in_the_same_graph(model: Model):
    engine = start(model)
    submit(engine, *([n, n + 1] for n in range(5)), max_tokens=9)
    submit(engine, [11], [12], [13], max_tokens=2)
    play(engine, 2)
    step = Step.next(engine)
    assert len(step.output.rows) == 5
    assert step.dispatch.descriptor == decode_descriptor(8, StageOutput.TOKENS)
    compare_with_a_fresh_engine(model, step)


def keeps(*names: str) -> Mutant:
    """Make a mutant: the named buffers of a mixed step keep their old values behind the step's
    tokens."""

    def mutant(patch: Patch) -> None:
        fill = InputBuffers._prepare_tokens

        def broken(self, output, *sizes):
            tails = {name: getattr(self, name)[output.num_tokens :].clone() for name in names}
            fill(self, output, *sizes)
            for name, tail in tails.items():
                getattr(self, name)[output.num_tokens :] = tail

        patch.setattr(InputBuffers, "_prepare_tokens", broken)

    mutant.__name__ = f"keeps_{'_'.join(names)}"
    return mutant


def keeps_rows(name: str, first: int = 0) -> Mutant:
    """Make a mutant: a buffer of a mixed step keeps its old values behind the step's own rows."""

    def mutant(patch: Patch) -> None:
        fill = InputBuffers._prepare_tokens

        def broken(self, output, *sizes):
            buffer = getattr(self, name)[first + len(output.rows) :]
            tail = buffer.clone()
            fill(self, output, *sizes)
            buffer.copy_(tail)

        patch.setattr(InputBuffers, "_prepare_tokens", broken)

    mutant.__name__ = f"keeps_rows_of_{name}"
    return mutant


def describes_rows_of_the_step_before(patch: Patch) -> None:
    fill = InputBuffers.prepare_inputs

    def broken(self, output, descriptor, epilogue_rows):
        rows = len(output.rows) + 2
        return replace(
            fill(self, output, descriptor, epilogue_rows),
            query_start_loc=self.query_start_loc[: rows + 1],
            seq_lens=self.seq_lens[:rows],
            block_table=self.block_table[:rows],
        )

    patch.setattr(InputBuffers, "prepare_inputs", broken)


@fails_with(
    keeps("input_ids"),
    keeps("positions"),
    keeps("slot_mapping"),
    describes_rows_of_the_step_before,
)
def test_trap_04_five_tokens_behind_eight_in_the_same_graph(model: Model):
    five_tokens_behind_eight(model, BatchDescriptor(8))


KEEPS_STARTS = keeps_rows("query_start_loc", first=1)


@fails_with(
    keeps("input_ids"),
    keeps("positions"),
    keeps("slot_mapping"),
    KEEPS_STARTS,
    keeps_rows("seq_lens"),
    on_cuda=(KEEPS_STARTS, keeps_rows("seq_lens")),
    modes=(FULL,),
)
def test_trap_04_one_row_behind_three_in_the_same_graph(model: Model):
    """Where the graph holds attention, the rows of a mixed batch are padded too, and their tail is
    not left over from the step before."""
    five_tokens_behind_eight(model, BatchDescriptor(8, num_reqs=8))


def five_tokens_behind_eight(model: Model, key: BatchDescriptor) -> None:
    engine = start(model)
    submit(engine, [1, 2, 3], [4, 5, 6], [7, 8])
    play(engine, 1)
    for name in ("1", "4", "7"):
        engine.abort(name)
    submit(engine, [9, 10, 11, 12, 13])
    step = Step.next(engine)
    assert (step.output.num_tokens, len(step.output.rows)) == (5, 1)
    assert step.dispatch.descriptor == key
    compare_with_a_fresh_engine(model, step)


# ---- trap 5: metadata frozen at capture ----------------------------------------------------------


def freezes_the_lengths(patch: Patch) -> None:
    """Mutant: the lengths are computed on the host, which no graph records."""
    gather = InputBuffers.gather_decode

    def broken(self, rows):
        gather(self, rows)
        self.seq_lens[:rows].copy_(torch.from_numpy(self.positions[:rows].numpy() + 1))

    patch.setattr(InputBuffers, "gather_decode", broken)


def keeps_the_plan_of_the_first_replay(patch: Patch) -> None:
    plans: dict[int, int] = {}

    def planned(metadata: AttentionMetadata) -> AttentionMetadata:
        seq_lens = metadata.seq_lens
        longest = plans.setdefault(len(seq_lens), int(seq_lens.max()))
        return replace(metadata, seq_lens=seq_lens.clamp(max=longest))

    patch.setattr(cpu_tape, "DIRECT", graphs_attend_with(planned))


def captures_the_length_that_it_sees(patch: Patch) -> None:
    gather = InputBuffers.gather_decode

    def broken(self, rows):
        gather(self, rows)
        if torch.cuda.is_current_stream_capturing():
            self.seq_lens[:rows].clamp_(max=1)

    patch.setattr(InputBuffers, "gather_decode", broken)


@fails_with(
    freezes_the_lengths,
    keeps_the_plan_of_the_first_replay,
    on_cuda=(captures_the_length_that_it_sees,),
)
def test_trap_05_a_graph_captured_at_length_1_serves_every_length(model: Model):
    """A graph captured on padding, whose length is 1, is right at length 1, around block edges and
    at the maximum."""
    runner = start(model).runner
    lengths = (1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, CONTEXT)
    for rows in (1, 3):
        for length in lengths:
            batch = tuple(BatchRow(max(0, length - 1 - n), 1, is_decode=True) for n in range(rows))
            key = decode_descriptor(1 if rows == 1 else 4, StageOutput.HIDDEN)
            assert_equals_eager(trial_of(runner, FULL, key, batch))


def captures_the_rows_that_it_sees(patch: Patch) -> None:
    """Mutant: the graph holds as many rows as it sees at capture, which is one, because it is
    captured on padding alone."""
    fill = InputBuffers.prepare_inputs

    def broken(self, output, descriptor, epilogue_rows):
        attn, rows = fill(self, output, descriptor, epilogue_rows), max(1, len(output.rows))
        # Where each row has one token, CUDA's kernel would notice that rows are missing.
        if attn.max_query_len == 1:
            return attn
        return replace(
            attn,
            query_start_loc=attn.query_start_loc[: rows + 1],
            seq_lens=attn.seq_lens[:rows],
            block_table=attn.block_table[:rows],
        )

    patch.setattr(InputBuffers, "prepare_inputs", broken)


@fails_with(
    captures_the_rows_that_it_sees,
    keeps_the_plan_of_the_first_replay,
    on_cuda=(captures_the_rows_that_it_sees,),
    modes=(FULL,),
)
def test_trap_05_a_graph_captured_on_empty_rows_serves_every_mixture(model: Model):
    """A graph captured on empty rows serves one row, chunks up to block edges, decodes beside them,
    and as many rows as it holds."""
    runner = start(model).runner
    mode, key = runner.ladders.mixed_key(16)
    assert (mode, key.num_reqs) == (FULL, 8)
    decodes = [BatchRow(length - 1, 1, is_decode=True) for length in (1, BLOCK_SIZE, CONTEXT)]
    mixtures = [
        [BatchRow(0, 1)],
        [BatchRow(0, 16)],
        [BatchRow(CONTEXT - 15, 15)],
        [BatchRow(3, BLOCK_SIZE), BatchRow(0, BLOCK_SIZE + 1), BatchRow(BLOCK_SIZE, 1)],
        [*decodes, BatchRow(7, 13)],
        [*decodes, *[BatchRow(n, 2) for n in range(5)]],
        decodes,
    ]
    for batch in mixtures:
        assert_equals_eager(trial_of(runner, mode, key, tuple(batch)), poisoned=True)


# ---- trap 6: prefill that looks like decode ------------------------------------------------------


def classifies_by_shape(patch: Patch) -> None:
    by_shape = property(lambda self: 1 if self.num_tokens == len(self.rows) else None)
    patch.setattr(SchedulerOutput, "query_len", by_shape)


HAS_PREFILL, PURE_DECODE = "PIECEWISE/has_prefill", "FULL/pure_decode"


@fails_with(classifies_by_shape, on_cuda=(classifies_by_shape,))
def test_trap_06_a_prompt_of_one_token_is_no_decode(model: Model):
    engine, eager = start(model), start(model, enforce_eager=True)
    for each in (engine, eager):
        submit(each, [5], max_tokens=4)
    tokens, ran = generate(engine)
    assert ran == {"5": {HAS_PREFILL: 1, PURE_DECODE: 3}}
    assert tokens == generate(eager)[0]


@fails_with(classifies_by_shape, on_cuda=(classifies_by_shape,))
def test_trap_06_a_chunk_of_one_token_is_no_decode(model: Model):
    """A prompt of one token alone and a last chunk of one token beside a decode are prefill: with 6
    tokens a step, the second prompt's 6 tokens come as 5 beside 1 decode, then 1 beside 1
    decode."""
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 6}
    played = []
    for engine in (start(model, **limits), start(model, enforce_eager=True, **limits)):
        submit(engine, [5], max_tokens=6)
        outputs = engine.step()
        submit(engine, [6, 7, 8, 9, 10, 11], max_tokens=2)
        tokens, ran = generate(engine)
        played.append([outputs[0].token_ids, tokens])
        if not engine.config.enforce_eager:
            assert ran["5"] == {HAS_PREFILL: 3, PURE_DECODE: 3}
            assert ran["6"] == {HAS_PREFILL: 2, PURE_DECODE: 1}
    assert played[0] == played[1]


# ---- trap 7: memory of the pool that is given out twice ------------------------------------------


def intermediates_die_at_the_break(patch: Patch) -> None:
    """Mutant: a tensor that crosses from one piece to the next is freed at the end of its piece, so
    that a result of the next one lies on it."""
    finish = CPUTapeBackend.finish

    def broken(self):
        ends, last = [], -1
        for _, nodes in self._capture.segments:
            last += len(nodes)
            ends.append(last)
        for storage in self._capture.internal.values():
            end = next(end for end in ends if end >= storage.born)
            storage.last_used = min(storage.last_used, end)
        finish(self)

    patch.setattr(CPUTapeBackend, "finish", broken)


def somebody_uses_the_pool_between_pieces(patch: Patch) -> None:
    finish = CPUTapeBackend.finish

    def broken(self):
        pieces = [segment for segment, _ in self._capture.segments]
        finish(self)
        for piece in pieces[:-1]:
            piece.calls.append((self.arena.fill_, (255,), {}))

    patch.setattr(CPUTapeBackend, "finish", broken)


def somebody_uses_the_pool_of_a_gpu_between_pieces(patch: Patch) -> None:
    end = CUDABackend.end

    def broken(self):
        replay = end(self)

        def run():
            replay()
            poison_the_pool(self)

        return run

    patch.setattr(CUDABackend, "end", broken)


@fails_with(
    intermediates_die_at_the_break,
    somebody_uses_the_pool_between_pieces,
    on_cuda=(somebody_uses_the_pool_of_a_gpu_between_pieces,),
)
def test_trap_07_every_graph_is_right_behind_every_other(model: Model):
    """All graphs are captured, then replayed from first to last and back, in the memory that they
    share."""
    replay_all(model)


@fails_with(modes=(FULL,))
def test_trap_07_graphs_without_pieces(model: Model):
    replay_all(model)


def replay_all(model: Model) -> None:
    runner = start(model).runner
    keys = runner.ladders.keys()
    for mode, key in keys + keys[::-1]:
        decode = key.uniform_decode
        batch = (*[BatchRow(5, 1, decode)] * (key.num_tokens if decode else 1),)
        if not decode and key.num_tokens > 1:
            batch += (BatchRow(0, key.num_tokens - 1),)
        assert_equals_eager(trial_of(runner, mode, key, batch), poisoned=True)


# ---- trap 8: a result that the next step overwrites ----------------------------------------------


def results_are_views(patch: Patch) -> None:
    sample_tokens = ModelRunner.sample_tokens

    def broken(self, output, dispatch):
        result = sample_tokens(self, output, dispatch)
        return StepResult(
            self.buffers.sampled_token_ids[: output.num_rows], result.logprobs, result.end_event
        )

    patch.setattr(ModelRunner, "sample_tokens", broken)


@fails_with(results_are_views, on_cuda=(results_are_views,))
def test_trap_08_a_result_read_late_is_the_result_of_its_step(model: Model):
    """The result of step N is right when it is read after step N+1 was launched, by a larger graph,
    by one of the other kind, or by a smaller one."""
    engine = start(model)
    submit(engine, [1, 2, 3], [4, 5])
    read: list[tuple[StepResult, StepResult]] = []
    ran = []
    for prompts in ([], [], [[6], [7, 8, 9], [10]], [], []):
        submit(engine, *prompts, max_tokens=2, logprobs=2)
        step = Step.next(engine)
        result = step.launch()
        ran.append((step.dispatch.mode, step.padded))
        if result.end_event is not None:
            result.end_event.synchronize()
        at_once = StepResult(result.token_ids.clone(), result.logprobs)
        read.append((result, at_once))
        step.retire(at_once)
    for late, at_once in read:
        assert late.tokens() == at_once.tokens()
        assert late.logprobs == at_once.logprobs
    assert ran == [(PIECEWISE, 8), (FULL, 2), (PIECEWISE, 8), (FULL, 8), (FULL, 2)]
    chosen = [[[row.token_id] for row in r.logprobs.sampled if row] for r, _ in read if r.logprobs]
    assert chosen == [read[2][0].tokens()[2:], read[3][0].tokens()[2:]], "of the step's own logits"


# ---- trap 14: address drift ----------------------------------------------------------------------


def moves_metadata(name: str) -> Mutant:
    def mutant(patch: Patch) -> None:
        fill = InputBuffers.prepare_inputs

        def broken(self, output, descriptor, epilogue_rows):
            attn = fill(self, output, descriptor, epilogue_rows)
            if not output.rows:  # There are no rows during a capture.
                return attn
            old = getattr(attn, name)
            return replace(attn, **{name: old + 1 if isinstance(old, int) else old.clone()})

        patch.setattr(InputBuffers, "prepare_inputs", broken)

    mutant.__name__ = f"moves_{name}"
    return mutant


MOVES = [moves_metadata(name) for name in AttentionMetadata.__dataclass_fields__]


def moves_an_argument(patch: Patch) -> None:
    call = model_runner.CUDAGraphWrapper.__call__

    def broken(self, *args):
        call(self, *args[:1], *(arg.clone() for arg in args[1:]))

    patch.setattr(model_runner.CUDAGraphWrapper, "__call__", broken)


def moves_a_buffer(patch: Patch) -> None:
    # The old tensors are kept alive, or a later one could get their address again.
    fill, left = InputBuffers.prepare_inputs, []

    def broken(self, output, descriptor, epilogue_rows):
        left.append(self.req_indices)
        self.req_indices = self.req_indices.clone()
        return fill(self, output, descriptor, epilogue_rows)

    patch.setattr(InputBuffers, "prepare_inputs", broken)


def moves_the_state(patch: Patch) -> None:
    apply, left = RequestTensors.apply, []

    def broken(self, *args):
        left.append(self.last_token)
        self.last_token = self.last_token.clone()
        apply(self, *args)

    patch.setattr(RequestTensors, "apply", broken)


def moves_an_attention_buffer(patch: Patch) -> None:
    prepare, left = ModelRunner.prepare, []

    def broken(self, *args):
        left.append(self.model.qkv)
        self.model.qkv = self.model.qkv.clone()
        return prepare(self, *args)

    patch.setattr(ModelRunner, "prepare", broken)


@fails_with(
    *MOVES,
    moves_an_argument,
    moves_a_buffer,
    moves_an_attention_buffer,
    moves_the_state,
    on_cuda=(*MOVES, moves_an_argument),
    modes=BOTH,
)
def test_trap_14_everything_that_a_graph_reads_stays_where_it_is(model: Model):
    """Arguments and metadata are compared with those of the capture before each replay; buffers and
    state keep their addresses."""
    engine = start(model)
    before = {name: tensor.data_ptr() for name, tensor in tensors(engine.runner).items()}
    submit(engine, [1, 2, 3], [4, 5], [6])
    _, ran = generate(engine)
    mixed = f"{model.mode.mixed_mode.name}/has_prefill"
    assert ran["1"].keys() == {mixed, PURE_DECODE}
    assert before == {name: tensor.data_ptr() for name, tensor in tensors(engine.runner).items()}


def test_trap_14_a_wrapper_takes_no_keyword_arguments(checkpoint):
    """The wrapper refuses keyword arguments, because their addresses would not be compared."""
    wrapper = start(Model(checkpoint, "cpu")).runner.model_step
    for call in (wrapper, wrapper.capture):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call(input_ids=torch.zeros(1))


# ---- trap 15: padding needs no room --------------------------------------------------------------


SCANT_BLOCKS = 7
"""Two blocks for each of three requests, and the null block."""


def null_numbers_belong_to_the_pool(patch: Patch) -> None:
    init = FreeList.__init__

    def broken(self, total):
        init(self, total)
        self._free[0] = None
        self._free.move_to_end(0, last=False)

    patch.setattr(FreeList, "__init__", broken)


def padding_gets_its_block_when_it_comes(patch: Patch) -> None:
    """Mutant: padding writes to a block of the pool, which in a full cache is one that a request
    holds."""
    fill = InputBuffers.prepare_inputs

    def broken(self, output, descriptor, epilogue_rows):
        self.request_tensors.block_table[0, 0] = SCANT_BLOCKS - 1
        return fill(self, output, descriptor, epilogue_rows)

    patch.setattr(InputBuffers, "prepare_inputs", broken)


@fails_with(
    null_numbers_belong_to_the_pool,
    padding_gets_its_block_when_it_comes,
    on_cuda=(null_numbers_belong_to_the_pool, padding_gets_its_block_when_it_comes),
)
def test_trap_15_a_padded_step_runs_when_every_block_and_slot_is_held(model: Model):
    """A padded step needs no free block or request index: the null block and the null index are
    reserved for padding before there is any graph or request."""
    limits = {"max_num_seqs": 3, "num_kv_blocks": SCANT_BLOCKS, "cudagraph_capture_sizes": (4, 16)}
    played = []
    for engine in (start(model, **limits), start(model, enforce_eager=True, **limits)):
        scheduler, tokens = engine.scheduler, []
        submit(engine, *([n] * BLOCK_SIZE for n in (1, 2, 3)), max_tokens=BLOCK_SIZE)
        play(engine, 1)
        for _ in range(BLOCK_SIZE - 1):
            step = Step.next(engine)
            assert (scheduler.block_pool.num_free, scheduler.req_indices.num_free) == (0, 0)
            assert 0 not in [block for request in scheduler.running for block in request.blocks]
            assert 0 not in [request.req_index for request in scheduler.running]
            result = launch_and_check_writes(step)
            tokens.append(result.tokens())
            step.retire(result)
        assert step.padded == (3 if engine.config.enforce_eager else 4)
        played.append(tokens)
    assert played[0] == played[1]
