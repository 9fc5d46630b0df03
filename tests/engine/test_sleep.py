"""Sleep and wake of an engine: what is released, what is refused, and the same tokens behind it."""

from __future__ import annotations

import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from minisrv import LLM, SamplingParams
from minisrv.arena import CPUArena
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.heartbeat import Heartbeat
from minisrv.engine.messages import (
    AskStats,
    CommandDone,
    EngineMessage,
    EngineStats,
    Hello,
    Ready,
    Sleep,
    SleepMode,
    SleepTag,
    WakeUp,
    decode_engine_message,
    encode,
)
from minisrv.engine.process import _EngineServer
from minisrv.errors import (
    ConfigError,
    EngineAsleepError,
    EngineError,
    RequestError,
    SleepError,
)
from minisrv.kernels.linear import multiplies_bfloat16
from tests.checkpoints import make_checkpoint
from tests.engine.test_compilation import MADE, FakeCompiler, Process, Progress, serve
from tests.engine.test_compilation import start as compiling

LIMITS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 4,
    "num_kv_blocks": 60,
    "device": "cpu",
    "dtype": "float32",
}
PROMPTS = [[5, 6, 7], list(range(3, 40)), [9] * 17]
WIDE = {"hidden_size": 256, "intermediate_size": 512}
"""Sizes of weights that cover whole pages, so that they are really gone."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", **WIDE)


def start(model: Path | None, **settings: Any) -> LLM:
    return LLM(
        None if model is None else str(model), **LIMITS | {"enable_sleep_mode": True} | settings
    )


def tokens(llm: LLM) -> list[list[int]]:
    params = [SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=20) for i in range(3)]
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def weights(llm: LLM) -> list[torch.Tensor]:
    plain = (tensor for tensor in llm.engine.sleeper._stored if not tensor.is_mkldnn)
    return [tensor for tensor in plain if tensor.nbytes > 1 << 16]


@pytest.mark.usefixtures("tape_holds_mixed_batches")
@pytest.mark.parametrize("steps_ahead", [False, True])
@pytest.mark.parametrize(
    "mode", ["none", "piecewise", "full-decode-only", "full", "full-and-piecewise"]
)
def test_every_mode_gives_the_same_tokens(checkpoint: Path, mode: str, steps_ahead: bool) -> None:
    llm = start(checkpoint, cudagraph_mode=mode, async_scheduling=steps_ahead)
    before = tokens(llm)
    addresses = [tensor.data_ptr() for tensor in (*weights(llm), *llm.engine.runner.kv_caches)]
    for level in (1, 2, 1):
        llm.sleep(level)
        llm.wake_up()
        assert tokens(llm) == before, level
    found = [tensor.data_ptr() for tensor in (*weights(llm), *llm.engine.runner.kv_caches)]
    assert found == addresses
    llm.sleep()  # until then a graph that is being certified holds blocks
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("llama-tied", {}),
        ("llama-biases", {"model_impl": "transformers", "compilation_mode": 0}),
        ("qwen3-tied", {"model_impl": "transformers", "compilation_mode": 0}),
        ("qwen2", {"quantization": "int8", "dtype": "auto"}),
        ("qwen3", {"load_format": "dummy", "seed": 3}),
    ],
)
def test_whatever_the_loader_makes_comes_back(
    variant: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    llm = start(make_checkpoint(tmp_path, variant, **WIDE), **settings)
    before = tokens(llm)
    llm.sleep(2)
    assert all(not tensor.flatten()[len(tensor.flatten()) // 2].any() for tensor in weights(llm))
    llm.wake_up()
    assert tokens(llm) == before


def test_weights_in_bfloat16_come_back(checkpoint: Path) -> None:
    if not multiplies_bfloat16():
        pytest.skip("this CPU does not multiply bfloat16")
    llm = start(checkpoint, dtype="bfloat16")
    before = tokens(llm)
    llm.sleep(2)
    llm.wake_up()
    assert tokens(llm) == before


def test_level_1_keeps_the_weights_until_level_2_drops_them(checkpoint: Path) -> None:
    llm = start(checkpoint)
    before, copies = tokens(llm), [tensor.clone() for tensor in weights(llm)]
    llm.sleep(1)
    assert llm.engine.sleeper.report.level == 1
    assert all(map(torch.equal, weights(llm), copies))
    llm.sleep(1)
    assert llm.engine.sleeper.report.level == 1
    llm.sleep(2)
    assert llm.engine.sleeper.report.level == 2
    assert not any(map(torch.equal, weights(llm), copies))
    llm.sleep(1)  # what is gone cannot be kept
    assert llm.engine.sleeper.report.level == 2
    llm.wake_up()
    assert llm.engine.sleeper.report.level == 0
    assert all(map(torch.equal, weights(llm), copies))
    assert tokens(llm) == before


@pytest.mark.parametrize("first", ["weights", "kv_cache"])
def test_an_engine_wakes_up_by_parts(checkpoint: Path, first: str) -> None:
    llm = start(checkpoint)
    before = tokens(llm)
    llm.sleep()
    for _ in range(2):
        llm.wake_up([first])
        assert llm.engine.sleeper.report.is_asleep
        assert SleepTag(first) not in llm.engine.sleeper.report.released
        with pytest.raises(EngineAsleepError):
            tokens(llm)
    llm.sleep(2)
    assert llm.engine.sleeper.report.released == tuple(SleepTag)
    llm.wake_up()
    llm.wake_up()  # nothing happens
    assert tokens(llm) == before


def test_a_prompt_is_refused_and_the_prefix_cache_is_forgotten(checkpoint: Path) -> None:
    llm = start(checkpoint)
    params = SamplingParams(max_tokens=1)
    prompt = [list(range(3, 30))]
    llm.generate(prompt, params)
    assert llm.generate(prompt, params)[0].num_cached_tokens
    llm.sleep()
    with pytest.raises(EngineAsleepError, match="put to sleep"):
        llm.generate(prompt, params)
    assert not llm.engine.has_work
    llm.wake_up()
    assert not llm.generate(prompt, params)[0].num_cached_tokens


def test_what_cannot_be_asked_for(checkpoint: Path) -> None:
    llm = start(checkpoint)
    for level in (0, 3, "x"):
        with pytest.raises(RequestError, match="level must be 1 or 2"):
            llm.sleep(level)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="tags must be one of weights, kv_cache"):
        llm.wake_up(["weight"])
    never = start(checkpoint, enable_sleep_mode=False)
    with pytest.raises(ConfigError, match="enable_sleep_mode"):
        never.sleep()
    assert tokens(never) == tokens(llm)


def test_a_checkpoint_that_is_gone_keeps_the_engine_asleep(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3")
    llm = start(model)
    before = tokens(llm)
    llm.sleep(2)
    file = model / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(SleepError, match="cannot be read again"):
            llm.wake_up()
        assert llm.engine.sleeper.report.released == tuple(SleepTag)
    (tmp_path / "elsewhere").rename(file)
    llm.wake_up()
    assert tokens(llm) == before


def test_other_weights_than_before_do_not_serve(tmp_path: Path) -> None:
    llm = start(make_checkpoint(tmp_path / "model", "qwen3"))
    llm.sleep(2)
    shutil.rmtree(tmp_path / "model")
    make_checkpoint(tmp_path / "model", "qwen3", seed=1)
    with pytest.raises(EngineError, match="does not compute what it did"):
        llm.wake_up()


def test_a_graph_that_lost_its_memory_is_found(checkpoint: Path) -> None:
    """A weight that the wake-up forgot would change every token, and nobody would know."""
    llm = start(checkpoint)
    llm.sleep(1)
    weights(llm)[0].zero_()
    with pytest.raises(EngineError, match="does not compute what it did"):
        llm.wake_up()


class Taken(CPUArena):
    """An arena whose memory others have taken, once."""

    taken = True

    def _restore(self) -> None:
        if self.taken:
            self.taken = False
            raise torch.OutOfMemoryError("others have it")

    def _refill(self, values: list[torch.Tensor]) -> None:
        self._restore()
        super()._refill(values)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("tag", [*SleepTag])
def test_memory_that_others_have_taken(checkpoint: Path, tag: SleepTag, level: int) -> None:
    llm = start(checkpoint)
    before = tokens(llm)
    llm.sleep(level)
    llm.engine.sleeper._arenas[tag].__class__ = Taken
    with pytest.raises(SleepError, match=f"memory of {tag.value} is not to be had"):
        llm.wake_up()
    assert tag in llm.engine.sleeper.report.released
    llm.wake_up()
    assert tokens(llm) == before


class Single(CPUArena):
    """An arena that is filled only with tensors to which nobody else refers."""

    is_filled = False

    def _refill(self, values: list[torch.Tensor]) -> None:
        references = [weakref.ref(value) for value in values]
        assert len(references) > 10
        super()._refill(values)
        assert not any(reference() is not None for reference in references)
        self.is_filled = True


@pytest.mark.parametrize("settings", [{}, {"model_impl": "transformers", "compilation_mode": 0}])
def test_weights_that_are_read_again_are_never_there_twice(
    checkpoint: Path, settings: dict[str, Any]
) -> None:
    """A GPU that holds a model has no room for another one of its size."""
    llm = start(checkpoint, **settings)
    before = tokens(llm)
    arena = llm.engine.sleeper._arenas[SleepTag.WEIGHTS]
    arena.__class__ = Single
    reload = llm.engine.sleeper._reload

    def reload_into_free_memory() -> Any:
        assert arena.is_released
        return reload()

    llm.engine.sleeper._reload = reload_into_free_memory
    llm.sleep(2)
    llm.wake_up()
    assert isinstance(arena, Single)
    assert arena.is_filled
    assert tokens(llm) == before


def seeded(engine: EngineCore) -> dict[str, Any]:
    """Serve requests, and return what those gave whose tokens do not depend on the engine's own
    seeds."""
    found, _ = serve(engine)
    return {name: given for name, given in found.items() if int(name) % 3 != 2}


def test_graphs_that_are_being_certified_are_waited_for(checkpoint: Path) -> None:
    """Compiled code comes into service before the engine sleeps if its graphs are being certified,
    and behind it if it is still being compiled; and stays in service."""
    before = None
    for certified_first in (True, False):
        compiler = FakeCompiler(process=Process([Progress(), Progress(), MADE]))
        settings = {
            **LIMITS,
            "enable_sleep_mode": True,
            "num_kv_blocks": 80,
            "cudagraph_capture": "whole",
        }
        engine = compiling(str(checkpoint), compiler, serve_slower=True, **settings)
        while certified_first and not engine.sleeper.is_busy:
            engine.advance_background()
        while engine.sleeper.is_busy:
            engine.advance_background()
        assert engine.compilation.generation == certified_first
        for level in (1, 2):
            engine.sleeper.sleep(level)
            engine.sleeper.wake_up(tuple(SleepTag))
        found = seeded(engine)
        while engine.compilation.is_under_way:
            engine.advance_background()
        assert engine.compilation.generation == 1
        engine.sleeper.sleep(2)
        engine.sleeper.wake_up(tuple(SleepTag))
        assert seeded(engine) == found == (before or found)
        before = found


@pytest.mark.compiler
@pytest.mark.parametrize("variant", ["qwen3", "llama-biases"])
def test_compiled_code_computes_with_the_weights_that_came_back(
    variant: str, tmp_path: Path
) -> None:
    llm = start(
        make_checkpoint(tmp_path, variant, **WIDE),
        model_impl="transformers",
        compilation_mode=3,
        compile_wait=True,
    )
    assert llm.engine.compilation.generation == 1
    before = tokens(llm)
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        assert tokens(llm) == before


def joining(server: _EngineServer, address: str) -> zmq.Socket[bytes]:
    """Return the socket of a new worker, always of the same name, whose first message has
    arrived."""
    worker = server.context.socket(zmq.DEALER)
    worker.set(zmq.ROUTING_ID, b"api-0")
    worker.connect(address)
    worker.send(encode(Hello()))
    assert server.socket.poll(10_000), "it has arrived"
    return worker


def connected(server: _EngineServer, address: str) -> zmq.Socket[bytes]:
    """Return the socket of a new worker, always of the same name, which the engine knows."""
    worker = joining(server, address)
    assert isinstance(hear(server, worker), Ready)
    return worker


def hear(server: _EngineServer, worker: zmq.Socket[bytes]) -> EngineMessage:
    """Let the engine work until it has sent the worker something, and return that."""
    while not worker.poll(0):
        server._turn()
    return decode_engine_message(worker.recv())


def serving(checkpoint: Path, tmp_path: Path) -> tuple[_EngineServer, str]:
    """Return an engine's side of a socket with an engine that it has started, and the address."""
    address = f"ipc://{tmp_path}/engine"
    server = _EngineServer(address, Heartbeat(tmp_path / "heartbeat"))
    settings = LIMITS | {"enable_sleep_mode": True, "cudagraph_capture": "whole"}
    config = EngineConfig(model=str(checkpoint), **settings)
    server.core = EngineCore(build_engine(config, server._progress))
    server.state = Ready(server.core.info)
    return server, address


def while_it_reloads(server: _EngineServer, act: Callable[[], object]) -> None:
    """Have something done, once, in the middle of the next wake-up from level 2."""
    reload = server.core.sleeper._reload

    def acting() -> Any:
        server.core.sleeper._reload = reload
        act()
        return reload()

    server.core.sleeper._reload = acting


def put_to_sleep(server: _EngineServer, worker: zmq.Socket[bytes], level: int) -> None:
    worker.send(encode(Sleep(level, SleepMode.ABORT)))
    told = hear(server, worker)
    assert isinstance(told, Ready)
    assert told.info.sleep.level == level
    assert hear(server, worker) == CommandDone()


def test_a_process_carries_out_commands(checkpoint: Path, tmp_path: Path) -> None:
    """It shows that it lives however long a command takes, and does not answer a new worker what a
    dead one of its name has asked for."""
    server, address = serving(checkpoint, tmp_path)
    beats: list[float] = []

    def wait_for_a_beat() -> None:
        began = server.heartbeat._time[0]
        while server.heartbeat._time[0] == began:
            time.sleep(0.01)
        beats.append(server.heartbeat._time[0])

    while_it_reloads(server, wait_for_a_beat)
    workers = [connected(server, address)]
    try:
        put_to_sleep(server, workers[0], 2)
        workers[0].send(encode(WakeUp([*SleepTag])))
        while not server.commands:
            server._receive()
        workers[0].close(linger=0)
        workers.append(connected(server, address))
        told = hear(server, workers[1])
        assert isinstance(told, Ready)
        assert not told.info.sleep.is_asleep
        assert beats
        put_to_sleep(server, workers[1], 1)
    finally:
        for worker in workers:
            worker.close(linger=0)
        server.close()


def test_what_is_sent_during_a_wake_up_is_read_behind_it(checkpoint: Path, tmp_path: Path) -> None:
    """No worker hears of a start-up again, and answers come in the order of the questions."""
    server, address = serving(checkpoint, tmp_path)
    worker = connected(server, address)
    stats = server.core.stats()
    assert stats != EngineStats()

    def ask() -> None:
        worker.send(encode(AskStats()))
        worker.send(encode(WakeUp([*SleepTag])))
        assert server.socket.poll(10_000), "they have arrived"

    try:
        put_to_sleep(server, worker, 2)
        while_it_reloads(server, ask)
        worker.send(encode(WakeUp([*SleepTag])))
        answers = [hear(server, worker) for _ in range(5)]
        kinds = [Ready, EngineStats, CommandDone, Ready, CommandDone]
        assert [type(answer) for answer in answers] == kinds
        assert answers[1] == server.core.stats()
        assert answers[2] == answers[4] == CommandDone()
    finally:
        worker.close(linger=0)
        server.close()


def test_a_worker_replaced_during_a_wake_up(checkpoint: Path, tmp_path: Path) -> None:
    """The new worker, which has asked for nothing, is not told that anything is done."""
    server, address = serving(checkpoint, tmp_path)
    workers = [connected(server, address)]

    def replace_it() -> None:
        workers[0].close(linger=0)
        workers.append(joining(server, address))

    try:
        put_to_sleep(server, workers[0], 2)
        while_it_reloads(server, replace_it)
        workers[0].send(encode(WakeUp([*SleepTag])))
        while len(workers) == 1:
            server._turn()
        workers[1].send(encode(AskStats()))
        told = [hear(server, workers[1])]
        while not isinstance(told[-1], EngineStats):
            told.append(hear(server, workers[1]))
        assert {type(message) for message in told[:-1]} == {Ready}
        assert not server.core.sleeper.report.is_asleep
    finally:
        for worker in workers:
            worker.close(linger=0)
        server.close()
