"""Measures what one request's body costs an API worker: time without answers, and memory.

    python benchmarks/bodies.py --rounds 3 --json bodies.json 'minisrv serve --api-workers 1'

A body of at most 4 MiB is sent to a server that does nothing else, while a second connection sends
GET /health again and again, as an orchestrator does. Reported are, for each body, the status, the
seconds until the answer, the longest time of a GET /health meanwhile, and the resident memory
(VmRSS) of the worker before, at its maximum, and after. Bodies are of three kinds: large ones of
real work, which are accepted, or refused for the length of the context only; bodies with many
values in few bytes; and bodies with as many values as are allowed. Of several rounds the one with
the median time of /health is reported.

The first row is without any body, and shows what the machine itself and this program add.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import msgspec
from rich.console import Console
from rich.table import Table

from loadgen.servers import Server
from minisrv.tools.environment import environment

PATIENCE_S = 120.0
ASK_S = 0.002
"""Seconds between two requests for /health."""
SETTLE_S = 0.5
"""Seconds from an answer to the last reading of the memory."""
MOST_BYTES = 4 << 20

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"


def _completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "hi", "max_tokens": 1, **fields}).encode()


def _chat(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": messages, "max_tokens": 1, **fields}).encode()


def _detokenize(tokens: list[int]) -> bytes:
    return json.dumps({"tokens": tokens}, separators=(",", ":")).encode()


def _repeated(start: bytes, item: bytes, end: bytes) -> bytes:
    """Return a body with as many copies of `item`, separated by commas, as fit into it."""
    count = (MOST_BYTES - len(start) - len(end) - 1) // (len(item) + 1)
    return start + b",".join([item] * count) + end


def _names(count: int) -> dict[str, Any]:
    return {f"p{i}": 1 for i in range(count)}


USER = {"role": "user", "content": "hi"}
CALLS = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 4096,
}
PROPERTIES = {
    f"parameter_{i}": {"type": "string", "description": "What it is, in a sentence. " * 4}
    for i in range(130)
}
CODE = 'def f(a, b):\n    return {"a": [1, 2], "b": (a, b)}\n'


def _tool(number: int, properties: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    # Large bodies of real work
    "a text of 3 MiB": (COMPLETIONS, lambda: _completion(prompt="word " * (600 << 10))),
    "code of 1 MB": (CHAT, lambda: _chat({"role": "user", "content": CODE * 20_000})),
    "131,072 token ids": (COMPLETIONS, lambda: _completion(prompt=[7] * (128 << 10))),
    "8 x 65,536 token ids": (COMPLETIONS, lambda: _completion(prompt=[[123] * (64 << 10)] * 8)),
    "4,096 messages": (CHAT, lambda: _chat(*[{"role": "user", "content": "word " * 150}] * 4096)),
    "100 tools of 20 KB": (
        CHAT,
        lambda: _chat(USER, tools=[_tool(i, PROPERTIES) for i in range(100)]),
    ),
    "ids to a text": (DETOKENIZE, lambda: _detokenize([77] * 700_000)),
    "a text to ids": (TOKENIZE, lambda: json.dumps({"prompt": "a b " * 1_000_000}).encode()),
    # Many values in few bytes
    "300,000 unknown fields": (COMPLETIONS, lambda: _completion(**_names(290_000))),
    "fields of a message": (CHAT, lambda: _chat({**USER, **_names(290_000)})),
    "61,440 tool calls": (CHAT, lambda: _chat(*[CALLS] * 15)),
    "2 million ids": (COMPLETIONS, lambda: _repeated(b'{"prompt":[', b"1", b"]}")),
    "empty messages": (CHAT, lambda: _repeated(b'{"messages":[', b"{}", b"]}")),
    "100,000 messages": (CHAT, lambda: _chat(*[USER] * 100_000)),
    "parts of no known type": (
        CHAT,
        lambda: _chat(*[{"role": "user", "content": [{"type": "x"}] * 1024}] * 200),
    ),
    "110,000 parts": (
        CHAT,
        lambda: _chat(*[{"role": "user", "content": [{"type": "text", "text": "x"}] * 1024}] * 110),
    ),
    "empty lists": (COMPLETIONS, lambda: _repeated(b'{"metadata":[', b"[]", b"]}")),
    "2 million [": (COMPLETIONS, lambda: b"[" * (2 << 20)),
    "an integer of a million digits": (
        COMPLETIONS,
        lambda: b'{"prompt":"a","seed":%s}' % (b"9" * 1_000_000),
    ),
    "integers of 4,000 digits": (
        COMPLETIONS,
        lambda: _repeated(b'{"prompt":[', b"9" * 4000, b"]}"),
    ),
    "1e999": (COMPLETIONS, lambda: _repeated(b'{"prompt":[', b"1e999", b"]}")),
    "NaN": (COMPLETIONS, lambda: _repeated(b'{"prompt":[', b"NaN", b"]}")),
    "one name again and again": (COMPLETIONS, lambda: _repeated(b"{", b'"n":1', b"}")),
    "a schema of 200,000 properties": (
        CHAT,
        lambda: _chat(USER, tools=[_tool(0, {f"p{i}": {} for i in range(200_000)})]),
    ),
    "a forced call of it": (
        CHAT,
        lambda: _chat(
            USER,
            tools=[_tool(0, {f"p{i}": {} for i in range(200_000)})],
            tool_choice="required",
        ),
    ),
    "arguments of a million lists": (
        CHAT,
        lambda: _chat(
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "function": {
                            "name": "f",
                            "arguments": '{"a":[' + ",".join(["[]"] * 69_000) + "]}",
                        }
                    }
                ]
                * 20,
            }
        ),
    ),
    "800,000 stop strings": (COMPLETIONS, lambda: _completion(stop=["a"] * 800_000)),
    "800,000 prompts": (COMPLETIONS, lambda: _completion(prompt=["a"] * 800_000)),
    "700,000 ids, 128 times": (COMPLETIONS, lambda: _completion(prompt=[111] * 700_000, n=128)),
    "300 biases, 128 times": (
        COMPLETIONS,
        lambda: _completion(logit_bias={str(i): 1 for i in range(300)}, n=128),
    ),
    "escapes": (COMPLETIONS, lambda: b'{"prompt":"%s"}' % (b"\\u0041" * 690_000)),
    "escaped quotes": (COMPLETIONS, lambda: b'{"prompt":"%s"}' % (b'\\"' * 2_090_000)),
    "no UTF-8": (COMPLETIONS, lambda: b'{"prompt":"%s"}' % (b"\xff" * 4_000_000)),
    # As many values as are allowed
    "149,000 unknown fields": (COMPLETIONS, lambda: _completion(**_names(149_000))),
    "149,000 fields of a message": (CHAT, lambda: _chat({**USER, **_names(149_000)})),
    "24,576 tool calls": (CHAT, lambda: _chat(*[CALLS] * 6)),
    "49,152 parts": (
        CHAT,
        lambda: _chat(*[{"role": "user", "content": [{"type": "text", "text": "x"}] * 1024}] * 48),
    ),
    "149,000 empty lists": (COMPLETIONS, lambda: _completion(metadata=[[]] * 149_000)),
    "74,000 properties": (
        CHAT,
        lambda: _chat(USER, tools=[_tool(0, {f"p{i}": {} for i in range(74_000)})]),
    ),
    "a forced call of 3,000 properties": (
        CHAT,
        lambda: _chat(
            USER,
            tools=[_tool(0, {f"p{i}": {} for i in range(3000)})],
            tool_choice="required",
        ),
    ),
    "590,000 floats": (COMPLETIONS, lambda: _completion(prompt=[1e99] * 590_000)),
    "790,000 ids": (COMPLETIONS, lambda: _completion(prompt=[1] * 790_000)),
}


class Health:
    """Sends GET /health again and again in a thread of its own, and keeps the longest time of an
    answer."""

    def __init__(self, netloc: str) -> None:
        self._netloc = netloc
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.longest_s = 0.0

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _ask(self) -> None:
        connection = HTTPConnection(self._netloc, timeout=PATIENCE_S)
        while not self._end.wait(ASK_S):
            began = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
        connection.close()


class Memory:
    """Reads the resident memory, in MiB, of the API worker.

    group: the id of the server's process group.
    """

    def __init__(self, group: int) -> None:
        self._status = next(
            path
            for path in Path("/proc").glob("[0-9]*/status")
            if "minisrv-api-0" in path.read_text().split("\n", 1)[0]
            and int(path.with_name("stat").read_text().rpartition(")")[2].split()[2]) == group
        )
        self.most = 0.0

    def read(self) -> float:
        """Return the current value."""
        [line] = [line for line in self._status.read_text().splitlines() if "VmRSS" in line]
        found = int(line.split()[1]) / 1024
        self.most = max(self.most, found)
        return found


def _measure(server: Server, memory: Memory, path: str, body: bytes | None) -> dict[str, Any]:
    """Send one body, or wait a second if it is None, and measure meanwhile."""
    netloc = urlsplit(server.url).netloc
    before = memory.most = memory.read()
    status, answer = 0, b""

    def send() -> None:
        nonlocal status, answer
        if body is None:
            time.sleep(1)
            return
        connection = HTTPConnection(netloc, timeout=PATIENCE_S)
        connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        status, answer = response.status, response.read()
        connection.close()

    with Health(netloc) as health:
        sender = threading.Thread(target=send)
        began = time.perf_counter()
        sender.start()
        while sender.is_alive():
            memory.read()
            sender.join(0.01)
        took = time.perf_counter() - began
    time.sleep(SETTLE_S)
    return {
        "bytes": len(body or b""),
        "status": status,
        "said": answer[:300].decode(errors="replace") if status >= 400 else "",
        "seconds": round(took, 3),
        "health_ms": round(1e3 * health.longest_s, 1),
        "mib": [round(value) for value in (before, memory.most, memory.read())],
    }


def measure(server: Server, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Measure all bodies, one after the other, each `rounds` times."""
    memory = Memory(server.pid)
    found: dict[str, dict[str, Any]] = {}
    for name in ["none", *names]:
        path, body = "", None
        if name in BODIES:
            path, make = BODIES[name]
            body = make()
        runs = [_measure(server, memory, path, body) for _ in range(rounds)]
        runs.sort(key=itemgetter("health_ms"))
        found[name] = runs[rounds // 2]
        print(f"{name}: {found[name]}", file=sys.stderr)
    return found


def print_report(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table with a row for each body."""
    # Without a terminal rich assumes a small width, at which rows would be broken.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    shown = Table("body", "MB", "status", "s", "/health ms", "MiB before, most, after", box=None)
    for name, one in found.items():
        shown.add_row(
            name,
            f"{one['bytes'] / 1e6:.1f}",
            str(one["status"] or ""),
            f"{one['seconds']:.2f}",
            f"{one['health_ms']:.0f}",
            ", ".join(map(str, one["mib"])),
        )
    console.print(shown)


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("server", metavar="COMMAND", help="with one API worker")
    parser.add_argument("--body", action="append", metavar="NAME", help="one of several; all")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of each body (1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    names = options.body or [*BODIES]
    if unknown := [name for name in names if name not in BODIES]:
        parser.error(f"no body is called {unknown[0]!r}; there are: {', '.join(BODIES)}")
    where = environment()
    with (
        TemporaryDirectory(prefix="bodies-") as directory,
        Server("the server", options.server, Path(directory, "log")) as server,
    ):
        server.wait_ready(PATIENCE_S)
        found = measure(server, names, options.rounds)
        server.check()
    print_report(found)
    if options.json is not None:
        whole = {
            "environment": msgspec.to_builtins(where),
            "server": shlex.join(server.command),
            "bodies": found,
        }
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
