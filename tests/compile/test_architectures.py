"""What is traced, rewritten and split of transformers' models computes the same before it is
compiled. The pieces are run by torch's operations here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

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

LAYERS = 2
"""The number of layers."""

MATCHES = {
    "llama": (2 * LAYERS, 0, 2 * LAYERS - 1, LAYERS, LAYERS),
    "qwen3": (2 * LAYERS, 0, 2 * LAYERS - 1, LAYERS, LAYERS),
    "smollm3": (2 * LAYERS, 0, 2 * LAYERS - 1, LAYERS, LAYERS),
    "phi3": (2 * LAYERS, 0, 2 * LAYERS - 1, LAYERS, LAYERS),
    "gemma": (2 * LAYERS, 0, 2 * LAYERS - 1, LAYERS, LAYERS),
    "gemma2": (0, 2 * LAYERS - 1, 0, LAYERS, LAYERS),
    "gemma3_text": (0, 2 * LAYERS - 1, 0, LAYERS, LAYERS),
    "glm4": (0, 2 * LAYERS - 1, 0, LAYERS, 0),  # a rotation of neighbours
    "olmo2": (0, 2 * LAYERS - 1, 0, LAYERS, LAYERS),
    "mixtral": (LAYERS, 0, 0, 0, LAYERS),  # a router needs the norm, and experts are no products
    "gpt_oss": (LAYERS, 0, 0, 0, 0),  # its rotation is written in another way
    "cohere2": (
        2 * LAYERS,
        0,
        0,
        0,
        0,
    ),  # LayerNorm, and one product of a layer's input
    "gpt2": (2 * LAYERS, 0, 0, 0, LAYERS),  # LayerNorm, and no rotation
}
"""For each architecture the number of matches of the passes that fuse: residuals, residuals with
norms behind products, norms, gates and attention. The norm of the first layer stays with the
embedding, and that behind the last product with the norm of the model's result."""


SETTINGS: dict[str, dict[str, Any]] = {
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},  # the last is not rotated
    "smollm3": {"no_rope_layers": [1, 0]},
}
"""Settings by which few layers are of all kinds."""


@pytest.mark.parametrize("name", [*MATCHES, "opt", "gpt_bigcode"])
def test_the_pieces_compute_the_forward(name: str, tmp_path: Path):
    """The queries of gpt_bigcode are a part of what a product is split into, of which a pass once
    asked for the shape."""
    matches = rewritten(tmp_path, name, **SETTINGS.get(name, {}))
    assert matches == MATCHES.get(name, matches)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text", "olmo2", "qwen3"])
def test_the_pieces_compute_the_forward_on_a_gpu(name: str, tmp_path: Path):
    assert rewritten(tmp_path, name, "cuda") == MATCHES[name]


def by_matmul(angles: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the rotation as older versions of transformers do."""
    frequencies = angles.inv_freq[None, :, None].float().expand(len(position_ids), -1, 1)
    each = (frequencies @ position_ids[:, None, :].float()).transpose(1, 2)
    both = torch.cat((each, each), dim=-1)
    cos, sin = both.cos() * angles.attention_scaling, both.sin() * angles.attention_scaling
    return cos.to(x.dtype), sin.to(x.dtype)


def swapped(angles: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = by_matmul(angles, x, position_ids)
    return sin, cos


def shifted(angles: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    return by_matmul(angles, x, position_ids + 1)


def reversed_frequencies(angles: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = by_matmul(angles, x, position_ids)
    return cos.flip(-1), sin.flip(-1)


@pytest.mark.parametrize(
    ("angles", "matches"), [(by_matmul, 2), (swapped, 0), (shifted, 0), (reversed_frequencies, 0)]
)
def test_other_rotations(
    angles: Callable[..., tuple[Tensor, Tensor]],
    matches: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", angles)
    assert rewritten(tmp_path, "llama")[-1] == matches


def rewritten(directory: Path, name: str, device: str = "cpu", **settings: Any) -> tuple[int, ...]:
    """Return the matches of the passes that fuse, once the result of a model has been found to be
    that of the model's own forward."""
    settings = {"num_hidden_layers": LAYERS, **settings}
    make_transformers_checkpoint(directory, name, **settings)
    job = job_of(directory, "transformers", device=device)
    traced = trace(lambda: make(job, "dummy"), device)
    matches = tuple(apply_passes(traced).values())[-5:]
    schedule = split(traced)
    model = make(job)
    driver = Driver(model, max_len=32)
    pieces = [InterpretedPiece(piece) for piece in schedule.pieces]
    program = Program(Description(128, {}, [], schedule.calls), pieces, model)
    layers = program.attention_layers(model.attention_layers)
    for rows in (1, 9):
        ids, positions, context = driver.context([(0, list(range(3, 3 + rows)))])
        shape = (rows, model.config.hidden_size)
        expected, computed = (torch.empty(shape, device=device) for _ in range(2))
        with torch.inference_mode(), set_forward_context(context):
            model.forward(ids, positions, expected)
        with torch.inference_mode(), set_forward_context(replace(context, layers=layers)):
            program(ids, positions, computed)
        tolerance = 1e-5 if device == "cpu" else 1e-4
        torch.testing.assert_close(computed, expected, atol=tolerance, rtol=tolerance)
    return matches
