"""Sets how many threads compute a step, and how long a waiting thread spins, for every entry point.

torch and the kernels in C share a pool of OpenMP threads, which begin an operation together and
wait for each other at its end. By default a waiting thread spins for about ten milliseconds. That
is fast while each thread has a core to itself. If another process wants a core, a spinning thread
keeps the thread that it waits for from running, and a step takes forty times as long. So here a
waiting thread spins for a tenth of a millisecond, which bridges the gaps within a step, and then
sleeps: on a shared machine a step then slows down only by the share of the cores that others take.

Knows: the cores that this process may use, OpenMP's variables, and torch's number of threads. Only
`limit` and its helper need torch, and they import it when called. Knows nothing of what is
computed.
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
"""Variables that set how OpenMP threads wait. The first is for GNU's runtime, which torch brings on
Linux and where it takes precedence over the second. The second is for all runtimes. The third is
for LLVM's and Intel's, whose least time above 0 is a millisecond. With fewer spins a step is slower
if no other process wants the cores, and with more spins it is slower if one does (docs/results)."""

OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

_spinning = False
"""Whether the OpenMP runtime was loaded before `let_waiting_threads_sleep` could set the
variables that it reads."""


def let_waiting_threads_sleep() -> None:
    """Set the variables in `WAITING` for this process and those that it starts, unless the user has
    set any of them.

    An OpenMP runtime reads them when it is loaded, with torch; if that has happened before, `limit`
    does what can still be done.
    """
    global _spinning
    if not WAITING.keys() & os.environ.keys():
        _spinning = "torch" in sys.modules
        os.environ.update(WAITING)


def without_blas() -> None:
    """Keep numpy's BLAS from starting threads in this process and in those that it starts, which
    multiply no matrices. It would start one per core, each of which takes 40 MiB of the memory that
    such a process may have. To be called before numpy is imported."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


def cores() -> int:
    """Return the number of cores that this process may use: those of its CPU affinity, or fewer if
    the CPU quota of its control group is less."""
    ties = hasattr(os, "sched_getaffinity")  # macOS has no CPU affinity
    tied = len(os.sched_getaffinity(0)) if ties else os.cpu_count() or 1
    return max(1, math.ceil(min(tied, _quota())))


def limit(beside: int = 0) -> None:
    """Limit the threads with which torch computes to the cores that are free for them, or fewer if
    OMP_NUM_THREADS or `torch.set_num_threads` says so. Another call never adds threads.

    beside: the number of other processes of minisrv that want a core while this one computes. Their
        cores are left free, because an operation whose threads wait for one that has lost its core
        loses more than one more thread would gain.
    """
    global _spinning
    import torch

    late = _spinning and torch.get_num_threads() > 1
    if COUNT not in os.environ:
        # If torch was imported first, `_outnumber_cores` makes waiting threads sleep almost at
        # once, and they have to be woken within a step; one thread fewer is then faster.
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
    """Make GNU's OpenMP runtime, once it is loaded with its default of long spins, take the cores
    for overcommitted: if it has more threads than there are cores, waiting threads sleep after 100
    spins (see GOMP_SPINCOUNT in its manual). It counts the pools of all threads together, so one
    more pool, whose threads sleep, is enough.
    """
    import torch

    number, computed = torch.get_num_threads(), threading.Event()

    def own_a_pool() -> None:
        torch.set_num_threads(1 + (os.cpu_count() or 1))  # sets the size of this thread's own pool
        torch.zeros(1 << 20).add_(1)  # large enough that all threads of the pool are started
        computed.set()
        threading.Event().wait()  # never set, as a pool ends with the thread that owns it

    threading.Thread(target=own_a_pool, name="minisrv-openmp", daemon=True).start()
    computed.wait()
    torch.set_num_threads(number)  # threads that start later get the number that was set last


def _quota() -> float:
    """Return the CPU quota of this process's control groups, in cores; infinite without a limit.

    Only control groups of version 2 are read: each group on the path has a file cpu.max that holds
    "quota period" or "max period", in microseconds. A container sees its own group as the root.
    """
    try:
        groups = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return math.inf  # the system is not Linux
    found = math.inf
    for path in (line.removeprefix("0::/") for line in groups if line.startswith("0::/")):
        for group in (CGROUPS / path, *(CGROUPS / path).parents):
            try:
                quota, period = (group / "cpu.max").read_text().split()
            except OSError:
                continue  # the root group of a machine has no limit and lacks the file
            if quota != "max":
                found = min(found, int(quota) / int(period))
    return found
