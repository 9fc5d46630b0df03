"""Repeats end-to-end tests of a server many times: deaths, disconnects and random requests.

    python benchmarks/chaos.py deaths --count 50 --json F
    python benchmarks/chaos.py disconnects --count 2000 --json F
    python benchmarks/chaos.py requests --count 10000 --json F --server-flags=--enforce-eager

*Deaths*: as many servers are started, and their engines are killed or suspended while they load,
idle, prefill or decode (tests/e2e/test_death.py). *Disconnects*: clients of one server disconnect
at any moment (tests/e2e/test_vanishing_clients.py). *Requests*: random requests, valid and invalid,
are sent beside a stream whose tokens must stay the same (tests/e2e/test_random_requests.py). A
result that should not be ends the run with an AssertionError. The last two take flags for their
server.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.clients.needs import needs
from minisrv.tools.environment import environment

with needs("pip install -e '.[test]'"):
    from tests.checkpoints import make_checkpoint
    from tests.e2e.server import Server
    from tests.e2e.test_death import ENGINE_TIMEOUT, die, random_death
    from tests.e2e.test_random_requests import send
    from tests.e2e.test_vanishing_clients import FLAGS, vanish_all


@contextmanager
def starting() -> Iterator[Callable[..., Server]]:
    """Return a context with a function that starts servers. They end with the context, and their
    logs are printed if it ends by an exception."""
    servers: list[Server] = []

    def start(*flags: str, **options: str) -> Server:
        servers.append(Server(*flags, **options))
        return servers[-1]

    try:
        yield start
    except BaseException:
        for server in servers:
            print(server.log, file=sys.stderr)
        raise
    finally:
        for server in servers:
            server.stop()


DEAD_LINE = 1.0
"""Maximum number of seconds from an engine's death to the last error that a client gets."""


def deaths(model: Path, count: int, flags: list[str]) -> dict[str, Any]:
    """Run a death for each seed from 0 on, each with flags of its own. Raises AssertionError for a
    death that is noticed too late; the server checks for a hang four times a second."""
    found = []
    for seed in tqdm(range(count)):
        with starting() as start:
            death = random_death(seed)
            found.append(die(start, model, death, seed))
            bound = DEAD_LINE + (ENGINE_TIMEOUT + 0.25) * (death.signum == signal.SIGSTOP)
            for name in ("last_error_seconds", "unready_seconds"):
                assert found[-1].get(name, 0.0) < bound, found[-1]
    slowest: dict[str, float] = {}
    for ended in found:
        seconds = ended.get("last_error_seconds", 0.0)
        slowest[ended["signal"]] = max(seconds, slowest.get(ended["signal"], 0.0))
    return {"slowest_error_seconds": slowest, "deaths": found}


SMALL = ("--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--max-model-len", "512")


def disconnects(model: Path, count: int, flags: list[str]) -> dict[str, Any]:
    """Run clients of one server that disconnect, and end when all its KV cache blocks are free
    again."""
    with starting() as start:
        server = start(str(model), *FLAGS, *flags).wait_ready()
        return {"clients": count, "how_far_they_came": dict(vanish_all(server, 0, count))}


def requests(model: Path, count: int, flags: list[str]) -> dict[str, Any]:
    """Send random requests to one server, beside a stream whose tokens must stay the same. It runs
    in float32, so that rounding cannot change a token from one batch to another."""
    with starting() as start:
        server = start(str(model), *SMALL, "--dtype", "float32", *flags).wait_ready()
        return send(server, count)


RUNS = {"deaths": deaths, "disconnects": disconnects, "requests": requests}


def main(argv: list[str] | None = None) -> None:
    """Run, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--server-flags", default="", help="as minisrv serve takes them")
    options = parser.parse_args(argv)
    if options.what == "deaths" and options.server_flags:
        parser.error("deaths: every seed has flags of its own, --enforce-eager among them")
    began = time.monotonic()
    with TemporaryDirectory() as directory:
        model = make_checkpoint(Path(directory), max_position_embeddings=1 << 15)
        found = RUNS[options.what](model, options.count, shlex.split(options.server_flags))
    seconds = round(time.monotonic() - began, 1)
    summary = {name: value for name, value in found.items() if not isinstance(value, list)}
    print(json.dumps({"seconds": seconds, **summary}, indent=1))
    if options.json is not None:
        report = {"environment": environment(), "options": vars(options), "seconds": seconds}
        text = json.dumps(msgspec.to_builtins({**report, **found}, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
