"""Compiled code on a GPU: each mode of compilation serves the tokens of the model's own code with
each mode of graphs, and compiled pieces take over under running requests.

Each start certifies its graphs: they equal the eager run of the same code bit for bit, and pieces
give the log-probabilities of the model's own code within the bounds of
`minisrv.certification.generation`.
"""

from __future__ import annotations

import fcntl
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from minisrv import LLM, SamplingParams
from minisrv.cache import cache_directory
from minisrv.compile.modes import CompilationMode
from minisrv.compile.pieces import PieceCompiler
from minisrv.config import EngineConfig
from minisrv.engine import background, compilation
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.messages import CompilationState
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineRequest
from tests.nn.test_logits import prompt

pytestmark = pytest.mark.gpu

PROMPTS = [prompt(length, length) for length in (3, 40, 17, 1, 70, 9)]
LIMITS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
    "num_kv_blocks": 40,
}
PIECES = CompilationMode.MINISRV_COMPILE
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(autouse=True)
def any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code serves also where it is not faster."""
    monkeypatch.setattr(compilation, "LEAST_SPEEDUP", 0.0)


def start(implementation: str, mode: int, **settings: Any) -> LLM:
    return LLM(model_impl=implementation, compilation_mode=mode, **{**LIMITS, **settings})


def tokens(llm: LLM) -> list[list[int]]:
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    return [[*output.outputs[0].token_ids] for output in outputs]


@cache
def expected() -> list[list[int]]:
    """The tokens of uncompiled code."""
    return tokens(start("transformers", 0))


def compile_pieces(implementation: str, **settings: Any) -> LLM:
    """Return an engine that serves by compiled pieces, which the cache has from then on."""
    name = f"compiling-{implementation}-{settings.get('dtype')}.lock"
    with (cache_directory() / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        llm = start(implementation, 3, compile_wait=True, **settings)
    report = llm.engine.compilation.report
    assert report.state is CompilationState.COMPILED, report.reason
    return llm


@pytest.mark.parametrize("graphs", [mode.value for mode in CUDAGraphMode])
def test_compiled_pieces_serve_the_tokens_of_uncompiled_code(graphs: str) -> None:
    assert tokens(compile_pieces("transformers", cudagraph_mode=graphs)) == expected()


@pytest.mark.parametrize("graphs", ["none", "full", "full-and-piecewise"])
@pytest.mark.parametrize("mode", [1, 2])
def test_a_compiled_model_serves_the_tokens_of_uncompiled_code(mode: int, graphs: str) -> None:
    torch.compiler.reset()
    assert tokens(start("transformers", mode, cudagraph_mode=graphs)) == expected()


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_the_decoder_of_minisrv_can_be_compiled(mode: int) -> None:
    torch.compiler.reset()
    llm = compile_pieces("minisrv") if mode == 3 else start("minisrv", mode)
    assert tokens(llm) == expected()


def test_bfloat16_is_certified() -> None:
    llm = compile_pieces("transformers", dtype="bfloat16")
    assert all(len(found) == GREEDY.max_tokens for found in tokens(llm))


class Finished:
    """A process that has compiled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def poll(self) -> Path:
        return self.directory

    def close(self) -> None:
        pass


class CompiledNow(PieceCompiler):
    """Says that what the cache has was compiled by a process and not at an earlier start."""

    def find(self) -> Path | None:
        return None

    def start(self) -> Any:
        kept = self._job.kept_program()
        assert kept is not None
        return Finished(kept)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_swap_under_running_requests(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token is lost or repeated, and the memory of the first graphs is free afterwards."""
    compile_pieces("transformers")
    monkeypatch.setattr(background, "LEAST_GAP", 0.0)
    monkeypatch.setattr(background, "REST", 0.0)
    monkeypatch.setattr("minisrv.engine.builder.PieceCompiler", CompiledNow)
    settings = {"compilation_mode": PIECES, "model_impl": "transformers", "async_scheduling": ahead}
    settings["cudagraph_capture"] = "whole"
    engine = EngineCore(build_engine(EngineConfig(**LIMITS, **settings)))
    pool = engine.runner.model_step.backend.pool  # type: ignore[attr-defined]
    assert pool in graph_pools()
    found: dict[str, list[int]] = {}
    steps: list[dict[str, int]] = []
    numbers = itertools.count()
    live = 0
    while engine.compilation.is_under_way or live:
        while engine.compilation.is_under_way and live < len(PROMPTS):  # no end of all at once
            number = next(numbers)
            ids = PROMPTS[number % len(PROMPTS)]
            engine.add(EngineRequest(request_id=str(number), prompt_token_ids=ids, params=GREEDY))
            live += 1
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
            if output.graph_steps is not None:
                steps.append(output.graph_steps)
            live -= output.finish_reason is not None
        engine.background.advance(busy=True)
    report = engine.compilation.report
    assert (report.state, report.generation) == (CompilationState.COMPILED, 1), report.reason
    for name, ids in found.items():
        assert ids == expected()[int(name) % len(PROMPTS)], name
    assert len(found) == next(numbers)
    assert any({key.endswith("/compiled") for key in counts} == {False, True} for counts in steps)
    while engine.has_work:
        engine.step()
    torch.cuda.empty_cache()  # steps were in flight when the engine did this
    assert pool not in graph_pools()
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("graphs", ["full", "full-and-piecewise"])
def test_the_ladder_fills_with_graphs_of_compiled_code_under_running_requests(
    graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the code keeps in its buffers is set aside for steps in the middle of a certification,
    so that each graph passes."""
    compile_pieces("transformers")
    for name in ("LEAST_GAP", "REST", "TURN"):
        monkeypatch.setattr(background, name, 0.0)
    settings = {"compilation_mode": PIECES, "model_impl": "transformers"}
    settings |= {"cudagraph_mode": CUDAGraphMode(graphs), "cudagraph_capture": "covering"}
    engine = EngineCore(build_engine(EngineConfig(**LIMITS, **settings)))
    assert engine.compilation.generation == 1
    assert not engine.filling.is_whole
    found: dict[str, list[int]] = {}
    numbers = itertools.count()
    while not engine.filling.is_whole or engine.has_work:
        if not engine.filling.is_whole and engine.scheduler.req_indices.num_free:
            number = next(numbers)
            ids = PROMPTS[number % len(PROMPTS)]
            engine.add(EngineRequest(request_id=str(number), prompt_token_ids=ids, params=GREEDY))
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
        engine.background.advance(busy=True)
    assert engine.filling.report.refused == {}
    for name, tokens_found in found.items():
        assert tokens_found == expected()[int(name) % len(PROMPTS)], name


def graph_pools() -> set[tuple[int, int]]:
    """Return the pools that have memory of the GPU."""
    torch.cuda.synchronize()
    return {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()}
