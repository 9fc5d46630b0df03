"""Whether a grammar can be compiled at all, found out where it can do no harm.

Compiling is native code that cannot be interrupted, and a few lines can keep it busy for hours or
fill the memory (vLLM's issues 17313 and 54003, CVE-2025-48944). So an API worker has a process that
compiles every grammar before the engine sees it. That process has loaded the tokenizer and forks
for each grammar: the child has a second of processor time and a bound on its memory, which the
kernel enforces, and ends whatever happens to it. What passes has compiled, and has been followed
for a few tokens, which is where grammars with too many alternatives fail. It is remembered, as most
clients send the same few grammars again and again, and what a child costs, 12 ms where vocabularies
are large, is more than a prompt takes.

Knows: processes and their limits. Knows nothing of what a grammar says.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import tokenizers

from minisrv.errors import EngineError, RequestError
from minisrv.processes import safe_path
from minisrv.request import StructuredOutput, StructuredOutputKind
from minisrv.text.structured import GrammarBackend, grammar_error
from minisrv.text.tokenizer import Tokenizer

CPU_SECONDS = 1.0
"""Processor time of one grammar. 3,000 properties or 10,000 enum values take a tenth."""
_WALL_SECONDS = 10 * CPU_SECONDS
"""Where the processor is that busy, or something waits that should not."""
_MEMORY_BYTES = 2 << 30
"""Private memory of the child, the tokenizer included."""
_REHEARSED_TOKENS = 16
_REMEMBERED = 4096
"""Grammars that have passed, by their digest."""

_encode = msgspec.msgpack.Encoder().encode
_decode_spec = msgspec.msgpack.Decoder(StructuredOutput).decode
_decode_verdict = msgspec.msgpack.Decoder(str).decode


class GrammarValidator:
    """An API worker's handle of its validating process, which starts with the first grammar.

    Arguments as for GrammarBackend.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._arguments = (vocab_size, eos_token_ids)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar-validator")
        self._connection: Connection | None = None
        self._passed: dict[bytes, None] = {}  # the oldest first

    def validate(self, spec: StructuredOutput) -> Future[None]:
        """One grammar after the other; one that has passed before waits for no other. Raises,
        through the future, RequestError for a grammar that cannot be compiled within the budget,
        EngineError if the process has been killed."""
        body = _encode(spec)
        digest = hashlib.sha256(body).digest()
        if digest in self._passed:
            known: Future[None] = Future()
            known.set_result(None)
            return known
        return self._pool.submit(self._validate, spec, body, digest)

    def close(self) -> None:
        """Drop what has not been validated yet and end the process."""
        self._pool.shutdown(cancel_futures=True)
        if self._connection is not None:
            self._connection.close()

    def _validate(self, spec: StructuredOutput, body: bytes, digest: bytes) -> None:
        try:
            if self._connection is None:
                self._connection = self._start()
            self._connection.send_bytes(body)
            verdict = _decode_verdict(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            self._connection = None  # a new one for the next grammar
            raise EngineError("the process that validates grammars has ended.") from error
        if verdict:
            raise RequestError(verdict, param=spec.param)
        if len(self._passed) == _REMEMBERED:
            del self._passed[next(iter(self._passed))]
        self._passed[digest] = None

    def _start(self) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=_serve,
            args=(theirs, *self._arguments),
            name="minisrv-grammar-validator",
            daemon=True,
        )
        with safe_path():
            process.start()
        theirs.close()
        # Not an argument: starting a process that dies early would wait for it to read them.
        ours.send_bytes(self._tokenizer.to_json().encode())
        return ours


def _serve(connection: Connection, vocab_size: int, eos_token_ids: list[int]) -> None:
    """Answer each grammar with one message: what is wrong with it, or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's; its end closes the connection
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(connection.recv_bytes().decode()))
    backend = GrammarBackend(tokenizer, vocab_size, eos_token_ids)
    # Loads the tokenizer, which the children share.
    _try(backend, StructuredOutput(kind=StructuredOutputKind.JSON_OBJECT), eos_token_ids)
    while True:
        try:
            spec = _decode_spec(connection.recv_bytes())
        except EOFError:
            return
        child = os.fork()  # no thread of this process holds a lock
        if child == 0:
            status = 1
            try:
                _limit(CPU_SECONDS, _WALL_SECONDS, _MEMORY_BYTES)
                verdict = _try(backend, spec, eos_token_ids)
                # A child that is killed has sent nothing, so that there is one message always.
                _limit(0, 0, resource.RLIM_INFINITY)
                connection.send_bytes(_encode(verdict))
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            connection.send_bytes(_encode(_died(spec, status)))


def _limit(cpu_seconds: float, wall_seconds: float, memory_bytes: int) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, resource.RLIM_INFINITY))


def _try(backend: GrammarBackend, spec: StructuredOutput, eos_token_ids: list[int]) -> str:
    """What is wrong with the grammar, or nothing."""
    try:
        # What may come before it would be all that is rehearsed.
        matcher = backend.compile(msgspec.structs.replace(spec, reasoning_end=""))
    except RequestError as error:
        return error.message
    row = np.zeros(backend.bitmask_words, np.int32)
    for _ in range(_REHEARSED_TOKENS):
        matcher.fill(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        texts = [token_id for token_id in allowed.tolist() if token_id not in eos_token_ids]
        if not texts or not matcher.accept(texts[:1]):
            break
    return matcher.error.message if matcher.error else ""


def _died(spec: StructuredOutput, status: int) -> str:
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    too_long = killed_by in (signal.SIGPROF, signal.SIGALRM)
    # Otherwise it has aborted where it got no memory.
    why = f"takes more than {CPU_SECONDS:g} s of processor time" if too_long else "fails"
    return grammar_error(spec, "is too complex", f"compiling it {why}; make it smaller").message
