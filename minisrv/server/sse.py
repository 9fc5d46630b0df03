"""Server-sent events, framed as OpenAI does, or with names, as Anthropic does.

Knows: bytes. All chunks of a stream are equal but for their choice, so the rest is encoded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode

encode_text: Callable[[str], bytes] = _encode
"""Encodes a text as JSON."""


def event(data: Any) -> bytes:
    """Return one event with `data` as JSON."""
    return b"data: " + _encode(data) + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """Return one event with a name and `data` as JSON."""
    return b"event: %b\n%b" % (name.encode(), event(data))


def tagged_event(data: msgspec.Struct) -> bytes:
    """Return one event with `data` as JSON, and the tag of its struct as the name."""
    return named_event(str(data.__struct_config__.tag), data)


class ChunkEncoder:
    """Encodes events that differ in their one choice only.

    chunk: the data of these events, without a choice.
    """

    def __init__(self, chunk: msgspec.Struct) -> None:
        self._before, _, self._after = event(chunk).partition(b'"choices":[]')
        self._before += b'"choices":['
        self._after = b"]" + self._after

    def encode(self, choice: msgspec.Struct) -> bytes:
        """Return the event with this choice."""
        return self._before + _encode(choice) + self._after

    def around_text(self, choice: msgspec.Struct, key: str) -> tuple[bytes, bytes]:
        """Return the bytes before and behind the JSON-encoded text in events with this choice, of
        which only the value of `key`, empty here, changes. The key must occur once."""
        before, _, after = self.encode(choice).partition(b'"%b":""' % key.encode())
        return before + b'"%b":' % key.encode(), after
