"""`minisrv trace --view` serves the page and the named files, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from minisrv.cli import main
from minisrv.server.ui_files import ui_files
from minisrv.tools.view import ViewServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ViewServer]:
    paths = [tmp_path / "left.ndjson", tmp_path / "right.ndjson"]
    for path in paths:
        path.write_text(f"{path.stem}\n")
    with ViewServer(paths) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: ViewServer, path: str, **headers: str) -> httpx.Response:
    return httpx.get(server.url + path, headers=headers, trust_env=False)


def test_the_page_and_the_files_are_served(server: ViewServer) -> None:
    page = get(server, "")
    assert page.content == ui_files()["index.html"].content
    assert page.headers["content-security-policy"].startswith(
        "default-src 'none'; script-src 'self'"
    )
    settings = get(server, "ui/settings.json").json()
    assert settings == {"keyed": False, "chat": False, "traces": ["left.ndjson", "right.ndjson"]}
    assert get(server, "ui/app.js").headers["content-type"].startswith("text/javascript")
    assert [get(server, f"ui/traces/{index}").text for index in (0, 1)] == ["left\n", "right\n"]


def test_nothing_else_is_served(server: ViewServer) -> None:
    for path in ("ui/traces/2", "ui/traces/-1", "ui/../view.py", "left.ndjson", "ui/", "nowhere"):
        assert get(server, path).status_code == 404, path
    server.paths[0].unlink()
    assert get(server, "ui/traces/0").status_code == 404


def test_a_page_that_lets_its_own_name_mean_this_machine_gets_nothing(server: ViewServer) -> None:
    for host in ("a.example", f"a.example:{server.server_port}", ""):
        assert get(server, "ui/traces/0", host=host).status_code == 421
    assert get(server, "ui/traces/0", host=f"localhost:{server.server_port}").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.ndjson", "--view"], "nowhere.ndjson cannot be read (No such file or directory)"),
        (["a", "b", "c", "--view"], "3 traces cannot be shown"),
        (["a", "--view", "--seconds", "3"], "--view shows files"),
        (["a", "b"], "one file is recorded at a time"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", *arguments]) == 1
    assert told in capsys.readouterr().err
