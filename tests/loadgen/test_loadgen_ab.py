"""`loadgen ab` as a user runs it: real server processes, most of them scripted, and at the end
minisrv's."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

import loadgen
from loadgen.ab import FORMULAS, Compared, Level, Spread, first_difference, repeats, verdict
from loadgen.bootstrap import Ratio
from loadgen.errors import ConfigError, ServerError
from loadgen.records import Answer, LevelResult, Load, RequestRecord, StoppedBy
from loadgen.servers import Server
from tests.checkpoints import make_checkpoint
from tests.loadgen.scripted_server import ScriptedServer, Step, answer

MAIN = "import sys; from loadgen.cli import main; sys.exit(main())"
HEEDS_SIGNALS = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "[signal.signal(s, signal.SIG_DFL) for s in (signal.SIGTERM, signal.SIGHUP)]; "
)
"""Code that restores the handling of signals: a test run in the background or under nohup may
ignore them, and a child would inherit that."""
SUPERVISOR = Path(loadgen.__file__).with_name("supervisor.py")
SERVE = Path(__file__).with_name("serve.py")
QUICK = (
    *("--concurrency", "2", "--repeats", "3", "--requests", "3", "--warmup", "1"),
    *("--input-tokens", "4", "--output-tokens", "5", "--timeout", "30", "--seed", "0"),
)


class Bench:
    """The directory that two scripted servers write to, and the command that compares the
    servers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(self, a: str, b: str, *arguments: str, code: str = MAIN) -> subprocess.Popen[str]:
        """Start the command; `a` and `b` are options of the two servers."""
        commands = [
            shlex.join([sys.executable, str(SERVE), name, str(self.directory)]) + f" {options}"
            for name, options in (("a", a), ("b", b))
        ]
        return subprocess.Popen(
            [sys.executable, "-c", code, "ab", *commands, *QUICK, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "160", "TMPDIR": str(self.directory)},
            start_new_session=True,
        )

    def run(self, a: str, b: str, *arguments: str, code: str = MAIN) -> tuple[int, str, str]:
        """Run the command, check that nothing it started is left, and return (exit status, stdout,
        stderr)."""
        process = self.start(a, b, *arguments, code=code)
        stdout, stderr = process.communicate(timeout=120)
        assert "Traceback" not in stderr
        until(lambda: self.alive() == [], "what was killed has ended")
        return process.returncode, stdout, stderr

    @property
    def requests(self) -> list[tuple[str, dict[str, Any]]]:
        path = self.directory / "requests"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(name, body) for name, body in map(json.loads, lines)]

    def alive(self) -> list[int]:
        """Return the ids of the servers and of their children that still run."""
        path = self.directory / "pids"
        pids = path.read_text().split() if path.exists() else []
        return [int(pid) for pid in pids if state(pid) not in "ZX"]


def state(pid: str) -> str:
    """Return a process's state: Z for a zombie, X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_stderr_that_nobody_reads_ends_nothing(bench: Bench) -> None:
    process = bench.start("", "")
    assert process.stderr is not None
    process.stderr.close()
    assert process.stdout is not None
    stdout = process.stdout.read()
    assert process.wait(120) == 0, stdout
    assert "TTFT" in stdout


def test_a_server_whose_log_is_gone(tmp_path: Path) -> None:
    """A server's end is reported although its log was deleted: directories for temporary files are
    cleared while long runs go on."""
    log = tmp_path / "a.log"
    command = shlex.join([sys.executable, "-c", "import sys; sys.exit(3)"])
    with Server("a", command, log) as server:
        log.unlink()
        with pytest.raises(
            ServerError, match=r"a ended with status 3; \S+ cannot be read: No such"
        ):
            server.wait_ready(60)


FILLS = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    left = 3

    def do_GET(self):
        body = json.dumps({"state": "ready", "graphs": {"missing": Handler.left}}).encode()
        Handler.left -= 1
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server that is ready, and says in answer to each question for its state that it lacks one graph
less, beginning with 3."""


def test_a_server_that_captures_graphs_while_it_serves_is_waited_for(tmp_path: Path) -> None:
    """What is compared is a server with all its graphs; one that says nothing of them has none."""
    command = f"{shlex.join([sys.executable, '-c', FILLS])} {{port}}"
    with Server("a", command, tmp_path / "a.log") as server:
        server.wait_ready(60)
        assert server._missing_graphs() == 2
        server.wait_whole(60)
        assert server._missing_graphs() < 0
    server.wait_whole(60)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    server = Server("a", "true", tmp_path / "nowhere" / "a.log")
    with pytest.raises(ConfigError, match="cannot write the log of a: .*No such file"):
        server.__enter__()


def test_abba_with_each_prompt_once_for_each_server(bench: Bench, tmp_path: Path) -> None:
    """The runs are in the order A, B, B, A. The test fails if a server sees a prompt twice, if the
    prompts of a pair of runs differ, or if the order is another one."""
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    page, lines = tmp_path / "out.html", tmp_path / "out.jsonl"
    status, stdout, stderr = bench.run(
        *("", ""),
        *("--concurrency", "1,2", "--repeats", "4", "--labels", "[graphs]", "eager"),
        *("--json", str(out), "--plot", str(plot), "--label", "a title", "--processes", "2"),
        *("--html", str(page), "--jsonl", str(lines), "--capture-sizes", "1", "2,4"),
    )
    assert status == 0, stderr
    runs = [bench.requests[at : at + 4] for at in range(0, len(bench.requests), 4)]
    assert [{name for name, _ in run} for run in runs] == [{x} for x in "abbaabba" * 2]
    prompts: dict[str, list[list[str]]] = {"a": [], "b": []}
    for run in runs:
        prompts[run[0][0]].append(sorted(json.dumps(body) for _, body in run))
    assert prompts["a"] == prompts["b"]
    assert len({prompt for run in prompts["a"] for prompt in run}) == 2 * 4 * 4

    assert "[graphs] is ready after" in stderr
    for words in (
        "eager / [graphs]",
        "12 of 12",
        "ITL p50 ms",
        "a title: ",
        "eager, worst run: client: ",
        *FORMULAS,
    ):
        assert words in stdout
    assert plot.read_text().rstrip().endswith("</svg>")
    report = json.loads(out.read_text())
    assert report["complete"]
    assert report["simulated"] == ""
    assert report["formulas"].items() >= FORMULAS.items()
    assert report["sides"][1]["command"][-2] == "--port"
    assert report["sides"][0]["ready_s"] > 0
    assert report["verdict"] in stdout
    for word in ("[graphs]", "eager / [graphs]", "a title: ", report["verdict"]):
        assert word in page.read_text()
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 2 * 4 * 2 * 3
    assert {(row["label"], row["load"]) for row in rows} == {
        (label, load)
        for label in ("[graphs]", "eager")
        for load in ("concurrency 1", "concurrency 2")
    }
    assert [level["concurrency"] for level in report["levels"]] == [1, 2]
    for level in report["levels"]:
        agreements = [found for repeat in level["repeats"] for found in repeat["agreements"]]
        assert [(found["answers"], found["same"]) for found in agreements] == [(3, 3)] * 4
        # These answers come in one read, so there are no gaps that could be measured.
        assert set(level["metrics"]) - {"ITL p50 ms"} == {"TTFT p50 ms", "tok/s"}
        for metric in level["metrics"].values():
            for spread in metric["spreads"]:
                assert 0 < spread["min"] <= spread["median"] <= spread["max"]
            for ratio in metric["ratios"]:
                assert 0 < ratio["low"] <= ratio["mean"] <= ratio["high"]
        rates = [
            [run["output_tokens_per_s"] for run in repeat["runs"]] for repeat in level["repeats"]
        ]
        assert level["metrics"]["tok/s"]["values"] == rates


@pytest.mark.parametrize(
    ("options", "arguments", "unit"),
    [
        ("--token 107", (), "token 3"),  # The texts are the same, and only the token ids differ.
        ("--token 8 --no-ids", (), "character 3"),
        ("--token 8", ("--no-return-token-ids",), "character 3"),
    ],
)
def test_answers_that_differ_are_counted(
    bench: Bench, tmp_path: Path, options: str, arguments: tuple[str, ...], unit: str
) -> None:
    out = tmp_path / "out.json"
    status, stdout, stderr = bench.run("", options, *arguments, "--warmup", "0", "--json", str(out))
    odd = sum(body["prompt"][0] % 2 for name, body in bench.requests if name == "b")
    assert 0 < odd < 9  # This holds for the seed in use.
    assert status == 0, stderr
    assert f"{odd} of 9 answers differ, from {unit}" in stdout
    (level,) = json.loads(out.read_text())["levels"]
    agreements = [found for repeat in level["repeats"] for found in repeat["agreements"]]
    assert sum(found["answers"] for found in agreements) == 9
    assert sum(found["same"] for found in agreements) == 9 - odd
    found = [difference for agreement in agreements for difference in agreement["differences"]]
    assert [f"{x['unit']} {x['position']}" for x in found] == [unit] * odd


def test_require_identical(bench: Bench) -> None:
    """With --require-identical answers that differ make the exit status 1."""
    status, _, stderr = bench.run("", "--token 8", "--warmup", "0", "--require-identical")
    assert status == 1
    assert "answers differ" in stderr
    assert bench.run("", "", "--require-identical")[0] == 0


def test_a_failed_request_changes_the_status_and_is_not_compared(bench: Bench) -> None:
    """Every run of B has a warning, and the report quotes the run with a failure as the example."""
    status, stdout, _ = bench.run("", "--fail-at 5 --no-usage")
    assert status == 1
    assert "8 of 8" in stdout
    assert "B, 3 of 3 runs, for example: failed: 1 x http_500" in stdout


def test_a_refused_field_names_its_option(bench: Bench) -> None:
    status, stdout, stderr = bench.run("", "--refuse return_token_ids", "--return-token-ids")
    assert status == 2
    assert "(see --no-return-token-ids)" in stderr
    assert stdout == ""


def test_what_one_server_refuses_is_sent_to_none(bench: Bench) -> None:
    status, stdout, stderr = bench.run("", "--refuse return_token_ids")
    assert status == 0, stderr
    assert "going on with --no-return-token-ids\n" in stderr
    assert "same answers" in stdout


def test_a_server_that_dies_at_start(bench: Bench) -> None:
    """The log of the server that died is shown, and the other server, which was ready, is
    stopped."""
    status, stdout, stderr = bench.run("", "--dead-at-start", "--labels", "good", "bad")
    assert status == 2
    assert "bad ended with status 1" in stderr
    assert stderr.rstrip().endswith("no such checkpoint")
    assert stdout == ""
    assert bench.requests == []


def test_a_server_that_dies_later_ends_the_run_and_keeps_what_there_was(
    bench: Bench, tmp_path: Path
) -> None:
    """The run ends with the server. The test fails by hanging if requests for an hour are sent to a
    server that is gone."""
    out = tmp_path / "out.json"
    more = ("--concurrency", "1", "--requests", "2", "--duration", "3600", "--repeats", "4")
    # Two runs of A have 6 requests; the 8th is measured, and the requests after it are refused.
    status, stdout, stderr = bench.run("--die-at 7", "", *more, "--json", str(out))
    assert status == 2
    assert "A ended with status 7" in stderr
    assert "out of memory" in stderr
    assert "4 of 4" in stdout
    report = json.loads(out.read_text())
    assert not report["complete"]
    assert [len(level["repeats"]) for level in report["levels"]] == [2]


def test_a_server_that_is_never_ready(bench: Bench) -> None:
    status, _, stderr = bench.run("--never-ready", "", "--ready-timeout", "1")
    assert status == 2
    assert "A is not ready after 1 s" in stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("phase", ["starting", "measuring"])
def test_no_server_outlives_an_interrupt(bench: Bench, sent: signal.Signals, phase: str) -> None:
    """No server outlives SIGINT, which a terminal sends to the whole process group, nor SIGTERM or
    SIGHUP, which come to one process."""
    options = "--never-ready" if phase == "starting" else "--hang-at 3"
    process = bench.start("", options, code=HEEDS_SIGNALS + MAIN)
    if phase == "starting":
        until(lambda: len(bench.alive()) == 4, "both are started")
    else:
        until(lambda: [name for name, _ in bench.requests].count("b") > 3, "B hangs")
    assert len(bench.alive()) == 4
    (os.killpg if sent is signal.SIGINT else os.kill)(process.pid, sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "interrupted" in stderr
    until(lambda: bench.alive() == [], "what was killed has ended")


@pytest.mark.parametrize("phase", ["starting", "measuring"])
def test_nothing_outlives_a_kill(bench: Bench, phase: str) -> None:
    """After SIGKILL nothing is left: neither a server, which a shell may have started, nor what the
    server has started, nor a client process."""
    options = "--never-ready" if phase == "starting" else "--hang-at 3"
    process = bench.start("", options, "--processes", "2")
    if phase == "starting":
        until(lambda: len(bench.alive()) == 4, "both are started")
    else:
        until(lambda: [name for name, _ in bench.requests].count("b") > 3, "B hangs")
    offspring = descendants(process.pid)
    process.kill()
    process.communicate(timeout=60)
    try:
        assert offspring >= set(bench.alive())
        until(lambda: all(state(str(pid)) in "ZX" for pid in offspring), "all have ended")
    finally:
        for pid in offspring:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> set[int]:
    """Return the ids of the processes that a process has started, and of those that these have
    started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return set(map(int, children)).union(*(descendants(int(child)) for child in children))


@pytest.mark.parametrize(
    ("signs", "status"), [(["end"], 3), (["end", "term"], -9), (["term"], 3), (["term"] * 2, -9)]
)
def test_a_supervisor_ends_its_command_in_order_and_then_at_once(
    signs: list[str], status: int, tmp_path: Path
) -> None:
    """A supervisor first asks its command to end and kills it at the second signal. The command
    ends with status 3 when it is asked to; where a second signal follows, it ignores the first.
    Like the command of a shell it leaves a process behind, which must end too."""
    deaf = len(signs) > 1
    script = (
        f"trap '{'touch told' if deaf else 'exit 3'}' TERM; sleep 1000 & echo $! > left;"
        " touch up; while :; do sleep 0.01; done"
    )
    ours, theirs = socket.socketpair()
    supervisor = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SUPERVISOR), "60", "sh", "-c", script],
        stdin=theirs.fileno(),
        cwd=tmp_path,
        start_new_session=True,
    )
    theirs.close()
    started, pid = ours.recv(1024).split()
    assert float(started) < time.perf_counter()
    assert os.getpgid(int(pid)) == int(pid)
    until((tmp_path / "up").exists, "it runs")
    for sign in signs:
        if sign == "end":
            ours.close()
        else:
            supervisor.terminate()
        if deaf:
            until((tmp_path / "told").exists, "it has been told")
    assert supervisor.wait(60) == status
    until(lambda: state((tmp_path / "left").read_text().strip()) in "ZX", "nothing is left")
    ours.close()


@pytest.mark.parametrize("with_parent", [False, True])
def test_nothing_outlives_a_killed_supervisor(
    bench: Bench, tmp_path: Path, with_parent: bool
) -> None:
    """After SIGKILL to the supervisor, alone or with the process that started it, neither its
    command is left, nor what that has started, nor the guard, which waits for this."""
    code = (
        "import sys, time; from pathlib import Path; from loadgen.servers import Server\n"
        "with Server('a', sys.argv[1], Path(sys.argv[2])) as server:\n"
        "    print(server.pid, flush=True); time.sleep(1000)"
    )
    command = shlex.join([sys.executable, str(SERVE), "a", str(bench.directory)])
    parent = subprocess.Popen(
        [sys.executable, "-c", code, command, str(tmp_path / "log")], stdout=subprocess.PIPE
    )
    offspring: set[int] = set()
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        until(lambda: len(bench.alive()) == 2, "the server and its child are started")
        (supervisor,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        offspring = descendants(int(supervisor))
        assert offspring > set(bench.alive())
        if with_parent:
            parent.kill()
        os.kill(int(supervisor), signal.SIGKILL)
        until(lambda: all(state(str(pid)) in "ZX" for pid in offspring), "all have ended")
    finally:
        for pid in (parent.pid, *offspring):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        parent.communicate()


def test_simulated_launches_are_written_on_everything(bench: Bench, tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    metrics = shlex.quote("# TYPE x gauge\nminisrv:simulated_launch_us 40.0\nother 1\n")
    status, stdout, stderr = bench.run(
        *(f"--metrics {metrics}", ""), *("--json", str(out), "--plot", str(plot))
    )
    assert status == 0, stderr
    assert "simulated launches (40 and 0 us): A and B" in stdout
    assert json.loads(out.read_text())["simulated"] == "simulated launches (40 and 0 us)"
    assert "simulated launches (40 and 0 us)" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plot", "/no/such/place/x.svg"], "not a file"),
        (["--plot", "x.pdf"], "neither .svg nor .png"),
        (["--repeats", "2"], "--repeats"),
        (["--labels", "a"], "1 --labels for 2 servers"),
        (["--concurrency", ","], "--concurrency"),
        (["--concurrency", "4"], "--concurrency 4 is out of reach with --requests 3"),
    ],
)
def test_what_cannot_work_is_said_before_a_server_starts(
    bench: Bench, arguments: list[str], words: str
) -> None:
    status, stdout, stderr = bench.run("", "", *arguments)
    assert status == 2
    assert words in stderr.splitlines()[-1]
    assert stdout == ""
    assert not (bench.directory / "pids").exists()


def test_plot_without_matplotlib_says_what_to_install(bench: Bench) -> None:
    code = f"import sys; sys.modules['matplotlib'] = None; {MAIN}"
    status, _, stderr = bench.run("", "", "--plot", "x.svg", code=code)
    assert status == 2
    assert "pip install matplotlib" in stderr
    assert not (bench.directory / "pids").exists()
    assert bench.run("", "", code=code)[0] == 0


@pytest.mark.parametrize("command", ["no-such-program", "'", ""])
def test_a_command_that_is_none(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "ab", command, "true"],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    assert "loadgen: " in done.stderr
    assert "Traceback" not in done.stderr


def test_first_difference() -> None:
    def ids(*values: int) -> Answer:
        return Answer("text", values)

    assert first_difference(ids(1, 2, 3), ids(1, 2, 3)) is None
    assert first_difference(ids(1, 2, 3), ids(1, 9, 3)) == (1, "token")
    assert first_difference(ids(1, 2, 3), ids(1, 2)) == (2, "token")
    assert first_difference(ids(1, 2), Answer("text", ())) is None
    assert first_difference(ids(1, 2), Answer("tent", ())) == (2, "character")


def result(requests: int, stopped_by: StoppedBy = StoppedBy.REQUESTS) -> LevelResult:
    records = [RequestRecord(index, 0.0, 1.0, (), (), None, 3, None) for index in range(requests)]
    return LevelResult(Load(2), stopped_by, records, [], [])


def test_repeats_know_their_sides() -> None:
    """A's runs have one request here, B's two and C's three. The test fails if the second repeat,
    which ran in the order C, B, A, is taken for A, B, C."""
    runs = [result(count) for count in (1, 2, 3, 3, 2, 1)]
    found = list(repeats(iter(runs), 3))
    assert [[run.ok for run in repeat.runs] for repeat in found] == [[1, 2, 3]] * 2
    (level,) = Level.of(found)
    ratios = level.metrics["tok/s"].ratios
    assert [ratio.mean for ratio in ratios] == [pytest.approx(2.0), pytest.approx(3.0)]


def test_a_run_that_was_interrupted_makes_no_repeat() -> None:
    """An interrupted run is not compared with the run before it."""
    cut = result(1, StoppedBy.INTERRUPT)
    assert list(repeats(iter([result(2), cut]), 2)) == []


def compared(*rows: list[float]) -> Level:
    return Level(4, None, {"ITL p50 ms": Compared.of(list(rows))}, [])


def test_the_verdict_names_the_winner_and_by_how_much() -> None:
    """B's ITL is 20% below A's and C's 50% above it in each repeat, at both levels; the machine is
    slower in each repeat than in the one before, which changes no ratio."""
    level = compared([10.0, 8.0, 15.0], [20.0, 16.0, 30.0], [40.0, 32.0, 60.0])
    said = verdict(["a", "b", "c"], [level, level])
    assert said == (
        "b won: its ITL p50 was 20.0% (95% interval 20.0% to 20.0%) below that of a and 46.7% "
        "(95% interval 46.7% to 46.7%) below that of c over 3 repeats at loads 4, 4."
    )


def test_a_difference_within_the_spread_is_no_win() -> None:
    said = verdict(["a", "b"], [compared([10.0, 8.0], [8.0, 10.0], [10.0, 10.1])])
    assert said.startswith("No server won: the ITL p50 of a was 0.3% (95% interval -")
    assert said.endswith(
        "below that of b over 3 repeats at concurrency 4, so their difference may be chance."
    )


def test_the_bootstrap_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    """Of 300 samples of 12 log-normal ratios with the true ratio 1.2, the intervals of nearly 95%
    hold it: percentile intervals of so few values are a little too narrow."""
    rng = np.random.default_rng(1)
    samples = np.exp(rng.normal(np.log(1.2), 0.1, (300, 12)))
    found = [Ratio.of([sample.tolist()]) for sample in samples]
    share = sum(ratio.low <= 1.2 <= ratio.high for ratio in found) / len(found)
    assert 0.87 < share < 0.97
    assert all(ratio.low < ratio.mean < ratio.high for ratio in found)


def test_urls_are_compared_with_servers_that_are_started(bench: Bench, tmp_path: Path) -> None:
    """Three sides, of which two run already. Their order is reversed in every other repeat."""
    order: list[str] = []

    def script(name: str) -> Callable[[int, dict[str, Any]], list[Step]]:
        def answered(number: int, body: dict[str, Any]) -> list[Step]:
            order.append(name)
            return answer(5)

        return answered

    out = tmp_path / "out.json"
    command = shlex.join([sys.executable, str(SERVE), "c", str(tmp_path)])
    with ScriptedServer(script("a")) as a, ScriptedServer(script("b")) as b:
        done = subprocess.run(
            [
                *(sys.executable, "-c", MAIN, "ab", a.url, b.url, command, *QUICK),
                *("--warmup", "0", "--json", str(out), "--labels", "x", "y", "z"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "COLUMNS": "200", "TMPDIR": str(tmp_path)},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert order == [*"aaabbb", *"bbbaaa", *"aaabbb"]
    assert [name for name, _ in bench.requests] == ["c"] * 9
    report = json.loads(out.read_text())
    assert [side["label"] for side in report["sides"]] == ["x", "y", "z"]
    assert [side["command"] is None for side in report["sides"]] == [True, True, False]
    assert "y / x" in done.stdout
    assert "z / x" in done.stdout
    assert f"x: {a.url}/v1" in done.stdout
    # x and y answer with the same text, and z with another.
    agreements = [repeat["agreements"] for repeat in report["levels"][0]["repeats"]]
    assert [[found["same"] for found in repeat] for repeat in agreements] == [[3, 0]] * 3


def test_spread() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0]) == Spread(2.5, 1.0, 4.0)


def test_minisrv_with_graphs_and_without(tmp_path: Path) -> None:
    """The command of the README on a tiny model, with real graphs: every answer is the same with
    graphs and without."""
    checkpoint = make_checkpoint(tmp_path / "model")
    serve = (
        f"{sys.executable} -m minisrv.cli serve {checkpoint} --max-num-seqs 2 "
        "--max-num-batched-tokens 32 --max-model-len 64"
    )
    out = tmp_path / "out.json"
    # NOTE: pytest's directory has too long a name for the path of minisrv's socket.
    with TemporaryDirectory(prefix="ab-") as temporary:
        done = subprocess.run(
            [
                *(sys.executable, "-c", MAIN, "ab", serve, f"{serve} --enforce-eager"),
                *("--labels", "graphs", "eager", *QUICK, "--json", str(out)),
                *("--token-range", "100:300", "--require-identical"),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "TMPDIR": temporary},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    (level,) = report["levels"]
    agreements = [found for repeat in level["repeats"] for found in repeat["agreements"]]
    assert [(found["answers"], found["same"]) for found in agreements] == [(3, 3)] * 3
    # An answer that comes in one read has no gaps, and so small a model is fast enough for that.
    assert set(level["metrics"]) - {"ITL p50 ms"} == {"TTFT p50 ms", "tok/s"}
