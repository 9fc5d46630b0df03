"""Memory, open files and threads of a server's processes, and memory of the GPUs.

Knows: /proc and nvidia-smi. Knows nothing of what a server does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path


def processes(root: int) -> dict[str, dict[str, float]]:
    """Return memory (MiB), open files and threads of a process and all its descendants, by the
    names of the processes.

    root: the id of the process.
    """
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parents[int(entry.name)] = int(_fields_of(entry)[1])
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    found: dict[str, dict[str, float]] = {}
    for pid in sorted(tree):
        process = Path("/proc", str(pid))
        with suppress(OSError, KeyError):  # raised if the process has just ended
            name = (process / "comm").read_text().strip()
            if name.startswith("python"):  # the process has not set a name of its own
                name = f"{Path('/proc', str(parents[pid]), 'comm').read_text().strip()}'s {name}"
            same = sum(other.partition(" #")[0] == name for other in found)
            found[f"{name} #{same + 1}" if same else name] = _sizes(process)
    return found


def _fields_of(process: Path) -> list[str]:
    """Return the fields of `stat` of a process that follow its name: state, parent, ..."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def _sizes(process: Path) -> dict[str, float]:
    status = _kib(process / "status")
    try:
        rollup = _kib(process / "smaps_rollup")
    except OSError:  # some kernels do not have this file
        rollup = {}
    own = rollup.get("Anonymous") or status.get("RssAnon") or status["VmRSS"]
    sizes = {"own_mib": own, "rss_mib": status["VmRSS"], "pss_mib": rollup.get("Pss", 0)}
    return {name: round(kib / 1024, 2) for name, kib in sizes.items()} | {
        "files": len(os.listdir(process / "fd")),
        "threads": status["Threads"],
    }


def _kib(file: Path) -> dict[str, int]:
    """Return the numbers, by name, of a file whose lines are `Name: 12 kB`."""
    pairs = (line.partition(":")[::2] for line in file.read_text().splitlines())
    return {name: int(n[0]) for name, rest in pairs if (n := rest.split()) and n[0].isdecimal()}


def gpu_mib() -> list[int] | None:
    """Return the memory in use on each GPU in MiB; None without nvidia-smi or a GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    ran = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return [int(line) for line in ran.stdout.split() if line.isdecimal()] or None
