"""Certification: a graph that is almost right does not enter service.

Each test breaks one thing on purpose and is named for it; a graph that passed nevertheless would
have served wrong tokens. What is broken here is broken for the CPU tape too, so all tests run on a
CPU; for a GPU there is test_traps.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minisrv import kernels
from minisrv.certification.batches import full_batch, plain_batch, short_batch
from minisrv.certification.compare import InitialState, certify
from minisrv.certification.digest import digest_
from minisrv.certification.startup import add_graph, probe
from minisrv.certification.trial import StepTrial, TrialSpace, borrow_space, reserved_space
from minisrv.config import EngineConfig
from minisrv.core.ladder import build_ladders
from minisrv.engine import builder
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.platforms.cuda import CUDAPlatform
from minisrv.errors import CertificationError, ConfigError
from minisrv.graph import cpu_tape
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.kernels import attention
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Stage
from minisrv.nn.attention import Attention
from minisrv.nn.decoder import Decoder
from minisrv.request import EngineRequest, SamplingParams
from minisrv.runner.input_buffers import InputBuffers
from minisrv.runner.model_runner import ModelRunner
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


def start(checkpoint: str, mode: str = "full-and-piecewise", **settings) -> EngineCore:
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 48, "block_size": 4, "device": "cpu"}
    limits |= {"itl_target_ms": 0.0}  # else the tokens of a step would depend on times
    limits |= {"cudagraph_capture": "whole"}
    return EngineCore(
        build_engine(
            EngineConfig(
                model=checkpoint, cudagraph_mode=CUDAGraphMode(mode), **{**limits, **settings}
            ),
            check_addresses=True,
        )
    )


def test_full_is_refused_on_a_cpu_before_anything_is_loaded(checkpoint, monkeypatch):
    monkeypatch.setattr(builder, "load_model", None)
    with pytest.raises(
        ConfigError, match="cudagraph_mode=full .* device=cpu .* full-and-piecewise"
    ):
        start(checkpoint, "full")


@pytest.mark.parametrize("mode", ["piecewise", "full-decode-only", "full", "full-and-piecewise"])
def test_a_right_model_passes_and_leaves_nothing_behind(checkpoint, mode, tape_holds_mixed_batches):
    engine = start(checkpoint, mode)
    assert engine.info.ladder.graphs == len(engine.dispatcher.ladders.keys()) > 0
    runner = engine.runner
    assert not runner.request_tensors.block_table.any()
    assert not runner.request_tensors.last_token.any()
    assert not runner.request_tensors.next_position.any()


@pytest.mark.parametrize("blocks", [2, 3, 8])
def test_a_cache_too_small_for_a_full_batch_certifies_what_it_holds(checkpoint, blocks):
    assert start(checkpoint, num_kv_blocks=blocks).info.ladder.graphs > 0


def test_user_sizes_above_the_limits_certify(checkpoint):
    engine = start(checkpoint, max_num_batched_tokens=64, cudagraph_capture_sizes=(4, 64))
    assert engine.dispatcher.ladders.decode == (4, 64)
    assert engine.dispatcher.ladders.mixed == (4, 64)


def test_no_graph_is_larger_than_all_requests_together(checkpoint):
    """Two requests of 40 tokens fill the largest graph, and a larger one is not captured."""
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 512, "max_model_len": 40}
    engine = start(checkpoint, num_kv_blocks=30, **limits)
    assert engine.dispatcher.ladders.mixed[-1] == engine.info.max_num_batched_tokens == 80
    for name in ("a", "b"):
        params = SamplingParams(max_tokens=0)
        prompt = [ord(name), *range(39)]
        engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
    step = engine.scheduler.schedule()
    assert step is not None
    assert step.num_tokens == 80


def test_a_context_that_ends_within_a_block(checkpoint):
    """A trial batch stays within a context that ends within a block. It once took the rest of the
    block too, beyond the rotary table: an IndexError at start-up."""
    sizes = {"cudagraph_capture_sizes": (1, 1024), "block_size": 300}
    engine = start(checkpoint, max_num_seqs=1, max_num_batched_tokens=1024, **sizes)
    assert engine.info.ladder.graphs == 6


def refused(checkpoint: str, mode: str, what: str) -> None:
    with pytest.raises(CertificationError, match=what):
        start(checkpoint, mode)


def test_stale_slots_in_the_padding(checkpoint, monkeypatch):
    """Trap 4: the padding rows keep the request indices of the step before, and write there."""
    fill = InputBuffers.prepare_inputs

    def leaves_the_tail(self, output, descriptor, epilogue_rows):
        tail = self.req_indices[len(output.rows) :].clone()
        attn = fill(self, output, descriptor, epilogue_rows)
        self.req_indices[len(output.rows) :] = tail
        return attn

    monkeypatch.setattr(InputBuffers, "prepare_inputs", leaves_the_tail)
    refused(
        checkpoint,
        "full-decode-only",
        "with poisoned padding changed last_token of a request index",
    )


def test_stale_slot_mapping_in_the_padding(checkpoint, monkeypatch):
    """Trap 1: padding tokens of a mixed batch write wherever the buffer says, and not to block
    0."""
    fill = InputBuffers.prepare_inputs

    def leaves_the_tail(self, output, descriptor, epilogue_rows):
        tail = self.slot_mapping[output.num_tokens :].clone()
        attn = fill(self, output, descriptor, epilogue_rows)
        if not descriptor.uniform_decode:
            self.slot_mapping[output.num_tokens :] = tail + self.sizes.block_size
        return attn

    monkeypatch.setattr(InputBuffers, "prepare_inputs", leaves_the_tail)
    refused(checkpoint, "piecewise", "with poisoned padding")


def test_a_value_frozen_at_capture(checkpoint, monkeypatch):
    """Trap 5: a value computed on the host from the inputs at capture is replayed as it was
    then."""
    forward = Decoder.forward

    def freezes_the_positions(self, input_ids, positions, out):
        forward(self, input_ids, positions, out)
        out.add_(float(positions.numpy().sum()))

    monkeypatch.setattr(Decoder, "forward", freezes_the_positions)
    refused(checkpoint, "full-decode-only", "hidden states")


def test_a_result_that_another_row_reaches(checkpoint, monkeypatch):
    """Trap 3: padding takes part in a real row's result, here through a sum over the batch."""
    add_to = Attention.add_to

    def mixes_rows(self, residual, *args):
        add_to(self, residual, *args)
        residual.add_(residual.sum(dim=0, keepdim=True), alpha=1e-3)

    monkeypatch.setattr(Attention, "add_to", mixes_rows)
    # The padding's position is 0 in the clean run and in the poisoned one, so the rows agree; a
    # difference appears when a padding row attends beyond its own token.
    start(checkpoint, "full-decode-only")
    gather = InputBuffers.gather_decode

    def reads_too_far(self, rows):
        gather(self, rows)
        self.seq_lens[:rows].clamp_(min=3)

    monkeypatch.setattr(InputBuffers, "gather_decode", reads_too_far)
    refused(checkpoint, "full-decode-only", "with poisoned padding")


def test_an_operation_that_the_tape_lost(checkpoint, monkeypatch):
    """A graph that lacks one of the captured operations is refused."""
    end = CPUTapeBackend.end

    def drops_one(self):
        segment = end(self)
        nodes = self._capture.segments[-1][1]
        del nodes[len(nodes) // 2]
        return segment

    monkeypatch.setattr(CPUTapeBackend, "end", drops_one)
    refused(checkpoint, "full-decode-only", "replay differs")


def test_intermediates_that_overlap(checkpoint, monkeypatch):
    """Trap 7: the memory of a tensor that is still to be read is given to another one.

    Where an operation would overwrite its own argument torch raises an error; elsewhere
    certification finds the difference.
    """
    lay_out = cpu_tape._lay_out

    def forgets_later_readers(storages):
        storages = list(storages)
        for storage in storages:
            storage.last_used = storage.born + 1
        return lay_out(storages)

    monkeypatch.setattr(cpu_tape, "_lay_out", forgets_later_readers)
    with pytest.raises((CertificationError, RuntimeError), match="differs|single memory location"):
        start(checkpoint, "piecewise")


def test_a_step_that_changes_what_is_in_the_cache_already(checkpoint, monkeypatch):
    """A step that changes older cache entries is refused, although eager run and graph agree
    because both make the mistake."""

    def changes_history(layer, *args):
        attention(layer, *args)
        layer.kv_cache[1:, 0] *= 2

    monkeypatch.setattr(kernels, "attention", changes_history)
    refused(checkpoint, "full-decode-only", "cache entries of layer 0 outside of the step")


def test_a_null_slot_that_is_not_put_back(checkpoint, monkeypatch):
    """Padding rows write their token and position to the null index, which must be reset: the next
    padding row must find token 0 and position 0 there."""

    def scatter(self, rows):
        state, req_indices = self.request_tensors, self.req_indices[:rows]
        state.last_token.index_copy_(0, req_indices, self.sampled_token_ids[:rows])
        state.next_position.index_copy_(0, req_indices, self.next_positions(rows).long())

    monkeypatch.setattr(InputBuffers, "scatter", scatter)
    refused(checkpoint, "full-decode-only", "changed last_token of a request index")


def test_a_model_that_is_not_finite(checkpoint, monkeypatch):
    compute = Decoder.forward

    def divides_by_zero(self, input_ids, positions, out):
        compute(self, input_ids, positions, out)
        out.div_(0)

    monkeypatch.setattr(Decoder, "forward", divides_by_zero)
    refused(checkpoint, "piecewise", "not finite")


@pytest.mark.parametrize("mode", ["full", "full-and-piecewise"])
def test_every_dispatchable_key_is_captured(checkpoint, mode, tape_holds_mixed_batches):
    engine = start(checkpoint, mode)
    runner: ModelRunner = engine.runner
    keys = build_ladders(CUDAGraphMode(mode), 6, 48).keys()
    captured = [set(wrapper.graphs) for wrapper in runner.wrappers]
    assert captured == [
        {d for m, d in keys if m is CUDAGraphMode.PIECEWISE},
        {d for m, d in keys if m is CUDAGraphMode.FULL and not d.uniform_decode},
        {d for m, d in keys if d.uniform_decode and d.stage is Stage.MODEL},
        {d for m, d in keys if d.stage is Stage.EPILOGUE},
    ]
    pieces = {CUDAGraphMode.PIECEWISE: len(runner.kv_caches) + 1, CUDAGraphMode.FULL: 1}
    for runtime, key in keys:
        graph = runner.graphs[runtime, key]
        assert len(graph.calls) == 2 * pieces[runtime] - 1


@pytest.mark.parametrize("mode", ["full-decode-only", "full", "full-and-piecewise"])
def test_the_probe_captures_two_of_each_kind(checkpoint, mode, tape_holds_mixed_batches):
    """The memory probe captures two graphs of each kind. Epilogues and decode steps have the same
    `output` field: when that alone told kinds apart, one stood for the other, and a step's graph
    was predicted to be as small as an epilogue's."""
    engine = start(checkpoint, mode)
    runner, wanted = engine.runner, {}
    for runtime, key in runner.ladders.keys():  # noqa: SIM118
        kind = (runtime, key.stage, key.uniform_decode, key.output)
        wanted.setdefault(kind, []).append((runtime, key))
    for wrapper in runner.wrappers:
        wrapper.graphs.clear()
    assert probe(runner, engine.scheduler.block_pool) > 0
    assert set(runner.graphs) == {key for keys in wanted.values() for key in keys[:2]}
    assert len(wanted) == {"full-decode-only": 4, "full": 5, "full-and-piecewise": 5}[mode]


@pytest.mark.parametrize("budget", [6, 48])
def test_all_graphs_of_an_engine_share_one_arena(checkpoint, budget):
    """All graphs share one arena, whichever kind of graph is the largest: else overlaps between the
    two kinds could not show."""
    engine = start(checkpoint, max_num_batched_tokens=budget)
    arena = engine.runner.model_step.backend.arena.untyped_storage()
    outputs = {
        tensor.untyped_storage().data_ptr()
        for wrapper in engine.runner.wrappers
        for graph in wrapper.graphs.values()
        for segment in graph.calls[::2]
        for _, args, kwargs in segment.calls
        for tensor in (*args, *kwargs.values())
        if isinstance(tensor, torch.Tensor)
    }
    assert arena.data_ptr() in outputs
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(engine)}
    assert outputs - known == {arena.data_ptr()}


def tensors_of(engine: EngineCore) -> list[torch.Tensor]:
    """Return all tensors that existed before the graphs."""
    runner = engine.runner
    held = [
        *vars(runner.request_tensors).values(),
        *vars(runner.buffers).values(),
        *runner.kv_caches,
    ]
    model = [*runner.model.parameters(), *runner.model.buffers()]
    return [tensor for tensor in held + model if isinstance(tensor, torch.Tensor)]


def test_logits_that_are_wrong_without_changing_the_token(checkpoint, monkeypatch):
    """Certification compares logits and not only tokens: with this fault every log-probability
    would be wrong, and no token."""
    compute = Decoder.compute_logits

    def freezes_a_scale(self, hidden):
        return compute(self, hidden) * (1.0 + abs(float(hidden.numpy()[0, 0])))

    monkeypatch.setattr(Decoder, "compute_logits", freezes_a_scale)
    with pytest.raises(CertificationError, match="LOGITS alone: logits"):
        start(checkpoint, "full-decode-only")


@pytest.mark.parametrize("field", ["last_token", "next_position", "temperature", "seed"])
def test_a_step_that_touches_a_slot_which_is_not_its_own(checkpoint, monkeypatch, field):
    scatter = InputBuffers.scatter

    def writes_beyond(self, rows):
        scatter(self, rows)
        getattr(self.request_tensors, field)[-1].add_(1)

    monkeypatch.setattr(InputBuffers, "scatter", writes_beyond)
    refused(checkpoint, "full-decode-only", f"changed {field} of a request index")


def test_a_step_that_changes_a_block_table(checkpoint, monkeypatch):
    scatter = InputBuffers.scatter

    def clears(self, rows):
        scatter(self, rows)
        self.request_tensors.block_table[1:].zero_()

    monkeypatch.setattr(InputBuffers, "scatter", clears)
    refused(checkpoint, "full-decode-only", "changed block_table of a request index")


def test_padding_tokens_that_write_to_the_last_block(checkpoint, monkeypatch):
    """Trap 1 itself: a slot mapping of -1 means the cache's last entry."""
    fill = InputBuffers.prepare_inputs

    def minus_one(self, output, descriptor, epilogue_rows):
        attn = fill(self, output, descriptor, epilogue_rows)
        if not descriptor.uniform_decode:
            self.slot_mapping[output.num_tokens : descriptor.num_tokens] = (
                len(runner_caches[0]) * self.sizes.block_size - 1
            )
        return attn

    runner_caches = start(checkpoint, "none").runner.kv_caches
    monkeypatch.setattr(InputBuffers, "prepare_inputs", minus_one)
    refused(checkpoint, "piecewise", "cache entries of layer 0 outside of the step")


def changes_two_signs(entry: torch.Tensor) -> None:
    """Exchange 1 and -1, which are far apart, so that the sum stays the same."""
    entry.view(-1)[0], entry.view(-1)[-1] = -1.0, 1.0


def exchanges_keys_and_values(entry: torch.Tensor) -> None:
    entry.copy_(entry.flip(0))


def changes_the_last_bit(entry: torch.Tensor) -> None:
    entry.view(-1).view(torch.int16)[-1] ^= 1


@pytest.mark.parametrize(
    "break_", [changes_two_signs, exchanges_keys_and_values, changes_the_last_bit]
)
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("place", [0, -1])
def test_keys_and_values_that_are_wrong_without_changing_a_result(checkpoint, break_, layer, place):
    """A graph that writes wrong keys and values behind its last read of them is refused, whichever
    entry it is: the next step would read them. What is compared are digests."""
    engine = start(checkpoint, dtype="bfloat16")
    runner = engine.runner
    for key in (runner.ladders.mixed_key(48), runner.ladders.keys()[-1]):
        with reserved_space(runner, engine.scheduler.block_pool) as space:
            trial = StepTrial(runner, space, key, short_batch(key[1], space.limits(runner)))
            run = trial.run

            def breaks(graph, trial=trial, run=run):
                run(graph)
                entry = runner.kv_caches[layer].flatten(0, 1)[trial.written_entries[place]]
                entry.view(-1)[0], entry.view(-1)[-1] = 1.0, -1.0
                if graph is not None:
                    break_(entry)

            trial.run = breaks
            with pytest.raises(CertificationError, match=r"of the cache of the replay differs"):
                certify(trial, lambda key=key: runner.graphs[key])
            trial.run = run
            certify(trial, lambda key=key: runner.graphs[key])
            trial.clear()


@pytest.mark.parametrize("mode", ["full-decode-only", "full-and-piecewise"])
def test_steps_of_requests_may_run_between_all_parts_of_a_certification(checkpoint, mode):
    engine, parts = start(checkpoint, mode), []
    runner = engine.runner
    for key in runner.ladders.keys():  # noqa: SIM118  (no mapping)
        with reserved_space(runner, engine.scheduler.block_pool) as space:
            trial = StepTrial(runner, space, key, short_batch(key[1], space.limits(runner)))

            def make_way(part, trial=trial):
                parts.append(part)
                trial.suspend()
                trial.resume()

            certify(trial, lambda key=key: runner.graphs[key], between=make_way)
            trial.clear()
    assert {"the eager run", "the capture", "the results of the eager run"} < {*parts}


class LargestTensor(TorchDispatchMode):
    """Takes note of the bytes of the largest tensor that an operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


def test_certification_copies_one_layer_at_a_time(checkpoint):
    """What a large step writes to all layers is several times as large as what it needs itself, and
    the cache would have to make room for copies of that."""
    engine = start(checkpoint, max_num_batched_tokens=512)
    runner = engine.runner
    key = runner.ladders.mixed_key(512)
    with reserved_space(runner, engine.scheduler.block_pool) as space:
        trial = StepTrial(runner, space, key, full_batch(key[1], space.limits(runner)))
        trial.reset(InitialState.CLEAN)
        trial.run(None)
        with LargestTensor() as largest:
            seen = trial.observe()
        trial.clear()
    entry = runner.kv_caches[0][0, 0].nbytes
    assert largest.nbytes == len(trial.written_entries) * entry
    assert len(trial.written_entries) > 400
    kept = sum(value.nbytes for name, value in seen.items() if "cache" in name)
    assert kept == 12 * len(runner.kv_caches) * len(trial.written_entries)


@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=8),
    places=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    bits=st.tuples(st.integers(0, 63), st.integers(0, 63)),
)
def test_other_bits_have_another_digest(values, places, bits):
    """One bit that changes, two that do, and two values that change places."""
    numbers = torch.tensor(values, dtype=torch.int64)
    first, second = (place % len(values) for place in places)
    one, two, exchanged = (numbers.clone() for _ in range(3))
    flips = torch.tensor([1 << bit if bit < 63 else -(2**63) for bit in bits])
    one[first] ^= flips[0]
    two[first] ^= flips[0]
    two[second] ^= flips[1]
    exchanged[[first, second]] = numbers[[second, first]]
    rows = torch.stack([numbers, one, two, exchanged])
    found = digest_(rows.clone()).tolist()
    assert [digest == found[0] for digest in found] == [torch.equal(row, numbers) for row in rows]


@pytest.mark.parametrize("seqs", [1, 2, 4])
def test_a_mixed_trial_fills_its_graph(checkpoint, seqs):
    """The trial batch of a mixed graph, however few request indices there are, has one token less
    than the padded size and is not all decodes."""
    runner = start(checkpoint, "none", max_num_seqs=seqs).runner
    limits = TrialSpace.of(runner, range(1, runner.num_blocks)).limits(runner)
    for tokens in (8, 48):
        batch = short_batch(BatchDescriptor(tokens), limits)
        assert sum(row.num_tokens for row in batch) == tokens - 1
        assert not all(row.is_decode for row in batch)


@pytest.mark.parametrize("make_batch", [short_batch, plain_batch])
def test_blocks_are_borrowed_for_the_whole_batch(checkpoint, make_batch):
    """Blocks for another batch once left the prompt out of the one that was timed."""
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 256, "num_kv_blocks": 400}
    engine = start(checkpoint, "none", **limits)
    runner, pool = engine.runner, engine.scheduler.block_pool
    wanted = TrialSpace.of(runner, range(1, 400)).limits(runner)
    for size in (16, 64, 256):
        key = (CUDAGraphMode.NONE, BatchDescriptor(size))
        space = borrow_space(runner, pool, key, make_batch)
        assert space is not None
        assert make_batch(key[1], space.limits(runner)) == make_batch(key[1], wanted)
        pool.give_back(space.blocks)


def test_sampling_parameters_reach_their_slot(checkpoint):
    engine = start(checkpoint, "none")
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1, seed=-3)
    engine.add(EngineRequest(request_id="a", prompt_token_ids=[1], params=params))
    engine.step()
    state, req_index = engine.runner.request_tensors, engine.scheduler.running[0].req_index
    found = [getattr(state, name)[req_index].item() for name in ("temperature", "top_p", "min_p")]
    assert found == pytest.approx([0.7, 0.8, 0.1])
    assert [state.top_k[req_index].item(), state.seed[req_index].item()] == [5, -3]


def decode_beside(checkpoint: str, between, device: str = "cpu", **settings):
    """Run requests of every kind to their ends, and return their outputs; `between` is called with
    the engine before each step."""
    engine = start(checkpoint, num_kv_blocks=60, device=device, dtype="float32", **settings)
    for name, params in (
        ("greedy", {}),
        ("seeded", {"temperature": 0.9, "seed": 7, "top_p": 0.9}),
        ("penalties", {"temperature": 0.7, "seed": 3, "frequency_penalty": 0.8}),
        ("logprobs", {"logprobs": 2}),
    ):
        given = SamplingParams(
            **{"temperature": 0.0, "ignore_eos": True, "max_tokens": 12} | params
        )
        prompt = [*range(5, 5 + 3 * len(name))]
        engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=given))
    found: dict[str, list] = {}
    while engine.has_work:
        between(engine)
        for output in engine.step():
            found.setdefault(output.request_id, []).append((output.token_ids, output.logprobs))
    engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.num_used == 0
    return found


def certifies_between_steps() -> tuple[set[GraphKey], Callable[[EngineCore], None]]:
    """Return a function that captures, certifies and installs the next graph of an engine, and the
    set of the keys that it has installed."""
    done: set[GraphKey] = set()

    def between(engine: EngineCore) -> None:
        keys = engine.runner.ladders.keys()
        for key in (keys[len(done) % len(keys)], keys[(len(done) + 1) % len(keys)]):
            before = engine.runner.graphs[key]
            with reserved_space(engine.runner, engine.scheduler.block_pool) as space:
                add_graph(engine.runner, space, key)
            assert engine.runner.graphs[key] is not before
            done.add(key)

    return done, between


@pytest.mark.parametrize("ahead", [False, True])
def test_graphs_are_certified_while_requests_decode(checkpoint, ahead):
    """Every graph is captured, certified and installed again between the steps of running requests,
    and no token or log-probability of theirs changes."""
    expected = decode_beside(checkpoint, lambda engine: None, async_scheduling=ahead)
    done, between = certifies_between_steps()
    assert decode_beside(checkpoint, between, async_scheduling=ahead) == expected
    assert len(done) > 10


@pytest.mark.gpu
def test_graphs_are_certified_while_requests_decode_on_a_gpu(checkpoint, monkeypatch):
    """Graphs are not timed, because times on a busy GPU may let the two engines choose graphs of
    different sizes, whose sums are rounded differently."""
    monkeypatch.setattr(CUDAPlatform, "times_graphs", False)
    expected = decode_beside(checkpoint, lambda engine: None, device="cuda", max_num_seqs=4)
    done, between = certifies_between_steps()
    assert decode_beside(checkpoint, between, device="cuda", max_num_seqs=4) == expected
    assert len(done) > 10


def test_a_trial_that_writes_to_a_running_request_is_found(checkpoint, monkeypatch):
    """A graph that changes the state of a request is refused while that request runs, too."""
    scatter = InputBuffers.scatter
    wrong = [False]

    def writes_beyond(self, rows):
        scatter(self, rows)
        if wrong[0]:
            self.request_tensors.last_token[1] += 1

    def between(engine: EngineCore) -> None:
        wrong[0] = bool(engine.scheduler.running)
        if wrong[0]:
            key = engine.runner.ladders.keys()[-1]
            with reserved_space(engine.runner, engine.scheduler.block_pool) as space:
                add_graph(engine.runner, space, key)

    monkeypatch.setattr(InputBuffers, "scatter", writes_beyond)
    with pytest.raises(CertificationError, match="changed last_token of a request index"):
        decode_beside(checkpoint, between)


def test_a_certification_that_fails_leaves_nothing_behind(checkpoint, monkeypatch):
    """If a replay fails while its batch is poisoned, no poison stays in the cache or the buffers,
    the borrowed blocks are free again, and the graph that was installed before still is."""
    engine = start(checkpoint)
    runner, pool = engine.runner, engine.scheduler.block_pool
    for cache in runner.kv_caches:
        cache.zero_()  # what no step has written may be anything
    graphs, num_free = runner.graphs, pool.num_free
    launch, replays = ModelRunner.launch, []

    def fails_on_poison(self, key, output, attn=None, graph=None):
        if graph is not None:
            replays.append(key)
            if len(replays) == 2:
                assert runner.buffers.hidden.isnan().any()
                raise RuntimeError("this replay fails")
        return launch(self, key, output, attn, graph)

    monkeypatch.setattr(ModelRunner, "launch", fails_on_poison)
    for key in runner.ladders.keys():  # noqa: SIM118  (not a mapping)
        replays.clear()
        with (
            pytest.raises(CertificationError, match="poisoned padding failed: this replay fails"),
            reserved_space(runner, pool) as space,
        ):
            add_graph(runner, space, key)
        model = runner.model
        for tensor in (*runner.kv_caches, model.qkv, model.attn_out, runner.buffers.hidden):
            assert not tensor.isnan().any()
        assert not runner.request_tensors.block_table.any()
        assert (runner.buffers.bitmask == -1).all()
        assert pool.num_free == num_free
    assert runner.graphs == graphs
