"""The grammars of an engine's requests: compiled while they wait, followed token by token.

A grammar is compiled in a thread, so that no step is held up; the tokenizer is loaded there when
the first grammar comes, and not before. Cheap grammars have a thread of their own, so that none
waits behind one that takes almost a second, and the other thread takes what the step loop leaves of
the processors. A grammar that several requests have, or that came lately, is compiled once and
copied, which takes microseconds. The matcher is kept until the request ends, through preemptions
too, as these change no token. What goes wrong with a grammar is a `MinisrvError` that ends its own
request.

A request may ask for `min_tokens` as well. No end is allowed before them, but where the grammar
lets nothing else follow: what was asked for is complete there, and a mask that allows no token
would leave nothing to sample.

API workers have seen each grammar compile within a time, in a process of its own
(`text.grammar_validator`): native code cannot be interrupted here. They say how long it took, and
send it in llguidance's words: what is left to do here releases the GIL, where Python code beside
the step loop would make each of its operations wait.

Knows: the matchers, by request id. Knows nothing of logits, or of how a step runs.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import PriorityQueue
from typing import TypeVar

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from minisrv.checkpoint import TokenizerDescription
from minisrv.core.step import ScheduledRow
from minisrv.errors import EngineError, MinisrvError
from minisrv.request import SamplingParams, StructuredOutput
from minisrv.text.recently_used import RecentlyUsed
from minisrv.text.structured import CHEAP_SECONDS, GrammarBackend, Matcher
from minisrv.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

KEPT_SECONDS = 2.0
"""Processor time of the compiled grammars that are kept for others, together. It bounds their
memory as well: those that compile longest grow by 80 MiB a second."""
KEPT_GRAMMARS = 256
"""Most of them."""
_NICE = 5
"""Of the thread for costly grammars."""


@dataclass
class _Minimum:
    """What is left of a request's `min_tokens`.

    tokens: how many. allowed: [bitmask_words] int32, a bit for each column of the logits whose
        token does not end the request.
    """

    tokens: int
    allowed: NDArray[np.int32]


class Grammars:
    """Of one engine. Methods are for one thread.

    tokenizer: of the checkpoint; made into one when the first grammar comes.
    vocab_size: columns of the logits. eos_token_ids: tokens that end a text.
    """

    def __init__(
        self, tokenizer: TokenizerDescription, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._cheap = _ShortestFirst("cheap-grammar")
        self._costly = _ShortestFirst("costly-grammar", nice=_NICE)
        self._kept: RecentlyUsed[StructuredOutput, Matcher] = RecentlyUsed(
            KEPT_SECONDS, least=KEPT_SECONDS / KEPT_GRAMMARS
        )
        self._compiling: dict[str, Future[tuple[Matcher, _Minimum | None]]] = {}
        self._matchers: dict[str, Matcher] = {}
        self._minima: dict[str, _Minimum] = {}

        self._loading = threading.Lock()

    @property
    def _backend(self) -> GrammarBackend:
        with self._loading:
            return self._loaded

    @functools.cached_property
    def _loaded(self) -> GrammarBackend:
        tokenizer = Tokenizer.from_description(self._tokenizer)
        return GrammarBackend(tokenizer, self._vocab_size, self._eos_token_ids)

    def compile(self, request_id: str, spec: StructuredOutput, params: SamplingParams) -> None:
        """Begin to; `compiled` tells when it is done.

        params: the request's, whose stop tokens and end-of-sequence tokens are kept from the first
            `min_tokens` tokens.
        """

        key = replace(spec, seconds=0.0)  # however long it took elsewhere

        def compile() -> tuple[Matcher, _Minimum | None]:
            matcher = self._kept.get(key)
            if matcher is None:
                began = time.thread_time()
                matcher = self._backend.compile(spec)
                # The first mask makes what later ones find made: a tenth of a second, of some.
                matcher.fill(np.zeros(self.bitmask_words, np.int32))
                self._kept.add(key, matcher, time.thread_time() - began)
            minimum = self._minimum(params) if params.min_tokens else None
            return matcher.copy(spec), minimum

        is_costly = spec.seconds > CHEAP_SECONDS and self._kept.get(key) is None
        thread = self._costly if is_costly else self._cheap
        self._compiling[request_id] = thread.submit(spec.seconds, compile)

    def _minimum(self, params: SamplingParams) -> _Minimum:
        allowed = np.zeros(32 * self.bitmask_words, np.uint8)
        allowed[: self._vocab_size] = 1
        allowed[[*self._eos_token_ids, *params.stop_token_ids]] = 0
        packed = np.packbits(allowed, bitorder="little").view(np.int32)
        return _Minimum(params.min_tokens, packed)

    @property
    def compiling(self) -> bool:
        """Whether some request waits for its grammar."""
        return bool(self._compiling)

    def wait(self, seconds: float) -> None:
        """Until a grammar is compiled, or the time is over."""
        wait(self._compiling.values(), timeout=seconds, return_when=FIRST_COMPLETED)

    def compiled(self) -> list[tuple[str, MinisrvError | None]]:
        """The requests whose grammars have been compiled since the last call, or could not be."""
        done = [(name, future) for name, future in self._compiling.items() if future.done()]
        found: list[tuple[str, MinisrvError | None]] = []
        for request_id, future in done:
            del self._compiling[request_id]
            error = future.exception()
            if error is None:
                self._matchers[request_id], minimum = future.result()
                if minimum is not None:
                    self._minima[request_id] = minimum
            elif not isinstance(error, MinisrvError):
                logger.error("a grammar could not be compiled", exc_info=error)
                error = EngineError("compiling a grammar failed; see the engine's log.")
            found.append((request_id, error))
        return found

    def drop(self, request_id: str) -> None:
        """The request has ended; nothing happens if it has no grammar."""
        self._minima.pop(request_id, None)
        if self._matchers.pop(request_id, None) is None:
            future = self._compiling.pop(request_id, None)
            if future is not None:
                future.cancel()

    # ---- runner.token_masks.AllowedTokens ----------------------------------------------------

    @property
    def bitmask_words(self) -> int:
        """See `AllowedTokens`."""
        return self._backend.bitmask_words

    def fill(self, rows: Sequence[ScheduledRow], bitmask: NDArray[np.int32]) -> None:
        """See `AllowedTokens`. A grammar that fails here allows the end only; `accept` tells. The
        row of a request that has ended meanwhile stays as it is: nobody gets its token."""
        matchers = [
            (self._matchers[row.request_id], index)
            for index, row in enumerate(rows)
            if row.masked and row.request_id in self._matchers
        ]
        if matchers:
            self._backend.fill(matchers, bitmask)
        for index, row in enumerate(rows) if self._minima else ():
            if row.masked and row.request_id in self._minima:
                others = bitmask[index] & self._minima[row.request_id].allowed
                if others.any():
                    bitmask[index] = others

    def accept(self, request_id: str, token_id: int) -> MinisrvError | None:
        """Go on behind a request's token, if it has a grammar; what has gone wrong with that."""
        matcher = self._matchers.get(request_id)
        if matcher is None:
            return None
        matcher.accept([token_id])
        minimum = self._minima.get(request_id)
        if minimum is not None:
            minimum.tokens -= 1
            if not minimum.tokens:
                del self._minima[request_id]
        return matcher.error


class _ShortestFirst:
    """A thread that does what takes least of what waits, and of the same the oldest. Many short
    ones cannot hold longer ones up for good: to try a grammar takes an API worker longer than to
    compile it here."""

    def __init__(self, name: str, *, nice: int = 0) -> None:
        """nice: what is added to the thread's niceness."""

        def be_nice() -> None:
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)

        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=be_nice)
        self._waiting: PriorityQueue[tuple[float, int, Callable[[], None]]] = PriorityQueue()
        self._count = itertools.count()

    def submit(self, seconds: float, work: Callable[[], _T]) -> Future[_T]:
        """Queue `work`, which takes about so long."""
        future: Future[_T] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # a panic of Rust's is no Exception
                future.set_exception(error)

        self._waiting.put((seconds, next(self._count), do))
        self._pool.submit(self._do_shortest)
        return future

    def _do_shortest(self) -> None:
        _, _, do = self._waiting.get_nowait()  # there is one for each call
        do()
