"""A server is ready with a covering ladder, and the other graphs enter service between its steps,
each for itself: certified, in the order in which batches ask for them, or not at all."""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from minisrv.config import EngineConfig
from minisrv.core import dispatcher
from minisrv.core.attention_work import NO_WORK
from minisrv.core.ladder import decode_descriptor
from minisrv.engine import background, filling
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.filling import LONGEST_STEP_MS
from minisrv.engine.heartbeat import Heartbeat
from minisrv.engine.messages import Hello, Ready, Submit, decode_engine_message, encode
from minisrv.engine.platforms import CPUPlatform
from minisrv.engine.platforms.cuda import CUDAPlatform
from minisrv.engine.process import _EngineServer
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Reason, StageOutput
from minisrv.nn.decoder import Decoder
from minisrv.request import EngineRequest, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.waiting import GUARD_SECONDS

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
DECODE = [1, 2, 4, 8, 16, 24, 32]
MIXED = [1, 2, 4, 8, 16, 32, 48]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture(autouse=True)
def no_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work has a turn behind each step, and makes way wherever it can."""
    monkeypatch.setattr(background, "LEAST_GAP", 0.0)
    monkeypatch.setattr(background, "REST", 0.0)
    monkeypatch.setattr(background, "TURN", 0.0)


def start(checkpoint: str, **settings: Any) -> EngineCore:
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 48, "block_size": 4, "device": "cpu"}
    limits |= {"dtype": "float32", "num_kv_blocks": 400, "itl_target_ms": 0.0}
    config = EngineConfig(model=checkpoint, **{**limits, **settings})
    return EngineCore(build_engine(config, check_addresses=True))


def requests(count: int, tokens: int = 9) -> Iterator[EngineRequest]:
    greedy = {"temperature": 0.0}
    for index in range(count):
        kinds = (greedy, {"temperature": 0.9, "seed": index}, {**greedy, "logprobs": 2})
        params = SamplingParams(max_tokens=tokens + index % 7, ignore_eos=True, **kinds[index % 3])
        prompt = [7, 8, 9, 10, 11, *range(index, 2 * index)]
        yield EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params)


def serve(engine: EngineCore, count: int = 40, turns: int = 3) -> tuple[dict[str, Any], list[Any]]:
    """Run requests to their ends, of which one comes with every third step, with turns of the
    background between the steps. Returns the tokens of each request, and the steps that each ran by
    mode and reason, in the order in which they end."""
    found: dict[str, list[int]] = {}
    ran: list[Any] = []
    waiting = list(requests(count))[::-1]
    steps = 0
    while waiting or engine.has_work:
        if waiting and steps % 3 == 0:
            engine.add(waiting.pop())
        steps += 1
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
            if output.graph_steps is not None:
                ran.append(output.graph_steps)
        for _ in range(turns):
            engine.background.advance(busy=True)
    return found, ran


def fill(engine: EngineCore) -> None:
    """Let an idle engine go on until nothing is left to do."""
    while engine.background.has_work:
        engine.background.advance(busy=False)
    engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.num_used == 0


@pytest.mark.parametrize("mode", ["full-and-piecewise", "piecewise", "full-decode-only"])
@pytest.mark.parametrize("ahead", [False, True])
def test_tokens_are_those_of_the_whole_ladder_while_it_fills(
    checkpoint: str, mode: str, ahead: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests run while graphs are captured, certified and put into service beside them: each gets
    the tokens that it would have got, and sees sizes appear."""
    settings = {"cudagraph_mode": CUDAGraphMode(mode), "async_scheduling": ahead}
    whole = start(checkpoint, cudagraph_capture="whole", **settings)
    expected, steps = serve(whole)
    assert not [key for each in steps for key in each if Reason.SIZE_MISSING in key]
    engine = start(checkpoint, **settings)
    ladders = engine.runner.ladders
    assert set(engine.runner.graphs) == set(ladders.covering().keys())
    assert engine.info.ladder.graphs < engine.info.ladder.total == len(ladders.keys())
    assert engine.info.ladder.missing == engine.info.ladder.total - engine.info.ladder.graphs
    with caplog.at_level(logging.INFO):
        found, ran = serve(engine)
        fill(engine)
    assert found == expected
    assert any(Reason.SIZE_MISSING in key for each in ran for key in each)
    assert set(engine.runner.graphs) == set(ladders.keys()) == engine.dispatcher.in_service
    report = engine.describe().ladder
    assert (report.graphs, report.missing, report.refused) == (report.total, 0, {})
    assert report == engine.stats().ladder == whole.info.ladder
    assert f"{report.total} of {report.total} graphs serve" in caplog.text
    found, ran = serve(engine)
    assert found == expected
    assert not [key for each in ran for key in each if Reason.SIZE_MISSING in key]


def test_a_batch_that_lacks_its_graph_gets_it_next(checkpoint: str) -> None:
    """Two requests decode: their size comes before larger ones, and they are told when it
    serves."""
    engine = start(checkpoint)
    for request in requests(2, tokens=100):
        engine.add(request)
    while engine.filling.report.decode[1] == 8:
        engine.step()
        for _ in range(30):
            engine.background.advance(busy=True)
        assert engine.has_work
    assert engine.filling.report.decode == (1, 2, 8, 32)
    for output in (output for _ in range(200) for output in engine.step()):
        if output.graph_steps is not None:
            assert output.graph_steps["FULL/size_missing"] > 0
            assert output.graph_steps["FULL/pure_decode"] > 0


def test_sizes_of_the_user_are_filled_as_well(checkpoint: str) -> None:
    engine = start(checkpoint, cudagraph_capture_sizes=(2, 5, 6, 32, 48))
    assert engine.info.ladder.decode == (2, 6, 32)
    fill(engine)
    assert engine.describe().ladder.decode == (2, 5, 6, 32)


def broken(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs of one size keep a value from their capture."""
    forward = Decoder.forward

    def freezes(model: Decoder, ids: torch.Tensor, positions: Any, out: torch.Tensor) -> None:
        forward(model, ids, positions, out)
        if len(ids) == size:
            out.add_(1e-7 * float(positions.numpy().sum()))

    monkeypatch.setattr(Decoder, "forward", freezes)


def test_a_graph_that_fails_its_certification_is_refused_while_serving(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names it, it is counted, its batches run at the next larger size, and the filling
    goes on."""
    expected, _ = serve(start(checkpoint))
    broken(4, monkeypatch)
    engine = start(checkpoint)
    with caplog.at_level(logging.WARNING):
        found, _ = serve(engine)
        fill(engine)
    assert found == expected
    report = engine.stats().ladder
    names = {"FULL decode 4 TOKENS", "FULL decode 4 HIDDEN", "PIECEWISE mixed 4 HIDDEN"}
    assert report.refused.keys() == names
    assert all("differs from the eager run's" in why for why in report.refused.values())
    assert (report.missing, report.graphs) == (0, report.total - 3)
    assert list(report.decode) == [size for size in DECODE if size != 4]
    assert list(report.mixed) == [size for size in MIXED if size != 4]
    assert caplog.text.count("may not serve; its batches run at the next larger size") == 3
    assert not names - {name for name in names if name in caplog.text}
    key = (FULL, decode_descriptor(4, StageOutput.TOKENS))
    assert key not in engine.runner.graphs
    dispatch = engine.dispatcher.dispatch(3, 3, query_len=1)
    assert (dispatch.descriptor.num_tokens, dispatch.reason) == (8, Reason.SIZE_MISSING)


def test_a_graph_of_the_covering_ladder_that_fails_ends_the_start(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(8, monkeypatch)
    with pytest.raises(Exception, match="differs from the eager run's"):
        start(checkpoint)


@pytest.mark.parametrize("when", ["before", "trial"])
def test_without_memory_the_filling_pauses_and_the_server_goes_on(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    expected, _ = serve(start(checkpoint))
    forward, left = Decoder.forward, [5]

    def has_room(*_: Any) -> bool:
        left[0] -= 1
        return when != "before" or left[0] > 0

    def runs_out(model: Decoder, ids: torch.Tensor, *rest: torch.Tensor) -> None:
        if when == "trial" and len(ids) == 16:
            raise torch.OutOfMemoryError("there is no more")
        forward(model, ids, *rest)

    monkeypatch.setattr(CPUPlatform, "has_room", has_room)
    engine = start(checkpoint)
    with caplog.at_level(logging.WARNING):
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "forward", runs_out)
            fill(engine)
        found, _ = serve(engine)
    assert found == expected
    report = engine.stats().ladder
    assert report.graphs < report.total
    assert (report.missing, report.refused) == (0, {})
    assert report.stopped
    assert caplog.text.count("no more graphs are captured") == 1
    assert set(engine.runner.graphs) == engine.dispatcher.in_service
    left[0] = 1000
    monkeypatch.setattr(filling, "MEMORY_PAUSE", 0.0)
    engine.background.advance(busy=False)
    fill(engine)
    report = engine.stats().ladder
    assert (report.graphs, report.missing, report.stopped) == (report.total, 0, "")


@pytest.mark.parametrize("where", ["room", "dispatcher"])
def test_an_error_beside_the_capture_refuses_the_graph_and_the_server_goes_on(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It ended the engine, and all requests with it."""
    expected, _ = serve(start(checkpoint, cudagraph_mode=CUDAGraphMode.NONE), count=12)
    engine = start(checkpoint)
    key = (FULL, decode_descriptor(4, StageOutput.TOKENS))
    stand_ins, calls = dispatcher.stand_ins, [0]

    def fails_for_one(keys: Any, in_service: Any) -> Any:
        if key in in_service:
            raise RuntimeError("it breaks")
        return stand_ins(keys, in_service)

    def fails_once(*_: Any) -> bool:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("it breaks")
        return True

    if where == "room":
        monkeypatch.setattr(engine.filling, "_has_room", fails_once)
    else:
        monkeypatch.setattr(dispatcher, "stand_ins", fails_for_one)
    found, _ = serve(engine, count=12)
    fill(engine)
    assert found == expected
    report = engine.filling.report
    assert list(report.refused.values()) == ["RuntimeError('it breaks')."]
    assert (report.missing, report.graphs) == (0, report.total - 1)
    assert set(engine.runner.graphs) == engine.dispatcher.in_service


@pytest.mark.usefixtures("raising_sigint")
def test_an_interrupted_filling_says_that_it_has_stopped(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C in a turn nothing was captured any more, and graphs counted as missing."""
    engine = start(checkpoint)
    forward = Decoder.forward

    def interrupted(model: Decoder, *given: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        forward(model, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill(engine)
    fill(engine)
    report = engine.describe().ladder
    assert (report.missing, report.stopped) == (0, "it was interrupted.")
    assert report.graphs < report.total
    assert set(engine.runner.graphs) == engine.dispatcher.in_service


def test_an_engine_that_nobody_has_leaves_no_memory(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread in which a graph was being certified referred to the filling, and so to all of the
    engine, whose memory was never free again."""
    monkeypatch.setattr(background, "TURN", 0.0)
    engine = start(checkpoint)
    while not engine.background.is_in_the_middle:
        engine.advance_background()
    runner = weakref.ref(engine.runner)
    del engine
    gc.collect()  # ends the thread, which has
    gc.collect()  # let go of what it held then
    assert runner() is None


def test_predictions_are_for_the_graph_that_runs(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a size is missing, a batch is predicted to take as long as the graph that runs it; when
    the size serves, its own time has joined the model. A graph that was measured to be cheaper
    takes the place of another."""

    def time(trial: Any, graph: Any) -> float:
        mode, key = trial.key
        if graph is None:
            return 100.0
        return 1.0 + key.num_tokens + (50.0 if (mode, key.num_tokens) == (FULL, 4) else 0.0)

    monkeypatch.setattr(CPUPlatform, "times_graphs", True)
    monkeypatch.setattr("minisrv.certification.trial.StepTrial.time", time)
    engine = start(checkpoint, itl_target_ms=1000.0)
    model, dispatcher = engine.cost_model, engine.dispatcher

    def predicted(rows: int) -> float:
        return model.predict(dispatcher.dispatch(rows, rows, query_len=1).key, NO_WORK)

    assert dispatcher.dispatch(2, 2, query_len=1).reason is Reason.SIZE_MISSING
    assert predicted(2) == predicted(8) == pytest.approx(9.0, rel=0.1)
    assert predicted(20) == predicted(32) == pytest.approx(33.0, rel=0.1)
    fill(engine)
    assert predicted(2) == pytest.approx(3.0, rel=0.1)
    assert predicted(20) == pytest.approx(25.0, rel=0.1)
    found = dispatcher.dispatch(3, 3, query_len=1)
    assert (found.key, found.reason) == ((PIECEWISE, BatchDescriptor(4)), Reason.CHEAPER)


def test_steps_that_take_long_are_left_to_an_idle_engine(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While requests run, no graph is captured whose step makes them wait for longer than they
    would otherwise; one that they have asked for is."""

    def time(trial: Any, graph: Any) -> float:
        return 10.0 if trial.key[1].num_tokens <= 8 else 2 * LONGEST_STEP_MS

    monkeypatch.setattr(CPUPlatform, "times_graphs", True)
    monkeypatch.setattr("minisrv.certification.trial.StepTrial.time", time)
    engine = start(checkpoint)
    engine.filling.want([(FULL, decode_descriptor(24, StageOutput.TOKENS))])
    for _ in range(2000):
        engine.background.advance(busy=True)
    assert not engine.background.has_work
    report = engine.filling.report
    assert report.decode == (1, 2, 4, 8, 24, 32)
    assert report.mixed == (1, 2, 4, 8, 32, 48)
    engine.background.advance(busy=False)
    fill(engine)
    assert engine.filling.report.missing == 0


def run(engine: EngineCore, request: EngineRequest, *, prompt_first: bool) -> None:
    """Run a request to its end, with turns of the background behind its steps.

    prompt_first: whether they begin when it has its first token.
    """
    engine.add(request)
    while prompt_first and not engine.step():
        pass
    for _ in range(2000):
        if not engine.has_work:
            break
        engine.step()
        engine.advance_background()
    assert not engine.has_work


def request_of(num_prompt: int, max_tokens: int) -> EngineRequest:
    prompt = [1 + index % 50 for index in range(num_prompt)]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id="all", prompt_token_ids=prompt, params=params)


def test_a_trial_that_holds_the_blocks_of_all_requests_does_not_rest(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rested for steps that could not run before it had ended, and the engine stood still."""
    engine = start(checkpoint, num_kv_blocks=31)
    while not engine.scheduler.block_pool.num_used:
        engine.advance_background()
    monkeypatch.setattr(background, "LEAST_GAP", 3600.0)
    run(engine, request_of(100, 20), prompt_first=False)


def test_a_trial_leaves_each_running_request_a_block(checkpoint: str) -> None:
    """It took the last block, and the request that came to need it lost all that it held."""
    engine = start(checkpoint, num_kv_blocks=31)
    run(engine, request_of(114, 6), prompt_first=True)
    assert engine.scheduler.num_preemptions == 0
    fill(engine)
    assert engine.filling.report.missing == 0


def test_every_worker_is_told_which_graphs_serve(checkpoint: str, tmp_path: Path) -> None:
    """An idle engine fills its ladders at once, and describes itself anew with each graph."""
    server = _EngineServer(f"ipc://{tmp_path}/engine", Heartbeat(tmp_path / "heartbeat"))
    server.core = start(checkpoint)
    server.state = Ready(server.core.info)
    worker = server.context.socket(zmq.DEALER)
    try:
        worker.connect(f"ipc://{tmp_path}/engine")
        worker.send(encode(Hello()))
        assert server.socket.poll(1000 * GUARD_SECONDS), "it has arrived before the ladders fill"
        told: list[int] = []
        while not told or told[-1]:
            while not worker.poll(0):
                server._turn()
            message = decode_engine_message(worker.recv())
            assert isinstance(message, Ready)
            told.append(message.info.ladder.missing)
        assert told == list(range(told[0], -1, -1))
        assert told[0] > 10
    finally:
        worker.close(linger=0)
        server.close()


@pytest.mark.parametrize("comes_in_it", [True, False])
def test_a_turn_of_an_idle_engine_counts_if_a_request_has_come_in_it(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_in_it: bool
) -> None:
    """An idle engine takes the graphs whose steps take longest, and those were the turns that were
    left out."""
    server = _EngineServer(f"ipc://{tmp_path}/engine", Heartbeat(tmp_path / "heartbeat"))
    server.core = start(checkpoint)
    server.state = Ready(server.core.info)
    worker = server.context.socket(zmq.DEALER)
    turns = server.core.background
    forward = Decoder.forward

    def send() -> None:
        worker.send(encode(Submit([request_of(4, 2)])))

    def takes_long(model: Decoder, *given: torch.Tensor) -> None:
        time.sleep(0.2)
        if comes_in_it:
            send()
            assert server.socket.poll(10_000)
        forward(model, *given)

    try:
        worker.connect(f"ipc://{tmp_path}/engine")
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "forward", takes_long)
            worker.send(encode(Hello()))
            while turns.idle_turn < 0.2:
                server._turn()
        took = turns.idle_turn
        if not comes_in_it:
            turns.close()
            server._turn()
            send()
        while not server.core.stats().generated_tokens:
            server._turn()
        assert server.core.stats().longest_turn_seconds == (took if comes_in_it else 0.0)
    finally:
        worker.close(linger=0)
        server.close()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["full", "full-and-piecewise"])
def test_tokens_while_the_ladder_fills_on_a_gpu(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Graphs are captured into the pool of those that serve, while steps are in flight. Graphs are
    not timed, because times would let the two engines choose graphs of different sizes, whose sums
    are rounded differently."""
    monkeypatch.setattr(CUDAPlatform, "times_graphs", False)
    settings = {"device": "cuda", "cudagraph_mode": CUDAGraphMode(mode)}
    expected, _ = serve(start(checkpoint, cudagraph_capture="whole", **settings))
    engine = start(checkpoint, **settings)
    found, ran = serve(engine)
    fill(engine)
    assert found == expected
    assert any(Reason.SIZE_MISSING in key for each in ran for key in each)
    assert set(engine.runner.graphs) == set(engine.runner.ladders.keys())
    assert serve(engine)[0] == expected
