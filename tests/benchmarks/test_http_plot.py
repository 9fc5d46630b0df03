"""benchmarks/http_plot.py on the reports that `loadgen run` writes."""

from __future__ import annotations

import json
import sys

from benchmarks import http_plot


def level(concurrency: int) -> dict[str, object]:
    times = {"p50": 2.0, "p99": 3.0}
    found = {"concurrency": concurrency, "output_tokens_per_s": 500.0}
    return {"summary": {**found, "itl_ms": times, "ttft_ms": times}}


def test_files_of_a_label_are_one_line(tmp_path, monkeypatch):
    simulated = "simulated launches (40 us)"
    for name, sizes, note in (("a", [64, 256], {}), ("b", [1], {"simulated": simulated})):
        report = {**note, "levels": [level(size) for size in sizes]}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    plain, slow = (tmp_path / f"{name}.json" for name in "ab")
    label, found = http_plot.labelled(f"ours={plain},{slow}")
    assert [summary["concurrency"] for summary in found] == [1, 64, 256]
    assert label == f"ours, {simulated}"
    plot = tmp_path / "plot.svg"
    runs = [f"ours={plain}", f"theirs={slow}"]
    monkeypatch.setattr(sys, "argv", ["http_plot.py", *runs, "--plot", str(plot)])
    http_plot.main()
    text = plot.read_text()
    assert "ours p99" in text
    assert f"theirs, {simulated} p99" in text
