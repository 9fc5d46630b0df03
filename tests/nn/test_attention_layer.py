"""The interface of the attention layer to captured graphs: static buffers, `graph_break`, and
capture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minisrv.checkpoint import describe_model
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.graph.forward_context import set_forward_context
from minisrv.graph.wrapper import CUDAGraphWrapper
from minisrv.modes import CUDAGraphMode
from minisrv.nn.decoder import Decoder
from minisrv.nn.loader import load_model
from tests.checkpoints import VARIANTS, make_checkpoint
from tests.nn.driver import Driver, broken_run, forward


def load(directory: Path, variant: str, dtype: torch.dtype = torch.float32) -> Decoder:
    make_checkpoint(directory, variant)
    model = load_model(describe_model(directory).model, directory, dtype=dtype)
    model.prepare()
    return model


def test_broken_attention_runs_later_in_the_context_of_then(tmp_path: Path) -> None:
    """While pieces are captured attention is not computed; the call that was handed over works on
    the buffers of the capture and in the forward context of the step that runs it."""
    driver = Driver(load(tmp_path, "qwen3"))
    model, block_size = driver.model, driver.block_size
    driver.step([(0, [3, 4, 5]), (1, [7])])
    ids, positions, context = driver.context([(0, [6]), (1, [8])])
    before = [cache.clone() for cache in driver.caches]
    handed = broken_run(model, ids, positions, context)
    assert len(handed) == len(driver.caches)
    assert model.attn_out.isnan().all()
    for cache, copy in zip(driver.caches, before, strict=True):
        torch.testing.assert_close(cache, copy, rtol=0, atol=0, equal_nan=True)

    _, _, later = driver.context([(2, [6]), (3, [8])])
    model.qkv.fill_(1.0)
    with torch.inference_mode(), set_forward_context(later):
        handed[0]()
    assert model.attn_out[:2].isfinite().all()
    assert model.attn_out[2:].isnan().all()
    changed = driver.caches[0].nan_to_num() != before[0].nan_to_num()
    slots = changed.flatten(2).any(dim=2).flatten().nonzero().flatten().tolist()
    assert slots == sorted(block_size * driver.rows[row].blocks[0] for row in (2, 3))
    assert torch.equal(driver.caches[1].nan_to_num(), before[1].nan_to_num())


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_step_equals_the_eager_one(
    variant: str, dtype: torch.dtype, mode: CUDAGraphMode, tmp_path: Path
) -> None:
    """A captured step equals the eager one bit for bit, replayed on other tokens than it was
    captured with."""
    driver = Driver(load(tmp_path, variant, dtype))
    driver.step([(0, [3, 4, 5, 6, 7, 8, 9]), (1, [7])])
    ids, positions, context = driver.context([(0, [6]), (1, [8])], pad_rows=1)
    result = torch.empty(3, driver.model.config.hidden_size, dtype=dtype)

    def step(ids: torch.Tensor, positions: torch.Tensor) -> None:
        driver.model(ids, positions, result)

    def run(runnable: object, mode: CUDAGraphMode, token: int) -> torch.Tensor:
        ids[0] = token
        with torch.inference_mode(), set_forward_context(replace(context, mode=mode)):
            runnable(ids, positions)  # type: ignore[operator]
        return result.clone()

    def capture(ids: torch.Tensor, positions: torch.Tensor) -> None:
        wrapper.install(context.descriptor, wrapper.capture(ids, positions))

    expected = run(step, CUDAGraphMode.NONE, 11)
    wrapper = CUDAGraphWrapper(step, mode, CPUTapeBackend(), check_addresses=True)
    run(capture, mode, 6)
    captured = driver.model.qkv.clone()
    found = run(wrapper, mode, 11)
    assert torch.equal(found, expected)
    assert not torch.equal(driver.model.qkv[:3], captured[:3])
    layers = len(driver.caches)
    pieces = layers + 1 if mode is CUDAGraphMode.PIECEWISE else 1
    assert len(wrapper.graphs[context.descriptor].calls) == 2 * pieces - 1


def test_works_without_inference_mode(tmp_path: Path) -> None:
    """The model runs under `no_grad` alone, and its result asks for no gradient."""
    driver = Driver(load(tmp_path, "llama"))
    ids, positions, context = driver.context([(0, [3, 4, 5])])
    with torch.no_grad(), set_forward_context(context):
        hidden = forward(driver.model, ids, positions)
    assert hidden.isfinite().all()
    assert not hidden.requires_grad
