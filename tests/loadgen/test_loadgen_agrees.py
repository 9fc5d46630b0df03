"""Counts of loadgen, of minisrv's metrics, of its answers about its steps and of its trace of steps
agree on one run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

import pytest

from loadgen.servers import Server
from tests.checkpoints import make_checkpoint

MAIN = "import sys; from loadgen.cli import main; sys.exit(main())"


def test_metrics_provenance_and_counts_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request at a time, so that each step of the server belongs to one request. The client's
    counts of requests and tokens are those of the server's counters, and the steps that the answers
    tell are, by mode and reason, those that the server counted, and those in the recorded trace."""
    checkpoint = make_checkpoint(tmp_path / "model")
    command = (
        f"{sys.executable} -m minisrv.cli serve {checkpoint} --max-num-seqs 2 "
        "--max-num-batched-tokens 32 --max-model-len 64"
    )
    out, lines = tmp_path / "out.json", tmp_path / "out.jsonl"
    recorded = tmp_path / "steps.ndjson"
    # NOTE: pytest's directory has too long a name for the path of minisrv's socket.
    with TemporaryDirectory(prefix="loadgen-") as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        with Server("minisrv", command, tmp_path / "log") as server:
            server.wait_ready(240)
            recording = subprocess.Popen(
                [
                    *(sys.executable, "-m", "minisrv.cli", "trace", str(recorded)),
                    *("--url", server.url, "--last", "1000"),
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
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
            last = last_step(server.url)
            while f'"id":{last},' not in (recorded.read_text() if recorded.exists() else ""):
                assert recording.poll() is None, recording.communicate()
                time.sleep(0.05)
            recording.send_signal(signal.SIGINT)
            _, said = recording.communicate(timeout=30)
            assert recording.returncode == 0, said
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
    header, *trace = map(json.loads, recorded.read_text().splitlines())
    assert header["type"] == "header"
    own = {row["extra"]["graph_stats"]["id"] for row in rows}
    assert len(own) == 6
    # The requests before the measured ones have steps too.
    steps = [
        line for line in trace if line["type"] == "step" and own & {i for i, _ in line["requests"]}
    ]
    assert Counter(f"{step['mode']}/{step['reason']}" for step in steps) == told
    for name, field in (("step_tokens", "tokens"), ("padded_tokens", "padding")):
        in_trace: Counter[str] = Counter()
        for step in steps:
            in_trace[f"{step['mode']}/{step['reason']}"] += step[field]
        in_metrics = {
            "{}/{}".format(*(part.split('"')[1] for part in key.split(","))): number
            for key, number in summary["server_counters"].items()
            if key.startswith(f"minisrv:{name}_total")
        }
        assert +in_trace == {key: number for key, number in in_metrics.items() if number}
    padding = sum(row["extra"]["graph_stats"]["padded_tokens"] for row in rows)
    assert padding == sum(step["padding"] for step in steps)
    assert sum(step["sampled"] for step in steps) == summary["output_tokens"]
    rungs: Counter[str] = Counter()
    for row in rows:
        rungs.update(row["extra"]["graph_stats"]["rungs"])
    assert rungs == Counter(f"{step['mode']}/{step['rung']}" for step in steps)
    assert f"{sum(line['type'] == 'step' for line in trace)} steps" in said


def last_step(url: str) -> int:
    """The id of the last step that the server has retired."""
    with urlopen(f"{url}/debug/steps?limit=1") as response:
        *_, last = response
    return int(json.loads(last)["id"])
