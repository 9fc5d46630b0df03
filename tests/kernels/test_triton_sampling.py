"""Sampling on CUDA gives the tokens of the CPU, in Triton's interpreter without a GPU and on a
GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minisrv.kernels import triton_sampling
from minisrv.kernels.sampling import ALL, apply_bitmask, sample
from minisrv.kernels.triton_sampling import apply_bitmask as triton_apply_bitmask
from minisrv.kernels.triton_sampling import sample as triton_sample

PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "seed")


def make(
    rows: int, vocab: int, *, dtype: torch.dtype, ties: bool, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Make logits, and the parameters of `rows` request indices after the null index, with random
    combinations of every kind."""
    g = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, vocab, generator=g)
    if ties:
        logits = logits.round()
    logits[:, :: max(2, vocab // 7)] = -math.inf

    def choose(values: list[float], dtype: torch.dtype) -> Tensor:
        index = torch.randint(len(values), (rows + 1,), generator=g)
        return torch.tensor(values, dtype=dtype)[index]

    return logits.to(dtype), {
        "req_indices": 1 + torch.randperm(rows, generator=g),
        "positions": torch.randint(1 << 20, (rows,), generator=g),
        "temperature": choose([0.0, 0.7, 1.0, 1.9], torch.float32),
        "top_k": choose([0, 0, 1, 3, vocab // 2, 10 * vocab], torch.int64),
        "top_p": choose([1.0, 1.0, 0.05, 0.5, 0.95], torch.float32),
        "min_p": choose([0.0, 0.0, 0.02, 0.3], torch.float32),
        "seed": torch.randint(-(1 << 62), 1 << 62, (rows + 1,), generator=g),
    }


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 32, 1000, 1024, 1057, 4096, 9000])
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_a_bitmask_drops_what_the_cpu_drops_and_is_whole_again(
    device: str, dtype: torch.dtype, vocab: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with a mask between rows without one are right, and mask rows beyond those of the logits
    are not touched."""
    monkeypatch.setattr(triton_sampling, "blocks_of", lambda rows, vocab: blocks)
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=g).to(dtype)
    bitmask = torch.randint(-(2**31), 2**31, (7, -(-vocab // 32)), dtype=torch.int32, generator=g)
    bitmask[1] = bitmask[3] = ALL
    expected, left = logits.clone(), bitmask.clone()
    apply_bitmask(expected, left[:5])
    assert (expected[[0, 2, 4]] == -math.inf).any(dim=1).all()
    assert torch.equal(expected[[1, 3]], logits[[1, 3]])
    assert (left[:5] == ALL).all()
    found, rest = logits.to(device), bitmask.to(device)
    triton_apply_bitmask(found, rest[:5])
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(rest.cpu(), left)


def run(op: Any, logits: Tensor, given: dict[str, Tensor]) -> Tensor:
    out = torch.full((len(logits),), -1, device=logits.device)
    op(logits, given["req_indices"], given["positions"], *(given[n] for n in PARAMETERS), out)
    return out


@settings(max_examples=25)
@given(
    rows=st.integers(1, 4),
    vocab=st.sampled_from([5, 64, 1024, 1500, 2049, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    ties=st.booleans(),
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([1, 2, 4]),
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no interpreter")
def test_the_interpreter_gives_the_tokens_of_the_cpu(blocks: int, **drawn: Any) -> None:
    logits, given_ = make(**drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_sampling, "blocks_of", lambda rows, vocab: blocks)
        found = run(triton_sample, logits, given_)
    assert torch.equal(found, run(sample, logits, given_))


def test_more_rows_have_larger_parts() -> None:
    found = [triton_sampling.blocks_of(rows, 151936) for rows in (1, 8, 16, 32, 64, 512)]
    assert found == [1, 1, 2, 4, 8, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(1, 151936), (256, 4096), (20, 151936), (64, 151936), (3, 262144), (17, 1000)],
)
def test_a_gpu_gives_the_tokens_of_the_cpu(
    rows: int, vocab: int, dtype: torch.dtype, ties: bool
) -> None:
    """The tokens may differ in one row of a thousand, where the last bits of `log`, `exp` or a sum
    in another order decide."""
    differing = total = 0
    for seed in range(4):
        logits, given_ = make(rows, vocab, dtype=dtype, ties=ties, seed=seed)
        there = {name: tensor.cuda() for name, tensor in given_.items()}
        found = run(triton_sample, logits.cuda(), there)
        assert torch.equal(found, run(triton_sample, logits.cuda(), there)), "it repeats itself"
        differing += int((found.cpu() != run(sample, logits, given_)).sum())
        total += rows
    assert differing <= total / 1000


@pytest.mark.gpu
def test_a_graph_follows_its_parameters_and_nobody_waits() -> None:
    """A captured graph samples by the parameters of each replay, and the host never waits for the
    GPU."""
    logits, given_ = make(8, 5000, dtype=torch.bfloat16, ties=False, seed=1)
    logits = logits.cuda()
    there = {name: tensor.cuda() for name, tensor in given_.items()}
    out = torch.empty(8, dtype=torch.int64, device="cuda")
    args = (logits, there["req_indices"], there["positions"], *(there[n] for n in PARAMETERS), out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_sample(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            triton_sample(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(5):
        fresh, other = make(8, 5000, dtype=torch.bfloat16, ties=True, seed=seed)
        logits.copy_(fresh)
        for name, tensor in other.items():
            there[name].copy_(tensor)
        graph.replay()
        assert torch.equal(out.cpu(), run(sample, fresh, other))


@pytest.mark.gpu
def test_nan_stays_in_its_row() -> None:
    logits, given_ = make(6, 3000, dtype=torch.bfloat16, ties=False, seed=3)
    there = {name: tensor.cuda() for name, tensor in given_.items()}
    clean = run(triton_sample, logits.cuda(), there)
    logits[4] = math.nan
    found = run(triton_sample, logits.cuda(), there)
    others = torch.arange(6) != 4
    assert torch.equal(found.cpu()[others], clean.cpu()[others])
    assert 0 <= int(found[4]) < 3000, "an id, whatever it is"
