"""The process that tries grammars for an API worker: it forks a process for each of them.

It has loaded the tokenizer, which the forked processes share, and has no threads, so that no lock
is held when it forks. Each forked process tries one grammar, within limits that the kernel
enforces: processor time, and private memory. It is ended in any case, and so is every process here
when its parent ends, even if it is stopped. Many trials run at a time; this process waits for all
of them at once, so it is never busy, and sends a sign of life every `BEAT_SECONDS` while there are
any.

Knows: processes, their limits, and the socket. Knows nothing of whose turn it is, nor of what a
grammar says. It must be imported before anything that would start threads, and so imports little
itself.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import socket
import struct
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from minisrv import threads
from minisrv.errors import RequestError
from minisrv.processes import bound_resource, die_with_parent
from minisrv.request import StructuredOutput, StructuredOutputKind

if TYPE_CHECKING:
    from minisrv.text.structured import GrammarBackend

BEAT_SECONDS = 1.0

MEMORY_BYTES = 2 << 30
"""Maximum number of bytes of private memory of a forked process, the tokenizer included."""
_REHEARSED_TOKENS = 16
_READ_BYTES = 1 << 16
_KILLED_FIRST = 1000
"""The `oom_score_adj` that makes the kernel kill a process before any other when memory runs
out."""

_LENGTH = struct.Struct("!I")


class GrammarTrial(msgspec.Struct, frozen=True):
    """Message from the worker to this process: try a grammar.

    cpu_seconds, wall_seconds: processor time and wall-clock time that the trial may take.
    nice: what is added to the niceness of the trial's process.
    """

    number: int
    spec: StructuredOutput
    cpu_seconds: float
    wall_seconds: float
    nice: int


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Message from this process to the worker: a sign of life. The first one says that the
    tokenizer is loaded."""


class GrammarOutcome(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Message from this process to the worker: a trial has ended.

    seconds: processor time that the trial took.
    lowered: the grammar in llguidance's format.
    problem: what is wrong with the grammar; empty if it may be used.
    killed_by: the signal that ended the trial, which has no result then; 0 if none did.
    late: the trial had not ended when its wall-clock time was over, and was killed for that.
    failure: an internal error of the trial, which should not happen.
    """

    number: int
    seconds: float
    lowered: str = ""
    problem: str = ""
    killed_by: int = 0
    late: bool = False
    failure: str = ""


class _TrialResult(msgspec.Struct, frozen=True):
    """The result that a forked process writes before it ends."""

    lowered: str = ""
    problem: str = ""
    failure: str = ""


encode = msgspec.msgpack.Encoder().encode
decode_report = msgspec.msgpack.Decoder(Beat | GrammarOutcome).decode
_decode_trial = msgspec.msgpack.Decoder(GrammarTrial).decode
_decode_result = msgspec.msgpack.Decoder(_TrialResult).decode


def frame(body: bytes) -> bytes:
    """Return a message as it is sent over the socket, in either direction."""
    return _LENGTH.pack(len(body)) + body


def frame_length(head: bytes) -> int:
    """Return the length in bytes of a message from the four bytes in front of it."""
    return int(_LENGTH.unpack(head)[0])


HEAD_BYTES = _LENGTH.size


def serve(connection: socket.socket, vocab_size: int, eos_token_ids: list[int]) -> None:
    """Try the grammars that are sent until the worker closes its end of the socket. The first
    message is a tokenizer.json."""
    threads.without_blas()
    import tokenizers

    from minisrv.text.structured import GrammarBackend
    from minisrv.text.tokenizer import Tokenizer

    first = _receive(connection)
    if first is None:
        return
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(first.decode()))
    backend = GrammarBackend(tokenizer, vocab_size, eos_token_ids)
    # A first trial loads what the forked processes then share.
    _try(backend, StructuredOutput(kind=StructuredOutputKind.JSON_OBJECT), eos_token_ids)
    _Trials(connection, backend, eos_token_ids).run()


@dataclass
class _Child:
    """A forked process that tries a grammar.

    deadline: when it must have ended, by `time.monotonic`.
    late: whether it was killed because its deadline was over.
    output: the bytes of its result that it has written so far.
    """

    pid: int
    number: int
    deadline: float
    late: bool = False
    output: bytes = b""


class _Trials:
    """The loop that runs trials.

    connection: the socket to the worker.
    """

    def __init__(
        self, connection: socket.socket, backend: GrammarBackend, eos_token_ids: list[int]
    ) -> None:
        self._connection = connection
        self._backend = backend
        self._eos_token_ids = eos_token_ids
        self._children: dict[int, _Child] = {}  # by the read end of the pipe that it writes to
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._sent_at = 0.0

    def run(self) -> None:
        """Run until the worker closes its end of the socket. Forked processes that are left end
        with this one."""
        self._send(Beat())
        while True:
            for key, _ in self._selector.select(BEAT_SECONDS if self._children else None):
                if key.fileobj is not self._connection:
                    self._read(key.fd)
                    continue
                body = _receive(self._connection)
                if body is None:
                    return
                self._start(_decode_trial(body))
            self._kill_late()
            if self._children and time.monotonic() - self._sent_at >= BEAT_SECONDS:
                self._send(Beat())

    def _send(self, report: Beat | GrammarOutcome) -> None:
        self._connection.sendall(frame(encode(report)))
        self._sent_at = time.monotonic()

    def _start(self, trial: GrammarTrial) -> None:
        read, write = os.pipe()
        this = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(read)
                die_with_parent(this)
                self._run_trial(trial, write)
            finally:
                os._exit(1)
        os.close(write)
        self._children[read] = _Child(pid, trial.number, time.monotonic() + trial.wall_seconds)
        self._selector.register(read, selectors.EVENT_READ)

    def _run_trial(self, trial: GrammarTrial, write: int) -> None:
        """Try the grammar in the forked process; does not return."""
        os.nice(trial.nice)
        Path("/proc/self/oom_score_adj").write_text(str(_KILLED_FIRST))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads messages of crashes here
        bound_resource(resource.RLIMIT_CORE, 0)
        bound_resource(resource.RLIMIT_DATA, MEMORY_BYTES)
        signal.setitimer(signal.ITIMER_PROF, trial.cpu_seconds)
        try:
            result = _try(self._backend, trial.spec, self._eos_token_ids)
        except MemoryError:
            os.abort()  # llguidance aborts too
        except BaseException:  # a panic in Rust is not an Exception
            result = _TrialResult(failure=traceback.format_exc())
        signal.setitimer(signal.ITIMER_PROF, 0)
        left = encode(result)
        while left:
            left = left[os.write(write, left) :]
        os._exit(0)  # closes the pipe last: its reader has nothing more to wait for

    def _read(self, pipe: int) -> None:
        child = self._children[pipe]
        if piece := os.read(pipe, _READ_BYTES):
            child.output += piece
            return
        self._selector.unregister(pipe)
        os.close(pipe)
        del self._children[pipe]
        _, status, usage = os.wait4(child.pid, 0)
        seconds = usage.ru_utime + usage.ru_stime
        outcome = GrammarOutcome(number=child.number, seconds=seconds, late=child.late)
        if os.WIFSIGNALED(status):
            outcome = msgspec.structs.replace(outcome, killed_by=os.WTERMSIG(status))
        elif status == 0:
            result = msgspec.structs.asdict(_decode_result(child.output))
            outcome = msgspec.structs.replace(outcome, **result)
        else:
            outcome = msgspec.structs.replace(outcome, failure=f"it ended with status {status}")
        self._send(outcome)

    def _kill_late(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            if child.deadline <= now and not child.late:
                child.late = True
                os.kill(child.pid, signal.SIGKILL)


def _receive(connection: socket.socket) -> bytes | None:
    """Receive a message; return None if the other end is closed."""
    head = _receive_exactly(connection, HEAD_BYTES)
    return head and _receive_exactly(connection, frame_length(head))


def _receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    body = bytearray()
    while len(body) < length:
        try:
            piece = connection.recv(length - len(body))
        except ConnectionResetError:
            return None
        if not piece:
            return None
        body += piece
    return bytes(body)


def _try(backend: GrammarBackend, spec: StructuredOutput, eos_token_ids: list[int]) -> _TrialResult:
    """Compile a grammar, and follow it for a few tokens, which is where grammars with too many
    alternatives fail."""
    import numpy as np

    try:
        lowered = backend.lower(spec)
        # Reasoning that may come before the answer is left out, as it would be all that is
        # followed.
        bare = msgspec.structs.replace(spec, reasoning_end="") if spec.reasoning_end else lowered
        matcher = backend.compile(bare)
    except RequestError as error:
        return _TrialResult(problem=error.message)
    row = np.zeros(backend.bitmask_words, np.int32)
    for _ in range(_REHEARSED_TOKENS):
        matcher.fill_bitmask(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        texts = [token_id for token_id in allowed.tolist() if token_id not in eos_token_ids]
        if not texts or not matcher.accept(texts[:1]):
            break
    if matcher.error is not None:
        return _TrialResult(problem=matcher.error.message)
    return _TrialResult(lowered=lowered.text)
