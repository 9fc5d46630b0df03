"""The programs in benchmarks/ that look at kernels: without a GPU the parts that need none, with a
GPU the rest too."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import step_kernels, tiles
from benchmarks.layers import DecodeSteps
from benchmarks.prompt_attention import Step
from benchmarks.tiles import Product, candidates
from minisrv import kernels
from minisrv.checkpoint import describe_model
from minisrv.kernels.tiles import GemvTile, SlicedTile, TallTile, tile
from minisrv.tools import plan

ROOT = Path(__file__).parents[2]
QWEN = ROOT / "benchmarks/configs/qwen3-0.6b"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def test_a_kernel_takes_from_the_end_before_it_to_its_own() -> None:
    """A kernel's time goes from the end of the one before it to its own end, also if it begins
    before that; the kernels of a step that did not finish are left out."""
    events = [
        {
            "cat": "kernel",
            "name": name,
            "ts": begin,
            "dur": end - begin,
            "args": {"grid": [1, 1, 1]},
        }
        for name, begin, end in [
            *(("_scatter", 0, 5), ("_gather", 4, 7), ("_gemv", 5, 11), ("_gather", 12, 15)),
            *(("_gemv", 13, 18), ("_decode", 14, 22), ("_gather", 22, 24), ("_gemv", 23, 30)),
        ]
    ]
    trace = {"traceEvents": [*events, {"cat": "gpu_memcpy", "name": "x", "ts": 0, "dur": 99}]}
    first, second = step_kernels.steps_of(step_kernels.kernels_of(trace))
    assert [(kernel["name"], kernel["us"]) for kernel in first] == [("_gemv", 4)]
    assert [(kernel["name"], kernel["us"]) for kernel in second] == [("_gemv", 3), ("_decode", 4)]


def products_of(directory: Path) -> list[Product]:
    """Return the products of a layer and the output projection, of which the first is normed, the
    gated one too, and the others are not."""
    model = describe_model(directory).model
    return [Product(*p[1:], normed=p.name in ("qkv", "gate_up")) for p in plan.products(model)]


@pytest.mark.parametrize(
    ("rows", "kinds"), [(1, {GemvTile}), (8, {SlicedTile, TallTile, NoneType})]
)
def test_every_product_has_candidates(rows: int, kinds: set[type]) -> None:
    for product in products_of(QWEN):
        found = list(candidates(rows, product))
        assert len(found) > 10
        assert len(set(found)) == len(found)
        assert {type(tile) for tile in found} == kinds


class FakeStep(NamedTuple):
    """Stands for a step that takes `us` microseconds."""

    us: float

    def median_us(self) -> float:
        return self.us


class FakeSteps:
    """Stands for steps that take as long as their tiles have outputs, so that the best tile is the
    one with the fewest."""

    def __init__(self, directory: Path, batches: list[int]) -> None:
        self.products = products_of(directory)

    def capture(self, rows: int, context: int) -> FakeStep:
        of, total = kernels.tiles.tile, 0
        for p in self.products:
            # As in a step, where it is asked whether there is a tile before it is known which.
            assert of(rows, p.n, p.k, 2, gated=p.gated, add=p.add) is not None or rows > 1
            tile = of(rows, p.n, p.k, 2, gated=p.gated, add=p.add, normed=p.normed)
            total += 999 if tile is None else tile.outputs
        return FakeStep(total)


def test_the_products_of_a_step_are_found() -> None:
    steps = FakeSteps(QWEN, [1])
    assert tiles.products(steps, 1) == steps.products
    assert kernels.tiles.tile is tile, "put back"


def test_a_step_is_captured() -> None:
    """The graph computes the step of its batch and context, again and again, on any device."""
    steps = DecodeSteps(ROOT / "models/minisrv-default", [1, 2])
    step = steps.capture(2, 40)
    buffers = steps.runner.buffers

    def state() -> list[list[int]]:
        found = buffers.hidden.view(torch.int16), buffers.seq_lens, buffers.sampled_token_ids
        return [tensor[:2].tolist() for tensor in found]

    first = state()
    assert first[1] == [40, 40]
    step.replay()
    assert state()[1] == [41, 41], "the token behind it"
    step.restart()
    step.replay()
    assert state() == first


@pytest.mark.gpu
def test_the_step_of_a_gpu_has_products_and_a_time() -> None:
    steps = DecodeSteps(ROOT / "models/minisrv-default", [1, 8])
    for rows in (1, 8):
        found = tiles.products(steps, rows)
        assert [p[:4] for p in found] == [
            p[:4] for p in products_of(ROOT / "models/minisrv-default")
        ]
        assert [p.normed for p in found if not p.add] == [True, True, False]
        assert 1 < steps.capture(rows, 40).median_us() < 1e5


def test_the_sweep_finds_the_tiles_of_the_shortest_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiles.json"
    monkeypatch.setattr(tiles.torch.cuda, "is_available", lambda: True)
    # The real function would ask the GPU for its name.
    monkeypatch.setattr(tiles, "environment", dict)
    monkeypatch.setattr(tiles, "DecodeSteps", FakeSteps)
    monkeypatch.setattr(tiles, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(2))
    monkeypatch.setattr(tiles, "compiled", lambda job: job[2] is None or job[2].outputs > 1)
    monkeypatch.setattr("sys.argv", ["tiles.py", str(QWEN), "--rows", "1,8", "--json", str(out)])
    tiles.main()
    assert kernels.tiles.tile is tile, "put back"
    one, eight = json.loads(out.read_text())["results"]
    assert one["own_us"] == 8 + 4 + 4 + 8 + 8
    assert one["best_us"] == 5 * 2, "those with one do not compile"
    assert eight["own_us"] == 64 + 16 + 32 + 16 + 64
    assert eight["best_us"] == 5 * 16
    assert "(1, 1024, 3072, False, True): GemvTile(outputs=2," in capsys.readouterr().out


def test_a_step_of_prompts() -> None:
    model = describe_model(QWEN).model
    assert Step.parse("4x2048") == (4, 2048, 0, 0, 0)
    assert Step.parse("1x512+70@8x900") == (1, 512, 70, 8, 900)
    step = Step.parse("2x3+5")
    assert step == (2, 3, 5, 0, 0)
    seen = 2 * (6 + 7 + 8)
    assert step.flops(model) == 4 * seen * model.num_heads * model.head_dim
    assert step.flops(model, masked=False) == 4 * 2 * 3 * 8 * model.num_heads * model.head_dim


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="it compares kernels for Hopper")
def test_prompt_attention_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.prompt_attention",
        QWEN,
        "--steps",
        "1x64,2x8+70,1x8+9@2x300",
    ]
    subprocess.run([*command, "--json", str(out)], cwd=ROOT, check=True, timeout=250)
    assert [one["step"]["rows"] for one in json.loads(out.read_text())["results"]] == [1, 2, 1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("step_kernels", "--batch 2 --context 40 --engine-flags"),
        ("attention_bandwidth", "--batch 1,4 --context 64"),
    ],
)
def test_on_a_gpu(program: str, arguments: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", f"benchmarks.{program}", str(QWEN), *arguments.split()]
    if program == "step_kernels":
        flags = "--load-format dummy --max-num-seqs 2 --max-model-len 256 --kv-cache-memory 200M"
        command.append(flags)
    subprocess.run([*command, "--json", str(out)], cwd=ROOT, check=True, timeout=250)
    report = json.loads(out.read_text())
    if program == "step_kernels":
        [batch] = report["batches"]
        assert batch["launches"] > 28 * 5
        assert {"sliced", "_decode"} <= {kernel["name"] for kernel in batch["kernels"]}
    else:
        assert [one["batch"] for one in report["results"]] == [1, 4]
