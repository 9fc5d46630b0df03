"""A scripted server as a process: `serve.py NAME DIRECTORY [options] --host HOST --port PORT`.

It appends a line [NAME, body] for each request to DIRECTORY/requests, and its own pid and that of a
child that does not end by itself to DIRECTORY/pids. It is used by test_loadgen_ab.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from scripted_server import DONE, ScriptedServer, Status, Step, Wait, event, usage


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", type=int, default=7, help="given for prompts that begin odd")
    parser.add_argument("--no-ids", action="store_true")
    parser.add_argument("--no-usage", action="store_true")
    parser.add_argument("--dead-at-start", action="store_true")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--die-at", type=int, help="this request ends the process")
    parser.add_argument("--hang-at", type=int, help="from this request on none is answered")
    parser.add_argument("--fail-at", type=int, help="this request gets a 500")
    parser.add_argument("--refuse", help="requests with this field get a 400")
    parser.add_argument("--metrics", default="")
    options = parser.parse_args()
    if options.dead_at_start:
        sys.exit("no such checkpoint")
    child = subprocess.Popen(["sleep", "1000"])
    with (options.directory / "pids").open("a") as pids:
        pids.write(f"{os.getpid()}\n{child.pid}\n")

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        with (options.directory / "requests").open("a") as requests:
            requests.write(json.dumps([options.name, body]) + "\n")
        if number == options.die_at:
            print("out of memory", flush=True)
            os._exit(7)
        if options.hang_at is not None and number >= options.hang_at:
            return [Wait(1_000_000)]
        if number == options.fail_at:
            return [Status(500, {"error": {"message": "a broken request"}})]
        if options.refuse in body:
            return [Status(400, {"error": {"message": f"unknown field {options.refuse}"}})]
        ids = [7] * body["max_tokens"]
        if body["prompt"][0] % 2:
            ids[-2] = options.token
        with_ids = body.get("return_token_ids") and not options.no_ids
        end = [chunk(None), DONE] if options.no_usage else [chunk(None), usage(len(ids)), DONE]
        return [*(chunk(token, with_ids) for token in ids), *end]

    server = ScriptedServer(script, port=options.port)
    server.metrics = options.metrics
    server.health = 503 if options.never_ready else 200
    with server:
        threading.Event().wait()


def chunk(token: int | None, with_ids: bool = False) -> bytes:
    """Return the event of one token, or of the end if `token` is None. Tokens above 100 have the
    same text as those below."""
    choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
    if token is not None:
        choice |= {"text": chr(ord("a") + token % 100), "finish_reason": None}
        if with_ids:
            choice["token_ids"] = [token]
    return event({"id": "x", "choices": [choice]})


main()
