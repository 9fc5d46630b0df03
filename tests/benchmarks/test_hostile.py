"""benchmarks/hostile_checkpoints.py as a program: it runs cases and keeps their outcomes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "hostile_checkpoints.py"


def test_what_was_found_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--count", "2", "--ways", "weights", "links"]
    done = subprocess.run(
        [*command, "--json", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["cases"] == sum(report["outcomes"].values()) == 2
    assert report["faults"] == []
    assert report["environment"]["versions"].keys() >= {"minisrv", "torch"}
