"""How log lines look and which way they go, in every process: text, or JSON with a field for
everything, to stderr through `log_writer`, for which nobody waits.

A line that is written while a request is served carries the request's id. Prompts and answers are
in none. A record may come with values: those of `extra={"fields": {...}}` are part of every line,
and those of `extra={"said": {...}}`, which the message holds already, of JSON alone. A line is made
where it is logged, and holds on to nothing.

A process that serves has its stderr to itself (`take_stderr`): warnings, tracebacks of threads and
what a library prints are lines like all others. What native code writes goes to the descriptor
itself, past all this: a message of zmq or torch's C++, a panic of Rust's before the process dies.

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
"""An environment variable, as child processes inherit it."""

FORMATS = ("text", "json")

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being served."""

LAST_SECONDS = 1.0
"""What a process that ends gives whoever reads its last lines."""

_STDERR = 2

logger = logging.getLogger(__name__)


def is_json() -> bool:
    """Whether every line is an object."""
    return os.environ.get(VARIABLE) == "json"


def configure(process: str = "") -> None:
    """Log to stderr from here on, in the format that `VARIABLE` names; of other packages only what
    is wrong, as some of them tell of each HTTP request. The process has a thread for it, and gives
    it `LAST_SECONDS` at its end.

    process: its name, in every line.
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
    """Let whatever else Python writes to stderr go the same way, after `configure`."""
    sys.stderr = _Stderr()
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def flush() -> None:
    """Wait until what has been logged is written, for `LAST_SECONDS` at most."""
    _writer.flush(LAST_SECONDS)


def _open_standard_descriptors() -> None:
    """Let no other file get the number of one that is closed, and with it what is logged, here or
    in a child process."""
    for fd in range(_STDERR + 1):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
    if sys.stderr is None:
        sys.stderr = open(_STDERR, "w", closefd=False)  # noqa: SIM115 (print would take stdout)


def _end() -> None:
    if isinstance(sys.stderr, _Stderr):
        sys.stderr.end_line()
    flush()


def _tell_of_dropped(count: int) -> str:
    """The line that stands for `count` others."""
    message = "%d lines of the log are missing here, as nobody read it or it could not be written"
    extra = {"said": {"dropped": count}}
    record = logger.makeRecord(
        logger.name, logging.WARNING, __file__, 0, message, (count,), None, extra=extra
    )
    return _formatter.format(record) + "\n"


_formatter = logging.Formatter()
"""What `configure` has chosen."""

_writer = LogWriter(_STDERR, _tell_of_dropped)
os.register_at_fork(after_in_child=_writer.reset)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            _writer.put(self.format(record).rstrip("\n") + "\n")
        except Exception:
            self.handleError(record)


class _Stderr(io.TextIOBase):
    """What is printed to stderr: text as it is, or of JSON an object for each line."""

    def __init__(self) -> None:
        # A line that has not ended is its thread's: so threads do not mix theirs, without a lock
        # that might be held when the process forks.
        self._line = threading.local()

    def write(self, text: str) -> int:
        added = text.replace("\r", "\n") if is_json() else text
        *lines, begun = (self._take_line() + added).split("\n")
        for line in lines:
            self._put(line + "\n")
        self._line.begun = begun
        if "\r" in begun:  # bars are drawn with it, and a terminal's stream lets it go as well
            self.flush()
        return len(text)

    def flush(self) -> None:
        if not is_json():
            self.end_line()

    def end_line(self) -> None:
        """Let go of a line that has no end."""
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
        return os.isatty(_STDERR) and not is_json()  # so no bar is drawn between objects

    def fileno(self) -> int:
        return _STDERR

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has a variable
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
    """Takes the request's id where it is logged, which is not where it is written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.request_id = REQUEST_ID.get()


class _Text(logging.Formatter):
    """A line for people. `fields` beside the message follow it as name=value."""

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
    """An object in a line."""

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
            **_values(record, "said"),
            **_values(record, "fields"),
        }
        if request_id := _request_id(record):
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _request_id(record: logging.LogRecord) -> str:
    return record.request_id if isinstance(record, _Record) else ""


def _values(record: logging.LogRecord, name: str) -> dict[str, Any]:
    """What was passed as `extra={name: ...}`."""
    return dict(getattr(record, name, {}))
