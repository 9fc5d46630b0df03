"""Child processes that have a name, ignore SIGINT and SIGTERM, and never outlive their parent.

Terminals and supervisors send those signals to a whole process group, and only the parent knows
which process is to end and when: a child ends by itself, or when the parent stops it, or when the
parent dies. A child that is suspended (SIGSTOP) could not see that its parent died, so the kernel
then resumes or kills it.

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
from types import ModuleType
from typing import Any

from minisrv import logs
from minisrv.errors import ConfigError
from minisrv.import_path import without_working_directory

logger = logging.getLogger(__name__)

PARENTS_SIGNALS = {signal.SIGINT, signal.SIGTERM}
"""Signals that are meant for the parent, and that a child ignores."""

_SAFE_PATH, _PATH = "PYTHONSAFEPATH", "PYTHONPATH"

_PR_SET_PDEATHSIG = 1
"""Option of Linux's `prctl` that sets the signal which the calling process gets when the thread
that started it ends."""


def process_began() -> float:
    """Return the time at which this process was created, on the clock of `time.monotonic`, in
    seconds with a resolution of 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # In some sandboxes the start time counts from another boot than the clock does.
    return time.monotonic() - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of file descriptors of this process, and of those that it starts, to the
    hard limit.

    The soft limit is low for the sake of programs that use `select`; each connection takes a
    descriptor.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # raised if the kernel's maximum was set below the hard limit since
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bound_resource(kind: int, limit: int) -> None:
    """Limit a resource of this process and of those that it starts. A limit that is lower already
    stays.

    kind: one of `resource.RLIMIT_*`.
    limit: the soft limit, in the unit of that kind.
    """
    soft, hard = resource.getrlimit(kind)
    bounds = (bound for bound in (limit, soft, hard) if bound != resource.RLIM_INFINITY)
    resource.setrlimit(kind, (min(bounds), hard))


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Hide the main module from a process that is started in the block. A spawned process imports
    it otherwise, so that a user's script without a guard of its name would run once more in each
    child, and one that is read from standard input would end it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class ChildProcess:
    """The parent's handle for a child process that runs `target(*arguments)`."""

    def __init__(
        self, name: str, target: Callable[..., None], *arguments: Any, private_dir: Path | None
    ) -> None:
        """Start the process at once.

        name: its name in logs; `ps` and `top` show `minisrv-` and this name, of which together the
            kernel keeps 15 characters.
        private_dir: the parent's own directory, which the child removes if the parent dies. The
            child's temporary files, and those of its own children, lie there too. None for a child
            that has none to remove: it then has no thread that watches the parent, so that it may
            fork, and the kernel kills it, suspended or not, when the thread ends that makes this
            object.
        """
        context = multiprocessing.get_context("spawn")
        self._process: BaseProcess = context.Process(
            target=_run, args=(name, private_dir, target, arguments), name=f"minisrv-{name}"
        )
        try:
            with safe_path(), _signals_blocked(), _hidden_main():
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
        """The handle that `multiprocessing.connection.wait` finds ready once the process has
        ended."""
        return self._process.sentinel

    @property
    def exit_status(self) -> int | None:
        """The exit status as in `multiprocessing`: the negative number of the signal that ended the
        process, or None if it has not ended."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Wait until the process has ended, and return its exit status. The sentinel is ready a
        moment before the status can be read."""
        self._process.join()
        return self.exit_status

    def describe_exit(self) -> str:
        """Wait until the process has ended, and return in words how it ended. It is not reaped, so
        that its process id, by which others may watch it, is not reused."""
        try:
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:  # the process has been reaped
            return describe_exit_status(self.exit_status)
        assert found is not None, "it has been waited for"
        by_itself = found.si_code == os.CLD_EXITED
        return describe_exit_status(found.si_status if by_itself else -found.si_status)

    def kill(self) -> None:
        """End the process as `stop` does, but do not wait for its end."""
        self._process.kill()

    def stop(self) -> None:
        """End the process at once and wait for its end. May be called twice.

        It is ended by SIGKILL: no child holds anything that must be cleaned up, and a child may be
        in native code, where no handler of a signal could run.
        """
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()


def describe_exit_status(exit_status: int | None) -> str:
    """Return in words how a process with this exit status ended."""
    if exit_status is None or exit_status >= 0:
        return f"with status {exit_status}"
    try:
        name = signal.Signals(-exit_status).name
    except ValueError:  # a real-time signal, which has no name of its own
        name = f"signal {-exit_status}"
    if name == "SIGPROF":  # its own timer's
        return "by SIGPROF, as one operation would not end"
    return f"by {name} (the kernel's log, dmesg, may tell why: of memory that ran out, or a fault)"


def unusable_temporary_directory(error: OSError) -> ConfigError:
    """Return the error to raise if the private directory, or a file in it, cannot be made."""
    return ConfigError(
        f"there is no temporary directory that can be used ({error.strerror or error}); set TMPDIR "
        "to one that can be written to and has some megabytes left."
    )


def map_shared(path: Path, size: int) -> mmap.mmap:
    """Map a file of the private directory that several processes share; the first one makes it,
    filled with zeros.

    size: bytes of the file.
    Raises ConfigError if there is no room for it.
    """
    try:
        with path.open("a+b") as file:
            # Not `truncate`, which reserves no room on the disk: if a write to the mapping then
            # found none, a signal would end the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise unusable_temporary_directory(error) from error


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block `PARENTS_SIGNALS` within this context: a process that is started here inherits them
    blocked, until it ignores them. The caller receives at the end the signals that came
    meanwhile."""
    resource_tracker.ensure_running()  # first, because its start unblocks these signals at its end
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


@contextmanager
def safe_path() -> Iterator[None]:
    """Keep the working directory out of the module path of processes that are spawned within this
    context: they, and the processes that multiprocessing starts beside them, look for modules where
    this process does, but not there (see `minisrv.import_path`).

    Sets the environment, and `sys.path`, which multiprocessing hands to a spawned process.
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
        die_with_parent(parent.pid)
    else:
        # Not SIGKILL: it would kill every child, and leave none to remove the directory. SIGCONT
        # resumes a suspended child and does nothing to a running one. If the parent died before
        # this call, the thread sees that.
        _signal_at_parents_death(signal.SIGCONT)
        os.environ["TMPDIR"] = str(private_dir)
        ends = (parent, private_dir)
        threading.Thread(target=_end_with_parent, args=ends, daemon=True).start()
    try:
        target(*arguments)
    except Exception:  # logged as a line like all others; multiprocessing would print a traceback
        logger.exception("the process has failed")
        sys.exit(1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process, suspended or not, when the thread ends that started it.

    parent: the id of the parent process; if it has died already, this process ends here.
    """
    _signal_at_parents_death(signal.SIGKILL)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGKILL)


def _signal_at_parents_death(signum: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signum))


def _end_with_parent(parent: BaseProcess, private_dir: Path) -> None:
    wait([parent.sentinel])
    shutil.rmtree(private_dir, ignore_errors=True)
    # Not sys.exit, which would end this thread only; the main thread may be busy, and no parent is
    # left that would read an exit status.
    signal.raise_signal(signal.SIGKILL)
