"""benchmarks/soak.py with a server of the default model, on a CPU; how it reads streams and judges
answers and memory."""

from __future__ import annotations

import json
import os
import shlex
import sys

import pytest

from benchmarks import soak
from benchmarks.memory import processes
from benchmarks.questions import Answer, Questions, parse

SERVE = shlex.join([sys.executable, "-m", "minisrv.cli", "serve", "--device", "cpu"])
SMALL = "--max-num-seqs 4 --max-num-batched-tokens 32 --num-kv-blocks 72 --max-model-len 1024"


def test_answers_are_compared_and_the_server_is_sampled_at_rest(tmp_path, monkeypatch, capsys):
    out = tmp_path / "soak.json"
    monkeypatch.setattr(soak, "SETTLE_S", 0.1)
    monkeypatch.setattr(soak, "FRESH_EVERY_S", 0.5)
    load = "--minutes 0.04 --rest-every 0.02 --concurrency 6 --questions 12 --step-tokens 1"
    command = f"{SERVE} {SMALL} --dtype float32 --enforce-eager"
    # The verdict is not asserted, because memory grows in the first seconds.
    soak.main([*load.split(), "--json", str(out), command])

    report = json.loads(out.read_text())
    assert report["errors"] == {}
    assert report["finished"]
    assert report["counts"].get("differing", 0) == 0
    for name in ("compared", "streamed", "disconnects", "fresh_grammars", "fresh_compared"):
        assert report["counts"][name] > 0
    assert report["memory"].keys() >= {"minisrv-engine", "minisrv-api-0"}
    for sample in report["samples"]:
        assert {sample["metrics"][name] for name in ("running", "waiting", "kv_cache_usage")} == {0}
        assert sample["processes"]["minisrv-engine"]["own_mib"] > 10
    assert "minisrv-engine" in capsys.readouterr().out


def chunks(*events: object) -> bytes:
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + (
        b"data: [DONE]\n\n"
    )


USAGE = {"prompt_tokens": 1, "completion_tokens": 2}


def test_a_stream_says_what_the_whole_answer_does() -> None:
    whole = {
        "text": "ab", "token_ids": [1, 2], "finish_reason": "stop", "index": 0,
        "logprobs": {"token_logprobs": [-1.0, -2.0], "top_logprobs": [{"a": -1.0}, {"b": -0.5}]},
    }  # fmt: skip
    parts = [
        {
            "index": 0, "text": text, "token_ids": [token], "finish_reason": reason,
            "logprobs": {"token_logprobs": [value], "top_logprobs": [{text: top}]},
        }
        for text, token, reason, value, top in (("a", 1, None, -1, -1), ("b", 2, "stop", -2, -0.5))
    ]  # fmt: skip
    events = [{"choices": [part]} for part in parts]
    streamed = parse(chunks(*events, {"choices": [], "usage": USAGE}), stream=True)
    answer = parse(json.dumps({"choices": [whole], "usage": USAGE}).encode(), stream=False)
    assert streamed.same_as(answer)
    assert answer.logprobs == [-1.0, -2.0, -1.0, -0.5]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'data: {"choices": []}\n\n',
        chunks({"error": {"message": "no"}}),
        chunks({"choices": [{"index": 0, "text": "a"}]}),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match="without its end|error event"):
        parse(text, stream=True)


def test_only_the_last_bits_of_a_log_probability_may_differ() -> None:
    answer = Answer([["a"]], [-1.0, -2.0])
    assert answer.same_as(Answer([["a"]], [-1.0002, -2.0]))
    for other in (Answer([["b"]], [-1.0, -2.0]), Answer([["a"]], [-1.1, -2]), Answer([["a"]], [])):
        assert not answer.same_as(other)


def test_a_seed_draws_the_same_questions() -> None:
    one, other = Questions(3), Questions(3)
    assert [one.draw() for _ in range(50)] == [other.draw() for _ in range(50)]


def sample(minutes: float, mib: float) -> dict[str, object]:
    sizes = {"own_mib": mib, "rss_mib": mib, "files": 3, "threads": 1}
    return {"minutes": minutes, "processes": {"engine": sizes}, "gpu_mib": [mib]}


@pytest.mark.parametrize(("last", "flat"), [(100.9, True), (101.1, False), (90, True)])
def test_flat_is_within_one_per_cent_behind_the_first_quarter(last: float, flat: bool) -> None:
    sizes = [50, 80, 100, 100, 100, 104, last, last, last]
    found = soak.growth([sample(10.0 * i, mib) for i, mib in enumerate(sizes)], 80)
    assert [one["flat"] for one in found.values()] == [flat, flat]
    assert found["engine"]["first_mib"] == 100


def test_processes_are_those_of_the_tree() -> None:
    [(name, sizes), *_] = processes(os.getpid()).items()
    assert name
    assert sizes["own_mib"] > 1
    assert sizes["files"] > 0
