"""Runs a command that ends when the process that started this one ends, even by SIGKILL.

    python -I -S loadgen/supervisor.py SECONDS COMMAND ...

Its standard input is a socket whose other end only the starting process has. It writes there the
time of `records.clock` at which the command was started, and its process id, or the reason why it
could not be started. When the other end is closed, the command gets SIGTERM, and after SECONDS
seconds SIGKILL. SIGTERM, SIGINT and SIGHUP to this process have the same effect, and the second of
all these events is answered by SIGKILL at once. When the command has ended, the rest of its process
group is killed. The exit status is that of the command, or this process ends by the same signal.

Knows: signals and one child. It imports few modules, and those of the standard library alone, as it
is started before each server.
"""

import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress

_LINE = 0
_ENDED = b"ended"
_SIGNS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_HEEDED = _SIGNS | {signal.SIGCHLD}


def main() -> None:
    """Run the command line."""
    patience_s, *command = sys.argv[1:]
    told, teller = os.pipe()
    os.set_blocking(teller, False)
    guard = _start_guard()
    # NOTE: signals are blocked until there is a child to end; otherwise one could end this process
    # and leave the child behind.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _HEEDED)
    try:
        child = os.posix_spawnp(
            command[0],
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, _LINE, os.devnull, os.O_RDONLY, 0)],
            setpgroup=0,
            setsigmask=held,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them; not so the command
        )
    except OSError as error:
        _tell(_LINE, str(error).encode())
        sys.exit(1)
    _tell(guard, f"{child}\n".encode())
    _tell(_LINE, f"{time.perf_counter()} {child}".encode())
    signal.set_wakeup_fd(teller, warn_on_full_buffer=False)
    for number in _HEEDED:
        signal.signal(number, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, held - _HEEDED)
    status = _watch(child, told, float(patience_s))
    _tell(guard, _ENDED)
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _start_guard() -> int:
    """Fork the guard, and return the descriptor of the pipe that it reads. It kills the process
    group whose number is written there, unless `_ENDED` follows before the pipe is closed, which
    the end of this process does."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(reader)
        return writer
    os.setsid()  # a signal to the group of this process must not reach the guard
    os.close(writer)
    os.closerange(0, 3)  # nobody may wait for the guard to read the end of the log or of the socket
    heard = b""
    while part := os.read(reader, 64):
        heard += part
    group, _, rest = heard.partition(b"\n")
    if group and rest != _ENDED:
        _kill_group(int(group))
    os._exit(0)


def _watch(child: int, told: int, patience_s: float) -> int:
    """Wait for the child's end, and bring it about if a sign to end comes. Returns its exit status,
    negative for a signal.

    told: the descriptor from which the numbers of signals to this process are read.
    patience_s: seconds from SIGTERM to SIGKILL.
    """
    signs = 0
    deadline_s: float | None = None
    lines = [told, _LINE]
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _kill_group(child)
            return os.waitstatus_to_exitcode(status)
        left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        ready, _, _ = select.select(lines, [], [], left_s)
        found = not ready  # nothing is ready if the deadline has passed
        if told in ready:
            found |= any(number in _SIGNS for number in os.read(told, 1024))
        if _LINE in ready:
            lines.remove(_LINE)  # readable means closed, as nobody writes to it
            found = True
        signs += found
        if found and signs == 1:
            os.kill(child, signal.SIGTERM)
            deadline_s = time.monotonic() + patience_s
        elif found:
            _kill_group(child)
            deadline_s = None


def _tell(line: int, text: bytes) -> None:
    with suppress(OSError):  # the other end is closed; `_watch` notices it for the socket
        os.write(line, text)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS: only zombies are left
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    main()
