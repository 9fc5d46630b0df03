"""benchmarks/overload.py with a server of the default model, on a CPU."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from benchmarks import overload
from loadgen.records import Failure, FailureKind, RequestRecord

SERVE = shlex.join([sys.executable, "-m", "minisrv.cli", "serve", "--device", "cpu"])
SMALL = "--max-num-seqs 2 --max-num-batched-tokens 32 --max-model-len 128 --enforce-eager"


def test_every_request_ends_in_tokens_a_429_or_a_deadline(tmp_path, monkeypatch, capsys):
    out = tmp_path / "overload.json"
    monkeypatch.setattr(overload, "SETTLE_S", 0.3)
    monkeypatch.setattr(overload, "SAMPLE_S", 0.3)
    command = f"{SERVE} {SMALL} --max-waiting 8 --request-timeout 60"
    numbers = "--max-num-seqs 2 --minutes 0.03 --capacity-seconds 1.5 --output-tokens 32"
    monkeypatch.setattr("sys.argv", ["overload.py", *numbers.split(), "--json", str(out), command])
    assert overload.main() == 0

    report = json.loads(out.read_text())
    before, during, _ = report["phases"]
    assert [one["phase"] for one in report["phases"]][::2] == ["at capacity", "at capacity again"]
    assert before["ended"].keys() == {"tokens"}
    assert before["served_per_s"] > 0
    assert during["ended"]["429"] > 0, "at ten times the load most find no place"
    assert during["requests"] == sum(during["ended"].values())
    assert during["step_ms"] > 0
    assert report["memory"][0]["mib"].keys() >= {"minisrv-engine", "minisrv-api-0"}
    assert "at capacity again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (None, "tokens"),
        (Failure(FailureKind.HTTP_STATUS, "full", 429), "429"),
        (Failure(FailureKind.HTTP_STATUS, "The request has not ended within 5 s", 504), "deadline"),
        (Failure(FailureKind.ERROR_EVENT, "The request has not ended within 5 s"), "deadline"),
    ],
)
def test_how_a_request_may_end(failure, expected):
    record = RequestRecord(0, 0.0, 1.0, (), (), None, None, failure)
    assert overload.outcome(record) == expected


def test_any_other_end_is_told():
    lost = Failure(FailureKind.BROKEN_STREAM, "the stream ended before [DONE]")
    record = RequestRecord(0, 0.0, 1.0, (), (), None, None, lost)
    assert "ended before" in overload.outcome(record)
