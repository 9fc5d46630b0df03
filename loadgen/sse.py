"""An incremental parser of server-sent events: bytes in, the data of each event out.

Knows the line rules of the event-stream format (LF, CRLF and CR, comments, several data lines in
one event, a leading byte-order mark) and that bytes may be split anywhere. Does not know JSON, nor
what an event means; the fields event, id and retry are skipped. What follows the last blank line
is no event, as the format demands.
"""

MAX_EVENT_BYTES = 4 << 20

_BOM = b"\xef\xbb\xbf"


class SSEError(ValueError):
    """The stream cannot be an event stream: one event exceeds `MAX_EVENT_BYTES`."""


class SSEParser:
    """Holds the unfinished line and event between two calls of `feed`."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._size = 0
        self._at_start = True
        self._skip_lf = False  # the last byte seen was a CR, so a LF now belongs to it

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes of the stream and return the data of each event they complete."""
        if not data:
            return []
        if self._skip_lf and data.startswith(b"\n"):
            data = data[1:]
            self._skip_lf = False
        if data:
            self._skip_lf = data.endswith(b"\r")
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = (self._line + data).split(b"\n")
        self._line = lines.pop()
        events = []
        for line in lines:
            if self._at_start:
                line = line.removeprefix(_BOM)
                self._at_start = False
            if line:
                self._field(line)
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data = []
                self._size = 0
        if self._size + len(self._line) > MAX_EVENT_BYTES:
            raise SSEError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._size += len(value) + 1
