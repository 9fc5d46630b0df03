"""The environment of a measurement, which every file of results carries (docs/results/README.md).

torch is imported only when `environment` is called, to read its threads and instruction set.
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

from minisrv.machine import cpu_name

PACKAGES = ("minisrv", "torch", "numpy")


class Environment(msgspec.Struct, frozen=True):
    """A command, the machine on which it ran, and the versions of packages.

    gpu: name of the current GPU, and the CUDA version; None without a GPU.
    cpus: number of CPUs that this process may use.
    memory_gib: memory of the whole machine in GiB.
    capability: the vector instructions that torch's CPU kernels use.
    threads: number of threads with which torch computes one operation.
    load: average number of processes that wanted a core in the minute before (the load average);
        a value much above 0 means that the machine was shared.
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
    """Return the environment of this process on this machine, at this moment.

    packages: names of packages whose versions are included beside `PACKAGES`.
    """
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Environment(
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=cpu_name(),
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


def _gpu_name() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
