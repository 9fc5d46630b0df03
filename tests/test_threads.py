"""The number of threads that compute, and that threads which wait do not keep others from their
cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minisrv import threads


def completed(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program with none of OpenMP's variables in its environment but these."""
    ours = {threads.COUNT, *threads.WAITING}
    env = {name: value for name, value in os.environ.items() if name not in ours} | variables
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True)


def test_numpy_starts_no_threads_where_it_multiplies_nothing() -> None:
    count = "import numpy, os; print(len(os.listdir('/proc/self/task')))"
    program = f"from minisrv import threads; threads.without_blas(); {count}"
    assert completed(program).stdout == "1\n"


SHOW = f"""
import os, minisrv
print({{name: os.environ[name] for name in {[*threads.WAITING]} if name in os.environ}})
"""


def test_waiting_threads_sleep_wherever_minisrv_is_imported():
    assert eval(completed(SHOW).stdout) == threads.WAITING


@pytest.mark.parametrize("name", threads.WAITING)
def test_what_the_user_has_set_of_waiting_stays(name: str):
    assert eval(completed(SHOW, **{name: "7"}).stdout) == {name: "7"}


WAIT = """
{imports}
import time
torch.set_num_threads(2)
threads.cores = lambda: 3
threads.limit()
assert torch.get_num_threads() == 2
x = torch.ones(1 << 17)
x.add_(1)
before = time.process_time()
for _ in range(20):
    x.add_(1)
    time.sleep(0.02)
print(time.process_time() - before)
"""


@pytest.mark.skipif(threads.cores() < 2, reason="on a single core no thread of OpenMP spins")
@pytest.mark.parametrize(
    "imports",
    ["from minisrv import threads; import torch", "import torch; from minisrv import threads"],
    ids=["minisrv first", "torch first"],
)
def test_a_thread_that_waits_takes_no_core(imports: str):
    """The test measures processor time and not wall time, so that other processes do not change it.
    It compares it with that of threads that spin as long as OpenMP's do by default, as both depend
    on the processor: they take 20 times as much."""
    waits, spins = (
        float(completed(WAIT.format(imports=imports), **variables).stdout)
        for variables in ({}, {"GOMP_SPINCOUNT": "300000"})
    )
    assert waits < spins / 3


def test_where_torch_came_first_a_core_is_left_and_it_is_said():
    program = "import torch; from minisrv import threads; threads.cores = lambda: 3\n"
    program += "torch.set_num_threads(3); threads.limit(); threads.limit()\n"
    program += "print(torch.get_num_threads())"
    done = completed(program)
    assert done.stdout == "2\n"
    assert done.stderr.count("Import minisrv first") == 1


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give torch three threads, on a machine of four cores, with no variable that sets the
    number."""
    before = torch.get_num_threads()
    monkeypatch.delenv(threads.COUNT, raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("beside", "expected"), [(0, 3), (1, 3), (2, 2), (4, 1)])
def test_there_are_cores_for_all_and_never_more_threads_than_before(beside: int, expected: int):
    threads.limit(beside)
    threads.limit()
    assert torch.get_num_threads() == expected


@pytest.mark.usefixtures("three_threads")
def test_a_number_of_the_users_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(threads.COUNT, "3")
    threads.limit(beside=4)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {"": "max 100000"}, 8),
        ("0::/", {"": "250000 100000"}, 3),
        ("0::/", {"": "10000 100000"}, 1),
        ("0::/", {"": "1600000 100000"}, 8),
        ("0::/a/b", {"a": "200000 100000", "a/b": "max 100000"}, 2),
        ("0::/a/b", {"a": "400000 100000", "a/b": "50000 50000"}, 1),
        ("2:cpu:/a\n0::/b", {"b": "300000 100000"}, 3),
        ("2:cpu:/a", {}, 8),
        (None, {}, 8),
    ],
)
def test_cores_of_a_container(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
    limits: dict[str, str],
    expected: int,
):
    """The number of cores is bounded by the CPU limits of the process's control group and of those
    above it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "all")
    if own is not None:
        (tmp_path / "own").write_text(own + "\n")
    for group, limit in limits.items():
        (tmp_path / "all" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / group / "cpu.max").write_text(limit + "\n")
    assert threads.cores() == expected
