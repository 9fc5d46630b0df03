"""An incremental parser of server-sent events: it is given bytes, and returns the data of events.

Knows: the line rules of the event-stream format (LF, CRLF and CR, comments, several data lines in
one event, a leading byte-order mark), and that bytes may be split anywhere. Knows nothing of JSON,
nor of what an event means. The fields event, id and retry are skipped. As the format demands, bytes
after the last blank line are no event.
"""

MAX_EVENT_BYTES = 4 << 20

_BOM = b"\xef\xbb\xbf"


class SSEError(ValueError):
    """The stream cannot be an event stream: one event exceeds `MAX_EVENT_BYTES`."""


class SSEParser:
    """Parses one stream, and holds the unfinished line and event between two calls of `feed`."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._size = 0
        self._at_start = True
        self._skip_lf = False  # whether the last byte was a CR, to which a LF that follows belongs

    def feed(self, data: bytes) -> list[bytes]:
        """Parse the next bytes of the stream, and return the data of each event that they complete.
        Raises SSEError."""
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
