"""Shows a server behind nginx (deploy/nginx.conf): that streams are not held back, that large
bodies are refused, that a client which goes away ends its request, and what an upgrade costs.

    python -m benchmarks.behind_nginx --json behind-nginx.json

Starts two servers with the default model, and nginx with TLS in front of them, at free ports. Then
it replaces both servers under a closed loop of streams, one after the other: SIGTERM, wait for the
end of its process, start another at the same port, wait until it is ready. Exits with status 1 if a
request fails, or something else is not as it should be.

Needs nginx and openssl, and `pip install httpx`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.streams import Load, free_port, until
from minisrv.tools.environment import environment

CONFIGURATION = Path(__file__).parents[1] / "deploy" / "nginx.conf"
NAME = "localhost"
PORTS = (8001, 8002)
"""The ports of the servers in the configuration."""


class Servers:
    """Two servers, and nginx in front of them."""

    def __init__(self, command: str, directory: Path) -> None:
        self.command, self.directory = command, directory
        self.ports = [free_port(), free_port()]
        self.running: list[subprocess.Popen[bytes] | None] = [None, None]
        self.tls = free_port()
        self.nginx: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL of nginx."""
        return f"https://{NAME}:{self.tls}"

    def start(self, index: int) -> None:
        """Start one server."""
        flags = ["--port", str(self.ports[index]), "--shutdown-timeout", "60"]
        log = (self.directory / f"server-{index}.log").open("ab")
        self.running[index] = subprocess.Popen(
            [*shlex.split(self.command), *flags], stdout=log, stderr=log
        )

    def drain(self, index: int) -> None:
        """Tell one server to end."""
        server = self.running[index]
        assert server is not None
        server.send_signal(signal.SIGTERM)

    def has_ended(self, index: int) -> bool:
        """Return whether the process of a server has ended."""
        server = self.running[index]
        return server is None or server.poll() is not None

    def is_ready(self, index: int) -> bool:
        """Return whether a server says that it is ready."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.ports[index]}/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def start_nginx(self) -> None:
        """Start nginx with the configuration, at other ports and with a certificate of its own."""
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
                *("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"),
                *("-keyout", self.directory / "key.pem", "-out", self.directory / "cert.pem"),
            ],
            check=True,
            capture_output=True,
        )
        text = CONFIGURATION.read_text()
        for given, here in zip(PORTS, self.ports, strict=True):
            text = text.replace(f"server 127.0.0.1:{given}", f"server 127.0.0.1:{here}")
        text = text.replace("listen 443", f"listen 127.0.0.1:{self.tls}")
        text = text.replace("models.example.org", NAME)
        text = text.replace("/etc/ssl/minisrv", str(self.directory))
        temporary = "".join(
            f"{kind}_temp_path {self.directory}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        whole = (
            f"daemon off; pid {self.directory}/pid; error_log {self.directory}/error.log;"
            f"events {{}} http {{ access_log off; {temporary}\n{text}\n}}"
        )
        (self.directory / "nginx.conf").write_text(whole)
        self.nginx = subprocess.Popen(
            ["nginx", "-p", self.directory, "-c", self.directory / "nginx.conf"]
        )

    def close(self) -> None:
        """End all processes."""
        for process in (*self.running, self.nginx):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()

    def open_requests(self) -> float:
        """Return how many requests run or wait in both servers."""
        found = 0.0
        for port in self.ports:
            for line in httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines():
                if line.startswith(("minisrv:num_requests_running ", "minisrv:num_requests_wait")):
                    found += float(line.rsplit(" ", 1)[1])
        return found


async def streaming(servers: Servers, client: httpx.AsyncClient) -> dict[str, Any]:
    """Return when the pieces of a stream arrived."""
    body = {"prompt": "The fox", "max_tokens": 100, "min_tokens": 100, "stream": True}
    began = time.monotonic()
    async with client.stream("POST", f"{servers.url}/v1/completions", json=body) as response:
        times = [time.monotonic() - began async for _ in response.aiter_raw()]
    return {
        "pieces": len(times),
        "first_s": round(times[0], 3),
        "last_s": round(times[-1], 3),
    }


async def bodies(servers: Servers, client: httpx.AsyncClient) -> dict[str, Any]:
    """Return how large bodies are answered, and by whom."""
    found = {}
    for mebibytes in (1.0, 4.5, 6.0):
        prompt = "x" * round(mebibytes * (1 << 20))
        answer = await client.post(f"{servers.url}/v1/completions", json={"prompt": prompt})
        by = "minisrv" if "x-request-id" in answer.headers else "nginx"
        found[f"{mebibytes} MiB"] = f"{answer.status_code} by {by}"
    return found


async def disconnect(servers: Servers, client: httpx.AsyncClient) -> dict[str, Any]:
    """Return how long a request runs on when its client has gone away."""
    body = {"prompt": "The fox", "max_tokens": 1500, "min_tokens": 1500, "stream": True}
    async with client.stream("POST", f"{servers.url}/v1/completions", json=body) as response:
        pieces = response.aiter_raw()  # to drop it would close the connection
        await anext(pieces)
        before = await asyncio.to_thread(servers.open_requests)
    ended = await until(lambda: servers.open_requests() == 0, "the request ends")
    return {"open_before": before, "ended_after_s": ended}


async def upgrade(servers: Servers, load: Load, seconds: float) -> dict[str, Any]:
    """Replace both servers under load."""
    drained, ready = [], []
    async with load.running():
        await asyncio.sleep(seconds)
        for index in (0, 1):
            servers.drain(index)
            drained.append(await until(lambda: servers.has_ended(index), "a server drains"))  # noqa: B023
            servers.start(index)
            ready.append(await until(lambda: servers.is_ready(index), "a server is ready"))  # noqa: B023
            await asyncio.sleep(seconds)
    return load.summary() | {"drained_after_s": drained, "ready_after_s": ready}


async def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run all parts, and return what they found."""
    servers = Servers(options.server, directory)
    try:
        for index in (0, 1):
            servers.start(index)
        servers.start_nginx()
        await until(lambda: servers.is_ready(0) and servers.is_ready(1), "both servers are ready")
        trusted = ssl.create_default_context(cafile=str(directory / "cert.pem"))
        async with httpx.AsyncClient(verify=trusted, timeout=60) as client:
            found = {
                "streaming": await streaming(servers, client),
                "bodies": await bodies(servers, client),
                "disconnect": await disconnect(servers, client),
            }
        load = Load(servers.url, options.streams, options.tokens, verify=trusted)
        return found | {"upgrade": await upgrade(servers, load, options.seconds)}
    finally:
        servers.close()


def failures(found: dict[str, Any]) -> list[str]:
    """Return what should not have happened."""
    wrong = []
    if found["streaming"]["pieces"] < 50:
        wrong.append(f"the stream came in {found['streaming']['pieces']} pieces")
    if list(found["bodies"].values())[1:] != ["413 by minisrv", "413 by nginx"]:
        wrong.append(f"bodies: {found['bodies']}")
    if found["disconnect"]["open_before"] != 1:
        wrong.append(f"disconnect: {found['disconnect']}")
    if found["upgrade"]["ends"].keys() != {"ok"}:
        wrong.append(f"upgrade: {found['upgrade']['ends']}")
    return wrong


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--server", default="minisrv serve --max-num-seqs 8")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--seconds", type=float, default=5, help="load before and after each event")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    missing = [name for name in ("nginx", "openssl") if shutil.which(name) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} must be installed")
    with tempfile.TemporaryDirectory(prefix="behind-nginx-") as directory:
        os.chmod(directory, 0o755)  # nginx's workers are another user's
        found = asyncio.run(measure(options, Path(directory)))
    for name, values in found.items():
        print(name, json.dumps(values))
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        described = msgspec.to_builtins(environment())
        result = {"environment": described, "settings": settings, "parts": found}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if wrong := failures(found):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
