"""Child processes: named, deaf to SIGINT and SIGTERM, and never left behind.

Terminals and supervisors send those signals to a whole group, and only the parent knows what is to
end and when: a child ends by itself, or when the parent says so, or with the parent. A child that
is stopped could not: the kernel lets it go on when its parent dies.

Knows: how a process starts and ends, on Linux. Knows nothing of what it does.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from minisrv import logs
from minisrv.errors import ConfigError
from minisrv.import_path import without_working_directory

logger = logging.getLogger(__name__)

PARENTS_SIGNALS = {signal.SIGINT, signal.SIGTERM}
"""What a child ignores."""

_SAFE_PATH, _PATH = "PYTHONSAFEPATH", "PYTHONPATH"

_PR_SET_PDEATHSIG = 1
"""Of Linux's `prctl`: the signal that the caller gets when the thread that started it ends."""


def process_began() -> float:
    """When this process was made, by `time.monotonic`, to 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # Some sandboxes count from another boot than their clock does.
    return time.monotonic() - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def raise_descriptor_limit() -> None:
    """Let this process, and those that it starts, have as many descriptors as the system allows.

    The soft limit is low for the sake of programs that use `select`; a connection is a descriptor.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # of a hard limit above what the kernel has been set to since
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bound_resource(kind: int, most: int) -> None:
    """Let this process, and those that it starts, take no more of a resource than that. A limit
    that is lower already stays.

    kind: one of `resource.RLIMIT_*`.
    """
    soft, hard = resource.getrlimit(kind)
    limits = (limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(kind, (min(limits), hard))


class ChildProcess:
    """The parent's handle of a process that runs `target(*arguments)`."""

    def __init__(
        self, name: str, target: Callable[..., None], *arguments: Any, private_dir: Path | None
    ) -> None:
        """Start the process at once.

        name: in logs, and behind `minisrv-` what `ps` and `top` call it, of which the kernel keeps
            15 characters.
        private_dir: the parent's own directory, which the child removes if the parent dies. None
            for a child that has none to remove, and no thread, so that it may fork: the kernel
            kills it, stopped or not, when the thread ends that starts it here.
        """
        context = multiprocessing.get_context("spawn")
        self._process: BaseProcess = context.Process(
            target=_run, args=(name, private_dir, target, arguments), name=f"minisrv-{name}"
        )
        try:
            with safe_path(), _signals_held():
                self._process.start()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """What `multiprocessing.connection.wait` finds ready once the process has ended."""
        return self._process.sentinel

    @property
    def exit_status(self) -> int | None:
        """As in `multiprocessing`: negative for a signal, None for a process that has not ended."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Wait for its end, of which the sentinel tells a moment too early; the exit status."""
        self._process.join()
        return self.exit_status

    def obituary(self) -> str:
        """How it has ended, for people: waits for its end, and leaves its number to it, by which
        others may be watching it."""
        try:
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:  # it has been waited for
            return how_it_ended(self.exit_status)
        assert found is not None, "it has been waited for"
        by_itself = found.si_code == os.CLD_EXITED
        return how_it_ended(found.si_status if by_itself else -found.si_status)

    def stop(self) -> None:
        """End the process at once and wait for it. May be called twice.

        By SIGKILL: no child keeps anything that outlives it, and none may be where a signal
        handler could run.
        """
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()


def how_it_ended(exit_status: int | None) -> str:
    """An exit status in words."""
    if exit_status is None or exit_status >= 0:
        return f"with status {exit_status}"
    try:
        name = signal.Signals(-exit_status).name
    except ValueError:  # one of the real-time signals, which have no names of their own
        name = f"signal {-exit_status}"
    if name == "SIGPROF":  # its own timer's
        return "by SIGPROF, as one operation would not end"
    return f"by {name} (the kernel's log, dmesg, may tell why: of memory that ran out, or a fault)"


def unusable_temporary_directory(error: OSError) -> ConfigError:
    """What to say where the private directory, or a file in it, cannot be made."""
    return ConfigError(
        f"there is no temporary directory that can be used ({error.strerror or error}); set TMPDIR "
        "to one that can be written to and has some megabytes left."
    )


def map_shared(path: Path, size: int) -> mmap.mmap:
    """A file of the private directory that several processes map; made, of zeros, by the first.

    size: in bytes.
    Raises ConfigError where there is no room for it.
    """
    try:
        with path.open("a+b") as file:
            # Not `truncate`: to write where no room has been set aside would end the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise unusable_temporary_directory(error) from error


@contextmanager
def _signals_held() -> Iterator[None]:
    """What a process started here inherits blocked, until it has said what to do with it. The
    caller gets at the end what came meanwhile."""
    resource_tracker.ensure_running()  # first, as its own start ends by unblocking them
    held = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def safe_path() -> Iterator[None]:
    """Spawn processes within this: they, and what multiprocessing starts beside them, look for
    modules where this one does, but not in the working directory (`minisrv.import_path`).

    Sets the environment, and `sys.path`, which a spawned process is handed.
    """
    names = {_SAFE_PATH, _PATH}
    before = {name: os.environ[name] for name in names & os.environ.keys()}
    path = sys.path
    os.environ[_SAFE_PATH] = "1"
    if _PATH in before:
        entries = without_working_directory(before[_PATH].split(os.pathsep))
        os.environ[_PATH] = os.pathsep.join(entries)
    sys.path = without_working_directory(path)
    try:
        yield
    finally:
        sys.path = path
        for name in names & os.environ.keys():
            del os.environ[name]
        os.environ |= before


def _run(
    name: str, private_dir: Path | None, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    Path("/proc/self/comm").write_text(f"minisrv-{name}")
    logs.configure(name)
    logs.take_stderr()
    for ignored in PARENTS_SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None
    if private_dir is None:
        assert parent.pid is not None
        die_with(parent.pid)
    else:
        # Not SIGKILL: every child would die of it, and none be left to remove the directory.
        # SIGCONT does nothing to one that runs. The thread sees a parent that died before this.
        _signal_at_parents_death(signal.SIGCONT)
        ends = (parent, private_dir)
        threading.Thread(target=_end_with_parent, args=ends, daemon=True).start()
    try:
        target(*arguments)
    except Exception:  # as a line like all others; multiprocessing would print it
        logger.exception("the process has failed")
        sys.exit(1)


def die_with(parent: int) -> None:
    """Have the kernel kill this process, stopped or not, when the thread ends that started it.

    parent: its process id; if that has died already, this process ends here.
    """
    _signal_at_parents_death(signal.SIGKILL)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGKILL)


def _signal_at_parents_death(signum: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signum))


def _end_with_parent(parent: BaseProcess, private_dir: Path) -> None:
    wait([parent.sentinel])
    shutil.rmtree(private_dir, ignore_errors=True)
    # Not sys.exit: the main thread may be deep in its work, and nobody is left to hear of it.
    signal.raise_signal(signal.SIGKILL)
