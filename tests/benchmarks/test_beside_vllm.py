"""benchmarks/beside_vllm.py, on recorded results of `minisrv bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import beside_vllm

RESULTS = Path(__file__).parents[2] / "docs" / "results"
GPU = RESULTS / "2026-11-25-on-a-gpu" / "bench-{}.json"
CPU = RESULTS / "2026-11-24-exact-on-cpu" / "bench-default.json"


def run(monkeypatch, capsys, bench: Path, *arguments: str) -> tuple[str, list[list[str]]]:
    """Run the program; return everything that it printed, and the cells of the table."""
    monkeypatch.setattr("sys.argv", ["beside_vllm.py", str(bench), *arguments])
    beside_vllm.main()
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return text, [line.strip("| ").split(" | ") for line in lines]


@pytest.mark.parametrize("model", ["qwen3-0.6b", "llama-3.2-1b"])
def test_a_row_for_each_batch(monkeypatch, capsys, tmp_path, model):
    bench, plot = Path(str(GPU).format(model)), tmp_path / "plot.svg"
    text, [headings, _, *rows] = run(
        monkeypatch, capsys, bench, "--model", model, "--plot", str(plot)
    )
    decode = json.loads(bench.read_text())["decode"]
    assert "H100" in text.splitlines()[0]
    assert len(headings) == 9
    assert [row[0] for row in rows] == [str(size["size"]) for size in decode]
    steps = beside_vllm.vllm_steps(model)
    for row, size in zip(rows, decode, strict=True):
        full, eager = size["modes"]["FULL"], size["modes"]["NONE"]
        theirs = steps.get(size["size"])
        assert row[1:3] == [f"{full['gpu_ms']:.2f}", f"{full['ms']:.2f}"]
        if theirs is None:
            assert row[3:5] == ["-", "-"]
        else:
            assert row[3:5] == [f"{theirs:.2f}", f"{theirs / full['ms']:.2f}"]
        assert row[6:8] == [f"{eager['ms']:.2f}", str(eager["launches"])]
        assert row[8] == f"{size['floor_ms'] / full['gpu_ms']:.0%}"
    assert "<svg" in plot.read_text()


def test_a_bench_on_a_cpu_has_no_gpu_times(monkeypatch, capsys):
    text, [_, _, *rows] = run(monkeypatch, capsys, CPU, "--model", "qwen3-0.6b")
    assert text.startswith("minisrv: default model")
    for row in rows:
        assert (row[1], row[8]) == ("-", "-")
        assert float(row[2]) > 0


def test_simulated_times_are_called_so(monkeypatch, capsys, tmp_path):
    report = json.loads(CPU.read_text())
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({**report, "simulated_launch_us": 5.0}))
    text, _ = run(monkeypatch, capsys, bench, "--model", "qwen3-0.6b")
    assert "SIMULATED" in text.splitlines()[0]
