"""Measures what busy processes cost the commands, and decode steps by how their threads wait.

    python benchmarks/busy_machine.py commands --rounds 3 --json F
    python benchmarks/busy_machine.py steps --rounds 5 --json F

*Commands*: the seconds that `LLM`, `certify`, `bench` and `pytest -m quick` take, alone and then
beside two processes that keep two cores busy. *Steps*: milliseconds of a decode step by batch, for
several numbers of spins after which a waiting thread sleeps. The least value of all rounds is the
most reliable, as other load on the machine can only add time. Run it without OpenMP's environment
variables. For another version of minisrv give its directory as --tree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from minisrv.threads import COUNT, WAITING
from minisrv.tools.environment import environment

ROOT = Path(__file__).parents[1]
LIMIT = 75
"""Maximum number of seconds of a command; the result of one that takes longer is None."""

_GENERATE = (
    "from minisrv import LLM, SamplingParams; LLM(max_num_seqs=8).generate("
    "['Once'] * 8, SamplingParams(max_tokens=100, ignore_eos=True))"
)
_SMALL = ("--max-num-seqs", "4", "--max-num-batched-tokens", "32")
COMMANDS: dict[str, tuple[str, ...]] = {
    "LLM": ("-c", _GENERATE),
    "torch, LLM": ("-c", f"import torch; {_GENERATE}"),
    "certify": ("-m", "minisrv.cli", "certify", *_SMALL),
    "bench": ("-m", "minisrv.cli", "bench", *_SMALL, "--batch-sizes", "1,4", "--rounds", "2"),
    "pytest": ("-m", "pytest", "-q", "-m", "quick", "tests/runner/test_certification.py"),
}
_STEPS = """
import json, statistics, time
from minisrv import LLM
from minisrv.request import EngineRequest, SamplingParams
sizes = (1, 8, 32)
engine = LLM(
    max_num_seqs=32, cudagraph_mode="full-decode-only", cudagraph_capture_sizes=sizes
).engine
params = SamplingParams(max_tokens=75, temperature=0.0, ignore_eos=True)
found = {}
for size in sizes:
    windows = []
    for _ in range(3):
        for row in range(size):
            ids = [(7 * row + place) % 1000 for place in range(64)]
            engine.add(EngineRequest(request_id=str(row), prompt_token_ids=ids, params=params))
        times = []
        while engine.has_work:
            begin = time.perf_counter()
            engine.step()
            times.append(1000 * (time.perf_counter() - begin))
        times = times[-72:]
        windows += [statistics.median(times[i : i + 6]) for i in range(0, 72, 6)]
    found[size] = round(min(windows), 3)
print(json.dumps(found))
"""
WAYS: dict[str, dict[str, str]] = {
    "as it is": {},
    **{f"{spins} spins": {"GOMP_SPINCOUNT": spins} for spins in ("0", "1000", "300000")},
    "one thread": {COUNT: "1"},
}


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Run that many processes that only compute while the context is open; should this process be
    killed, the command `timeout` ends them."""
    command = ["timeout", str(2 * LIMIT), sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.terminate()
            hog.wait()


def python(tree: Path, arguments: tuple[str, ...], **variables: str) -> tuple[float | None, str]:
    """Run Python on the minisrv in `tree`, and return the seconds that it took, or None if they
    exceeded LIMIT, and its output. Raises CalledProcessError.

    variables: environment variables for it.
    """
    ours = {COUNT, *WAITING}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PYTHONPATH": str(tree), **variables}
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tree,
            env=env,
            timeout=LIMIT,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return round(time.monotonic() - begin, 2), done.stdout


def commands(tree: Path) -> Iterator[dict[str, Any]]:
    """Run one round of the commands, and yield a row for each."""
    for name, arguments in COMMANDS.items():
        for processes in (0, 2):
            with busy(processes):
                seconds, _ = python(tree, arguments)
            yield {"command": name, "busy_processes": processes, "seconds": seconds}


def steps(tree: Path) -> Iterator[dict[str, Any]]:
    """Run one round of the measurement of steps, and yield a row for each way of waiting."""
    for name, variables in WAYS.items():
        _, printed = python(tree, ("-c", _STEPS), **variables)
        yield {"waiting": name, "ms_by_batch": json.loads(printed or "null")}


RUNS = {"commands": commands, "steps": steps}


def main(argv: list[str] | None = None) -> None:
    """Run, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tree", type=Path, default=ROOT, help="of the version that is measured")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    found = []
    for number in range(options.rounds):
        for row in RUNS[options.what](options.tree.resolve()):
            found.append({"round": number, **row, "load": round(os.getloadavg()[0], 1)})
            print(json.dumps(found[-1]), flush=True)
    if options.json is not None:
        report = {"environment": environment(), "rows": found}
        options.json.write_text(json.dumps(msgspec.to_builtins(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
