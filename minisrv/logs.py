"""The format of log lines, as text or as JSON, and their way to stderr, in every process.

Lines are written by `log_writer`, so that no code that logs waits for stderr. A line that is logged
while a request is served carries the request's id. No line holds a prompt or an answer. A record
may come with values: those of `extra={"fields": {...}}` are part of every line, and those of
`extra={"json_fields": {...}}`, which the message already holds, of JSON lines alone. A line is
formatted where it is logged, so no logged object is kept alive.

A process that serves takes over its stderr (`take_stderr`): warnings, tracebacks of threads and
text that a library prints become lines like all others. Text that native code writes goes past this
to the descriptor itself: a message of zmq or of torch's C++, or a panic of Rust code before the
process dies.

Knows: logging. Knows nothing of what is logged.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import sys
import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from minisrv.log_writer import LogWriter

VARIABLE = "MINISRV_LOG_FORMAT"
"""Name of the environment variable that holds the format; child processes inherit it."""

FORMATS = ("text", "json")

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that is being served; empty outside of requests."""

LAST_SECONDS = 1.0
"""Seconds that a process waits at its end for its last lines to be written."""

_STDERR = 2

logger = logging.getLogger(__name__)


def is_json() -> bool:
    """Whether every log line is a JSON object."""
    return os.environ.get(VARIABLE) == "json"


def configure(process: str = "") -> None:
    """Log to stderr from here on, in the format that the environment variable `VARIABLE` names. Of
    other packages only warnings and errors are logged, as some of them log each HTTP request. The
    process has a thread that writes, and waits for it at its end for up to `LAST_SECONDS`.

    process: the name of the process, which every line holds.
    """
    _open_standard_descriptors()
    global _formatter
    _formatter = _Json(process) if is_json() else _Text(process)
    handler = _Handler()
    handler.setFormatter(_formatter)
    logging.setLogRecordFactory(_Record)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("minisrv").setLevel(logging.INFO)
    atexit.unregister(_end)
    atexit.register(_end)


def take_stderr() -> None:
    """Make log lines of whatever else Python writes to stderr. To be called after `configure`."""
    sys.stderr = _Stderr()
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def flush() -> None:
    """Wait until the lines logged so far are written, for `LAST_SECONDS` at most."""
    _writer.flush(LAST_SECONDS)


def _open_standard_descriptors() -> None:
    """Open /dev/null for each of the descriptors 0 to 2 that is closed. Otherwise another file
    would get its number, and with it the log lines of this process or of a child."""
    for fd in range(_STDERR + 1):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    if sys.stderr is None:
        sys.stderr = open(_STDERR, "w", closefd=False)  # noqa: SIM115 (print would use stdout)


def _end() -> None:
    if isinstance(sys.stderr, _Stderr):
        sys.stderr.end_line()
    flush()


def _dropped_lines_notice(count: int) -> str:
    """Return the line that stands in the place of `count` missing ones."""
    message = "%d lines of the log are missing here, as nobody read it or it could not be written"
    extra = {"json_fields": {"dropped": count}}
    record = logger.makeRecord(
        logger.name, logging.WARNING, __file__, 0, message, (count,), None, extra=extra
    )
    return _formatter.format(record) + "\n"


_formatter = logging.Formatter()
"""The formatter that `configure` has chosen."""

_writer = LogWriter(_STDERR, _dropped_lines_notice)
os.register_at_fork(after_in_child=_writer.reset)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            _writer.put(self.format(record).rstrip("\n") + "\n")
        except Exception:
            self.handleError(record)


class _Stderr(io.TextIOBase):
    """Replaces `sys.stderr`: writes text as it is, or in JSON format an object for each line."""

    def __init__(self) -> None:
        # Each thread keeps its own line that has not ended, so that threads do not mix their lines;
        # a lock for that might be held when the process forks.
        self._line = threading.local()

    def write(self, text: str) -> int:
        added = text.replace("\r", "\n") if is_json() else text
        *lines, begun = (self._take_line() + added).split("\n")
        for line in lines:
            self._put(line + "\n")
        self._line.begun = begun
        if "\r" in begun:  # progress bars use it, and a terminal's stream flushes for it as well
            self.flush()
        return len(text)

    def flush(self) -> None:
        if not is_json():
            self.end_line()

    def end_line(self) -> None:
        """Write the line that this thread has begun, though it has no end."""
        if line := self._take_line():
            self._put(line)

    def _take_line(self) -> str:
        begun: str = getattr(self._line, "begun", "")
        self._line.begun = ""
        return begun

    def _put(self, line: str) -> None:
        if not is_json():
            _writer.put(line)
        elif line.strip():
            logging.getLogger("stderr").warning("%s", line.rstrip())

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(_STDERR) and not is_json()  # no progress bar between JSON objects

    def fileno(self) -> int:
        return _STDERR

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed declares a variable
        return "utf-8"


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logger.critical("an error that nobody has caught", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_value is not None:
        name = found.thread.name if found.thread is not None else "that has ended"
        trace = (found.exc_type, found.exc_value, found.exc_traceback)
        logger.error("an error that nobody has caught in thread %s", name, exc_info=trace)


def _log_unraisable(found: sys.UnraisableHookArgs) -> None:
    message = found.err_msg or "an error that nobody could catch"
    trace = (found.exc_type, found.exc_value, found.exc_traceback)
    logger.error("%s: %r", message, found.object, exc_info=trace)  # type: ignore[arg-type]


class _Record(logging.LogRecord):
    """A record that takes the request's id where it is logged, as the thread that writes it has
    none. Its name is unlike those that other libraries add to their records, which logging refuses
    if the record has one already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.minisrv_request_id = REQUEST_ID.get()


class _Text(logging.Formatter):
    """Formats a line of text for people; the record's `fields` follow the message as name=value."""

    def __init__(self, process: str) -> None:
        name = f" {process}:" if process else ""
        super().__init__(f"%(asctime)s %(levelname)s{name} %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        line = super().formatMessage(record)
        fields = _values(record, "fields")
        if request_id := _request_id(record):
            fields["request"] = request_id
        return " ".join((line, *(f"{name}={value}" for name, value in fields.items())))


class _Json(logging.Formatter):
    """Formats a record as a JSON object in one line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "process": self._process or "launcher",
            "logger": record.name,
            "message": record.getMessage(),
            **_values(record, "json_fields"),
            **_values(record, "fields"),
        }
        if request_id := _request_id(record):
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _request_id(record: logging.LogRecord) -> str:
    return record.minisrv_request_id if isinstance(record, _Record) else ""


def _values(record: logging.LogRecord, name: str) -> dict[str, Any]:
    """Return the values that were passed as `extra={name: ...}`."""
    return dict(getattr(record, name, {}))
