"""benchmarks/http_plot.py on what `loadgen run` writes."""

from __future__ import annotations

import json
import sys

from benchmarks import http_plot


def level(concurrency: int) -> dict[str, object]:
    times = {"p50": 2.0, "p99": 3.0}
    found = {"concurrency": concurrency, "output_tokens_per_s": 500.0}
    return {"summary": {**found, "itl_ms": times, "ttft_ms": times}}


def test_files_of_a_label_are_one_line(tmp_path, monkeypatch):
    for name, sizes in (("a", [64, 256]), ("b", [1])):
        report = {"levels": [level(size) for size in sizes]}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    files = f"{tmp_path}/a.json,{tmp_path}/b.json"
    assert [found["concurrency"] for found in http_plot.levels(files)] == [1, 64, 256]
    plot = tmp_path / "plot.svg"
    monkeypatch.setattr(sys, "argv", ["http_plot.py", f"ours={files}", "--plot", str(plot)])
    http_plot.main()
    assert "ours p99" in plot.read_text()
