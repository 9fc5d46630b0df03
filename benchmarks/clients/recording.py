"""A proxy that records the bodies of requests on their way to a server, whatever client sends them.

Knows: HTTP. Knows nothing of clients or of what is asked for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

NOT_PASSED_ON = {"connection", "content-length", "host", "transfer-encoding", "accept-encoding"}


@contextmanager
def recording(url: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the URL of a proxy of `url`, and the list in which it records paths and JSON bodies."""
    recorded: list[dict[str, Any]] = []
    host, port = urlsplit(url).hostname, urlsplit(url).port

    class Handler(BaseHTTPRequestHandler):
        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if body:
                recorded.append({"path": self.path, "body": json.loads(body)})
            headers = {k: v for k, v in self.headers.items() if k.lower() not in NOT_PASSED_ON}
            target = HTTPConnection(host or "", port)
            target.request(self.command, self.path, body, headers)
            answer = target.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in NOT_PASSED_ON:
                    self.send_header(name, value)
            self.end_headers()
            while piece := answer.read1():
                self.wfile.write(piece)
                self.wfile.flush()
            target.close()

        do_GET = do_POST = do_DELETE = _pass_on  # noqa: N815 - http.server looks for these names

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", recorded
        finally:
            server.shutdown()
            thread.join()
