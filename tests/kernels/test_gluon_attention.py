"""Attention on Hopper's tensor cores against the float64 reference of all attention.

Triton's interpreter has no Gluon, so without such a GPU only the choice of the kernel and its
compilation are tested. What `test_triton_attention` tests on a GPU is tested with this kernel too,
where it supports the layer.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.6")
from minisrv.kernels import gluon_attention as module
from minisrv.kernels import triton_attention
from minisrv.kernels.gluon_attention import num_groups, supports
from tests.kernels.attention_cases import Case, assert_equal_to_reference, make_case

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == module.HOPPER
hopper = pytest.mark.skipif(not HOPPER, reason="the kernel is for Hopper")
SHARED = 227 * 1024
"""Number of bytes of shared memory that a program may have on Hopper."""

H100_SMS = 132
RAGGED = [(0, 300), (37, 129), (1000, 65), (17, 1), (63, 64), (0, 1), (5, 2)]


def supported(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> bool:
    monkeypatch.setattr(module, "_is_hopper", lambda _: True)
    shape = {"head_dim": 64, "block_size": 16, "dtype": torch.bfloat16, **changes}
    return supports(make_case([(0, 2)], **shape).layer, torch.device("cuda"))


@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 128}, {"dtype": torch.float16}, {"group": 7}, {"block_size": 8}]
)
def test_supported(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert supported(monkeypatch, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 80},
        {"dtype": torch.float32},
        {"group": 65},
        {"block_size": 4},
        {"block_size": 24},
        {"block_size": 256},
        {"sliding_window": 9},
        {"logit_soft_cap": 5.0},
        {"sinks": True},
    ],
)
def test_not_supported(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not supported(monkeypatch, **changes)


def test_no_other_device_is_supported() -> None:
    case = make_case([(0, 2)], head_dim=64, block_size=16, dtype=torch.bfloat16)
    assert not supports(case.layer, torch.device("cpu"))


def test_programs_are_smaller_where_large_ones_would_leave_sms_without_work() -> None:
    """Eight key heads, each with four queries a token: 32 tokens are a tile of two warp groups."""
    few = [num_groups(3, tokens, 8, 4, H100_SMS) for tokens in (2, 512)]
    many = [num_groups(3, tokens, 8, 4, H100_SMS) for tokens in (544, 8192)]
    assert few == [2, 2]
    assert many == [3, 3]
    assert num_groups(2, 8192, 8, 4, H100_SMS) == 2


@pytest.mark.parametrize(("head_dim", "groups"), [(128, 2), (64, 3)])
def test_compiles_to_what_hopper_is_for(head_dim: int, groups: int) -> None:
    """Products are asynchronous, pages are loaded by the TMA alone, the program fits, and its
    accumulators are in registers."""
    script = Path(__file__).with_name("compile_gluon_attention.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, str(head_dim), str(groups), "16"]
    found = json.loads(
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    )
    assert found["shared"] <= SHARED
    code = found["ptx"]
    assert "wgmma.mma_async" in code
    assert "mma.sync" not in code
    assert "cp.async.bulk.tensor.2d" in code
    assert "ld.global.v4" not in code
    assert ".local" not in code


# ---- on a GPU only -----------------------------------------------------------------------------


def run(case: Case) -> Case:
    ran = case.copy("cuda")
    ran.run(triton_attention.attention)
    return ran


def bits_of(case: Case, rows: slice = slice(None)) -> Tensor:
    return run(case).args["out"][rows].cpu().view(torch.uint8)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    ("head_dim", "group", "groups", "block_size", "dtype"),
    [
        (64, 4, 3, 16, torch.bfloat16),
        (64, 4, 2, 8, torch.bfloat16),
        (64, 1, 3, 128, torch.float16),
        (64, 3, 3, 16, torch.bfloat16),
        (64, 64, 2, 16, torch.bfloat16),
        (128, 2, 2, 16, torch.bfloat16),
        (128, 4, 2, 8, torch.float16),
        (128, 7, 2, 16, torch.bfloat16),
        (128, 1, 2, 128, torch.bfloat16),
    ],
)
def test_ragged_rows(
    head_dim: int,
    group: int,
    groups: int,
    block_size: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts, chunks behind a history and decode rows, with padding, in programs of so many warp
    groups."""
    monkeypatch.setattr(module, "num_groups", lambda *_: groups)
    shape = {"head_dim": head_dim, "group": group, "block_size": block_size, "dtype": dtype}
    rows = RAGGED if group < 64 else RAGGED[3:]
    case = make_case(rows, num_kv_heads=1 if group > 4 else 2, pad_tokens=9, pad_rows=5, **shape)
    assert_equal_to_reference(run(case), case)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_edges(tokens: int) -> None:
    """One row has no launch for rows of one token, so that its tiles may hold one too."""
    for history in (0, 1, 127, 128, 250):
        shape = {"head_dim": 64, "block_size": 16, "dtype": torch.bfloat16, "num_kv_heads": 1}
        case = make_case([(history, tokens)], pad_tokens=1, **shape)
        assert_equal_to_reference(run(case), case)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_row_depends_on_no_other(head_dim: int) -> None:
    """A row is the same bit for bit whatever the other rows hold, NaN included, and however long
    they are."""
    rows = [(40, 65), (0, 130), (9, 1), (300, 2)]
    shape = {"head_dim": head_dim, "block_size": 16, "dtype": torch.bfloat16}
    case = make_case(rows, **shape)
    others = make_case([(7, n) for _, n in rows], seed=1, poison=0.0, **shape)
    for row, (first, last) in enumerate(pairwise(case.args["query_start_loc"].tolist())):
        changed = case.copy()
        changed.args["qkv"][:first] = math.nan
        changed.args["qkv"][last:] = math.nan
        for other in set(range(len(rows))) - {row}:
            changed.args["seq_lens"][other] = others.args["seq_lens"][other]
        own = slice(first, last)
        assert torch.equal(bits_of(case, own), bits_of(changed, own))


@pytest.mark.gpu
@hopper
def test_chunks_give_what_the_prompt_gives() -> None:
    """A token has the same result bit for bit in a prompt that is computed at once and in a chunk,
    whatever the chunk's tiles."""
    shape = {"head_dim": 128, "block_size": 16, "dtype": torch.bfloat16, "num_kv_heads": 1}
    whole = run(make_case([(0, 700)], **shape))
    chunk = whole.copy("cuda")
    begin = 333
    for name in ("qkv", "positions", "slot_mapping", "out"):
        chunk.args[name] = chunk.args[name][begin:].clone()
    chunk.args["query_start_loc"] = torch.tensor([0, 700 - begin], dtype=torch.int32).cuda()
    chunk.run(triton_attention.attention)
    assert torch.equal(chunk.args["out"], whole.args["out"][begin:])


@pytest.mark.gpu
@hopper
def test_results_are_the_same_every_time() -> None:
    """Which program takes which tile does not matter to the results."""
    shape = {"head_dim": 64, "block_size": 16, "dtype": torch.bfloat16}
    case = make_case([(500, 700), (0, 900)], **shape)
    assert len({bits_of(case).numpy().tobytes() for _ in range(5)}) == 1
