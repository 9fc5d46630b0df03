"""Logits equal those of transformers on the same weights, however the tokens are cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minisrv.checkpoint import describe_model
from minisrv.nn.decoder import Decoder
from minisrv.nn.loader import load_model
from tests.checkpoints import VARIANTS, VOCAB_SIZE, make_checkpoint
from tests.nn.driver import Driver

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
"""Tolerances in float32 for logits of about unit size, because sums are computed in another
order."""


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = load_model(describe_model(directory).model, directory, dtype=dtype)
    model.prepare()
    return model


def reference(directory: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_variant(variant: str, tmp_path: Path) -> None:
    """The steps hold prompts longer than a block, one-token prompts, chunks, decodes, and several
    requests at once."""
    directory = make_checkpoint(tmp_path, variant)
    driver = Driver(load(directory))
    tokens = [prompt(length, seed) for seed, length in enumerate((37, 1, 20, 29))]
    expected = [reference(directory, t + prompt(3, 9)) for t in tokens]
    a, b, c, d = tokens
    more = prompt(3, 9)
    # A chunk that ends with its block, beside a one-token prompt.
    driver.step([(0, a[:16]), (1, b)])
    # A decode first, then prefill.
    driver.step([(1, more[:1]), (0, a[16:21]), (2, c)], pad_tokens=5)
    # One of the chunks has one token.
    driver.step([(1, more[1:2]), (2, more[:1]), (0, a[21:22]), (3, d[:28])])
    # Decode rows are not first.
    driver.step([(2, more[1:2]), (0, a[22:]), (1, more[2:]), (3, d[28:])])
    for i in range(3):
        rows = [(0, more[i : i + 1]), (3, more[i : i + 1])]
        driver.step(rows + [(2, more[2:])] * (i == 2), pad_rows=2)
    for index in range(4):
        torch.testing.assert_close(driver.logits(index), expected[index], **TOLERANCE)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_bfloat16_logits_are_as_close_as_bfloat16_allows(variant: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, variant, dtype=torch.bfloat16)
    tokens = prompt(40, 3)
    driver = Driver(load(directory, torch.bfloat16))
    driver.step([(0, tokens[:30])])
    for token in tokens[30:]:
        driver.step([(0, [token])])
    found = driver.logits(0).float()
    exact = reference(directory, tokens)
    theirs = reference(directory, tokens, torch.bfloat16).float()
    ours_off = (found - exact).square().mean().sqrt()
    theirs_off = (theirs - exact).square().mean().sqrt()
    assert ours_off < 1.2 * theirs_off


def test_padding_changes_no_bit_of_real_rows(tmp_path: Path) -> None:
    """Real rows are the same bit for bit in one padded shape, with a clean null block and with NaN
    in it."""
    model = load(make_checkpoint(tmp_path, "qwen3"))
    found = []
    for poison in (0.0, torch.nan):
        driver = Driver(model)
        driver.step([(0, prompt(11, 0)), (1, prompt(3, 1))])
        for cache in driver.caches:
            cache[0] = poison
        driver.step([(0, [5]), (1, [6])], pad_rows=3, pad_tokens=2)
        found.append([driver.logits(0), driver.logits(1)])
    for clean, poisoned in zip(*found, strict=True):
        assert torch.equal(clean, poisoned)
        assert clean.isfinite().all()
