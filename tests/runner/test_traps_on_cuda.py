"""Traps 9 to 12, and traps 5 and 8 where a GPU makes them harder. See test_traps.py."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch

from minisrv.certification.batches import BatchRow
from minisrv.core.ladder import decode_descriptor
from minisrv.graph.cuda import engine_stream
from minisrv.modes import CUDAGraphMode, StageOutput
from minisrv.runner import input_buffers, results
from minisrv.runner.input_buffers import InputBuffers
from minisrv.runner.results import ResultRing
from tests.checkpoints import make_checkpoint
from tests.runner.stepping import (
    BOTH,
    Model,
    Patch,
    Step,
    assert_equals_eager,
    generate,
    passes_but_for,
    play,
    start,
    submit,
    trial_of,
)

pytestmark = pytest.mark.gpu

FULL = CUDAGraphMode.FULL

LATE = 50_000_000
"""Number of cycles that the GPU is kept busy: about 25 ms, in which the host gets several steps
ahead."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("model")
    return Model(str(make_checkpoint(directory, "qwen3", max_position_embeddings=2048)))


def test_trap_05_a_graph_captured_at_length_1_serves_2048(model):
    runner = start(model, max_model_len=2048, block_size=16, num_kv_blocks=400).runner
    lengths = (1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 513, 1024, 1025, 2047, 2048)
    for rows in (1, 3):
        key = decode_descriptor(1 if rows == 1 else 4, StageOutput.HIDDEN)
        for length in lengths:
            batch = tuple(BatchRow(max(0, length - 1 - n), 1, is_decode=True) for n in range(rows))
            assert_equals_eager(trial_of(runner, FULL, key, batch), poisoned=True)


def test_trap_05_a_mixed_graph_captured_on_empty_rows_serves_2048(model):
    """The batches have chunks that end anywhere behind histories of any length, beside decodes as
    long, and decodes alone; from one row to as many as the graph holds."""
    limits = {"max_model_len": 2048, "block_size": 16, "max_num_batched_tokens": 512}
    runner = start(replace(model, mode=FULL), num_kv_blocks=800, **limits).runner
    for tokens in (1, 8, 64, 512):
        mode, key = runner.ladders.mixed_key(tokens)
        assert (mode, key.num_reqs) == (FULL, min(tokens, 8))
        for length in (1, 16, 17, 127, 128, 129, 511, 513, 1025, 2047, 2048):
            chunk = min(tokens, length)
            batches = [[BatchRow(length - chunk, chunk)]]
            if tokens > 1:
                decode = BatchRow(length - 1, 1, is_decode=True)
                chunk = min(tokens - 1, length)
                batches += [[decode, BatchRow(length - chunk, chunk)], [decode, decode]]
            if tokens >= 8:
                chunk = min(tokens - 7, length)
                batches.append(
                    [*[decode] * 5, *[BatchRow(3, 1)] * 2, BatchRow(length - chunk, chunk)]
                )
            for batch in batches:
                assert_equals_eager(trial_of(runner, mode, key, tuple(batch)), poisoned=True)


def one_place_for_results(patch: Patch) -> None:
    begin = ResultRing.begin

    def broken(self):
        for entry in self._entries:
            # Forget the result, because nobody reads it before the next one comes.
            entry.result = None
        begin(self)

    patch.setattr(results, "RING_SIZE", 1)
    patch.setattr(ResultRing, "begin", broken)


@pytest.mark.parametrize("mutant", [None, one_place_for_results])
def test_trap_08_a_result_is_read_when_the_next_step_is_done(model, mutant):
    def test() -> None:
        engine, alone = start(model), start(model, enforce_eager=True)
        for each in (engine, alone):
            submit(each, [1, 2, 3], [4, 5], max_tokens=20)
            play(each, 2)
        for _ in range(4):
            torch.cuda._sleep(LATE)
            step, expected = Step.next(engine), Step.next(alone)
            result = step.launch()
            following = Step.next(engine)
            late = following.launch()
            torch.cuda.synchronize()
            for each, of, found in ((step, expected, result), (following, None, late)):
                of = of or Step.next(alone)
                right = of.launch()
                assert found.tokens() == right.tokens()
                each.retire(found)
                of.retire(right)

    passes_but_for(test, mutant)


def one_buffer_for_inputs(patch: Patch) -> None:
    """Mutant: there is one pinned buffer for each size of inputs. All that is read wrongly belongs
    to one later step, so that indices stay in range."""
    buffers: dict[int, torch.Tensor] = {}

    def broken(values, device):
        source = torch.from_numpy(values)
        buffer = buffers.setdefault(len(source), torch.empty_like(source, pin_memory=True))
        return buffer.copy_(source).to(device, non_blocking=True)

    patch.setattr(input_buffers, "to_device", broken)


@pytest.mark.parametrize("mutant", [None, one_buffer_for_inputs])
@pytest.mark.parametrize("mode", BOTH)
def test_trap_09_inputs_are_copied_before_the_host_writes_the_next(model, mutant, mode):
    """Inputs are copied before the host writes the next ones, while the host is a step ahead and
    the GPU far behind."""
    model = replace(model, mode=mode)

    def test() -> None:
        right = _staggered(start(model, enforce_eager=True), late=False)
        assert _staggered(start(model, async_scheduling=True), late=True) == right

    passes_but_for(test, mutant)


def _staggered(engine, *, late: bool) -> dict[str, list[int]]:
    """Run requests that end one by one, so that two steps of one size have different request
    indices; `late` keeps the GPU busy before each launch."""
    for n in range(1, 8):
        submit(engine, [n, n + 1, n + 2], max_tokens=2 + n)
    launch = engine._launch

    def slow(output):
        torch.cuda._sleep(LATE)
        return launch(output)

    if late:
        engine._launch = slow
    return generate(engine)[0]


def draws_of_the_capture(patch: Patch) -> None:
    next_positions = InputBuffers.next_positions

    def broken(self, rows):
        found = next_positions(self, rows)
        return torch.ones_like(found) if torch.cuda.is_current_stream_capturing() else found

    patch.setattr(InputBuffers, "next_positions", broken)


@pytest.mark.parametrize("mutant", [None, draws_of_the_capture])
def test_trap_10_replays_draw_anew_and_as_eager_runs_do(model, mutant):
    """Sampling noise depends on seed and position at each replay, as in eager runs, and is not
    frozen at capture."""

    def drawn(seed: int, **settings: object) -> list[int]:
        engine = start(model, **settings)
        submit(engine, [1, 2, 3], max_tokens=40, temperature=2.0, seed=seed)
        return generate(engine)[0]["1"]

    def test() -> None:
        eager = drawn(7, enforce_eager=True)
        assert drawn(7) == eager
        assert drawn(8) != eager
        assert len(set(eager)) > 20, "of 40, from nearly alike logits"

    passes_but_for(test, mutant)


def test_trap_11_other_threads_may_use_the_gpu_while_graphs_are_captured(model):
    """Another thread uses the GPU and the libraries that the model uses, on a stream of its own,
    before, during and after the captures; neither disturbs the other."""
    expected, stop, errors = _staggered(start(model), late=False), threading.Event(), []

    def other() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                x = torch.eye(512, device="cuda")
                while not stop.is_set():
                    x = x @ x
                    assert float(x.sum()) == 512
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        engine = start(model)
        tokens = _staggered(engine, late=False)
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert tokens == expected
    assert torch.cuda.current_stream() == engine_stream(torch.device("cuda", 0))


def test_trap_11_no_other_stream_is_the_engines():
    """torch hands out the streams of a pool by turns, and would give one of them twice."""
    device = torch.device("cuda", 0)
    others = {torch.cuda.Stream(device).cuda_stream for _ in range(100)}
    assert engine_stream(device).cuda_stream not in others


@pytest.mark.parametrize("mode", BOTH)
def test_trap_12_graphs_are_right_when_others_are_gone(model, mode):
    """Engines share a process and graphs share a memory pool; none needs memory that another one
    has freed when it was deleted."""
    model = replace(model, mode=mode)
    first, second = start(model), start(model)
    expected = _staggered(first, late=False)
    del first
    _overwrite_what_is_free()
    assert _staggered(second, late=False) == expected
    runner = second.runner
    for wrapper in runner.wrappers:
        for key in sorted(wrapper.graphs, key=lambda key: key.num_tokens)[1::2]:
            del wrapper.graphs[key]
    _overwrite_what_is_free()
    for mode, key in runner.ladders.keys():  # noqa: SIM118  (no mapping)
        if (mode, key) in runner.graphs:
            rows = key.num_tokens if key.uniform_decode else 1
            batch = (BatchRow(5, 1, key.uniform_decode),) * rows
            assert_equals_eager(trial_of(runner, mode, key, batch), poisoned=True)


def _overwrite_what_is_free() -> None:
    """Make sure that all memory that the allocators have got back is overwritten with NaN, used by
    others, or unmapped."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    taken = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in 40 * [8 << 20]]
    taken += [torch.full((1 << 18,), 255, dtype=torch.uint8, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    del taken
