"""`minisrv ladder`, and the answers of `minisrv plan --batch`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from minisrv.cli import main
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.graph_times import StepTime
from minisrv.core.ladder import build_ladders
from minisrv.engine.messages import BatchCount, EngineStats, LadderReport
from minisrv.errors import ConfigError
from minisrv.metrics import Metrics
from minisrv.modes import CUDAGraphMode
from minisrv.tools.batch_answers import Batch, answer
from minisrv.tools.batch_sources import read_server, read_trace
from tests.checkpoints import make_checkpoint

LIMITS = ["--max-num-seqs", "12", "--max-num-batched-tokens", "64"]
HEADER: dict[str, Any] = {
    "type": "header",
    "version": 1,
    "mode": "full-and-piecewise",
    "device": "cpu",
    "max_num_seqs": 12,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
    "ladders": {"decode": [1, 8, 12], "mixed": [1, 8, 32, 64], "epilogue": [1, 8, 12]},
}


def step(rows: int, prefill: int, rung: int, ms: float) -> dict[str, Any]:
    """A step of a trace; the readers ignore what they do not know."""
    kind = {"mode": "PIECEWISE" if prefill else "FULL", "rung": rung, "unknown": 1}
    sizes = {"rows": rows, "tokens": rows + prefill - (prefill > 0), "prefill_tokens": prefill}
    return {"type": "step", **kind, **sizes, "context": 9 * rows, "measured_ms": ms}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """100 steps with 9 requests that run as 12 in 1.2 ms, and some with prompts, which take a
    millisecond for each token of their size."""
    steps = [step(9, 0, 12, 1.2)] * 100 + [step(1, 0, 1, 0.1)] * 5
    steps += [step(1, 40, 64, 64.0)] * 10 + [step(1, 8, 8, 8.0)]
    return write(tmp_path / "trace.ndjson", [HEADER, {"type": "event"}, *steps])


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_a_trace_is_fitted(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the times of its steps, within the limits of its server."""
    file, plot = tmp_path / "ladder.json", tmp_path / "ladder.png"
    files = ["--json", str(file), "--plot", str(plot)]
    said = run(capsys, "ladder", "--trace", str(trace), "--num-graphs", "17", *files)
    assert f"Batches 116 steps recorded in {trace}." in said
    flag = said.strip().splitlines()[-1]
    assert re.fullmatch(r"--cudagraph-capture-sizes [\d ]+", flag)
    report = json.loads(file.read_text())
    sizes = list(map(int, flag.split()[1:]))
    assert report["fitted"]["sizes"] == sizes
    assert {9, 12, 40, 64} <= set(sizes)
    assert (report["now"]["graphs"], report["fitted"]["graphs"]) == (16, 17)
    assert report["unit"] == "ms"
    assert report["now"]["cost"] == pytest.approx(100 * 1.2 + 5 * 0.1 + 640 + 8, rel=0.01)
    assert report["fitted"]["cost"] == pytest.approx(100 * 0.9 + 5 * 0.2 + 400 + 9, rel=0.02)
    assert report["now"]["padding"] == pytest.approx((300 + 240) / (1200 + 5 + 640 + 8))
    assert plot.stat().st_size > 10_000
    assert "fitted" in said
    assert "now" in said
    # The flag can be given to the command, which then has nothing better to say.
    again = run(capsys, "ladder", "--trace", str(trace), *flag.split())
    assert again.strip().splitlines()[-1] == flag
    assert "saves 0.0% of the time of these steps" in again


def test_flags_ask_what_other_limits_would_change(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "ladder", "--trace", str(trace), "--max-num-seqs", "20")
    assert " 20 " in said.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["uniform", "streams:9"])
def test_assumed_batches_are_told(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "ladder", *LIMITS, "--assume", kind, "--num-sizes", "6")
    assert said.startswith("Batches assumed: ")
    assert len(said.strip().splitlines()[-1].split()) == 7


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--num-sizes", "2"], "no ladder of 2 sizes holds every batch"),
        (["--assume", "streams:13"], "--assume 'streams:13' is not allowed"),
        (["--assume", "bursts"], "--assume 'bursts' is not allowed"),
        (["--enforce-eager"], "there is no ladder"),
        (["--num-sizes", "2", "--num-graphs", "9"], "exclude each other"),
        (["--graph-memory", "9M"], "needs the memory of graphs"),
        (["--json", "/none/a.json"], "there is no directory /none"),
        (["--plot", "a.nope"], "a plot's name ends in one of"),
        (["--trace", "t", "--url", "u"], "give one"),
        (["--trace", "/none"], "--trace /none cannot be read"),
        (
            ["--url", "http://127.0.0.1:9"],
            "http://127.0.0.1:9/metrics?names=minisrv cannot be read",
        ),
        (["--batch", "13"], "no step has more than --max-num-seqs 12"),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ladder", *LIMITS, *arguments]) == 1
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([], "no header of version 1"),
        ([HEADER | {"version": 2}], "no header of version 1"),
        ([HEADER], "has no steps"),
        ([HEADER, {"type": "step"}], "line 2 is no line of a step trace"),
        ([step(1, 0, 1, 1.0)], "no header"),
        ([HEADER, step(1, 0, 1, 1.0) | {"mode": "ELSE"}], "line 2 is no line"),
        ([HEADER, step(1, 0, 1, 1.0) | {"rows": "1"}], "line 2 is no line"),
        ([HEADER, step(1, 0, 1, 1.0) | {"rung": 0}], "line 2 is no line"),
        ([HEADER, step(1, 0, 1, 1e300)], "line 2 is no line"),
        ([HEADER | {"ladders": {"decode": 5}}], "line 1 is no line"),
        ([HEADER | {"mode": "else"}], "line 1 is no line"),
        ([{"type": "header"}], "line 1 is no line"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(
    lines: list[dict[str, Any]], what: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(what)):
        read_trace(write(tmp_path / "trace", lines))


def test_the_ladders_are_those_after_the_last_refit(tmp_path: Path) -> None:
    ladders = {"decode": [3, 12], "mixed": [3, 64], "epilogue": [3, 12]}
    lines = [step(9, 0, 12, 1.2), {"type": "event", "event": "refit", "ladders": ladders}]
    lines.append({"type": "event", "event": "sleep"})
    found = read_trace(write(tmp_path / "trace", [HEADER, *lines])).ladders
    assert found is not None
    assert (found.decode, found.mixed, found.epilogues) == ((3, 12), (3, 64), (3, 12))


def test_a_line_of_brackets_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text('{"type": "header", "deep": ' + "[" * 100_000)
    with pytest.raises(ConfigError, match="line 1 is no line of a step trace"):
        read_trace(path)


@pytest.fixture
def served() -> Iterator[str]:
    """The URL of a server whose metrics show batches and a ladder."""
    ladder = LadderReport(8, 8, (1, 8, 12), (1, 8, 32, 64), (1, 8, 12))
    batches = [BatchCount("decode", 9, 100), BatchCount("mixed", 40, 3)]
    stats = EngineStats(batches=batches, ladder=ladder)
    text = Metrics().render(stats, None, "ready", ["ready"])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = (self.path, self.headers["Authorization"])
            is_known = asked == ("/metrics?names=minisrv", "Bearer key")
            self.send_response(200 if is_known else 401)
            self.end_headers()
            self.wfile.write(text if is_known else b"")

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_counts_of_a_server_are_fitted(
    served: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = read_server(served + "/v1", "key")
    assert (source.batches.decode, source.batches.mixed) == ({9: 100}, {40: 3})
    ladders = source.ladders
    assert ladders is not None
    assert (ladders.decode, ladders.mixed) == ((1, 8, 12), (1, 8, 32, 64))
    assert ladders.mode is CUDAGraphMode.FULL_AND_PIECEWISE
    with pytest.raises(ConfigError, match="401"):
        read_server(served, None)
    monkeypatch.setenv("MINISRV_API_KEY", "key")
    said = run(capsys, "ladder", "--url", served, "--num-graphs", "17")
    assert f"Batches 103 steps counted by {served}." in said
    assert " 9 12 " in said.strip().splitlines()[-1]
    assert "saves" in said


def test_measured_graphs_tell_what_steps_and_starts_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = make_checkpoint(tmp_path / "model"), tmp_path / "ladder.json"
    limits = ["--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--max-model-len", "64"]
    arguments = ["ladder", str(model), *limits, "--measure", "--json", str(file)]
    said = run(capsys, *arguments, "--graph-memory", "100M")
    assert "start s" in said
    report = json.loads(file.read_text())
    assert report["unit"] == "ms"
    assert report["environment"]["versions"]
    assert report["fitted"]["graphs"] * 2 <= 100
    assert all(use["cost"] > 0 for use in report["use_now"])


# ---- answers -------------------------------------------------------------------------------------

LADDERS = build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, 64, 512)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "33",
            "33 runs by a FULL graph of 40 requests, 7 of them padding (pure_decode: every request "
            "decodes, and a FULL graph holds so many; the size below is 32).",
        ),
        (
            "mixed:100+8",
            "mixed:100+8 runs by a PIECEWISE graph of 128 tokens, 20 of them padding (has_prefill: "
            "some request reads its prompt, and a graph holds so many tokens; the size below is "
            "96), then an epilogue by a FULL graph of 16 requests.",
        ),
        (
            "decode:1:grammar",
            "decode:1:grammar runs by a FULL graph of 1 request, 0 of them padding (pure_decode: "
            "every request decodes, and a FULL graph holds so many; 1 is the smallest size), then "
            "an epilogue by a FULL graph of 1 request.",
        ),
    ],
)
def test_a_batch_is_answered_in_one_line(text: str, said: str) -> None:
    assert answer(Batch.parse(text), Dispatcher(LADDERS)) == said


def test_an_answer_has_the_measured_time() -> None:
    times = {key: StepTime(1.0, 1.5) for key in LADDERS.keys()}  # noqa: SIM118  (no mapping)
    said = answer(Batch.parse("decode:64:logprobs"), Dispatcher(LADDERS), times)
    assert said.endswith("; 1.500 ms.")


def test_a_batch_without_a_graph_is_answered_too() -> None:
    ladders = build_ladders(CUDAGraphMode.FULL_DECODE_ONLY, 4, 64)
    assert answer(Batch.parse("mixed:9"), Dispatcher(ladders)) == (
        "mixed:9 runs eagerly, without padding (no_mixed_graph: some request reads its prompt, and "
        "the mode has no graphs for that), then an epilogue by a FULL graph of 1 request."
    )


@pytest.mark.parametrize("text", ["", "x", "decode:", "0", "mixed:0+3", "mixed:5:what", "9" * 9])
def test_what_is_no_batch_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--batch .*; write decode:|has at least one request"):
        Batch.parse(text)


@pytest.mark.parametrize("command", ["plan", "ladder"])
def test_both_commands_answer_the_same_and_nothing_else(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, command, *LIMITS, "--batch", "decode:9", "--batch", "mixed:33+2")
    first, second = said.splitlines()
    assert first.startswith("decode:9 runs by a FULL graph of 12 requests, 3 of them padding")
    assert second.startswith("mixed:33+2 runs by a PIECEWISE graph of 48 tokens, 13 of them")
