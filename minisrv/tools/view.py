"""`minisrv trace --view`: shows recorded step traces in a browser, without a server of the API.

A small HTTP server on this machine's loopback address serves the web page and the files, until it
is interrupted.

Knows: HTTP, and the page's files. Knows nothing of what is in a trace: the page reads it, and says
what is wrong with it.
"""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from minisrv.errors import ConfigError
from minisrv.server.ui_files import HEADERS, PAGE, SETTINGS_URL, UIFile, ui_files

HOST = "127.0.0.1"
MAX_FILES = 2
"""The page shows at most two traces side by side."""


class ViewServer(ThreadingHTTPServer):
    """Serves the page and `paths`, the traces that it shows, on a free port of the loopback
    address. Whoever makes it calls `serve_forever`, and `server_close` at the end.

    Raises ConfigError if a file cannot be read.
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[Path]) -> None:
        if not 1 <= len(paths) <= MAX_FILES:
            raise ConfigError(f"{len(paths)} traces cannot be shown; name one, or two to compare.")
        for path in paths:
            try:
                path.open("rb").close()
            except OSError as error:
                raise ConfigError(
                    f"the trace {path} cannot be read ({error.strerror}); record one with "
                    "`minisrv trace FILE`."
                ) from None
        self.paths = tuple(paths)
        super().__init__((HOST, 0), _Handler)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def file(self, path: str) -> UIFile | None:
        """Return what is at a path of a URL; None for nothing."""
        if path == "/":
            return ui_files()[PAGE]
        if path == f"/{SETTINGS_URL}":
            names = [path.name for path in self.paths]
            told = {"keyed": False, "chat": False, "traces": names}
            return UIFile(json.dumps(told).encode(), "application/json")
        for index, trace in enumerate(self.paths):
            if path == f"/ui/traces/{index}":
                return UIFile(trace.read_bytes(), "application/x-ndjson")
        return ui_files().get(path.removeprefix("/ui/"))


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer

    def do_GET(self) -> None:
        """Answer a request. One for another host name is refused: a web page of anybody could reach
        the traces by making its own name mean this machine."""
        name = self.headers.get("host", "").rpartition(":")[0]
        if name not in (HOST, "localhost"):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        try:
            file = self.server.file(self.path)
        except OSError:  # the trace has been removed
            file = None
        if file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        for header, value in HEADERS.items():
            self.send_header(header, value)
        self.send_header("content-type", file.media_type)
        self.send_header("content-length", str(len(file.content)))
        self.end_headers()
        self.wfile.write(file.content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def view(paths: Sequence[Path]) -> int:
    """Show traces in a browser until Ctrl-C, and return the exit status. Raises ConfigError."""
    with ViewServer(paths) as server:
        print(f"minisrv: the trace is shown at {server.url} until Ctrl-C", flush=True)
        webbrowser.open(server.url)
        server.serve_forever()
    return 0
