"""A function that runs in turns with its caller: never at the same time, and never left behind."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextvars import ContextVar
from pathlib import Path
from threading import current_thread

import pytest
import torch

from minisrv.turns import MakeWay, in_turns

WHERE: ContextVar[str] = ContextVar("where")


def test_the_two_take_turns():
    events: list[str] = []

    def work(make_way: MakeWay) -> str:
        for name in ("a", "b"):
            events.append(name)
            make_way()
        events.append(WHERE.get())
        return "done"

    WHERE.set("in the context of the caller")
    turns = in_turns(work)
    assert not events, "nothing runs before the first turn"
    for number in (1, 2):
        next(turns)
        events.append(f"caller {number}")
    with pytest.raises(StopIteration) as end:
        next(turns)
    assert end.value.value == "done"
    assert events == ["a", "caller 1", "b", "caller 2", "in the context of the caller"]


def test_operations_have_as_many_threads_as_those_of_the_caller():
    """They had one a core once, whatever the limit."""
    maps = Path("/proc/self/maps").read_text().split()
    runtimes = [path for path in maps if Path(path).name.startswith("libgomp")]
    if not runtimes:
        pytest.skip("torch's OpenMP is not GNU's here")
    openmp, before = ctypes.CDLL(runtimes[0]), torch.get_num_threads()
    torch.set_num_threads(1 + (os.cpu_count() or 1))
    try:
        turns = in_turns(lambda make_way: openmp.omp_get_max_threads())
        with pytest.raises(StopIteration) as end:
            next(turns)
        assert end.value.value == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_the_caller_gets_its_error():
    def work(make_way: MakeWay) -> None:
        make_way()
        raise ValueError("this work fails")

    turns = in_turns(work)
    next(turns)
    with pytest.raises(ValueError, match="this work fails"):
        next(turns)


def test_work_that_is_left_cleans_up_and_ends():
    threads, events = [], []

    def work(make_way: MakeWay) -> None:
        threads.append(current_thread())
        try:
            make_way()
            events.append("never")
        except Exception:
            events.append("no error of the work")
        finally:
            events.append("cleaned up")

    turns = in_turns(work)
    next(turns)
    turns.close()
    assert events == ["cleaned up"]
    assert not threads[0].is_alive()


def test_a_process_ends_though_a_function_has_not():
    """As one that has answered a single message while the rest of its graphs are captured."""
    code = (
        "import builtins\n"  # whose names are dropped late, when no thread runs any more
        "from minisrv.turns import in_turns\n"
        "builtins.left = in_turns(lambda make_way: [make_way() for _ in range(1000)])\n"
        "next(builtins.left)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
