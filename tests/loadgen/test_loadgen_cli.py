"""The command as a user runs it: a subprocess against a scripted server."""

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import loadgen
from loadgen.cli import normalize_url
from loadgen.errors import ConfigError
from loadgen.records import PromptKind
from loadgen.rows import MAX_RAW_ROWS
from tests.loadgen.scripted_server import (
    DONE,
    ScriptedServer,
    Sleep,
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

LINKS = ("src", "href", "xlink:href", "srcset", "action", "data")
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


@pytest.mark.parametrize(
    ("limits", "share", "status"),
    [
        (("ttft:60000", "e2e:60000"), "1", 0),
        (("ttft:60000,e2e:100",), "1", 1),
    ],
)
def test_the_exit_status_says_whether_enough_requests_met_the_limits(
    limits: tuple[str, ...], share: str, status: int, tmp_path: Path
) -> None:
    """Every second request takes at least 300 ms, so it misses a limit of 100 ms however busy the
    machine is, and every request meets one of a minute."""
    out = tmp_path / "out.json"

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        return [Sleep(0.3 * (number % 2)), *honest(number, body)]

    with ScriptedServer(script) as server:
        done = run(
            *(server.url, "--concurrency", "1", "--requests", "8", "--warmup", "0"),
            *("--slo", *limits, "--slo-attainment", share, "--json", str(out)),
        )
    goodput = load(out)["levels"][0]["summary"]["goodput"]
    assert goodput["requests"] == 8
    assert (goodput["attained"] < 5) == bool(status)
    assert done.returncode == status, done.stderr
    assert ("met the limits of --slo at concurrency 1" in done.stderr) == bool(status)
    assert f"{goodput['attained']} of 8 requests met every limit" in done.stdout


def test_an_open_loop_a_line_for_each_request_and_the_pictures(tmp_path: Path) -> None:
    """An open loop of two processes as a user runs it. The page asks for nothing outside of it."""

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        steps = answer(body["max_tokens"])
        if number == 7:
            return [Status(429, {"error": {"message": "the queue is full"}})]
        end = event({"choices": [{"index": 0, "text": "", "finish_reason": "length", "seen": 5}]})
        return [*steps[:-3], end, *steps[-2:]]

    out, lines, page = tmp_path / "out.json", tmp_path / "out.jsonl", tmp_path / "out.html"
    picture = tmp_path / "out.png"
    with ScriptedServer(script) as server:
        done = run(
            *(server.url, "--request-rate", "40,80", "--burstiness", "0.5", "--ramp-up", "0.1"),
            *("--requests", "12", "--processes", "2", "--output-tokens", "uniform:2:6"),
            *("--warmup", "2", "--seed", "3", "--extra-body", '{"mark": 1}', "--label", "<b>"),
            *("--json", str(out), "--jsonl", str(lines), "--html", str(page)),
            *("--plot", str(picture)),
        )
        bodies = server.bodies
    assert done.returncode == 1, done.stderr
    assert "1 x http_429" in done.stdout
    assert "send delay p50" in done.stdout
    assert {body["mark"] for body in bodies} == {1}
    assert {body["max_tokens"] for body in bodies} == {2, 3, 4, 5, 6}
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["load"] for row in rows] == ["request rate 40"] * 12 + ["request rate 80"] * 12
    for level in (rows[:12], rows[12:]):
        assert [row["index"] for row in level] == list(range(12))
        due = [row["due_ms"] for row in level]
        assert due == sorted(due)
        assert due[0] == 0
        assert all(row["send_delay_ms"] >= 0 for row in level)
    failed = [row for row in rows if row["failure"] is not None]
    assert [(row["failure"], row["message"]) for row in failed] == [
        ("http_429", "the queue is full")
    ]
    for row in rows:
        if row["failure"] is None:
            assert len(row["chunk_ms"]) == len(row["chunk_tokens"]) == row["output_tokens"]
            assert row["extra"] == {"seen": 5}
    summaries = [level["summary"] for level in load(out)["levels"]]
    assert [summary["request_rate"] for summary in summaries] == [40, 80]
    assert [summary["send_delay_ms"]["count"] for summary in summaries] == [12, 12]
    assert picture.read_bytes().startswith(b"\x89PNG")
    tags = TagsOf(page.read_text())
    assert {"table", "svg"} <= tags.names
    assert not tags.names & {"script", "link", "img", "iframe", "b"}
    assert all(link.startswith("#") for link in tags.links)


class TagsOf(HTMLParser):
    """The names of all tags of a page, and what its attributes refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links |= {value or "" for name, value in attrs if name in LINKS}


def test_the_server_s_own_metrics_stand_beside(tmp_path: Path) -> None:
    """The growth of counters from the end of the warm-up to the end of the level is shown, under
    the prefix of any server; what does not grow is no counter."""
    out = tmp_path / "out.json"
    with ScriptedServer() as server:

        def script(number: int, body: dict[str, Any]) -> list[Step]:
            done = number + 1
            server.metrics = (
                "# TYPE any:request_success_total counter\n"
                f'any:request_success_total{{reason="length"}} {done}\n'
                "# TYPE any:generation_tokens_total counter\n"
                f"any:generation_tokens_total {done * 64}\n"
                "# TYPE any:time_to_first_token_seconds histogram\n"
                f'any:time_to_first_token_seconds_bucket{{le="+Inf"}} {done}\n'
                f"any:time_to_first_token_seconds_sum {done * 0.25}\n"
                f"any:time_to_first_token_seconds_count {done}\n"
                "# TYPE any:num_requests_running gauge\n"
                f"any:num_requests_running {done}\n"
            )
            return honest(number, body)

        server.script = script
        done = run(
            *(server.url, "--concurrency", "1", "--requests", "4", "--warmup", "2"),
            *("--json", str(out)),
        )
    assert done.returncode == 0, done.stderr
    assert "client and server count: requests 4 and 4, output tokens 256 and 256" in done.stdout
    summary = load(out)["levels"][0]["summary"]
    assert summary["server_counters"]['any:request_success_total{reason="length"}'] == 4
    assert "any:num_requests_running" not in summary["server_counters"]
    found = {row["name"]: row["server"] for row in summary["server"]}
    assert found == {"requests": 4, "output tokens": 256, "TTFT mean ms": pytest.approx(250)}


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
        (["URL", "--request-rate", "0"], "not in (0, 100000]"),
        (["URL", "--burstiness", "2"], "--burstiness does nothing without --request-rate"),
        (["URL", "--max-concurrency", "2"], "nothing without --request-rate or --trace"),
        (["URL", "--turns", "2"], "--turns does nothing without --prompt-kind chat"),
        (["URL", "--num-prefixes", "2"], "--num-prefixes does nothing without --prefix-tokens"),
        (["URL", "--capture-sizes", "2"], "--capture-sizes does nothing without --plot or --html"),
        (["URL", "--input-tokens", "uniform:9:3"], "empty range"),
        (["URL", "--output-tokens", "zipf:2"], "no length"),
        (["URL", "--slo", "tbt:3"], "none of ttft, itl, tpot, e2e"),
        (["URL", "--extra-body", "[]"], "no JSON object"),
        (["URL", "--trace", "/no/such/trace"], "no such file"),
        (["URL", "--trace", __file__], "line 1: "),
        (["URL", "--trace", __file__, "--request-rate", "2"], "--trace says what --request-rate"),
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
        done = run(server.url, "--concurrency", "2", "--requests", "50", "--ignore-eos")
        assert len(server.bodies) == 2 + len(PromptKind)
        again = run(server.url, "--concurrency", "2", "--requests", "4", "--no-ignore-eos")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unknown field ignore_eos (see --no-ignore-eos)" in done.stderr
    assert again.returncode == 0


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_server_that_refuses_what_is_sent_by_default_is_sent_other_requests(
    status: int, tmp_path: Path
) -> None:
    """Some servers take no token ids, and some no ignore_eos; the run says what it sends then."""

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        refused = "ignore_eos" in body or not isinstance(body["prompt"], str)
        return [Status(status, {"detail": "no"})] if refused else answer(body["max_tokens"])

    few = ("--concurrency", "2", "--requests", "4", "--output-tokens", "3")
    out, lines = tmp_path / "out.json", tmp_path / "out.jsonl"
    with ScriptedServer(script) as server:
        done = run(server.url, *few, "--json", str(out), "--jsonl", str(lines))
    assert done.returncode == 0, done.stderr
    assert "no; going on with --prompt-kind text --no-ignore-eos\n" in done.stderr
    config = load(out)["config"]
    assert (config["prompt_kind"], config["ignore_eos"]) == ("text", False)
    assert len(lines.read_text().splitlines()) == 4


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
