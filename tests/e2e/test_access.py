"""API keys and HTTPS with several API workers, set by the flags of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import trustme

from tests.e2e.server import SMALL, Server

Start = Callable[..., Server]


def test_https_and_keys(
    start: Start, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, certificate = trustme.CA(), tmp_path / "cert.pem"
    issued = authority.issue_cert("localhost", "127.0.0.1")
    for pem in issued.cert_chain_pems:
        pem.write_to_path(str(certificate), append=True)
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    (tmp_path / "keys").write_text("from-file\n\nanother\n")
    monkeypatch.setenv("MINISRV_API_KEY", "from-environment")
    server = start(
        *(str(tiny), *SMALL, "--api-workers", "2"),
        *("--api-key", "from-flag", "--api-key-file", str(tmp_path / "keys")),
        *("--max-requests-per-key", "4"),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(tmp_path / "key.pem")),
    ).wait_ready()
    assert server.url.startswith("https://127.0.0.1")
    with httpx.Client(
        base_url=server.url, verify=str(tmp_path / "authority.pem"), trust_env=False
    ) as client:
        body = {"prompt": "x", "max_tokens": 2}
        for key in ("from-flag", "from-file", "another", "from-environment"):
            headers = {"authorization": f"Bearer {key}"}
            answer = client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
        assert client.post("/v1/completions", json=body).status_code == 401
        body = {"prompt": [5] * 40, "max_tokens": 1}
        cached = []
        for key in ("from-flag", "from-file", "from-flag"):
            headers = {"authorization": f"Bearer {key}"}
            usage = client.post("/v1/completions", json=body, headers=headers).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached == [0, 0, 32], "a key finds what it has asked itself, and nothing else"
        assert client.get("/metrics").status_code == 401
    for pid in server.group() - {server.pid}:
        assert b"from-" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert "from-" not in server.log
    private = [path for path in server.socket_dirs() if path.is_dir()]
    assert [oct(os.stat(path).st_mode & 0o777) for path in private] == ["0o700"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ssl-certfile", "a.pem", "--ssl-keyfile", "b.pem"], "cannot be used"),
        (["--ssl-certfile", "a.pem"], "only allowed together"),
        (["--api-key-file", "nowhere"], "cannot be read"),
        (["--max-requests-per-key", "2"], "counts by API key"),
    ],
)
def test_what_is_refused_at_start(start: Start, tiny: Path, flags: list[str], words: str) -> None:
    server = start(str(tiny), *flags)
    assert server.wait() == 1
    assert words in server.log
    assert "Traceback" not in server.log


def test_no_other_name_than_the_machines_own(server: Server) -> None:
    """A server that listens on a loopback address and asks for no key answers to no other host
    name."""
    port = server.url.rpartition(":")[2]
    for host, status in ((f"localhost:{port}", 200), (f"evil.example:{port}", 421)):
        answer = httpx.get(server.url + "/v1/models", headers={"host": host}, trust_env=False)
        assert answer.status_code == status


def test_an_empty_variable_lets_nobody_in(
    start: Start, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MINISRV_API_KEY that is set but empty, a secret that was not filled in, is refused at the
    start."""
    monkeypatch.setenv("MINISRV_API_KEY", "")
    server = start(str(tiny))
    assert server.wait() == 1
    assert "MINISRV_API_KEY is set and empty" in server.log
