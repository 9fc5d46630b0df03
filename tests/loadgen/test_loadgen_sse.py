"""The event-stream parser gives the same events wherever the bytes are split."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.sse import MAX_EVENT_BYTES, SSEError, SSEParser


def parse(*parts: bytes) -> list[bytes]:
    parser = SSEParser()
    return [event for part in parts for event in parser.feed(part)]


STREAM = (
    b"\xef\xbb\xbf: a comment first\r\n"
    b'data: {"a": "\xc3\xa9"}\r\n\r\n'
    b": keep-alive\n\n"
    b"event: ping\nid: 7\nretry: 10\ndata:no space\n\n"
    b"data: one\ndata: two\r\ndata:\ndata:  three\n\n"
    b"data\n\n"
    b"data: old mac\r\r"
    b"database: not data\n\n"
    b"data: [DONE]\r\n\r\n"
    b"data: cut off by the end\n"
)
EVENTS = [
    b'{"a": "\xc3\xa9"}',
    b"no space",
    b"one\ntwo\n\n three",
    b"",
    b"old mac",
    b"[DONE]",
]


def test_whole_stream() -> None:
    assert parse(STREAM) == EVENTS


def test_split_at_every_position() -> None:
    """Fails if a CRLF or a line is taken as finished at the end of a read."""
    for at in range(len(STREAM) + 1):
        assert parse(STREAM[:at], STREAM[at:]) == EVENTS, at


def test_byte_by_byte_with_empty_reads() -> None:
    parts = [part for i in range(len(STREAM)) for part in (STREAM[i : i + 1], b"")]
    assert parse(*parts) == EVENTS


LINES = st.lists(
    st.sampled_from([b"data: x", b"data:y", b"data:", b": c", b"event: e", b"other", b""]),
    max_size=12,
)


@given(LINES, st.sampled_from([b"\n", b"\r\n", b"\r"]), st.data())
def test_any_lines_any_split(lines: list[bytes], newline: bytes, data: st.DataObject) -> None:
    """The events are those of a second, line-based implementation of the same rules, for every kind
    of newline."""
    stream = b"".join(line + newline for line in lines)
    expected, pending = [], []
    for line in lines:
        if line.startswith(b"data:"):
            pending.append(line[5:].lstrip(b" "))
        elif not line and pending:
            expected.append(b"\n".join(pending))
            pending = []
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    bounds = [0, *cuts, len(stream)]
    parts = [stream[a:b] for a, b in pairwise(bounds)]
    assert parse(*parts) == expected


def test_an_event_comes_with_its_last_byte_not_later() -> None:
    """Fails if the parser waits for the next read: a token would get the time of the one after
    it."""
    parser = SSEParser()
    assert parser.feed(b"data: x\n") == []
    assert parser.feed(b"\n") == [b"x"]


@pytest.mark.parametrize("part", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n"])
def test_endless_event_is_refused(part: bytes) -> None:
    parser = SSEParser()
    rounds = MAX_EVENT_BYTES // 65536
    with pytest.raises(SSEError, match="longer than"):  # noqa: PT012  (the last rounds raise)
        for _ in range(rounds + 2):
            parser.feed(part)
