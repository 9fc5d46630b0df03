"""The files of the web page: what `ui/` at the top of the repository is built into.

They are kept in memory, because a file would take a descriptor for as long as a client reads it.

Knows: the files, and the headers that they are served with. Knows nothing of FastAPI, as a recorded
trace is shown without a server of the API (`minisrv.tools.view`).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import NamedTuple

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
}

PAGE = "index.html"
"""The name of the page itself."""

SETTINGS_URL = "ui/settings.json"
"""The relative URL of what the page is told about the server: `keyed`, whether requests need an API
key; `chat`, whether the model has a chat template; `traces`, the names of the recorded traces that
it shows in place of a server, of which the one at index N is at `ui/traces/N`."""

LOCKED_POLICY = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""The part of a content security policy that is the same for all pages."""

COMMON_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
"""Headers of everything that is served to browsers."""

HEADERS = COMMON_HEADERS | {
    "cache-control": "no-cache",  # another version may serve tomorrow at the same address
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        f"img-src data:; require-trusted-types-for 'script'; {LOCKED_POLICY}"
    ),
}
"""Headers of the page and its files. No script or style within the page is allowed, and nothing
from another origin."""


class UIFile(NamedTuple):
    """The content of a file, and its media type."""

    content: bytes
    media_type: str


@cache
def ui_files() -> dict[str, UIFile]:
    """Return the files of the page by name."""
    found = files("minisrv.server") / "ui"
    return {
        entry.name: UIFile(entry.read_bytes(), _TYPES[entry.name.rpartition(".")[2]])
        for entry in found.iterdir()
    }
