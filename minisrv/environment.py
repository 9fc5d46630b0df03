"""Where a result comes from: what every file of figures carries (docs/results/README.md).

Imports torch only to ask what it computes with, when asked.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

PACKAGES = ("minisrv", "torch", "numpy")


class Environment(msgspec.Struct, frozen=True):
    """A command, the machine it ran on, and the versions.

    gpu: the current one and its CUDA version, None without one.
    cpus: what this process may use. memory_gib: of the whole machine. capability: the vector
    instructions that torch's kernels use. threads: torch's, inside an operation.
    load: processes that wanted a core in the minute before; much above 0 is a shared machine.
    """

    command: str
    date: str
    cpu: str
    gpu: str | None
    capability: str
    cpus: int
    memory_gib: float
    load: float
    threads: int
    platform: str
    python: str
    versions: dict[str, str]


def environment(*packages: str) -> Environment:
    """This process, on this machine, now.

    packages: whose versions matter too.
    """
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Environment(
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu_name(),
        gpu=_gpu_name(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cpus=len(os.sched_getaffinity(0)),
        memory_gib=round(memory / 2**30, 1),
        load=round(os.getloadavg()[0], 2),
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        python=platform.python_version(),
        versions={name: version(name) for name in (*PACKAGES, *packages)},
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu_name() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
