"""Measures how long servers take from exec until they are ready and give a first token, by turns.

    python benchmarks/ready.py --rounds 5 --json ready.json \\
        --server 'graphs=minisrv serve DIR --load-format dummy' \\
        --server 'eager=minisrv serve DIR --load-format dummy --enforce-eager'

A round starts each server once, alone, on a free port, requests `/ready` every 20 ms until it
answers 200, requests a completion of one token at once, and ends the server. Seconds count from
before the process is created. Phases are those in the server's own log line "ready in", which add
up to the time that the server itself has measured from the start of its process.

The caches are those of the environment, and each server is started once before without being
measured. With --cold each start has empty directories in place of those in CACHES, and there is no
start before; the system's page cache stays, and a hub id would be downloaded each time, so name a
directory.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from http.client import HTTPConnection, HTTPException
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
from rich.console import Console
from rich.table import Table

from loadgen.errors import LoadgenError
from loadgen.servers import Server
from minisrv.tools.environment import Environment, environment

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
"""Variables that name the directories of compiled kernels: those of Triton, of Inductor, and of
minisrv."""

POLL_S = 0.02
PATIENCE_S = 900.0
_SAID = re.compile(r"ready in [\d.]+ s \(([^)]*)\)")


class Start(NamedTuple):
    """One start of a server.

    seconds: seconds until it was ready.
    first_token: seconds until it had answered a request of one token that was sent then.
    phases: seconds of each phase by its name, as the server reports them.
    """

    seconds: float
    first_token: float
    phases: dict[str, float]


def start(label: str, command: str, *, cold: bool) -> Start:
    """Start a server, wait until it is ready, and end it. Raises SystemExit if it does not become
    ready."""
    with TemporaryDirectory(prefix="ready-") as directory:
        log = Path(directory, "log")
        if cold:
            given = [f"{name}={Path(directory, name)}" for name in CACHES]
            command = f"env {shlex.join(given)} {command}"
        server = Server(label, command, log)
        try:
            began = time.perf_counter()
            with server:
                seconds = wait_ready(server, began)
                complete(server.url)
                first_token = time.perf_counter() - began
        except LoadgenError as error:
            raise SystemExit(str(error)) from None
        # The line is logged a moment after /ready answers, and certainly before the server ends.
        said = _SAID.search(log.read_text(errors="replace"))
    if said is None:
        raise SystemExit(f"{label} does not say what its start took; is it `minisrv serve`?")
    return Start(round(seconds, 3), round(first_token, 3), phases(said[1]))


def wait_ready(server: Server, began: float) -> float:
    """Wait until `/ready` answers 200, and return the seconds since `began`. Raises ServerError if
    the server ends before that, and SystemExit after PATIENCE_S seconds."""
    while True:
        server.check()
        ready, seconds = is_ready(server.url), time.perf_counter() - began
        if ready:
            return seconds
        if seconds > PATIENCE_S:
            raise SystemExit(f"{server.name} is not ready after {seconds:.0f} s")
        time.sleep(POLL_S)


def is_ready(url: str) -> bool:
    """Whether `/ready` answers 200."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def complete(url: str) -> None:
    """Request a completion of one token. Raises SystemExit if it fails."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_S)
    body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 1})
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(
                f"a completion is answered with {response.status}: {response.read()!r}"
            )
        response.read()
    finally:
        connection.close()


def phases(text: str) -> dict[str, float]:
    """Parse the seconds of phases by name, from a text such as "weights 0.1, graphs 2.4"."""
    words = (part.rsplit(" ", 1) for part in text.split(", "))
    return {name: float(seconds) for name, seconds in words}


def measure(servers: dict[str, str], rounds: int, *, cold: bool) -> dict[str, list[Start]]:
    """Start the servers by turns, and print a line to stderr for each start. Returns the measured
    starts by label.

    servers: the command of each server by its label.
    """
    turns = [] if cold else ["warm-up"]
    turns += [f"round {number} of {rounds}" for number in range(1, rounds + 1)]
    starts: dict[str, list[Start]] = {label: [] for label in servers}
    for turn in turns:
        for label, command in servers.items():
            found = start(label, command, cold=cold)
            first = f"first token {found.first_token:.2f} s"
            said = f"{found.seconds:.2f} s, {first} ({say(found.phases)})"
            print(f"{turn}: {label} {said}", file=sys.stderr)
            if turn != "warm-up":
                starts[label].append(found)
    return starts


def say(seconds: dict[str, float]) -> str:
    """Format the seconds of phases as a text such as "weights 0.1, graphs 2.4"."""
    return ", ".join(f"{name} {took:.1f}" for name, took in seconds.items())


def machine() -> Environment:
    """Return the environment, as read by a child process that ends. A process that has used CUDA
    would hold memory of the GPU, and keep its driver loaded while servers are started."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(environment).result()


def table(starts: dict[str, list[Start]]) -> Table:
    """Return a table with a row for each server."""
    columns = ("least s", "median", "most", "first token", "phases, median")
    shown = Table("server", *columns, box=None)
    for label, found in starts.items():
        seconds = [one.seconds for one in found]
        middle = {name: median(one.phases[name] for one in found) for name in found[0].phases}
        shown.add_row(
            label,
            *(f"{value:.2f}" for value in (min(seconds), median(seconds), max(seconds))),
            f"{median(one.first_token for one in found):.2f}",
            say(middle),
        )
    return shown


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--server", action="append", required=True, metavar="LABEL=COMMAND", help="may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured starts of each (5)")
    parser.add_argument("--cold", action="store_true", help="empty caches for each start")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    servers: dict[str, str] = {}
    for text in options.server:
        label, _, command = text.partition("=")
        if not label or not command or label in servers:
            parser.error(f"--server {text!r}: give LABEL=COMMAND, each label once")
        servers[label] = command
    if options.rounds < 1:
        parser.error("--rounds: at least 1")

    where = machine()
    starts = measure(servers, options.rounds, cold=options.cold)
    # Without a terminal rich assumes a small width, at which rows would be broken.
    width = None if sys.stdout.isatty() else 250
    Console(highlight=False, soft_wrap=True, width=width).print(table(starts))
    if options.json is not None:
        report = {
            "environment": msgspec.to_builtins(where),
            "cold": options.cold,
            "servers": {
                label: {"command": servers[label], "starts": [one._asdict() for one in found]}
                for label, found in starts.items()
            },
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
