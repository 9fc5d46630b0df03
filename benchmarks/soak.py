"""Loads one server for hours with all features: does anything grow, and does any answer change?

    python benchmarks/soak.py --minutes 120 --json soak.json 'minisrv serve --dtype float32 \\
        --max-num-seqs 16 --max-num-batched-tokens 128 --max-model-len 1024 --num-kv-blocks 80'

First each request of a pool (benchmarks/questions.py) is sent alone, with a cache salt of its own,
so that it shares no prefix. Then comes the load: `--concurrency` clients send requests of the pool,
streamed or not, and compare each answer with that of the lone request; some send grammars that have
not been sent before, and some disconnect, after a number of events or at any time. Every
`--rest-every` minutes the load pauses until the server is at rest, with no request and every KV
cache block free. Then requests with fresh grammars, and those whose answers differed, are sent
again, alone, and a sample is taken: memory, open files and threads of each process of the server,
and memory of the GPU.

A process is *flat* if its memory in the last three samples is at most 1% above that in the first
three after a quarter of the time (medians); it may shrink. Its memory is the pages that it has
written itself (`Anonymous` of smaps_rollup, else RssAnon, else VmRSS); the resident set is shown
beside it.

Answers are the same in every batch only in float32: give the server `--dtype float32`. The chat
template of its model has to support tools, as the default model's does. This script adds `--port`
to the command. The JSON is written at each sample. The exit status is 1 if an answer differed, a
request failed, the server did not come to rest, or a process is not flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.memory import gpu_mib, processes
from benchmarks.questions import COMPLETIONS, Answer, Question, Questions, parse
from loadgen.errors import ServerError
from loadgen.http import Client, HTTPError
from loadgen.servers import Server
from minisrv.tools.environment import environment

PATIENCE_S = 300.0
"""Maximum number of seconds for an answer under load, for the server's start, and for its coming to
rest."""
SETTLE_S = 3.0
"""Seconds from the server's last request to a sample."""
VANISHING = 0.12
FRESH_EVERY_S = 5.0
KEPT_DIFFERENCES = 20
MOST_KINDS = 100
"""Maximum number of kinds of errors that are counted apart."""
ASKED_AGAIN = 8
FLAT = 0.01
_SERIES = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "kv_cache_usage": "kv_cache_usage_perc",
    "preemptions": "num_preemptions_total",
    "prompt_tokens": "prompt_tokens_total",
    "generated_tokens": "generation_tokens_total",
    "prefix_cache_hits": "prefix_cache_hits_total",
}
_AT_REST = ("running", "waiting", "kv_cache_usage")
"""The metrics that are 0 when the server is at rest."""


# ---- the load ------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A request that is to be sent again when the server is at rest, and its answer."""

    question: Question
    answer: Answer
    differs_from: Answer | None
    """The answer of the lone request, if `answer` differed from it; None for a fresh grammar."""


class Soak:
    """One server, the requests to it, and the results so far."""

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self._server = server
        self._options = options
        self._questions = Questions(options.seed)
        self._random = random.Random(options.seed)
        self._client: Client
        self._lone: list[tuple[Question, Answer]] = []
        self._again: deque[Asked] = deque(maxlen=ASKED_AGAIN)
        self._began = time.monotonic()
        self._last_fresh = 0.0
        self._loading = True
        self.stopped = False
        self.metrics: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.pool: Counter[str] = Counter()
        self.differences: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Run the whole soak. Raises ServerError if the server ends."""
        with Client(None) as self._client:
            await self._step_every_size()
            await self._ask_all_alone()
        self._began = time.monotonic()
        await self._sample()
        while not self.stopped and self._minutes() < self._options.minutes:
            with Client(None) as self._client:
                await self._load()
                await self._count(self._rest())
                await self._count(self._ask_again())
            await self._sample()

    def _minutes(self) -> float:
        return (time.monotonic() - self._began) / 60

    async def _fetch(self, path: str, method: str = "GET", body: bytes = b"") -> tuple[int, bytes]:
        text = bytearray()

        def receive(status: int, data: bytes, now_s: float) -> bool:
            text.extend(data)
            return True

        url = self._server.url + path
        head = await asyncio.wait_for(self._client.exchange(method, url, body, receive), PATIENCE_S)
        return head.status, bytes(text)

    async def _ask(self, question: Question, stream: bool, **fields: Any) -> Answer:
        """Send a request, and return its answer. Raises ValueError for an answer that is an error
        or not complete.

        fields: more fields of the request's body.
        """
        body = question.body | fields | {"stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        status, text = await self._fetch(question.path, "POST", json.dumps(body).encode())
        if status != 200:
            raise ValueError(f"status {status}: {text.decode(errors='replace')}")
        return parse(text, stream)

    async def _step_every_size(self) -> None:
        """Send a prompt of each size alone, as one step, with the logits of all its tokens, because
        a CPU's libraries keep some memory for each size of a matrix product that they have met."""
        _, text = await self._fetch("/v1/models")
        length = json.loads(text)["data"][0]["max_model_len"]
        if length < 1024:
            raise ServerError(f"the questions need a --max-model-len of 1024, not {length}")
        for size in range(1, min(self._options.step_tokens, length - 1) + 1):
            fields = {"echo": True, "logprobs": 1, "max_tokens": 1, "cache_salt": f"size {size}"}
            await self._ask(Question(COMPLETIONS, {"prompt": [5] * size} | fields), False)

    async def _ask_all_alone(self) -> None:
        for number in range(self._options.questions):
            question = self._questions.draw()
            answer = await self._ask(question, False, cache_salt=f"alone {number}")
            self._lone.append((question, answer))
            self.pool.update(question.body.keys())
        self._tell("asked alone")

    async def _load(self) -> None:
        """Run the clients until the next rest, and wait until each has ended its request."""
        self._loading = True
        clients = [
            asyncio.create_task(self._one_client()) for _ in range(self._options.concurrency)
        ]
        minutes = min(self._options.rest_every, self._options.minutes - self._minutes())
        end = time.monotonic() + 60 * minutes
        told = time.monotonic()
        while time.monotonic() < end and not self.stopped:
            await asyncio.wait(clients, timeout=0.5, return_when=asyncio.FIRST_EXCEPTION)
            for client in clients:
                if client.done():
                    client.result()  # raises the client's exception
            if time.monotonic() - told > 60:
                told = time.monotonic()
                self._tell("load")
        self._loading = False
        await asyncio.gather(*clients)

    async def _one_client(self) -> None:
        while self._loading:
            if self._random.random() < VANISHING:
                await self._count(self._vanish())
            elif time.monotonic() - self._last_fresh > FRESH_EVERY_S:
                self._last_fresh = time.monotonic()
                await self._count(self._ask_fresh())
            else:
                await self._count(self._ask_known())

    async def _count(self, asking: Awaitable[None]) -> None:
        """Wait for `asking`, and count its error if it raises one. Raises ServerError if the server
        has ended."""
        try:
            await asking
        except (ValueError, KeyError, HTTPError, TimeoutError) as error:
            # Numbers are replaced, so that there are few kinds of errors.
            kind = re.sub(r"\d+", "N", f"{type(error).__name__}: {error}"[:160])
            self.errors[kind if len(self.errors) < MOST_KINDS else "others"] += 1
            self._server.check()
            await asyncio.sleep(0.5)

    async def _ask_known(self) -> None:
        question, lone = self._random.choice(self._lone)
        stream = question.may_stream and self._random.random() < 0.6
        answer = await self._ask(question, stream)
        self.counts["streamed"] += stream
        if not self._compare(question, stream, lone, answer, "compared"):
            self._again.append(Asked(question, answer, lone))

    def _compare(
        self, question: Question, stream: bool, lone: Answer, answer: Answer, counted_as: str
    ) -> bool:
        """Whether two answers to `question` are the same. The first that are not are kept for the
        report.

        counted_as: the name of the counter of such comparisons.
        """
        self.counts[counted_as] += 1
        if same := answer.same_as(lone):
            return same
        self.counts["differing"] += 1
        if len(self.differences) < KEPT_DIFFERENCES:
            self.differences.append(_difference(question, stream, lone, answer))
        return same

    async def _ask_fresh(self) -> None:
        self.counts["fresh_grammars"] += 1
        question, pattern = self._questions.fresh_grammar(self.counts["fresh_grammars"])
        answer = await self._ask(question, self._random.random() < 0.5)
        text = answer.exact[0][0]["text"]
        if re.fullmatch(pattern, text) is None:
            raise ValueError(f"{pattern} does not match {text}")
        self._again.append(Asked(question, answer, None))

    async def _vanish(self) -> None:
        """Send a request, and disconnect after a number of reads or after a time, whichever comes
        first. Raises ValueError if it was refused."""
        self.counts["disconnects"] += 1
        question = self._questions.endless()
        reads, answered = self._random.choice((1, 1, 3, 10, 50)), 200
        body = question.body | {"stream": self._random.random() < 0.7}

        def receive(status: int, data: bytes, now_s: float) -> bool:
            nonlocal reads, answered
            reads, answered = reads - 1, status
            return reads > 0

        url = self._server.url + question.path
        exchange = self._client.exchange("POST", url, json.dumps(body).encode(), receive)
        with suppress(TimeoutError):
            await asyncio.wait_for(exchange, self._random.choice((0.001, 0.05, 0.5, 3.0)))
        if answered != 200:
            raise ValueError(f"status {answered} for {body}")

    # ---- at rest -----------------------------------------------------------------------------

    async def _read_metrics(self) -> None:
        _, text = await self._fetch("/metrics")
        pairs = (line.rpartition(" ")[::2] for line in text.decode().splitlines())
        found = {name.removeprefix("minisrv:"): value for name, value in pairs}
        self.metrics = {ours: float(found[name]) for ours, name in _SERIES.items()}

    async def _rest(self) -> None:
        """Wait until the server has no request and no KV cache block in use. Raises
        TimeoutError."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            await self._read_metrics()
            if not any(self.metrics[name] for name in _AT_REST):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server does not come to rest: {self.metrics}")
            await asyncio.sleep(0.2)

    async def _ask_again(self) -> None:
        """Send again, alone, the last requests with answers that differed or with fresh
        grammars."""
        while self._again:
            question, answer, lone = self._again.popleft()
            again = await self._ask(question, False, cache_salt=f"again {self._minutes()}")
            if lone is None:
                self._compare(question, False, again, answer, "fresh_compared")
            else:
                self.counts["differing_asked_again"] += 1
                self.counts["again_as_alone"] += again.same_as(lone)

    async def _sample(self) -> None:
        """Take a sample, and write the report. The connections of the load are closed by then; the
        one that reads the metrics is closed before memory is measured."""
        await asyncio.sleep(SETTLE_S)
        with Client(None) as self._client:
            await self._count(self._read_metrics())
        await asyncio.sleep(SETTLE_S)
        self.samples.append(
            {
                "minutes": round(self._minutes(), 2),
                "processes": processes(self._server.pid),
                "gpu_mib": gpu_mib(),
                "metrics": self.metrics,
                "counts": dict(self.counts),
                "errors": self.errors.total(),
            }
        )
        write(self._options, self)
        self._tell("at rest")

    def _tell(self, what: str) -> None:
        said = {**self.counts, "errors": self.errors.total()}
        if self.samples:
            last = self.samples[-1]
            said["preemptions"] = int(self.metrics["preemptions"])
            said["own MiB"] = {n: p["own_mib"] for n, p in last["processes"].items()}
        print(f"{self._minutes():6.1f} min, {what}: {said}", file=sys.stderr, flush=True)


def _difference(question: Question, stream: bool, lone: Answer, answer: Answer) -> dict[str, Any]:
    was, is_now = lone.apart(answer)
    asked = {"path": question.path, "body": question.body, "stream": stream}
    return asked | {"lone": was, "answer": is_now}


# ---- the report ----------------------------------------------------------------------------------


def growth(samples: list[dict[str, Any]], minutes: float) -> dict[str, dict[str, Any]]:
    """Return, for each process and the GPU, the memory after the first quarter of the time and at
    the end.

    minutes: minutes of the whole load.
    """
    later = [sample for sample in samples if sample["minutes"] >= minutes / 4]
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({name for sample in later for name in sample["processes"]}):
        there = [sample["processes"][name] for sample in later if name in sample["processes"]]
        own = [sizes["own_mib"] for sizes in there]
        rss = [sizes["rss_mib"] for sizes in there]
        found[name] = _change(own) | {
            "rss_change": _change(rss)["change"],
            "files": [there[0]["files"], there[-1]["files"]],
            "threads": [there[0]["threads"], there[-1]["threads"]],
        }
    if later and later[0]["gpu_mib"]:
        found["GPU"] = _change([sum(sample["gpu_mib"] or ()) for sample in later])
    return found


def _change(mib: list[float]) -> dict[str, Any]:
    first, last = statistics.median(mib[:3]), statistics.median(mib[-3:])
    change = last / first - 1
    return {"first_mib": first, "last_mib": last, "change": change, "flat": change <= FLAT}


def report(options: argparse.Namespace, soak: Soak) -> dict[str, Any]:
    """Return all results so far."""
    minutes = soak.samples[-1]["minutes"]
    return {
        "server": options.server,
        "minutes": minutes,
        "finished": minutes >= options.minutes,
        "questions_with": dict(soak.pool),
        "counts": dict(soak.counts),
        "preemptions": soak.metrics["preemptions"],
        "errors": dict(soak.errors),
        "memory": growth(soak.samples, minutes),
        "differences": soak.differences,
        "samples": soak.samples,
    }


def write(options: argparse.Namespace, soak: Soak) -> None:
    """Write the report to the JSON file, if one was asked for; the file is replaced as a whole."""
    if options.json is None:
        return
    whole = {"environment": msgspec.to_builtins(options.environment), **report(options, soak)}
    part = options.json.with_suffix(".part")
    part.write_text(json.dumps(whole, indent=1) + "\n")
    part.replace(options.json)


def show(found: dict[str, Any]) -> bool:
    """Print the report, and return whether all is as it should be."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for name in ("minutes", "counts", "preemptions", "errors"):
        console.print(f"{name}: {found[name]}", markup=False)
    table = Table(
        "process", "MiB behind a quarter", "at the end", "change", "RSS", "files", "threads",
        "flat within 1%", box=None,
    )  # fmt: skip
    for name, one in found["memory"].items():
        table.add_row(
            name,
            f"{one['first_mib']:.2f}",
            f"{one['last_mib']:.2f}",
            f"{one['change']:+.2%}",
            f"{one['rss_change']:+.2%}" if "rss_change" in one else "",
            " → ".join(map(str, one.get("files", ()))),
            " → ".join(map(str, one.get("threads", ()))),
            "reached" if one["flat"] else "NOT REACHED",
        )
    console.print(table)
    flat = all(one["flat"] for one in found["memory"].values())
    return flat and not found["errors"] and not found["counts"].get("differing")


def main(argv: list[str] | None = None) -> int:
    """Run, print, and write the JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("server", metavar="COMMAND", help="such as 'minisrv serve'")
    parser.add_argument("--minutes", type=float, default=120.0, help="of load (120)")
    parser.add_argument("--rest-every", type=float, default=5.0, metavar="MINUTES", help="(5)")
    parser.add_argument("--concurrency", type=int, default=16, help="clients at a time (16)")
    parser.add_argument("--questions", type=int, default=300, help="whose lone answers are known")
    parser.add_argument(
        "--step-tokens", type=int, default=512, help="prompts of each size up to it come first"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    options.environment = environment()
    with (
        TemporaryDirectory(prefix="soak-") as directory,
        Server("the server", options.server, Path(directory, "log")) as server,
    ):
        server.wait_ready(PATIENCE_S)
        soak = Soak(server, options)

        def stop(*_: object) -> None:
            soak.stopped = True

        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, stop)
        try:
            asyncio.run(soak.run())
            server.check()
        except (ServerError, HTTPError, TimeoutError, ValueError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            soak.errors["the server ended, or could not be asked alone"] += 1
    if not soak.samples:
        return 1
    write(options, soak)
    return int(not show(report(options, soak)))


if __name__ == "__main__":
    sys.exit(main())
