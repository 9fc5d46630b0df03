"""The command as a user runs it: a subprocess against a scripted server."""

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loadgen
from loadgen.cli import normalize_url
from loadgen.errors import ConfigError
from loadgen.report import MAX_RAW_ROWS
from tests.loadgen.scripted_server import (
    DONE,
    ScriptedServer,
    Status,
    Step,
    Wait,
    answer,
    chunk,
    event,
    honest,
    usage,
)
from tests.traps import install_command, set_traps

COMMAND = [sys.executable, "-c", "import sys; from loadgen.cli import main; sys.exit(main())"]


def environment(**more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return {**plain, "COLUMNS": "160", **more}


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "run", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**env),
        check=False,
    )


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_nothing_of_the_working_directory_is_imported(tmp_path: Path) -> None:
    """Nothing of the working directory is imported, neither by the command, nor by its client
    processes, nor by what Python starts beside them."""
    here, script = tmp_path / "here", install_command(tmp_path / "bin", "loadgen")
    here.mkdir()
    traps = set_traps(here)
    few = ("--concurrency", "2", "--requests", "4", "--warmup", "0", "--processes", "2")
    root = str(Path(loadgen.__file__).parents[1])
    with ScriptedServer() as server:
        done = subprocess.run(
            [sys.executable, script, "run", server.url, *few],
            cwd=here,
            env=environment(PYTHONPATH=root),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert traps.sprung() == set()


def test_two_levels_two_processes_and_the_json(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with ScriptedServer() as server:
        done = run(
            server.url,
            *("--concurrency", "1,3", "4", "--requests", "10", "--warmup", "2"),
            *("--output-tokens", "5", "--input-tokens", "6", "--processes", "2"),
            *("--label", "[a label]", "--api-key", "sk-hidden", "--json", str(out)),
        )
        assert done.returncode == 0, done.stderr
        assert len(server.bodies) == 3 * (10 + 2)
        assert len({json.dumps(body) for body in server.bodies}) == 36
        assert server.keys == {"Bearer sk-hidden"}
        assert all(len(body["prompt"]) == 6 for body in server.bodies)
        assert all(100 <= min(b["prompt"]) <= max(b["prompt"]) < 1000 for b in server.bodies)
    assert done.stderr == ""  # Without a terminal there is no progress bar.
    for word in ("[a label]", "TTFT", "ITL", "TPOT", "closed loop", "coordinated omission"):
        assert word in done.stdout
    text = out.read_text()
    assert "sk-hidden" not in text
    report = json.loads(text)
    assert report["complete"] is True
    assert report["config"]["model"] == "m"
    assert report["config"]["base_url"] == server.url + "/v1"
    assert report["environment"]["python"]
    assert set(report["formulas"]) >= {"TTFT", "ITL", "TPOT", "E2E", "window"}
    summaries = [level["summary"] for level in report["levels"]]
    assert [summary["concurrency"] for summary in summaries] == [1, 3, 4]
    assert [len(summary["clients"]) for summary in summaries] == [1, 2, 2]
    for level in report["levels"]:
        summary = level["summary"]
        assert (summary["ok"], summary["failed"], summary["stopped_by"]) == (10, 0, "requests")
        assert summary["output_tokens"] == 50
        assert summary["chunks"] == 50
        assert summary["itl_ms"]["count"] == 40
        assert {"streams", "cpu_share", "lag_p99_s", "lag_max_s"} <= set(summary["clients"][0])
        assert summary["ttft_ms"]["min"] <= summary["ttft_ms"]["p50"] <= summary["e2e_ms"]["p50"]
        rows = [dict(zip(report["raw_fields"], row, strict=True)) for row in level["raw"]["rows"]]
        assert sorted(row["index"] for row in rows) == list(range(10))
        assert {row["failure"] for row in rows} == {None}


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-"])
def test_a_stderr_that_is_closed_ends_nothing(closed: str) -> None:
    """A run goes on without a stderr, and no connection gets its file descriptor, to which messages
    would then be written."""
    few = ("--concurrency", "2", "--requests", "4", "--warmup", "0", "--processes", "1")
    with ScriptedServer() as server:
        command = shlex.join([*COMMAND, "run", server.url, *few])
        done = subprocess.run(
            ["sh", "-c", f"{command} {closed}"],
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            env=environment(),
            check=False,
        )
    assert done.returncode == 0, done.stdout
    assert "TTFT" in done.stdout


def test_that_many_requests_are_really_in_flight(tmp_path: Path) -> None:
    """Each answer waits until 120 requests are there: with a limit on connections, or with streams
    lost in the split over processes, all would time out."""
    gate = Wait(120)
    out = tmp_path / "out.json"
    with ScriptedServer(lambda number, body: [chunk("a"), gate, *answer(1)[1:]]) as server:
        done = run(
            server.url,
            *("--concurrency", "120", "--requests", "120", "--warmup", "0", "--timeout", "30"),
            *("--output-tokens", "1", "--json", str(out)),
        )
    assert done.returncode == 0, done.stdout
    assert load(out)["levels"][0]["summary"]["ok"] == 120


def test_lanes_split_over_processes_are_all_there(tmp_path: Path) -> None:
    gate = Wait(7)
    with ScriptedServer(lambda number, body: [gate, *honest(number, body)]) as server:
        done = run(
            server.url,
            *("--concurrency", "7", "--requests", "7", "--warmup", "0", "--processes", "3"),
            *("--timeout", "30"),
        )
    assert done.returncode == 0, done.stdout


def test_a_run_repeated_does_not_measure_the_prefix_cache() -> None:
    """Each run draws another seed, so a repeated run measures no cached prompts, and the report
    says how to send the same prompts again."""
    seen: set[str] = set()

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        cached = len(body["prompt"]) if json.dumps(body["prompt"]) in seen else 0
        seen.add(json.dumps(body["prompt"]))
        return [*answer(64)[:-2], usage(64, prompt=len(body["prompt"]), cached=cached), DONE]

    options = ("--concurrency", "1", "--requests", "3", "--warmup", "0")
    with ScriptedServer(script) as server:
        runs = [run(server.url, *options) for _ in range(2)]
        [seed] = re.findall(r"seed (\d+)$", runs[0].stdout, re.MULTILINE)
        repeated = run(server.url, *options, "--seed", seed)
        bodies = server.bodies
    for done in runs:
        assert done.returncode == 0, done.stderr
        assert "prefix cache and not computed" not in done.stdout
        assert re.findall(r" (\d+%) *$", done.stdout, re.MULTILINE) == ["0%"]
    assert len(seen) == 6
    assert bodies[6:] == bodies[:3]
    assert "384 of 384 prompt tokens were in the server's prefix cache" in repeated.stdout
    assert re.findall(r" (\d+%) *$", repeated.stdout, re.MULTILINE) == ["100%"]


def test_simulated_figures_are_labelled_in_all_that_is_shown_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with ScriptedServer() as server:
        server.metrics = "minisrv:simulated_launch_us 11.5\n"
        done = run(
            server.url,
            *("--requests", "4", "--label", "a label", "--json", str(out)),
        )
    assert done.returncode == 0, done.stderr
    assert "a label: simulated launches (11.5 us): m at " in done.stdout
    assert "simulated launches (11.5 us): latencies in ms" in done.stdout
    assert load(out)["simulated"] == "simulated launches (11.5 us)"
    # The default concurrencies end at the number of requests, which is four.
    assert load(out)["config"]["concurrencies"] == [1, 4]


def test_failures_are_counted_named_and_change_the_exit_status(tmp_path: Path) -> None:
    def script(number: int, body: dict[str, Any]) -> list[Step]:
        if number % 4 == 1:
            return [Status(429, {"error": {"message": "the queue is full"}})]
        if number % 4 == 2:
            return [chunk("a"), event({"error": {"message": "the engine is gone"}})]
        return honest(number, body)

    out = tmp_path / "out.json"
    with ScriptedServer(script) as server:
        done = run(
            server.url + "/v1/",
            *("--concurrency", "1", "--requests", "8", "--warmup", "0", "--json", str(out)),
        )
    assert done.returncode == 1
    assert "exit status is 1" in done.stderr
    assert "2 x http_429" in done.stdout
    assert "the queue is full" in done.stdout
    summary = load(out)["levels"][0]["summary"]
    assert (summary["ok"], summary["failed"]) == (4, 4)
    assert summary["failures"] == {"http_429": 2, "error_event": 2}
    assert summary["output_tokens"] == 4 * 64


def test_a_failed_warm_up_changes_the_exit_status() -> None:
    def script(number: int, body: dict[str, Any]) -> list[Step]:
        return [Status(503, {"error": {"message": "loading"}})] if number == 0 else answer(64)

    with ScriptedServer(script) as server:
        done = run(server.url, "--concurrency", "1", "--requests", "3", "--warmup", "2")
    assert done.returncode == 1
    assert "warm-up failed: 1 x http_503" in done.stdout


def test_duration_ends_a_level(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with ScriptedServer() as server:
        done = run(
            server.url,
            *("--concurrency", "2", "--duration", "0.5", "--output-tokens", "2"),
            *("--json", str(out)),
        )
    assert done.returncode == 0, done.stderr
    level = load(out)["levels"][0]
    assert level["summary"]["stopped_by"] == "duration"
    assert level["summary"]["ok"] > 0
    assert len(level["raw"]["rows"]) <= MAX_RAW_ROWS
    assert "ended by duration" in done.stdout


def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    """After three requests of the second level both streams hang; then SIGINT is sent to the
    process group."""
    never = Wait(1_000, seen=2)

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        return [never] if number >= 9 else honest(number, body)

    out = tmp_path / "out.json"
    with ScriptedServer(script) as server:
        process = subprocess.Popen(
            [
                *(*COMMAND, "run", server.url, "--concurrency", "1", "2"),
                *("--requests", "6", "--warmup", "0", "--processes", "2", "--json", str(out)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        assert never.reached.wait(60)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "interrupted" in stderr
    report = load(out)
    assert report["complete"] is False
    summaries = [level["summary"] for level in report["levels"]]
    assert [summary["ok"] for summary in summaries] == [6, 3]
    assert [summary["failed"] for summary in summaries] == [0, 0]
    assert [summary["stopped_by"] for summary in summaries] == ["requests", "interrupt"]


def test_a_client_process_that_dies_is_said_and_what_was_measured_is_kept(tmp_path: Path) -> None:
    """All requests of the second level hang; the test fails by hanging if nobody watches for client
    processes that die."""
    never = Wait(1_000, seen=2)

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        return [never] if number >= 4 else honest(number, body)

    out = tmp_path / "out.json"
    with ScriptedServer(script) as server:
        process = subprocess.Popen(
            [
                *(*COMMAND, "run", server.url, "--concurrency", "1", "2", "--requests", "4"),
                *("--warmup", "0", "--processes", "2", "--json", str(out)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert never.reached.wait(60)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        clients = [x for x in children if b"spawn_main" in Path(f"/proc/{x}/cmdline").read_bytes()]
        assert len(clients) == 2
        os.kill(int(clients[1]), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "client process 2 of 2 died (killed by signal 9)" in stderr
    assert "--processes" in stderr
    assert "Traceback" not in stderr
    assert "concurrency 1: " in stdout
    report = load(out)
    assert report["complete"] is False
    assert [level["summary"]["ok"] for level in report["levels"]] == [4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["http://127.0.0.1:9"], "cannot reach http://127.0.0.1:9/v1/models"),
        (["ftp://host"], "no http or https URL"),
        (["http://user:pw@host"], "--api-key"),
        (["URL", "--api-key", "sk\nX: y"], "no header can carry"),
        (["URL", "--model", "other"], "'other'"),
        (["URL", "--json", "/no/such/place/x.json"], "--json"),
        (["URL", "--concurrency", ","], "--concurrency"),
        (["URL", "--concurrency", "0"], "not in 1..10000"),
        (["URL", "--concurrency", "1,9,2", "--requests", "5"], "9 is out of reach with"),
        (["URL", "--token-range", "5:5"], "empty range"),
        (["URL", "--duration", "nan"], "not in (0, 3600]"),
        (["URL", "--timeout", "x"], "no number"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(arguments: list[str], words: str) -> None:
    with ScriptedServer() as server:
        done = run(*(server.url if part == "URL" else part for part in arguments))
        assert server.bodies == []
    assert done.returncode == 2
    assert words in done.stderr.strip().splitlines()[-1]
    assert done.stdout == ""


def test_a_request_that_the_server_refuses_stops_the_run_after_the_warm_up() -> None:
    refusal = Status(400, {"error": {"message": "unknown field ignore_eos", "param": "ignore_eos"}})

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        return [refusal] if "ignore_eos" in body else answer(3)

    with ScriptedServer(script) as server:
        done = run(server.url, "--concurrency", "2", "--requests", "50")
        assert len(server.bodies) == 2
        again = run(server.url, "--concurrency", "2", "--requests", "4", "--no-ignore-eos")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unknown field ignore_eos (see --no-ignore-eos)" in done.stderr
    assert again.returncode == 0


def test_chat_and_the_key_from_the_environment() -> None:
    with ScriptedServer() as server:
        done = run(
            server.url,
            *("--concurrency", "1", "--requests", "2", "--prompt-kind", "chat"),
            OPENAI_API_KEY="sk-env",
        )
        assert done.returncode == 0, done.stderr
        assert set(server.paths) == {"/v1/chat/completions"}
        assert server.keys == {"Bearer sk-env"}


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("h:1", "http://h:1/v1"),
        ("https://h/proxy", "https://h/proxy/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_normalize_url(url: str, base: str) -> None:
    assert normalize_url(url) == base


@pytest.mark.parametrize(
    "url", ["", "http://", "http://h:99999", "http://h?x=1", "http://[::1", "http://h\u00fc"]
)
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConfigError):
        normalize_url(url)


def test_loadgen_knows_no_server() -> None:
    """loadgen imports neither minisrv nor torch: it can measure any server only while it depends on
    none."""
    for path in Path(loadgen.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {"minisrv", "torch"} & {name.split(".")[0] for name in names}, path
