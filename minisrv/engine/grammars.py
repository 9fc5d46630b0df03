"""The grammars of an engine's requests: compiled while the requests wait, followed token by token.

A grammar is compiled in a thread, so that no step is delayed; the tokenizer is loaded there when
the first grammar comes, and not before. Cheap grammars have a thread of their own, so that none
waits behind one that takes almost a second; the other thread has a lower priority and takes the
processor time that the step loop leaves. A grammar that several requests have, or that came
recently, is compiled once and copied, which takes microseconds. The matcher is kept until the
request ends, through preemptions too, as these change no token. A failure of a grammar is a
`MinisrvError` that ends only its own request. A grammar that has failed on its way is not copied
any more, because its copies could not go on either.

A request may ask for `min_tokens` as well. Before that many tokens no end is allowed, except where
the grammar lets nothing else follow: the output is complete there, and a mask that allows no token
would leave nothing to sample.

API workers have already seen each grammar compile within a time limit, in a separate process
(`text.grammar_validator`), because native code cannot be interrupted here. They report how long it
took, and send the grammar in llguidance's own format: the work that is left to do here releases the
GIL, whereas Python code would delay each operation of the step loop.

Knows: the matchers, by request id. Knows nothing of logits, or of how a step runs.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import PriorityQueue
from typing import TypeVar

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from minisrv.core.step import ScheduledRow
from minisrv.errors import EngineError, MinisrvError
from minisrv.request import EngineOutput, SamplingParams, StructuredOutput
from minisrv.text.lru_cache import LRUCache
from minisrv.text.structured import CHEAP_SECONDS, GrammarBackend, Matcher
from minisrv.text.tokenizer import Tokenizer
from minisrv.text.tokenizer_description import TokenizerDescription

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_CACHED_SECONDS = 2.0
"""Maximum processor time, in seconds, that compiling the grammars which are kept for other requests
took together. It bounds their memory as well: those that compile longest grow by 80 MiB a
second."""
MAX_CACHED_GRAMMARS = 256
"""Maximum number of grammars that are kept."""
_NICE = 5
"""Niceness that is added to the thread for costly grammars."""


@dataclass
class _MinTokens:
    """The remaining minimum length of a request (`min_tokens`).

    num_left: the number of tokens that are left.
    allowed: [bitmask_words] int32, a bit for each column of the logits whose token does not end the
        request.
    """

    num_left: int
    allowed: NDArray[np.int32]


class Grammars:
    """The grammars of one engine. The methods must be called from one thread.

    tokenizer: the description of the checkpoint's tokenizer; it is loaded when the first grammar
        comes.
    vocab_size: the number of columns of the logits.
    eos_token_ids: the tokens that end a text.
    """

    def __init__(
        self, tokenizer: TokenizerDescription, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._cheap = _ShortestFirst("cheap-grammar")
        self._costly = _ShortestFirst("costly-grammar", nice=_NICE)
        self._cache: LRUCache[StructuredOutput, Matcher] = LRUCache(
            MAX_CACHED_SECONDS, min_weight=MAX_CACHED_SECONDS / MAX_CACHED_GRAMMARS
        )
        self._compiling: dict[str, Future[tuple[Matcher, _MinTokens | None]]] = {}
        self._matchers: dict[str, Matcher] = {}
        self._min_tokens: dict[str, _MinTokens] = {}

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
        """Begin to compile a grammar; `pop_compiled` reports when it is done.

        params: the parameters of the request; its stop tokens and the end-of-sequence tokens are
            not allowed among the first `min_tokens` tokens.
        """

        key = _cache_key(spec)

        def compile() -> tuple[Matcher, _MinTokens | None]:
            matcher = self._cache.get(key)
            if matcher is None:
                began = time.thread_time()
                matcher = self._backend.compile(spec)
                # The first mask computes data that later ones reuse; for some grammars it takes a
                # tenth of a second.
                matcher.fill_bitmask(np.zeros(self.bitmask_words, np.int32))
                self._cache.add(key, matcher, time.thread_time() - began)
            minimum = self._min_tokens_of(params) if params.min_tokens else None
            return matcher.copy(spec), minimum

        is_costly = spec.compile_seconds > CHEAP_SECONDS and self._cache.get(key) is None
        thread = self._costly if is_costly else self._cheap
        self._compiling[request_id] = thread.submit(spec.compile_seconds, compile)

    def _min_tokens_of(self, params: SamplingParams) -> _MinTokens:
        allowed = np.zeros(32 * self.bitmask_words, np.uint8)
        allowed[: self._vocab_size] = 1
        allowed[[*self._eos_token_ids, *params.stop_token_ids]] = 0
        packed = np.packbits(allowed, bitorder="little").view(np.int32)
        return _MinTokens(params.min_tokens, packed)

    @property
    def compiling(self) -> bool:
        """Whether some request waits for its grammar."""
        return bool(self._compiling)

    def wait(self, seconds: float) -> None:
        """Wait until a grammar is compiled, or the time is over."""
        wait(self._compiling.values(), timeout=seconds, return_when=FIRST_COMPLETED)

    def pop_compiled(self) -> list[tuple[str, MinisrvError | None]]:
        """Return the requests whose grammars have been compiled, or could not be, since the last
        call."""
        done = [(name, future) for name, future in self._compiling.items() if future.done()]
        found: list[tuple[str, MinisrvError | None]] = []
        for request_id, future in done:
            del self._compiling[request_id]
            error = future.exception()
            if error is None:
                self._matchers[request_id], minimum = future.result()
                if minimum is not None:
                    self._min_tokens[request_id] = minimum
            elif not isinstance(error, MinisrvError):
                logger.error("a grammar could not be compiled", exc_info=error)
                error = EngineError("compiling a grammar failed; see the engine's log.")
            found.append((request_id, error))
        return found

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended; nothing happens if it has no grammar."""
        self._min_tokens.pop(request_id, None)
        if self._matchers.pop(request_id, None) is None:
            future = self._compiling.pop(request_id, None)
            if future is not None:
                future.cancel()

    # ---- runner.token_masks.AllowedTokens ----------------------------------------------------

    @property
    def bitmask_words(self) -> int:
        """See `AllowedTokens`."""
        return self._backend.bitmask_words

    def fill_bitmask(self, rows: Sequence[ScheduledRow], bitmask: NDArray[np.int32]) -> None:
        """See `AllowedTokens`. A grammar that fails here allows only the end; `accept_token`
        reports the error. The row of a request that has ended meanwhile stays as it is, because its
        token is dropped."""
        matchers = [
            (self._matchers[row.request_id], index)
            for index, row in enumerate(rows)
            if row.use_structured_output and row.request_id in self._matchers
        ]
        if matchers:
            self._backend.fill_bitmasks(matchers, bitmask)
        for index, row in enumerate(rows) if self._min_tokens else ():
            if row.use_structured_output and row.request_id in self._min_tokens:
                others = bitmask[index] & self._min_tokens[row.request_id].allowed
                if others.any():
                    bitmask[index] = others

    def accept_tokens(self, outputs: Iterable[EngineOutput]) -> dict[str, MinisrvError]:
        """Advance the grammars of requests that have one by the tokens of outputs, and return the
        errors of those that have failed, by request."""
        errors = {}
        for output in outputs:
            for token_id in output.token_ids:
                error = self._accept_token(output.request_id, token_id)
                if error is not None:
                    errors[output.request_id] = error
        return errors

    def _accept_token(self, request_id: str, token_id: int) -> MinisrvError | None:
        """Advance a grammar, if there is one, by a token; return its error if it has failed."""
        matcher = self._matchers.get(request_id)
        if matcher is None:
            return None
        matcher.accept([token_id])
        minimum = self._min_tokens.get(request_id)
        if minimum is not None:
            minimum.num_left -= 1
            if not minimum.num_left:
                del self._min_tokens[request_id]
        error = matcher.error
        if error is not None and matcher.original is not None:
            self._cache.remove(_cache_key(matcher.spec), matcher.original)
        return error


def _cache_key(spec: StructuredOutput) -> StructuredOutput:
    """Return what equal grammars have in common; the time that compiling took in an API worker is
    not part of it."""
    return replace(spec, compile_seconds=0.0)


class _ShortestFirst:
    """A thread that does the shortest of the waiting work first, and the oldest of equally short
    work.

    Many short grammars cannot delay longer ones for ever: an API worker takes longer to try a
    grammar than this thread takes to compile it.
    """

    def __init__(self, name: str, *, nice: int = 0) -> None:
        """nice: the number that is added to the thread's niceness."""

        def be_nice() -> None:
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)

        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=be_nice)
        self._waiting: PriorityQueue[tuple[float, int, Callable[[], None]]] = PriorityQueue()
        self._count = itertools.count()

    def submit(self, seconds: float, work: Callable[[], _T]) -> Future[_T]:
        """Queue `work`, which takes about so many seconds."""
        future: Future[_T] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # a panic in Rust is not an Exception
                future.set_exception(error)

        self._waiting.put((seconds, next(self._count), do))
        self._pool.submit(self._do_shortest)
        return future

    def _do_shortest(self) -> None:
        _, _, do = self._waiting.get_nowait()  # each call has one item
        do()
