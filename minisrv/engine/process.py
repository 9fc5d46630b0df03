"""The engine as a separate process: a socket around `EngineCore`.

Knows: how the process starts, serves, and ends. It ends with an error, with its parent, or when the
parent stops it. A worker is any process that says hello on the socket. Each worker gets one message
a step with what the step added to its requests, and the counters and recorded steps when it asks.
A worker that says hello again is a new process in place of one that has died, whose requests are
dropped.

The parent can see that the engine is alive: once it serves, its loop comes round every half second
or every step; while it loads, which is no loop, a thread beats as often. So a load that waits for
ever for a disk or a device looks like a slow one; only a process that is stopped, or that holds the
interpreter, does not. Knows nothing of HTTP or text.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import zmq

from minisrv import threads
from minisrv.checkpoint import Checkpoint
from minisrv.config import EngineConfig, KVEventsConfig
from minisrv.core.kv_events import RecordingBlockPool
from minisrv.engine.ahead import prepare_gpu
from minisrv.engine.heartbeat import Heartbeat
from minisrv.engine.kernel_process import start_early
from minisrv.engine.kv_events import KVEventPublisher
from minisrv.engine.messages import (
    AskStats,
    Command,
    CommandDone,
    EngineMessage,
    EngineStats,
    Failed,
    Hello,
    Loading,
    Ready,
    Sleep,
    SleepMode,
    StepOutputs,
    Submit,
    WakeUp,
    decode_worker_message,
    encode,
)
from minisrv.engine.stats_log import StatsLog
from minisrv.engine.trace_format import AskSteps, Steps
from minisrv.errors import (
    ConfigError,
    EngineError,
    EngineNotReadyError,
    MinisrvError,
    SleepError,
    asleep_error,
)
from minisrv.processes import ChildProcess
from minisrv.progress import StartupClock
from minisrv.request import EngineOutput, RequestFailure

logger = logging.getLogger(__name__)

IDLE_MS = 500
"""Maximum time in milliseconds for which the loop waits for a message, and the interval of the
thread that beats during loading."""


FIRST_WORKER_MS = 5000
"""Maximum time in milliseconds for which an engine that could not be loaded waits for a worker to
tell it to: workers import their modules meanwhile."""


class EngineProcess(ChildProcess):
    """The parent's handle of an engine process."""

    def __init__(
        self,
        config: EngineConfig,
        private_dir: Path,
        *,
        log_stats: bool = False,
        kv_events: KVEventsConfig | None = None,
    ) -> None:
        """Start the process at once. It imports its modules, and then waits for `load`.

        private_dir: the directory for its socket.
        log_stats: whether it logs throughput and queue while there is work.
        kv_events: where it publishes the events of its prefix cache; None publishes none.

        Raises ConfigError if the path of the socket is too long, and for events of a prefix cache
        that is off.
        """
        if kv_events is not None and not config.enable_prefix_caching:
            raise ConfigError(
                "kv_events_endpoint is not allowed without the prefix cache, whose events it "
                "publishes; leave out --no-enable-prefix-caching or the endpoint."
            )
        path = private_dir / "engine"
        if len(bytes(path)) > zmq.IPC_PATH_MAX_LEN:
            raise ConfigError(
                f"the path of the engine's socket, {path}, is longer than {zmq.IPC_PATH_MAX_LEN} "
                "bytes, the most that a socket allows; set TMPDIR to a shorter directory."
            )
        self.address = f"ipc://{path}"
        beats = private_dir / "heartbeat"
        self._heartbeat = Heartbeat(beats)
        theirs, self._checkpoint = Pipe(duplex=False)
        arguments = config, theirs, self.address, beats, log_stats, kv_events, time.monotonic()
        with theirs:
            super().__init__("engine", _main, *arguments, private_dir=private_dir)

    def load(self, checkpoint: Path) -> None:
        """Let the process load the model. May be called once.

        checkpoint: the file in which a `Checkpoint` has been saved.
        """
        with self._checkpoint, suppress(OSError):  # raised if the process has ended
            self._checkpoint.send(checkpoint)

    @property
    def silent_seconds(self) -> float:
        """Number of seconds since it last showed that it is alive; at first, since it was
        started."""
        return self._heartbeat.age


def _main(
    config: EngineConfig,
    checkpoint: Connection,
    address: str,
    heartbeat: Path,
    log_stats: bool,
    kv_events: KVEventsConfig | None,
    began: float,
) -> None:
    clock = StartupClock(began)
    server = _EngineServer(address, Heartbeat(heartbeat))
    try:
        if kv_events is not None:
            server.publish_kv_events(kv_events, heartbeat.parent)
        with server.heartbeat.beating(IDLE_MS / 1000):
            server.load(config, lambda: _received(checkpoint), clock)
        server.run(log_stats=log_stats)
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


def _received(line: Connection) -> Checkpoint:
    """Wait until the parent has saved the checkpoint, and return it."""
    try:
        path: Path = line.recv()
    except EOFError:  # the parent has died, and a thread ends this process (`ChildProcess`)
        signal.pause()
        raise
    return Checkpoint.load(path)


class _EngineServer:
    """The engine's side of the socket, and the loop."""

    def __init__(self, address: str, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 1000  # milliseconds for the last messages
        # A worker that replaces a dead one has its name.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.set_hwm(0)  # admission, not the socket, bounds what is in flight
        self.socket.bind(address)
        self.workers: set[bytes] = set()
        self.owners: dict[str, bytes] = {}
        self.commands: deque[tuple[bytes | None, Command]] = deque()
        """The commands that have not been carried out, with the worker that is to be answered."""
        self.state: EngineMessage = Loading("starting")
        self._kv_events: KVEventPublisher | None = None

    def publish_kv_events(self, config: KVEventsConfig, private_dir: Path) -> None:
        """Publish the events of the prefix cache of the engine that `load` makes. Raises what
        `KVEventPublisher` raises."""
        self._kv_events = KVEventPublisher(config, private_dir)

    def load(
        self, config: EngineConfig, read_checkpoint: Callable[[], Checkpoint], clock: StartupClock
    ) -> None:
        """Make the engine, and report the progress to every worker.

        read_checkpoint: returns the checkpoint; it is called once the modules are imported, and may
            wait for what another process reads meanwhile.
        """
        clock.end("engine process")
        # What imports make is not garbage, and collections would go through all of it again and
        # again. Where memory is measured, a `Platform` collects.
        gc.disable()
        early_kernels = start_early(config)
        prepare_gpu(config)
        try:
            logger.info("importing torch")  # no message reports progress before torch is imported
            # The imports are here so that workers can connect while torch is imported.
            from minisrv.engine.builder import build_engine
            from minisrv.engine.core import EngineCore

            # Nothing that was imported is garbage, and each of the collections below, without which
            # tensors stay, would go through a quarter of a million objects.
            gc.freeze()
            clock.end("imports")
            checkpoint = read_checkpoint()
            clock.end("checkpoint")
            threads.limit(beside=1)  # for the API worker
            self.core = EngineCore(
                build_engine(
                    config,
                    self._progress,
                    checkpoint=checkpoint,
                    clock=clock,
                    early_kernels=early_kernels,
                    record_kv_events=self._kv_events is not None,
                )
            )
            # Objects that exist now stay: a garbage collection that went through all of them would
            # delay a step.
            gc.collect()
            gc.freeze()
        finally:
            gc.enable()
            if early_kernels is not None:
                early_kernels.close()
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

    def run(self, *, log_stats: bool) -> None:
        """Serve until the process is told to end."""
        stats_log = StatsLog(self.core.stats) if log_stats else None
        try:
            while True:
                self._turn()
                if stats_log is not None:
                    stats_log.tick()
        finally:
            self.core.background.close()

    def _turn(self) -> None:
        """Read what workers have sent, run a step if there is one to run, and go on with the work
        between steps. Every worker is told of a change that this makes."""
        self.heartbeat.beat()
        background = self.core.background
        has_waited = background.idle_turn and (self.core.has_work or self.socket.poll(0))
        while self.socket.poll(0 if self._has_work() else IDLE_MS):
            self._receive()
            self.heartbeat.beat()
        if self.core.has_work:
            if has_waited:
                background.count_turn()
            self._deliver(self.core.step())
        if self.core.advance_background():
            self._tell_change()
        while self.commands and self._is_due(self.commands[0][1]):
            self._carry_out_first()
        if self._kv_events is not None:
            pool = self.core.scheduler.block_pool
            assert isinstance(pool, RecordingBlockPool), "it was asked for"
            self._kv_events.publish(pool.take_events())

    def _has_work(self) -> bool:
        core = self.core
        is_between = core.background.has_work and not core.sleeper.report.is_asleep
        return core.has_work or is_between or bool(self.commands)

    def _tell_change(self) -> None:
        """Tell every worker that the description of the engine has changed."""
        info = self.core.describe()
        if self.core.step_trace is not None:
            self.core.step_trace.note(info)
        self.state = Ready(info)
        self._broadcast()

    def _is_due(self, command: Command) -> bool:
        """Whether the first command can be carried out. One to sleep has new requests refused until
        it can, of which every worker is told. It ends the requests that there are, unless it and
        every sleep behind it are to wait for them."""
        if isinstance(command, WakeUp):
            return True
        was_due = self.core.sleeper.report.is_due
        self.core.sleeper.refuse_requests()
        if any(isinstance(c, Sleep) and c.mode is SleepMode.ABORT for _, c in self.commands):
            failure = RequestFailure.of(asleep_error())
            ended = [EngineOutput(request_id=each, error=failure) for each in self.owners]
            for output in ended:
                self.core.abort(output.request_id)
            self._deliver(ended)
        is_due = not self.core.has_work and not self.core.sleeper.is_busy
        if not is_due and not was_due:
            self._tell_change()
        return is_due

    def _carry_out_first(self) -> None:
        """Sleep or wake up, as the first command says, and answer the worker that asked for it,
        unless another one has replaced it meanwhile."""
        _, command = self.commands[0]
        failure = None
        with self.heartbeat.beating(IDLE_MS / 1000):
            try:
                match command:
                    case Sleep(level):
                        self.core.sleeper.sleep(level)
                    case WakeUp(tags):
                        self.core.sleeper.wake_up(tags)
            except (SleepError, ConfigError) as error:
                logger.error("%s", error.message)
                failure = RequestFailure.of(error)
        self._tell_change()
        while self.socket.poll(0):  # a worker that has replaced another says so
            self._receive()
        worker, _ = self.commands.popleft()
        if worker is not None:
            self._send(worker, CommandDone(failure))

    def _receive(self) -> None:
        worker, body = self.socket.recv_multipart()
        message = decode_worker_message(body)
        if worker not in self.workers and not isinstance(message, Hello):
            # A worker that has died sent this message, and it is read when another worker has its
            # name, so it comes under a name that zmq made up: nobody would read the answer or abort
            # the request.
            return
        match message:
            case Submit():
                self._submit(worker, message)
            case AskStats():
                ready = isinstance(self.state, Ready)
                self._send(worker, self.core.stats() if ready else EngineStats())
            case AskSteps():
                trace = self.core.step_trace if isinstance(self.state, Ready) else None
                self._send(worker, Steps() if trace is None else trace.read(message))
            case Sleep() | WakeUp():
                self._command(worker, message)
            case Hello():
                self._drop_requests_of(worker)
                self.workers.add(worker)
                self._send(worker, self.state)

    def _drop_requests_of(self, worker: bytes) -> None:
        """Abort the requests that a dead worker of this name has left open. Its commands are
        carried out, and nobody is answered."""
        left = [request_id for request_id, owner in self.owners.items() if owner == worker]
        for request_id in left:
            self.core.abort(request_id)
            del self.owners[request_id]
        self.commands = deque((None if each == worker else each, c) for each, c in self.commands)

    def _command(self, worker: bytes, command: Command) -> None:
        if isinstance(self.state, Ready):
            self.commands.append((worker, command))
            return
        loading = EngineNotReadyError("the engine is still loading; try again later.")
        self._send(worker, CommandDone(RequestFailure.of(loading)))

    def _submit(self, worker: bytes, message: Submit) -> None:
        outputs = self._abort(message.aborts)  # first, because this makes room
        for request in message.with_prompts():
            self.owners[request.request_id] = worker
            try:
                if not isinstance(self.state, Ready):
                    raise EngineNotReadyError("the engine is still loading; try again later.")
                self.core.add(request)
            except MinisrvError as error:
                outputs.append(
                    EngineOutput(request_id=request.request_id, error=RequestFailure.of(error))
                )
        outputs += self._abort(message.aborts)  # those that were submitted in the same message
        self._deliver(outputs)

    def _abort(self, request_ids: list[str]) -> list[EngineOutput]:
        """Abort requests, and return the last outputs of those that had not ended."""
        if not isinstance(self.state, Ready):
            return []
        ended = (self.core.abort(request_id) for request_id in request_ids)
        return [output for output in ended if output is not None]

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        """Send each worker its own outputs."""
        by_worker: defaultdict[bytes, list[EngineOutput]] = defaultdict(list)
        for output in outputs:
            ended = output.finish_reason is not None or output.error is not None
            owner = (self.owners.pop if ended else self.owners.__getitem__)(output.request_id)
            by_worker[owner].append(output)
        for worker, added in by_worker.items():
            self._send(worker, StepOutputs(added))

    def fail(self, error: MinisrvError) -> bool:
        """Tell every worker why the engine ends, and return whether there is one, which then logs
        it. If there is none yet, the first one is waited for."""
        while self.socket.poll(0 if self.workers else FIRST_WORKER_MS):
            worker, _ = self.socket.recv_multipart()
            self.workers.add(worker)
        self.state = Failed(RequestFailure.of(error))
        self._broadcast()
        return bool(self.workers)

    def close(self) -> None:
        """Close the sockets once the messages have been sent."""
        if self._kv_events is not None:
            self._kv_events.close()
        self.socket.close()
        self.context.term()
