"""An engine serves what transformers' code computes in every graph mode, with transformers' own
tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisrv import LLM, SamplingParams
from minisrv.certification.sweep import sweep
from minisrv.errors import GraphCaptureError
from tests.architectures import INSTALLED, make_transformers_checkpoint
from tests.checkpoints import make_checkpoint
from tests.nn.test_logits import prompt

PROMPTS = [prompt(length, length) for length in (3, 40, 17, 1, 25, 9)]
NUM_TOKENS = 20
LIMITS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "max_model_len": 128,
    "num_kv_blocks": 40,  # fewer than four requests need, so some are preempted
    "device": "cpu",
    "dtype": "float32",
    "compilation_mode": 0,
    "cudagraph_capture": "whole",  # for a batch has one size, by which its sums are rounded
}
MODES = ("none", "piecewise", "full-and-piecewise", "full")


def greedy(directory: Path) -> list[list[int]]:
    """Return the tokens that transformers generates."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    found = []
    for tokens in PROMPTS:
        with torch.inference_mode():
            ids = torch.tensor([tokens])
            for _ in range(NUM_TOKENS):
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        found.append(ids[0, len(tokens) :].tolist())
    return found


def served(directory: Path, mode: str, **settings: Any) -> list[list[int]]:
    """Return the tokens that an engine generates, the second time, when the prefix cache has the
    prompts."""
    llm = LLM(
        str(directory),
        cudagraph_mode=mode,
        **{**LIMITS, "model_impl": "transformers", **settings},
    )
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    first, second = (llm.generate(prompts, params, use_tqdm=False) for _ in range(2))
    found = [[*output.outputs[0].token_ids] for output in second]
    assert found == [[*output.outputs[0].token_ids] for output in first]
    assert bool(llm.engine.runner.graphs) == (mode != "none")
    return found


@pytest.mark.usefixtures("tape_holds_mixed_batches")
@pytest.mark.parametrize("variant", ["qwen3", "llama-tied"])
def test_tokens_are_those_of_the_decoder_in_nn(variant: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, variant)
    expected = served(directory, "none", model_impl="minisrv")
    assert expected == greedy(directory)
    for mode in MODES:
        assert served(directory, mode, async_scheduling=variant == "qwen3") == expected, mode


@pytest.mark.usefixtures("tape_holds_mixed_batches")
@pytest.mark.parametrize("name", ["cohere2", "gemma2", "gpt_oss", "phi3", "qwen2_moe"])
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, name)
    expected = greedy(directory)
    for mode in MODES:
        assert served(directory, mode, async_scheduling=mode == "full") == expected, mode


def test_auto_serves_windows_of_qwen2(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says whose code computes the model, and why; also when what the checkpoint says comes
    from the cache."""
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    directory = make_checkpoint(tmp_path, "qwen2", **windows)
    expected = greedy(directory)
    with caplog.at_level("INFO"):
        for mode in ("none", "full-and-piecewise"):
            assert served(directory, mode, model_impl="auto") == expected
    assert caplog.text.count("computed by the code of transformers; minisrv's own does not") == 2
    assert caplog.text.count("'sliding_attention' are not implemented") == 2


HOST_TENSORS = {"phimoe"}
"""Architectures whose code makes tensors on the host in each step and copies them to the device,
which a CUDA graph cannot hold."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in INSTALLED if name not in HOST_TENSORS])
def test_tokens_on_a_gpu(name: str, tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, name)
    expected = greedy(directory)
    for mode in MODES:
        assert served(directory, mode, device="cuda") == expected, mode


@pytest.mark.gpu
@pytest.mark.parametrize("name", HOST_TENSORS)
def test_code_that_a_cuda_graph_cannot_hold_is_served_eagerly(name: str, tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, name)
    with pytest.raises(GraphCaptureError, match=r"--enforce-eager serves"):
        served(directory, "full-and-piecewise", device="cuda")
    assert served(directory, "none", device="cuda") == greedy(directory)


DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_graphs_in_bfloat16_equal_eager_runs(name: str, device: str, tmp_path: Path) -> None:
    """They do so bit for bit on every kind of batch, with experts too."""
    directory = make_transformers_checkpoint(tmp_path, name, dtype=torch.bfloat16)
    settings = {"device": device, "dtype": "bfloat16", "num_kv_blocks": None}
    engine = LLM(str(directory), **{**LIMITS, **settings}).engine
    reports = sweep(engine.runner, engine.scheduler.block_pool, lambda done, total: None)
    assert reports
    assert not [failure for report in reports for failure in report.failures]


def test_int8(tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, "mistral", dtype=torch.bfloat16)
    # With steps of other sizes, rounding in bfloat16 decides otherwise.
    settings = {"dtype": "auto", "quantization": "int8", "max_num_batched_tokens": 32}
    eager = served(directory, "none", **settings)
    assert served(directory, "full-and-piecewise", **settings) == eager
