"""`minisrv launch-cost`: what it predicts from launches and graphs, and where eager meets graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minisrv.cli import main
from minisrv.tools.bench.measure import ModeResult, SizeResult
from minisrv.tools.launch_cost import launch_points, meeting
from tests.checkpoints import make_checkpoint

LAUNCHES = 100
LAUNCH_MS = 0.02


def kernels_ms(size: int) -> float:
    """The time of the kernels of a step on an imagined device."""
    return 0.5 + 0.05 * size


def step(launches: int, ms: float) -> ModeResult:
    return ModeResult(0, launches, ms, {}, None, None, 0.0, [])


def measured(size: int, *, overlaps: bool) -> SizeResult:
    """A size measured without noise: a launch takes LAUNCH_MS of the host."""
    host_ms, device_ms = LAUNCHES * LAUNCH_MS, kernels_ms(size)
    if overlaps:
        eager, graph = max(host_ms, device_ms), device_ms
    else:
        eager, graph = host_ms + device_ms, LAUNCH_MS + device_ms
    modes = {"NONE": step(LAUNCHES, eager), "FULL": step(1, graph)}
    return SizeResult(size, (0, 0), None, modes, {})


SIZES = [1, 8, 24, 32, 64, 1000]


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_time_of_the_host_at_one_size_explains_all_others(overlaps: bool) -> None:
    points, host_ms = launch_points(
        [measured(size, overlaps=overlaps) for size in SIZES], overlaps=overlaps
    )
    assert host_ms == pytest.approx((LAUNCHES - (not overlaps)) * LAUNCH_MS)
    for point in points:
        assert point.predicted_ms == pytest.approx(point.eager_ms)
        assert (point.launches, point.graph) == (LAUNCHES, "FULL")


@pytest.mark.parametrize(
    ("overlaps", "sizes", "where"),
    [
        (True, SIZES, "between 24 and 32"),  # 2 ms of launches are 1.1 times the kernels of 26
        (True, [1, 24], "above 24"),
        (True, [64, 1000], "at 64 or fewer"),
        (False, SIZES, "between 64 and 1000"),  # launches add 10% to the step of 386 requests
    ],
)
def test_where_eager_steps_meet_graphs(overlaps: bool, sizes: list[int], where: str) -> None:
    points, _ = launch_points(
        [measured(size, overlaps=overlaps) for size in sizes], overlaps=overlaps
    )
    for predicted in (False, True):
        assert meeting(points, predicted=predicted) == where


def test_a_size_without_a_graph_is_left_out() -> None:
    size = SizeResult(1, (0, 0), None, {"NONE": step(LAUNCHES, 1.0)}, {})
    assert launch_points([size], overlaps=True) == ([], 0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=2))


def run(checkpoint: str, *flags: str) -> int:
    limits = ("--device", "cpu", "--max-num-seqs", "4", "--max-num-batched-tokens", "24")
    return main(["launch-cost", checkpoint, *limits, "--context", "40", "--rounds", "1", *flags])


def test_the_command(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "launches.json", tmp_path / "launches.svg"
    flags = ("--simulate-launch-us", "200", "--json", str(out), "--plot", str(plot))
    assert run(checkpoint, *flags) == 0
    report = json.loads(out.read_text())
    assert not report["overlaps"]
    assert [point["size"] for point in report["decode"]] == [1, 2, 4]
    assert [(point["size"], point["graph"]) for point in report["prefill"]] == [(24, "PIECEWISE")]
    first = report["decode"][0]
    assert first["predicted_ms"] == pytest.approx(first["eager_ms"], abs=1e-4)
    saved_us = 1000 * (first["eager_ms"] - first["graph_ms"])
    assert report["launch_us"] == pytest.approx(saved_us / first["launches"], abs=0.1)
    shown = capsys.readouterr().out
    assert "SIMULATED: every launch takes 200 us longer" in shown
    assert f"{first['launches']} launches of a decode step with 1 request." in shown
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--enforce-eager"], "leave out --enforce-eager"),
        (["--compilation-mode", "3"], "the model's own code"),
        (["--plot", "launches.txt"], "ends in one of"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    checkpoint: str, flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, *flags) == 1
    assert error in capsys.readouterr().err
