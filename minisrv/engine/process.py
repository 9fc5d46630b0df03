"""The engine as a process of its own: a socket around `EngineCore`.

Knows: how the process starts, serves, and ends. It ends with an error, with its parent, or when
the parent stops it. SIGINT and SIGTERM are left to the parent: terminals and supervisors send them
to both, and the parent gives open requests time to finish. Workers are whoever says hello on the
socket; each gets one message a step with what the step added to its requests, and all get the
counters after a step that added nothing or left nothing to do.
Knows nothing of HTTP or text.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import zmq

from minisrv.config import EngineConfig
from minisrv.engine.messages import (
    EngineMessage,
    EngineStats,
    Failed,
    Loading,
    Ready,
    StepOutputs,
    decode_submit,
    encode,
)
from minisrv.errors import ConfigError, EngineError, EngineNotReadyError, MinisrvError
from minisrv.request import EngineOutput, RequestFailure

logger = logging.getLogger(__name__)

PARENTS_SIGNALS = {signal.SIGINT, signal.SIGTERM}
"""What the engine ignores."""


class EngineProcess:
    """The parent's handle of an engine process."""

    def __init__(self, config: EngineConfig, socket_dir: Path) -> None:
        """Start the process at once.

        socket_dir: a private directory for the socket; the engine removes it if the parent dies.
        Raises ConfigError if its path is too long for a socket.
        """
        path = socket_dir / "engine"
        if len(bytes(path)) > zmq.IPC_PATH_MAX_LEN:
            raise ConfigError(
                f"the path of the engine's socket, {path}, is longer than {zmq.IPC_PATH_MAX_LEN} "
                "bytes, the most that a socket allows; set TMPDIR to a shorter directory."
            )
        self.address = f"ipc://{path}"
        context = multiprocessing.get_context("spawn")
        self._process: BaseProcess = context.Process(
            target=_main, args=(config, self.address, socket_dir), name="minisrv-engine"
        )
        try:
            with _signals_held():
                self._process.start()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, by itself or by `stop`."""
        return self._process.exitcode is not None

    def stop(self) -> None:
        """End the process at once and wait for it. May be called twice.

        By SIGKILL: the engine keeps nothing that outlives it, a step may take long, and a signal
        handler would not wake a socket that is being polled.
        """
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()


@contextmanager
def _signals_held() -> Iterator[None]:
    """What a process started here inherits blocked, until it has said what to do with it. The
    caller gets at the end what came meanwhile."""
    resource_tracker.ensure_running()  # first, as its own start ends by unblocking them
    held = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _main(config: EngineConfig, address: str, socket_dir: Path) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s", force=True
    )
    for ignored in PARENTS_SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    threading.Thread(target=_end_with_parent, args=(socket_dir,), daemon=True).start()
    server = _EngineServer(address)
    try:
        server.load(config)
        server.run()
    except MinisrvError as error:
        if not server.fail(error):
            logger.error("%s", error.message)
        sys.exit(1)
    except Exception as error:
        logger.exception("the engine failed")
        server.fail(EngineError(f"the engine failed ({type(error).__name__}); see its log."))
        sys.exit(1)
    finally:
        server.close()


def _end_with_parent(socket_dir: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    shutil.rmtree(socket_dir, ignore_errors=True)
    # Not sys.exit: the main thread may be deep in a step, and nobody is left to hear of it.
    signal.raise_signal(signal.SIGKILL)


class _EngineServer:
    """The engine's side of the socket, and the loop."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 1000  # milliseconds for the last words
        self.socket.set_hwm(0)  # what is in flight is bounded by admission, not by the socket
        self.socket.bind(address)
        self.workers: set[bytes] = set()
        self.owners: dict[str, bytes] = {}
        self.state: EngineMessage = Loading("starting")

    def load(self, config: EngineConfig) -> None:
        """Make the engine, telling whoever asks how far it is."""
        # Here, so that workers can connect while torch is imported.
        import torch

        from minisrv.engine.core import EngineCore

        if "OMP_NUM_THREADS" not in os.environ:
            # One core is left to the API worker: threads of a parallel region that wait for one
            # which has lost its core cost many times what the last core would bring.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
        self.core = EngineCore(config, self._progress)
        self.state = Ready(self.core.info)
        self._broadcast()

    def _progress(self, phase: str, done: int, total: int) -> None:
        self.state = Loading(phase, done, total)
        self._broadcast()
        while self.socket.poll(0):
            self._receive()

    def _broadcast(self) -> None:
        for worker in self.workers:
            self._send(worker, self.state)

    def _send(self, worker: bytes, message: EngineMessage) -> None:
        self.socket.send_multipart([worker, encode(message)])

    def run(self) -> None:
        """Serve until the process is told to end."""
        while True:
            while self.socket.poll(0 if self.core.has_work else None):
                self._receive()
            outputs = self.core.step()
            # A long prefill adds no output for many steps, and the last step of an aborted request
            # none and yet frees its blocks: the counters are told all the same.
            self._deliver(outputs, to_all=not outputs or not self.core.has_work)

    def _receive(self) -> None:
        worker, body = self.socket.recv_multipart()
        message = decode_submit(body)
        if worker not in self.workers:
            self.workers.add(worker)
            self._send(worker, self.state)
        outputs = self._abort(message.aborts)  # first, as this makes room
        for request in message.requests:
            self.owners[request.request_id] = worker
            try:
                if not isinstance(self.state, Ready):
                    raise EngineNotReadyError("the engine is still loading; try again later.")
                self.core.add(request)
            except MinisrvError as error:
                outputs.append(
                    EngineOutput(request_id=request.request_id, error=RequestFailure.of(error))
                )
        outputs += self._abort(message.aborts)  # those that came with their requests
        if outputs:
            self._deliver(outputs)

    def _abort(self, request_ids: list[str]) -> list[EngineOutput]:
        """The last outputs of those that have not ended."""
        if not isinstance(self.state, Ready):
            return []
        ended = (self.core.abort(request_id) for request_id in request_ids)
        return [output for output in ended if output is not None]

    def _deliver(self, outputs: list[EngineOutput], to_all: bool = False) -> None:
        """Send each worker what is its own, and the counters with it.

        to_all: send the counters to workers without outputs too.
        """
        by_worker: defaultdict[bytes, list[EngineOutput]] = defaultdict(list)
        if to_all:
            by_worker.update((worker, []) for worker in self.workers)
        for output in outputs:
            ended = output.finish_reason is not None or output.error is not None
            owner = (self.owners.pop if ended else self.owners.__getitem__)(output.request_id)
            by_worker[owner].append(output)
        stats = self.core.stats() if isinstance(self.state, Ready) else EngineStats()
        for worker, added in by_worker.items():
            self._send(worker, StepOutputs(added, stats))

    def fail(self, error: MinisrvError) -> bool:
        """Tell every worker why the engine ends; whether there is one to log it."""
        while self.socket.poll(0):
            worker, _ = self.socket.recv_multipart()
            self.workers.add(worker)
        self.state = Failed(RequestFailure.of(error))
        self._broadcast()
        return bool(self.workers)

    def close(self) -> None:
        """Close the socket once what was sent has left."""
        self.socket.close()
        self.context.term()
