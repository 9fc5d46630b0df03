"""The files of the web page are built ahead and committed, so that installing needs no node."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from minisrv.server.ui_files import ui_files

UI = Path(__file__).parents[2] / "ui"


def digest_of_sources() -> str:
    """The digest that ui/build.mjs computes."""
    paths = [UI / "package.json", UI / "build.mjs", *(UI / "src").iterdir()]
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.relative_to(UI).as_posix()):
        digest.update(path.relative_to(UI).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


@pytest.mark.parametrize("name", ["index.html", "app.js", "app.css"])
def test_the_built_files_are_those_of_the_sources(name: str) -> None:
    first = ui_files()[name].content.decode().partition("\n")[0]
    assert f" sources sha256 {digest_of_sources()} " in first, (
        "the web page was not built after its last change: run `npm ci && npm run build` in ui/"
    )


def test_there_are_no_other_files() -> None:
    assert set(ui_files()) == {"index.html", "app.js", "app.css"}
