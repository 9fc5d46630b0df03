"""How many threads compute a step, and what those do that wait: decided here, for every way in.

torch and the kernels in C share a pool of OpenMP threads, which begin an operation together and
wait for each other at its end. By default a waiting thread spins, for about ten milliseconds. That
is quick while each thread has a core to itself. Where another process wants a core, a thread that
spins keeps the one that it waits for from running, and a step takes forty times as long. So here a
waiting thread spins for a tenth of a millisecond, which bridges the gaps within a step, and then
sleeps: a machine that is shared costs its share.

Knows: the cores that this process may use, OpenMP's variables, and torch's number of threads. Only
`limit` needs torch, and imports it. Knows nothing of what is computed.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

COUNT = "OMP_NUM_THREADS"
WAITING = {"GOMP_SPINCOUNT": "5000", "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""Of GNU's runtime, which torch brings on Linux and for which it decides before the next; of all;
and of LLVM's and Intel's, whose least time above 0 is a millisecond. Fewer spins make a step slower
where nobody else wants the cores, and more where somebody does (docs/results)."""

OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

_spinning = False
"""Whether the runtime was loaded before `let_waiting_threads_sleep` could tell it anything."""


def let_waiting_threads_sleep() -> None:
    """Set the environment so, for this process and those that it starts. What the user has set of
    it stays as it is.

    A runtime reads it when it is loaded, with torch; `limit` does what can be done after that.
    """
    global _spinning
    if not WAITING.keys() & os.environ.keys():
        _spinning = "torch" in sys.modules
        os.environ.update(WAITING)


def without_blas() -> None:
    """Have numpy's BLAS start no threads in this process and those that it starts, which multiply
    no matrices. To be called before numpy is imported. There would be one a core, each of which
    takes 40 MiB of the memory that such a process may have."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


def cores() -> int:
    """Cores that this process may use: those it is tied to, or fewer where its control group is
    given less time than they have."""
    ties = hasattr(os, "sched_getaffinity")  # macOS ties no process to cores
    tied = len(os.sched_getaffinity(0)) if ties else os.cpu_count() or 1
    return max(1, math.ceil(min(tied, _quota())))


def limit(beside: int = 0) -> None:
    """Let torch compute with as many threads as there are cores for, and fewer where it is told to
    by OMP_NUM_THREADS or `torch.set_num_threads`. To call it again never adds threads.

    beside: other processes of ours that want a core while this one computes. Threads of an
        operation that wait for one which has lost its core cost more than its core would bring.
    """
    global _spinning
    import torch

    late = _spinning and torch.get_num_threads() > 1
    if COUNT not in os.environ:
        # Threads that sleep at once have to be woken within a step: one fewer is quicker then.
        number = max(1, cores() - beside - late)
        torch.set_num_threads(min(torch.get_num_threads(), number))
    if late:
        _spinning = False
        logger.warning(
            "torch was imported before minisrv, so its threads cannot be told how to wait: %d "
            "compute, and steps are slower. Import minisrv first, or set GOMP_SPINCOUNT=%s.",
            torch.get_num_threads(),
            WAITING["GOMP_SPINCOUNT"],
        )
        if torch.get_num_threads() > 1:
            _outnumber_cores()


def _outnumber_cores() -> None:
    """Have GNU's runtime, which spins already, take the cores for overcommitted: where it has more
    threads than there are cores, those that wait sleep after 100 spins (see GOMP_SPINCOUNT in its
    manual). It counts the pools of all threads, so one more pool, of threads that sleep, will do.
    """
    import torch

    number, computed = torch.get_num_threads(), threading.Event()

    def own_a_pool() -> None:
        torch.set_num_threads(1 + (os.cpu_count() or 1))  # of this thread's pool
        torch.zeros(1 << 20).add_(1)  # large enough for all of them
        computed.set()
        threading.Event().wait()  # a pool ends with its thread

    threading.Thread(target=own_a_pool, name="minisrv-openmp", daemon=True).start()
    computed.wait()
    torch.set_num_threads(number)  # torch gives the last number set to threads yet to come


def _quota() -> float:
    """Cores' worth of time that the control groups give this process; infinite without a limit.

    As version 2 has it: each group of the path has a file "quota period" or "max period", in
    microseconds. A container sees its own group as the root.
    """
    try:
        groups = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return math.inf  # no Linux
    found = math.inf
    for path in (line.removeprefix("0::/") for line in groups if line.startswith("0::/")):
        for group in (CGROUPS / path, *(CGROUPS / path).parents):
            try:
                quota, period = (group / "cpu.max").read_text().split()
            except OSError:
                continue  # the root of a whole machine has no limit, and not the file
            if quota != "max":
                found = min(found, int(quota) / int(period))
    return found
