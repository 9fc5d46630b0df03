"""How log lines look, in every process: text, or JSON with a field for everything.

A line that is written while a request is served carries the request's id. Prompts and answers are
in none. A record may come with values: those of `extra={"fields": {...}}` are part of every line,
and those of `extra={"said": {...}}`, which the message holds already, of JSON alone.

Knows: logging. Knows nothing of what is logged.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from logging.handlers import QueueHandler, QueueListener
from typing import Any

VARIABLE = "MINISRV_LOG_FORMAT"
"""An environment variable, as child processes inherit it."""

FORMATS = ("text", "json")

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being served."""


def configure(process: str = "") -> None:
    """Log to stderr from here on, in the format that `VARIABLE` names; of other packages only what
    is wrong, as some of them tell of each HTTP request.

    process: its name, in every line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if os.environ.get(VARIABLE) == "json" else _Text(process))
    logging.setLogRecordFactory(_Record)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("minisrv").setLevel(logging.INFO)


@contextmanager
def in_background() -> Iterator[None]:
    """Let a thread write what is logged, so that nobody waits for a terminal or a disk."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = QueueListener(lines, *handlers)
    root.handlers[:] = [_Queue(lines)]
    listener.start()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        listener.stop()


class _Record(logging.LogRecord):
    """Takes the request's id where it is logged, which is not where it is written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.request_id = REQUEST_ID.get()


class _Queue(QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the thread is of this process, and formats it itself


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
