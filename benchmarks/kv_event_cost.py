"""What it costs a server to publish the events of its prefix cache: to nobody, to a reader, and
beside strangers who connect, subscribe and ask for replays without end.

    python -m benchmarks.kv_event_cost --rounds 3 --json cost.json

Starts a server with `--kv-events-endpoint` and one without it on the first half of the cores, and
everything else on the other half. By turns eight streams run at one of them. What is compared is
the server's own, as in `page_cost.py`. Strangers take processor time of the machine whomever they
visit, so beside "strangers" there is "strangers elsewhere": the streams run at the server without
events, and the strangers visit the other one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.request import urlopen

import msgspec
import zmq

from benchmarks.page_cost import Streams, window
from benchmarks.streams import free_port
from minisrv.tools.environment import environment

SERVE = "minisrv serve --max-num-seqs 8 --disable-log-stats"
START_SECONDS = 120
SETTLE_SECONDS = 0.7
"""Seconds until all streams decode."""


class Server(NamedTuple):
    """A running server, and its ports; 0 where it does not publish events."""

    netloc: str
    process: subprocess.Popen[bytes]
    events: int
    replay: int

    def engine_bytes(self) -> int:
        """Return the resident memory of its engine."""
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
                if (lines["Name"].strip(), int(lines["PPid"])) == (
                    "minisrv-engine",
                    self.process.pid,
                ):
                    return int(lines["VmRSS"].split()[0]) << 10
        sys.exit("the engine is gone")


@contextmanager
def serving(command: str, cores: str, *, events: bool) -> Iterator[Server]:
    """Run a server on some cores while the block does."""
    port = free_port()
    ports = (free_port(), free_port()) if events else (0, 0)
    endpoints = ["--kv-events-endpoint", f"tcp://*:{ports[0]}"]
    endpoints += ["--kv-events-replay-endpoint", f"tcp://*:{ports[1]}"]
    process = subprocess.Popen(
        [
            *("taskset", "-c", cores, *shlex.split(command), "--port", str(port)),
            *(endpoints if events else ()),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/ready"):
                break
            if time.monotonic() > deadline or process.poll() is not None:
                sys.exit("a server has not become ready")
            time.sleep(0.2)
        yield Server(f"127.0.0.1:{port}", process, *ports)
    finally:
        process.terminate()
        process.wait()


def read(server: Server) -> None:
    """Read events, for ever."""
    events = zmq.Context().socket(zmq.SUB)
    events.subscribe(b"")
    events.connect(f"tcp://127.0.0.1:{server.events}")
    while True:
        events.recv_multipart()


_TOPICS = b"".join(b"\0\4\1" + bytes(each) for each in product(range(60), range(60), (0, 255)))


def visit(server: Server) -> None:
    """Be four strangers, for ever."""
    floods: list[Callable[[], None]] = [
        lambda: socket.create_connection(("127.0.0.1", server.events)).close(),
        lambda: _flood(server.replay, b"DEALER", b"\1\0" * 2000),
        lambda: _flood(server.events, b"SUB", _TOPICS),
        lambda: _replays(server.replay),
    ]

    def again(flood: Callable[[], None]) -> None:
        while True:
            with suppress(OSError):
                flood()

    for flood in floods:
        threading.Thread(target=again, args=(flood,)).start()


def _flood(port: int, kind: bytes, data: bytes) -> None:
    """Greet as a zmq socket of some kind does, and send the same until disconnected."""
    with socket.create_connection(("127.0.0.1", port)) as peer:
        body = b"\5READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
        greeting = b"\xff" + bytes(8) + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + bytes(32)
        peer.sendall(greeting + b"\4" + bytes([len(body)]) + body)
        while True:
            peer.sendall(data)


def _replays(port: int) -> None:
    """Ask for everything again and again, and read it."""
    replay = zmq.Context().socket(zmq.DEALER)
    replay.connect(f"tcp://127.0.0.1:{port}")
    while True:
        replay.send_multipart((b"", bytes(8)))
        while len(frames := replay.recv_multipart()) != 4 or frames[2] != b"\xff" * 8:
            pass


def turn(
    measured: Server, seconds: float, work: Callable[[Server], None] | None, visited: Server
) -> dict[str, float]:
    """Measure a server while a process visits one.

    work: what the process does; None: there is no process.
    """
    process = multiprocessing.Process(target=work, args=(visited,)) if work else None
    streams = Streams(measured.netloc, STREAMS, temperature=1)
    if process is not None:
        process.start()
    try:
        time.sleep(SETTLE_SECONDS)
        found = window(measured.netloc, seconds, STREAMS, measured.process.pid)
        return found | {"visited_engine_mib": visited.engine_bytes() / 2**20}
    finally:
        streams.end()
        if process is not None:
            process.kill()
            process.join()


STREAMS = 8


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return what was measured in each round, by who was there."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    os.sched_setaffinity(0, cores[half:] or cores)
    first = ",".join(map(str, cores[:half]))
    with (
        serving(options.command, first, events=False) as off,
        serving(options.command, first, events=True) as on,
    ):
        sides: dict[str, tuple[Server, Callable[[Server], None] | None]] = {
            "off": (off, None),
            "nobody": (on, None),
            "reader": (on, read),
            "strangers elsewhere": (off, visit),
            "strangers": (on, visit),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for server in (off, on):
            turn(server, options.seconds, None, on)  # what happens once has happened
        for number in range(options.rounds):
            for name in sorted(sides, reverse=bool(number % 2)):
                measured, work = sides[name]
                found[name].append(turn(measured, options.seconds, work, on))
        return found


def ratios(
    sides: dict[str, list[dict[str, float]]], side: str, other: str, name: str
) -> list[float]:
    """Return the least, the median and the greatest ratio of a figure to that of another side in
    the same round."""
    each = [a[name] / b[name] for a, b in zip(sides[side], sides[other], strict=True)]
    return [round(value, 4) for value in (min(each), median(each), max(each))]


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--command", default=SERVE, help="how a server is started")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each window")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sides = measure(options)
    pairs = [("nobody", "off"), ("reader", "off"), ("strangers", "strangers elsewhere")]
    report: dict[str, Any] = {
        "environment": msgspec.to_builtins(environment("pyzmq")),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "rounds": sides,
        "ratios": {
            f"{side} / {other}": {name: ratios(sides, side, other, name) for name in sides[side][0]}
            for side, other in pairs
        },
    }
    for name, found in report["ratios"].items():
        print(name, json.dumps(found))
    for side, rounds in sides.items():
        print(
            f"{side:>20}: step {median(each['step_ms_median'] for each in rounds):.2f} ms, "
            f"p99 {median(each['step_ms_p99'] for each in rounds):.2f} ms, engine with events "
            f"{max(each['visited_engine_mib'] for each in rounds):.0f} MiB"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
