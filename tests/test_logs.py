"""Log lines: text and JSON, with the request's id, from where it was logged."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from minisrv import logs


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], io.StringIO]]:
    """Configures what is logged, as a process does, and gives what it writes to."""
    root, factory = logging.getLogger(), logging.getLogRecordFactory()
    handlers, level = root.handlers[:], root.level
    written = io.StringIO()

    def configure(format: str) -> io.StringIO:
        monkeypatch.setenv(logs.VARIABLE, format)
        monkeypatch.setattr("sys.stderr", written)
        logs.configure("api-0")
        return written

    yield configure
    root.handlers[:], root.level = handlers, level
    logging.setLogRecordFactory(factory)


def write_some() -> None:
    logging.getLogger("minisrv.a").info("it is %d", 3, extra={"fields": {"status": 200, "ms": 1.5}})
    token = logs.REQUEST_ID.set("req-1")
    try:
        raise ValueError("broken\nline")
    except ValueError:
        logging.getLogger("b").exception("failed")
    finally:
        logs.REQUEST_ID.reset(token)


def test_text(log: Callable[[str], io.StringIO]) -> None:
    written = log("text")
    write_some()
    first, second, *rest = written.getvalue().splitlines()
    assert first.endswith("INFO api-0: it is 3 status=200 ms=1.5")
    assert second.endswith("ERROR api-0: failed request=req-1")
    assert rest[0].startswith("Traceback")


def test_what_the_message_says_has_fields_in_json_alone(log: Callable[[str], io.StringIO]) -> None:
    for format in ("text", "json"):
        written = log(format)
        logging.getLogger("minisrv.a").info("3 reqs", extra={"said": {"running": 3}})
    text, line = written.getvalue().splitlines()
    assert text.endswith("INFO api-0: 3 reqs")
    assert json.loads(line)["running"] == 3


@pytest.mark.parametrize("in_background", [False, True])
def test_json_written_at_once_or_by_a_thread(
    log: Callable[[str], io.StringIO], in_background: bool
) -> None:
    written = log("json")
    if in_background:
        with logs.in_background():
            write_some()
    else:
        write_some()
    first, second = map(json.loads, written.getvalue().splitlines())
    assert first.pop("time")
    assert first == {
        "level": "info",
        "process": "api-0",
        "logger": "minisrv.a",
        "message": "it is 3",
        "status": 200,
        "ms": 1.5,
    }
    assert second["request_id"] == "req-1"
    assert "broken\nline" in second["exception"]
