"""The results of memory probes, kept for the next start of the same engine.

A probe captures graphs only to see how much memory they take. The same engine on the same machine
takes the same memory at each start, so a result is kept under all that it depends on, and the next
start captures no graph twice. A result is kept only while no start that relies on it has failed:
each start takes it out of the cache, and keeps it again once the memory has sufficed.

Knows: what a probe's result depends on, and the cache. Knows nothing of how memory is measured.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from minisrv.cache import cache_directory, code_digest, read_cached, write_cached
from minisrv.engine.kernel_process import lists_directory
from minisrv.engine.kernels import KernelJob

logger = logging.getLogger(__name__)

_DRIVER = Path("/proc/driver/nvidia/version")
"""The exact release of the driver, which not every container shows."""

_ALLOCATOR = "PYTORCH_"
"""Prefix of the variables that set how torch allocates memory."""


class ProbeResult(msgspec.Struct, frozen=True):
    """What a probe has measured.

    step_bytes: the number of bytes that the largest steps take beside weights and cache.
    graph_bytes: the number of bytes that all graphs of one generation take.
    """

    step_bytes: int
    graph_bytes: int


def result_path(job: KernelJob, *others: object) -> Path | None:
    """Return the file for the result of a probe; None, with the reason in the log, if none can be
    kept.

    job: what decides which kernels the engine launches.
    others: whatever else the result depends on, such as the sizes of the probe's tensors.
    """
    try:
        driver = _DRIVER.read_text() if _DRIVER.exists() else ""
        settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_ALLOCATOR)]
        parts = job.key(), lists_directory().name, code_digest(("engine",)), driver, *settings
        key = hashlib.sha256("\0".join([*parts, repr(others)]).encode()).hexdigest()[:32]
        return cache_directory("probes") / f"{key}.msgpack"
    except Exception as error:  # as without Triton, or where nobody may write
        logger.warning("the result of the memory probe is not kept: %s", error)
        return None


def take_result(path: Path) -> ProbeResult | None:
    """Return the result that is kept in a file, None if there is none. It is forgotten until
    `keep_result`: however a start ends that fails by it, the next one measures again."""
    body = read_cached(path)
    with suppress(OSError):  # where nothing can be removed, results cannot be replaced either
        path.unlink(missing_ok=True)
    try:
        return None if body is None else msgspec.msgpack.decode(body, type=ProbeResult)
    except msgspec.MsgspecError:
        return None


def keep_result(path: Path, result: ProbeResult) -> None:
    """Keep a result in a file, if it can be written."""
    write_cached(path, msgspec.msgpack.encode(result))
