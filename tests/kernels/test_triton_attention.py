"""CUDA's attention against the same float64 reference as the CPU's, on the same random batches.

Without a GPU the kernels run in Triton's interpreter, which multiplies bfloat16 wrongly (it takes
the bits for integers); float16 stands for both there.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.attention_cases import (
    OPTIONS,
    TOLERANCE,
    Case,
    assert_equal_to_reference,
    make_case,
    with_padding_rows,
)

# Triton 3.6's interpreter cannot loop over a range with NumPy 2.4 (triton-lang/triton#9171).
pytest.importorskip("triton", minversion="3.6" if torch.cuda.is_available() else "3.7")
import triton
import triton.language as tl

from minisrv.kernels import triton_attention as module
from minisrv.kernels.triton_attention import (
    DECODE_FEW,
    DECODE_MANY,
    DECODE_WIDE,
    attention,
    decode_shape,
    num_splits,
)
from minisrv.kernels.triton_ragged import SURVEY, survey_rows

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
H100_SMS = 132


@pytest.fixture(autouse=True)
def _small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one program after the other, so it stands for a GPU of few SMs."""
    if not GPU:
        monkeypatch.setattr(module, "multiprocessors", lambda _: 16)


def run(case: Case) -> Case:
    """Return a copy of the case, on the tested device, that attention has been run on."""
    ran = case.copy(DEVICE)
    ran.run(attention)
    return ran


def check(case: Case) -> None:
    assert_equal_to_reference(run(case), case)


def bits_of(case: Case, rows: slice = slice(None)) -> Tensor:
    return run(case).args["out"][rows].cpu().view(torch.uint8)


@settings(max_examples=25)
@given(
    rows=st.one_of(
        st.lists(st.tuples(st.integers(0, 300), st.just(1)), min_size=1, max_size=5),
        st.lists(st.tuples(st.integers(0, 150), st.integers(1, 12)), min_size=1, max_size=4),
    ),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 16, 64, 80]),
    block_size=st.sampled_from([1, 4, 5, 16, 32]),
    pad_tokens=st.one_of(st.just(0), st.integers(0, 5)),
    pad_rows=st.one_of(st.just(0), st.integers(0, 9)),
    norm=st.booleans(),
    rotate=st.booleans(),
    scale=st.sampled_from([None, 0.25]),
    sliding_window=st.one_of(st.none(), st.integers(1, 200)),
    logit_soft_cap=st.sampled_from([None, 0.5, 5.0]),
    sinks=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    poison=st.sampled_from([math.nan, math.inf, -math.inf]),
    seed=st.integers(0, 1000),
)
def test_any_batch_equals_the_reference(**drawn: Any) -> None:
    check(make_case(**drawn))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([(0, 1)], id="one-token prompt"),
        pytest.param([(127, 1), (128, 1), (129, 1), (130, 1)], id="decode around a tile"),
        pytest.param([(500, 1), (2, 1), (0, 1)], id="a long row beside short ones"),
        pytest.param([(0, 1)] * 9, id="one token each"),
        pytest.param([(0, 128), (0, 129)], id="prompts around a tile"),
        pytest.param([(0, 32), (0, 33), (40, 31)], id="queries around a tile"),
        pytest.param([(0, 5), (9, 1), (200, 3), (4, 1)], id="decode rows scattered"),
    ],
)
@pytest.mark.parametrize(("pad_tokens", "pad_rows"), [(0, 0), (2, 0), (0, 3), (70, 40)])
def test_edges(rows: list[tuple[int, int]], pad_tokens: int, pad_rows: int) -> None:
    padding = {"pad_tokens": pad_tokens, "pad_rows": pad_rows}
    check(make_case(rows, num_kv_heads=1, head_dim=64, block_size=16, **padding))


def test_as_many_tokens_as_rows_are_not_one_each() -> None:
    """A batch with as many tokens as rows need not have one token in each: a batch that a graph
    holds may have empty rows, so only `max_query_len` tells."""
    case = make_case([(9, 3), (4, 1)], pad_rows=2)
    assert len(case.args["positions"]) == len(case.args["seq_lens"])
    check(case)


def test_the_last_split_may_be_empty_or_not_full() -> None:
    """The last split of a row may be empty or partly filled: every length up to a few tiles is
    tested in four splits, as for one row on a GPU of one SM. Up to two shares are combined as few,
    and others as many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "multiprocessors", lambda _: 1)
        patch.setattr(module, "FEW_SHARES", 2)
        patch.setattr(module, "MAX_KEYS", 16)
        for history in [0, 1, 15, 16, 17, 63, 64, 65, 66, 80, 81, 500, 511]:
            check(make_case([(history, 1)], num_kv_heads=1, block_size=256))
            window = {"sliding_window": 65, "sinks": True}
            check(make_case([(history, 1)], num_kv_heads=1, block_size=16, **window))


@pytest.mark.parametrize("sliding_window", [1, 63, 64, 65])
def test_windows_around_a_tile(sliding_window: int) -> None:
    """A tile of keys may lie before the window of some of a tile's queries, which have then seen
    nothing yet, and keys before the window of all of them are not loaded."""
    shape = {"head_dim": 64, "block_size": 16, "sliding_window": sliding_window}
    check(make_case([(300, 1), (63, 1), (64, 1), (0, 1)], **shape))
    check(make_case([(100, 20), (0, 70), (128, 1)], pad_tokens=3, pad_rows=2, **shape))


def test_long_windows_and_rows_are_split() -> None:
    for window in (None, 200, 256, 400):
        check(make_case([(700, 1)], num_kv_heads=1, block_size=16, sliding_window=window))


@pytest.mark.parametrize(
    ("head_dim", "options"),
    [(256, OPTIONS[0]), (256, OPTIONS[1]), (80, {**OPTIONS[1], "rotate": True})],
    ids=["plain", "with options", "with options and rotation"],
)
def test_kernels_compile_and_fit(head_dim: int, options: dict[str, Any]) -> None:
    """The compiler takes the kernels, and no program needs more than 99 KiB of shared memory, which
    every GPU with tensor cores for bfloat16 has."""
    script = Path(__file__).with_name("compile_attention.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, str(head_dim), json.dumps(options)]
    printed = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout
    shared = [line.split() for line in printed.splitlines()]
    decode, prompt, mixed = (
        ["_decode"] * 2,
        ["_prepare", "_attend"],
        ["_prepare", "_decode", "_attend"],
    )
    assert [kernel for kernel, _ in shared] == decode + prompt + mixed
    assert all(int(size) <= 99 * 1024 for _, size in shared)


@pytest.mark.parametrize("head_dim", [1, 7, 20, 40, 72, 112, 120, 192])
def test_heads_of_any_size(head_dim: int) -> None:
    """Heads need not fill a vector or a tile, and those that are not rotated may be odd."""
    for rotate in {False, head_dim % 2 == 0}:
        shape = {"head_dim": head_dim, "rotate": rotate}
        check(make_case([(50, 1), (3, 1)], **shape))
        check(make_case([(20, 9), (0, 1), (7, 3)], pad_tokens=2, **shape))


@pytest.mark.parametrize("group", [1, 7, 16, 17, 40])
@pytest.mark.parametrize("rows", [[(300, 1), (20, 1)], [(70, 20), (0, 1)]], ids=["decode", "mixed"])
def test_groups_of_any_size(rows: list[tuple[int, int]], group: int) -> None:
    """A group may have more query heads than a tile of queries holds, and groups need not fill a
    tile."""
    check(make_case(rows, num_kv_heads=1, group=group, head_dim=256, block_size=16))


@pytest.mark.parametrize(
    "rows", [[(5, 1), (2, 1), (0, 1)], [(200, 1), (150, 1)], [(5, 1), (3, 6)], [(7, 9), (140, 2)]]
)
@pytest.mark.parametrize("sliding_window", [None, 4])
def test_real_rows_do_not_depend_on_what_is_poisoned(
    rows: list[tuple[int, int]], sliding_window: int | None
) -> None:
    """Real rows are the same bit for bit whatever the null block, stale blocks, tails of blocks,
    entries before the window and padding tokens hold."""
    for padding in ({}, {"pad_tokens": 3}, {"pad_tokens": 3, "pad_rows": 2}):
        clean, *poisoned = (
            bits_of(make_case(rows, poison=poison, sliding_window=sliding_window, **padding))
            for poison in (0.0, math.nan, math.inf)
        )
        assert all(torch.equal(clean, other) for other in poisoned)


def test_nan_stays_in_padding_rows() -> None:
    """Padding rows of a decode batch, which lie in the null block, are finite if their tokens are;
    NaN in them does not reach the real rows."""
    case = make_case([(5, 1), (150, 1)])
    clean, poisoned = (with_padding_rows(case, 2, value) for value in (1.0, math.nan))
    assert run(clean).args["out"].isfinite().all()
    real = slice(0, 2)
    assert torch.equal(bits_of(clean, real), bits_of(poisoned, real))
    assert run(poisoned).args["out"][2:].isnan().all()


@pytest.mark.parametrize(
    "rows", [[(200, 1), (31, 1), (16, 1)], [(40, 5), (0, 40), (9, 1)]], ids=["decode", "mixed"]
)
def test_a_row_depends_on_no_other(rows: list[tuple[int, int]]) -> None:
    """A row is the same bit for bit whatever the other rows hold, also if they hold NaN or have
    other lengths."""
    case = make_case(rows, head_dim=64, block_size=16)
    others = make_case([(7, n) for _, n in rows], head_dim=64, block_size=16, seed=1, poison=0.0)
    starts = case.args["query_start_loc"].tolist()
    for row, (first, last) in enumerate(pairwise(starts)):
        changed = case.copy()
        changed.args["qkv"][:first] = math.nan
        changed.args["qkv"][last:] = math.nan
        for other in set(range(len(rows))) - {row}:
            changed.args["seq_lens"][other] = others.args["seq_lens"][other]
        own = slice(first, last)
        assert torch.equal(bits_of(case, own), bits_of(changed, own))


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "with options"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_agree(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Rows of one token each give the same results, bit for bit, in a decode batch and in a mixed
    batch, here with a padding token beside them."""
    rows = [(300, 1), (17, 1), (0, 1)]
    case = make_case(rows, head_dim=128, block_size=16, dtype=dtype, **options)
    padded = case.copy()
    for name in ("qkv", "positions", "slot_mapping", "out"):
        tensor = padded.args[name]
        padded.args[name] = torch.cat((tensor, torch.zeros_like(tensor[:1])))
    padded.args["out"].fill_(math.nan)
    padded.options["max_query_len"] = len(padded.args["positions"])
    decode, mixed = run(case).args, run(padded).args
    assert torch.equal(decode["out"], mixed["out"][:-1])
    assert not mixed["out"][-1].any()
    mine, other = (args["kv_cache"][1:].cpu().double() for args in (decode, mixed))
    torch.testing.assert_close(mine, other, equal_nan=True, **TOLERANCE[dtype])


def test_splits_follow_from_shapes() -> None:
    """The number of splits depends only on shapes and on the GPU, so that capture and replay
    agree."""
    few, many = DECODE_FEW.programs_per_sm * H100_SMS, DECODE_MANY.programs_per_sm * H100_SMS
    assert num_splits(8, 4096 // 128, few) == 32, "no share under 128 keys"
    assert num_splits(8, 40960 // 128, few) == 32
    assert num_splits(1, 40960 // 128, few) == 64
    assert num_splits(128, 40960 // 128, many) == 8
    assert num_splits(64 * 8, 40960 // 128, many) == 2
    assert num_splits(256 * 8, 40960 // 128, many) == 1
    assert num_splits(1, 0, few) == 1


def test_wide_heads_have_large_tiles_where_there_are_few_programs() -> None:
    found = [decode_shape(n, H100_SMS, wide=wide) for n in (8, 9, 66, 67) for wide in (True, False)]
    assert found == [DECODE_WIDE, *5 * [DECODE_FEW], *2 * [DECODE_MANY]]


@triton.jit
def _write_splits(found, splits, wanted, heads: tl.constexpr):
    singles = tl.program_id(0) + 1
    tl.store(found + singles - 1, module._splits_of(singles, splits, wanted, heads))


def test_rows_beside_prompts_are_split_as_if_they_were_alone() -> None:
    """In a graph for any batch, the number of splits follows from the rows that have one token, not
    from the rows of the graph: by the device as by the host."""
    wanted = DECODE_MANY.programs_per_sm * H100_SMS
    found = torch.zeros(160, dtype=torch.int32, device=DEVICE)
    _write_splits[(len(found),)](found, 32, wanted, 8)
    assert found.tolist() == [num_splits(8 * (row + 1), 32, wanted) for row in range(len(found))]


@triton.jit
def _write_survey(query_start_loc, survey, rows, fewest, block_q: tl.constexpr):
    survey_rows(query_start_loc, survey, rows, fewest, block_q)


@settings(max_examples=60)
@given(
    counts=st.one_of(
        st.lists(st.integers(0, 40), min_size=1, max_size=12),
        st.tuples(st.integers(0, 200), st.integers(0, 3), st.integers(0, 140)).map(
            lambda n: [1] * n[0] + [17] * n[1] + [0] * n[2] or [0]
        ),
    ),
    fewest=st.integers(1, 2),
    block_q=st.sampled_from([16, 64]),
)
def test_a_survey_says_where_there_is_work(counts: list[int], fewest: int, block_q: int) -> None:
    """Every tile with work lies between those that the survey names, and both of these have work;
    the rows of one token lie before the one that it names."""
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=DEVICE)
    survey = torch.full((SURVEY,), -1, dtype=torch.int32, device=DEVICE)
    _write_survey[(1,)](starts, survey, len(counts), fewest, block_q)
    first = starts.tolist()
    tiles = [
        first[row] // block_q + row + tile
        for row, count in enumerate(counts)
        if count >= fewest
        for tile in range(-(-count // block_q))
    ]
    next_tile, singles, first_tile, end_tile, first_row, end_row = survey.tolist()
    tiled = [row for row, count in enumerate(counts) if count >= max(1, fewest)]
    assert next_tile == 0
    assert singles == max((row + 1 for row, count in enumerate(counts) if count == 1), default=0)
    found = (first_tile, end_tile, first_row, end_row)
    none = (0, 0, 0, 0)
    assert found == ((min(tiles), max(tiles) + 1, tiled[0], tiled[-1] + 1) if tiles else none)


def test_triton_is_imported_by_cuda_tensors_only() -> None:
    """An engine on a CPU starts without importing Triton, also where it is installed."""
    code = "import sys, minisrv.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- on a GPU only -----------------------------------------------------------------------------

gpu = pytest.mark.gpu
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DIMS_AND_GROUPS = [(64, 1), (80, 2), (96, 4), (128, 7), (256, 8)]
MORE = [(64, 4), (128, 1), (128, 2), (128, 8), (256, 2)]


@gpu
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "with options"])
@pytest.mark.parametrize(
    ("head_dim", "group", "dtype"),
    [
        *((*shape, dtype) for shape in DIMS_AND_GROUPS for dtype in FLOATS),
        *((*shape, torch.bfloat16) for shape in MORE),
    ],
)
def test_models(head_dim: int, group: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Decode batches, with splits and without, and mixed batches, in the shapes of models."""
    shape = {"head_dim": head_dim, "group": group, "block_size": 16, "dtype": dtype, **options}
    check(make_case([(3999, 1), (1, 1), (800, 1)], **shape))
    check(make_case([(n % 97 + n, 1) for n in range(256)], num_kv_heads=3, **shape))
    check(make_case([(0, 300), (900, 65), (3000, 1), (17, 1), (64, 64)], pad_tokens=7, **shape))


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_through_the_dispatcher(dtype: torch.dtype) -> None:
    for padding in ({}, {"pad_tokens": 1}, {"pad_rows": 1}):
        case = make_case([(70, 1), (9, 1)], dtype=dtype, **padding)
        ran = case.copy(DEVICE)
        ran.run_op()
        assert_equal_to_reference(ran, case)


@gpu
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "with options"])
@pytest.mark.parametrize(
    ("rows", "padding"),
    [
        ([(3000, 1), (0, 1), (130, 1)], {}),
        ([(n, 1) for n in range(100)], {}),
        ([(0, 70), (500, 3), (80, 1)], {"pad_tokens": 3}),
        ([(0, 70), (500, 3), (80, 1)], {"pad_tokens": 54, "pad_rows": 61}),
        ([(900, 1), (80, 1)], {"pad_tokens": 6, "pad_rows": 6}),
    ],
    ids=["split", "not split", "mixed", "mixed with empty rows", "decodes with empty rows"],
)
def test_captured_at_one_length_replays_at_others(
    rows: list[tuple[int, int]], padding: dict[str, int], options: dict[str, Any]
) -> None:
    """A graph captured on the null block alone is right for other lengths: nothing that depends on
    a length is frozen. The host never waits for the GPU, which a capture would not allow."""
    shape = {"head_dim": 128, "block_size": 16, "dtype": torch.bfloat16, **options}
    case = make_case(rows, **shape, **padding)
    eager = run(case)
    static = case.copy(DEVICE)
    null = {"positions": 0, "slot_mapping": 0, "block_table": 0, "seq_lens": 1}
    for name, value in null.items():
        static.args[name].fill_(value)
    if padding:  # Every row is empty at the capture.
        static.args["query_start_loc"].fill_(0)
    static.run(attention)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.run(attention)
    for name, value in case.args.items():
        static.args[name].copy_(value)
    for _ in range(2):  # The partial results that the first replay left must not reach the second.
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(
            static.args["out"].view(torch.int16), eager.args["out"].view(torch.int16)
        )
        assert_equal_to_reference(static, case)


@gpu
def test_addresses_beyond_32_bits() -> None:
    """Addresses are right in a cache of more than 2^31 elements; the row lies at its end."""
    case = make_case([(40, 1)], num_kv_heads=8, head_dim=128, block_size=16, dtype=torch.bfloat16)
    small, used = case.args["kv_cache"], len(case.args["kv_cache"])
    blocks = 2**31 // small[0].numel() + used
    moved = case.copy(DEVICE)
    moved.args["kv_cache"] = torch.zeros(blocks, *small.shape[1:], dtype=small.dtype, device=DEVICE)
    moved.args["kv_cache"][-used:] = small.to(DEVICE)
    table = case.args["block_table"]
    moved.args["block_table"][table < used] += blocks - used
    moved.args["slot_mapping"] += (blocks - used) * 16
    moved.run(attention)
    moved.args["kv_cache"] = moved.args["kv_cache"][-used:]
    assert_equal_to_reference(moved, case)
