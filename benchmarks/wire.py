"""Measures the API workers' CPU time per streamed token, without a model.

    python benchmarks/wire.py --api-workers 1,2 --streams 64 --steps-per-s 100 --json F

The workers are those of `minisrv serve`. A script takes the engine's place and speaks its protocol:
every step, at a fixed rate, adds a token to each open request. One client process reads all streams
and counts events. As long as the workers keep up, tokens arrive at a rate of streams x steps per
second; beyond that, the measured rate is the workers' maximum. On a machine with fewer cores than
processes the client and the script compete with the workers, so that the microseconds per token are
more meaningful than the rate.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import zmq
from rich.console import Console
from rich.table import Table

from minisrv.checkpoint import open_checkpoint
from minisrv.config import EngineConfig, ServerConfig
from minisrv.engine.messages import (
    AskStats,
    EngineInfo,
    EngineStats,
    Hello,
    Ready,
    StepOutputs,
    Submit,
    decode_engine_message,
    decode_worker_message,
    encode,
)
from minisrv.request import EngineOutput, FinishReason
from minisrv.server.launcher import listen
from minisrv.server.process import WorkerProcess
from minisrv.server.worker_config import CHECKPOINT, WorkerConfig
from minisrv.text.tokenizer import Tokenizer
from minisrv.tools.environment import environment

TEXT = "Once upon a time there lived a brave child who asked what the old mill was for. "
INFO = EngineInfo(
    max_model_len=1 << 20,
    vocab_size=1 << 20,
    num_kv_blocks=1,
    block_size=16,
    max_num_seqs=1 << 16,
    max_num_batched_tokens=1,
    max_waiting=0,
    dtype="none",
    device="none",
    cudagraph_mode="none",
    startup_seconds={},
)


def play_engine(address: str, steps_per_s: float, token_ids: list[int]) -> None:
    """Play the engine's side of the socket, forever: send a token for every open request in each
    step.

    token_ids: the ids of these tokens, in turn.
    """
    server = zmq.Context().socket(zmq.ROUTER)
    server.set_hwm(0)
    server.bind(address)
    open_requests: dict[str, list[Any]] = {}  # worker and number of tokens left, by request id
    due = time.perf_counter()
    while True:
        left = due - time.perf_counter()
        while server.poll(max(0, round(1e3 * left)) if open_requests else None):
            worker, body = server.recv_multipart()
            match decode_worker_message(body):
                case Hello():
                    server.send_multipart([worker, encode(Ready(INFO))])
                case AskStats():
                    server.send_multipart([worker, encode(EngineStats())])
                case Submit(requests, aborts):
                    for request in requests:
                        open_requests[request.request_id] = [worker, request.params.max_tokens]
                    for request_id in aborts:
                        open_requests.pop(request_id, None)
            left = due - time.perf_counter()
        if left > 0.0005:
            continue
        due = max(due + 1 / steps_per_s, time.perf_counter())
        by_worker: dict[bytes, list[EngineOutput]] = {}
        for request_id, state in list(open_requests.items()):
            worker, tokens = state
            state[1] -= 1
            by_worker.setdefault(worker, []).append(
                EngineOutput(
                    request_id=request_id,
                    token_ids=[token_ids[tokens % len(token_ids)]],
                    finish_reason=None if tokens > 1 else FinishReason.LENGTH,
                )
            )
            if tokens == 1:
                del open_requests[request_id]
        for worker, outputs in by_worker.items():
            server.send_multipart([worker, encode(StepOutputs(outputs))])


def read_streams(port: int, streams: int, tokens: int, path: str, told: Connection) -> None:
    """Open all streams at once, and read them to their ends. Sends to `told` the number of events
    that came, and the seconds from the first byte of an answer to the end."""
    prompt: dict[str, Any] = {"prompt": [1]}
    if path.startswith("/v1/chat"):
        prompt = {"messages": [{"role": "user", "content": "Go on."}]}
    body = {**prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sent = f"{head}connection: close\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
    mark, tails = b"data: {", dict[Any, bytes]()
    found = selectors.DefaultSelector()
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(sent)
        found.register(connection, selectors.EVENT_READ)
    first, events = 0.0, 0
    while found.get_map():
        for key, _ in found.select():
            connection = key.fileobj
            received = connection.recv(1 << 20)
            first = first or time.perf_counter()
            text = tails.get(connection, b"") + received
            events += text.count(mark)
            tails[connection] = text[1 - len(mark) :]
            if not received:
                found.unregister(connection)
                connection.close()
    told.send((events, time.perf_counter() - first))


def cpu_seconds(pid: int) -> float:
    """Return the seconds for which all threads of a process have run."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def measure(workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Start one server with so many API workers, and run a warm-up and `--rounds` rounds."""
    checkpoint = open_checkpoint(EngineConfig())
    context = get_context("spawn")
    children: list[Any] = []
    with TemporaryDirectory(prefix="wire-") as name:
        address = f"ipc://{name}/engine"
        checkpoint.save(Path(name, CHECKPOINT))
        text = Tokenizer.from_description(checkpoint.tokenizer).encode(TEXT)
        engine = context.Process(target=play_engine, args=(address, options.steps_per_s, text))
        engine.start()
        listeners = listen(ServerConfig(port=0, api_workers=workers))
        port = listeners[0].getsockname()[1]
        try:
            for index, listener in enumerate(listeners):
                config = WorkerConfig(
                    index=index,
                    number=workers,
                    address=address,
                    engine_pid=engine.pid or 0,
                    private_dir=Path(name),
                    root="wire",
                    served_model_names=("x",),
                    settings=ServerConfig(shutdown_timeout=1),
                )
                children.append(WorkerProcess(config, listener))
            for child in children:
                child.reports.recv()  # the worker reports that it is ready
            rounds = []
            for number in range(options.rounds + 1):
                ours, theirs = context.Pipe()
                before = [cpu_seconds(child.pid) for child in (*children, engine)]
                arguments = (port, options.streams, options.tokens, options.path, theirs)
                client = context.Process(target=read_streams, args=arguments)
                client.start()
                if ours not in wait([ours, client.sentinel], timeout=300):
                    raise SystemExit("the client got no answer.")
                events, seconds = ours.recv()
                client.join()
                after = [cpu_seconds(child.pid) for child in (*children, engine)]
                *spent, script = (b - a for a, b in zip(before, after, strict=True))
                tokens = options.streams * options.tokens
                if number:  # the first round is a warm-up
                    rounds.append(
                        {
                            "tokens_per_s": tokens / seconds,
                            "us_per_token": 1e6 * sum(spent) / tokens,
                            "us_per_token_of_the_script": 1e6 * script / tokens,
                            "share_of_workers": [round(part / sum(spent), 3) for part in spent],
                            "events": events,
                        }
                    )
        finally:
            for child in children:
                child.stop()
            engine.kill()
            engine.join()
            for listener in listeners:
                listener.close()
    best = {key: median(row[key] for row in rounds) for key in list(rounds[0])[:3]}
    return {"api_workers": workers, **best, "rounds": rounds}


def codec_us(number: int = 256) -> dict[str, float]:
    """Measure the median microseconds to encode and to decode the message of a step.

    number: number of outputs in the message.
    """
    ids = [f"cmpl-4c1bebad9b48499aa4cac1e94bc9dd85-{index}" for index in range(number)]
    message = StepOutputs([EngineOutput(request_id=name, token_ids=[1234]) for name in ids])
    body = encode(message)
    found: dict[str, float] = {"bytes": len(body)}
    for name, call in (
        ("encode_us", lambda: encode(message)),
        ("decode_us", lambda: decode_engine_message(body)),
    ):
        times = []
        for _ in range(500):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        found[name] = 1e6 * median(times)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--api-workers", default="1,2", help="numbers of workers, one by one")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--steps-per-s", type=float, default=100)
    parser.add_argument("--path", default="/v1/completions", help="or /v1/chat/completions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    results = []
    for workers in map(int, options.api_workers.split(",")):
        print(f"{workers} workers", file=sys.stderr, flush=True)
        results.append(measure(workers, options))
    codec = codec_us()
    table = Table("workers", "tok/s", "CPU us/token", "the script's", "shares", box=None)
    for row in results:
        shares = " ".join(f"{part:.2f}" for part in row["rounds"][-1]["share_of_workers"])
        table.add_row(
            str(row["api_workers"]),
            f"{row['tokens_per_s']:.0f}",
            f"{row['us_per_token']:.1f}",
            f"{row['us_per_token_of_the_script']:.1f}",
            shares,
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{options.path}: {options.streams} streams of {options.tokens} tokens, "
        f"{options.steps_per_s:g} steps/s"
    )
    console.print(table)
    console.print(
        f"a step's message of 256 outputs: {codec['bytes']:.0f} bytes, "
        f"encoded in {codec['encode_us']:.1f} us, decoded in {codec['decode_us']:.1f} us"
    )
    if options.json is not None:
        report = {
            "environment": environment("uvicorn", "pyzmq", "msgspec"),
            "options": vars(options),
            "runs": results,
            "codec": codec,
        }
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
