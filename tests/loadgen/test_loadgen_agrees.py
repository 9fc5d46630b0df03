"""Counts of loadgen, of minisrv's metrics and of its answers about its steps agree on one run."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from loadgen.servers import Server
from tests.checkpoints import make_checkpoint

MAIN = "import sys; from loadgen.cli import main; sys.exit(main())"


def test_metrics_provenance_and_counts_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request at a time, so that each step of the server belongs to one request. The client's
    counts of requests and tokens are those of the server's counters, and the steps that the answers
    tell are, by mode and reason, those that the server counted."""
    checkpoint = make_checkpoint(tmp_path / "model")
    command = (
        f"{sys.executable} -m minisrv.cli serve {checkpoint} --max-num-seqs 2 "
        "--max-num-batched-tokens 32 --max-model-len 64"
    )
    out, lines = tmp_path / "out.json", tmp_path / "out.jsonl"
    # NOTE: pytest's directory has too long a name for the path of minisrv's socket.
    with TemporaryDirectory(prefix="loadgen-") as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        with Server("minisrv", command, tmp_path / "log") as server:
            server.wait_ready(240)
            done = subprocess.run(
                [
                    *(sys.executable, "-c", MAIN, "run", server.url, "--concurrency", "1"),
                    *("--requests", "6", "--warmup", "2", "--token-range", "100:300"),
                    *("--input-tokens", "uniform:3:40", "--output-tokens", "uniform:2:9"),
                    *("--extra-body", '{"include_graph_steps": true}'),
                    *("--json", str(out), "--jsonl", str(lines)),
                ],
                capture_output=True,
                text=True,
                timeout=120,
                env=os.environ,
                check=False,
            )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    summary = json.loads(out.read_text())["levels"][0]["summary"]
    assert len(rows) == summary["ok"] == 6
    for figure in summary["server"]:
        if "mean" not in figure["name"]:
            assert figure["client"] == figure["server"], figure
    assert {figure["name"] for figure in summary["server"]} >= {
        *("requests", "prompt tokens", "output tokens"),
        *("TTFT mean ms", "ITL mean ms", "E2E mean ms"),
    }
    assert summary["output_tokens"] == sum(row["output_tokens"] for row in rows)
    told: Counter[str] = Counter()
    for row in rows:
        told.update(row["extra"]["graph_steps"])
    counted = {
        "{}/{}".format(*(part.split('"')[1] for part in name.split(","))): steps
        for name, steps in summary["server_counters"].items()
        if name.startswith("minisrv:graph_steps_total")
    }
    assert told == counted
