"""Models that torch.compile compiles as a whole, modes 1 and 2, serve the tokens of mode 0.

Each compilation takes several seconds, so each is made once and looked at by several tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from minisrv import LLM, SamplingParams
from minisrv.checkpoint import describe_model
from minisrv.compile.modes import CompilationMode
from minisrv.compile.whole import compile_whole, warm_up_sizes
from minisrv.errors import CompilationError
from minisrv.graph.forward_context import set_forward_context
from minisrv.kernels.linear import INT8_ROWS, LINEAR_METHODS
from minisrv.nn.loader import load_model
from tests.checkpoints import make_checkpoint
from tests.nn.driver import Driver, forward
from tests.nn.test_logits import prompt

PROMPTS = [prompt(length, length) for length in (3, 40, 17, 1, 25, 9)]
LIMITS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 4,
    "max_model_len": 128,
    "num_kv_blocks": 40,  # fewer than four requests need, so some are preempted
    "device": "cpu",
    "dtype": "float32",
    "cudagraph_mode": "none",
}


class Served(NamedTuple):
    """What an engine has served: its tokens by prompt, in a mode of compilation.

    graphs, graphs_after: the number of graphs that Dynamo had traced when the engine was ready, and
        when it had served.
    breaks: the number of graph breaks.
    """

    llm: LLM
    tokens: list[list[int]]
    graphs: int
    graphs_after: int
    breaks: int


def serve(directory: Path, implementation: str, mode: int) -> Served:
    torch.compiler.reset()
    counters.clear()
    llm = LLM(str(directory), model_impl=implementation, compilation_mode=mode, **LIMITS)
    graphs = counters["stats"]["unique_graphs"]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [[*output.outputs[0].token_ids] for output in outputs]
    after, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return Served(llm, tokens, graphs, after, breaks)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("compiled"), "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def uncompiled(checkpoint: Path) -> Served:
    return serve(checkpoint, "transformers", 0)


@pytest.fixture(scope="module")
def traced_once(checkpoint: Path) -> Served:
    return serve(checkpoint, "transformers", 2)


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> Served:
    return serve(checkpoint, "minisrv", 1)


@pytest.mark.compiler
def test_a_model_of_transformers_that_is_traced_once_serves_the_same_tokens(
    uncompiled: Served, traced_once: Served
) -> None:
    assert traced_once.tokens == uncompiled.tokens
    assert traced_once.llm.engine.runner.model.compiled is not None
    assert uncompiled.llm.engine.runner.model.compiled is None


@pytest.mark.compiler
def test_a_decoder_by_stock_torch_compile_serves_the_same_tokens(
    uncompiled: Served, stock: Served
) -> None:
    assert stock.tokens == uncompiled.tokens
    assert stock.breaks == 0
    assert stock.graphs >= 2, "steps of one token are compiled apart"


@pytest.mark.compiler
def test_mode_2_traces_one_graph_without_breaks_for_every_batch(traced_once: Served) -> None:
    assert (traced_once.graphs, traced_once.graphs_after) == (1, 1)
    assert traced_once.breaks == 0


@pytest.mark.compiler
def test_the_engine_says_how_it_compiled(traced_once: Served, uncompiled: Served) -> None:
    info = traced_once.llm.engine.info
    assert "mode none, 0 graphs, compilation DYNAMO_TRACE_ONCE (as asked for)" in info.summary
    assert info.startup_seconds["compilation"] > 0
    assert "compilation NONE (as asked for)" in uncompiled.llm.engine.info.summary


@pytest.mark.compiler
def test_a_second_trace_is_an_error(traced_once: Served) -> None:
    """Dynamo would make another graph without a word when its cache has been emptied."""
    model = traced_once.llm.engine.runner.model
    torch.compiler.reset()
    with pytest.raises(Exception, match="traced a second time"):
        step(model)


def step(model: Any) -> None:
    ids, positions, context = Driver(model).context([(0, [3, 4, 5])])
    with torch.no_grad(), set_forward_context(context):
        forward(model, ids, positions)


@pytest.mark.compiler
def test_mode_2_takes_the_kernel_of_each_number_of_rows(tmp_path: Path) -> None:
    """A traced model once kept the kernel that its first step had chosen by the number of rows in
    Python: int8 weights for few rows and bfloat16 for more."""
    directory = make_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    model = load_model(describe_model(directory).model, directory, dtype=torch.bfloat16)
    model.prepare(quantization="int8")
    batches = [[(0, [3])], [(0, [3, 4, 5, 6])], [(0, [3, 4, 5]), (1, [6, 7])], [(1, [*range(16)])]]
    assert {1, INT8_ROWS, INT8_ROWS + 1, 16} == {sum(len(t) for _, t in b) for b in batches}

    def run() -> list[Tensor]:
        return [Driver(model).step(batch) for batch in batches]

    model.allocate_buffers(4 * 128)
    compile_whole(model, CompilationMode.DYNAMO_TRACE_ONCE, lambda done, total: None)
    compiled, model.compiled = run(), None
    for number, (found, expected) in enumerate(zip(compiled, run(), strict=True)):
        assert torch.equal(found, expected), batches[number]
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    method = LINEAR_METHODS["int8"](weight, None)
    x = torch.randn(INT8_ROWS, 64, dtype=torch.bfloat16)
    assert not torch.equal(method.apply(x), method.many_rows.apply(x)), "the kernels round alike"


def test_a_failing_compiler_is_an_error_with_a_remedy(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of registers")

    monkeypatch.setattr("minisrv.compile.whole.choose_cxx", lambda: "g++")
    monkeypatch.setattr("minisrv.compile.whole._stock", lambda *_: fail)
    with pytest.raises(CompilationError, match=r"out of registers\); serve it with --compilation-"):
        LLM(str(checkpoint), compilation_mode="stock_torch_compile", **LIMITS)


@pytest.mark.parametrize("most", [3, 4, 8, 9, 100])
def test_steps_before_service_hold_one_token_and_the_most(most: int) -> None:
    first, *rest = warm_up_sizes(most)
    assert 2 <= first < most
    assert rest == sorted({*rest})
    assert {1, most} <= {*rest}
