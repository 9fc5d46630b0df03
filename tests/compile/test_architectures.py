"""What is traced, rewritten and split of transformers' models computes the same before it is
compiled. The pieces are run by torch's operations here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minisrv.compile.passes import apply_passes
from minisrv.compile.program import Program
from minisrv.compile.split import split
from minisrv.compile.trace import trace
from minisrv.compile.values import Description
from minisrv.graph.forward_context import set_forward_context
from tests.architectures import make_transformers_checkpoint
from tests.compile.compiled import job_of, make
from tests.compile.interpreted import InterpretedPiece
from tests.nn.driver import Driver


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        "gemma",
        "olmo2",
        "phi3",
        "gemma3_text",
        "gpt2",
        "mixtral",
        "smollm3",
        "cohere2",
        "gpt_oss",
        "opt",
    ],
)
def test_the_pieces_compute_the_forward(name: str, tmp_path: Path):
    job = job_of(make_transformers_checkpoint(tmp_path, name), "transformers")
    traced = trace(lambda: make(job, "dummy"), "cpu")
    apply_passes(traced)
    schedule = split(traced)
    model = make(job)
    driver = Driver(model, max_len=32)
    pieces = [InterpretedPiece(piece) for piece in schedule.pieces]
    program = Program(Description(128, {}, [], schedule.calls), pieces, model)
    layers = program.attention_layers(model.attention_layers)
    for rows in (1, 9):
        ids, positions, context = driver.context([(0, list(range(3, 3 + rows)))])
        expected, computed = (torch.empty(rows, model.config.hidden_size) for _ in range(2))
        with torch.inference_mode(), set_forward_context(context):
            model.forward(ids, positions, expected)
        with torch.inference_mode(), set_forward_context(replace(context, layers=layers)):
            program(ids, positions, computed)
        torch.testing.assert_close(computed, expected, atol=1e-5, rtol=1e-5)
