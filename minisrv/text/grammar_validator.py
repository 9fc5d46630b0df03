"""Finds out whether a grammar can be compiled at all, where that can do no harm.

Compiling is native code that cannot be interrupted, and a few lines can keep it busy for hours or
fill the memory (vLLM's issues 17313 and 54003, CVE-2025-48944). So an API worker has a process that
compiles every grammar before the engine sees it, each in a forked process, within limits that the
kernel enforces (`text.grammar_trials`). A grammar that passes has compiled, and has been followed
for a few tokens, which is where grammars with too many alternatives fail. The outcome for each
grammar is cached, as most clients send the same few again and again, and a trial, which takes 12 ms
for large vocabularies, costs more than tokenising a prompt.

Every grammar is tried in the fast lane first, which gives it `CHEAP_SECONDS` of processor time.
Nearly all need less. A grammar that needs more is killed, and tried again in the slow lane, with
`CPU_SECONDS`. Each lane has places of its own, and within a lane owners take turns. So a grammar's
first trial waits for at most `CHEAP_SECONDS` of processor time of each other owner, for itself and
for each grammar that its own owner has sent before it, divided by the number of the fast lane's
places, whatever others have sent.

The process may be killed, stopped or hang, as any may. It sends a sign of life once a second while
there is work; after `SILENT_SECONDS` without one it is killed and another takes its place. Grammars
that were being tried are tried once more, and then fail with an error of ours.

Knows: whose turn it is, what is cached, and the process. Knows nothing of what a grammar says.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import signal
import socket
import time
from collections.abc import Hashable
from contextlib import closing
from contextvars import Context
from dataclasses import dataclass, field

from minisrv import threads
from minisrv.errors import (
    GrammarBudgetError,
    GrammarUnavailableError,
    MinisrvError,
    RequestError,
    shutting_down_error,
)
from minisrv.processes import ChildProcess
from minisrv.request import MAX_GRAMMAR_LENGTH, StructuredOutput, StructuredOutputKind
from minisrv.text import grammar_trials
from minisrv.text.fairness import FairQueue, TokenBucket
from minisrv.text.grammar_trials import (
    BEAT_SECONDS,
    HEAD_BYTES,
    GrammarOutcome,
    GrammarTrial,
    decode_report,
    encode,
    frame,
    frame_length,
)
from minisrv.text.lru_cache import LRUCache
from minisrv.text.structured import CHEAP_SECONDS, grammar_error
from minisrv.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CPU_SECONDS = 1.0
"""Seconds of processor time that one grammar may take. 3,000 properties or 10,000 enum values take
a tenth of it."""
WALL_SECONDS = 30.0
"""Seconds of wall-clock time that one trial may take; it is reached only if the processors are very
busy, or if something waits that should not."""
SILENT_SECONDS = 5 * BEAT_SECONDS
_CHECKS = 10
"""Number of checks for a sign of life within the time limit, before the process is considered
silent."""
LOADING_SECONDS = 60.0
"""Seconds that the process gets to load the tokenizer, which takes a second or two on an idle
machine."""
BUDGET_PERIOD = 60.0
"""Period in seconds over which the budget of an API key is refilled."""
MAX_FAST, MAX_SLOW = 8, 2
"""Maximum number of trials at a time in each lane; fewer on machines with few cores."""
_SLOW_NICE = 5
"""Niceness of slow trials, which use the processor time that others leave."""
_TRIALS = 2
"""Maximum number of trials of a grammar in one lane, if the process dies."""
_MAX_LOWERED = 4 * MAX_GRAMMAR_LENGTH
"""Maximum number of characters of a grammar in llguidance's format, of which the message for each
choice holds a copy."""
_MAX_CACHED, _MAX_CACHED_CHARACTERS = 4096, 64 << 20
"""Maximum numbers of grammars, and of their characters together, in the cache of those that have
passed; the cache of those that have not passed has the same limits."""


class GrammarValidator:
    """An API worker's handle of the process that tries its grammars, which starts with the first
    grammar.

    Methods are for one event loop, in the main thread: the process ends with the thread that has
    started it.

    tokenizer, vocab_size, eos_token_ids: as for GrammarBackend.
    seconds_per_key: seconds of processor time that new grammars of one API key may take in
        `BUDGET_PERIOD`; 0 sets no limit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: list[int],
        *,
        seconds_per_key: float = 0.0,
    ) -> None:
        self._tokenizer = tokenizer
        self._arguments = (vocab_size, eos_token_ids)
        self._seconds_per_key = seconds_per_key
        self._budgets: dict[int, TokenBucket] = {}
        max_weight, min_weight = _MAX_CACHED_CHARACTERS, _MAX_CACHED_CHARACTERS / _MAX_CACHED
        self._passed: LRUCache[bytes, StructuredOutput] = LRUCache(max_weight, min_weight)
        self._refused: LRUCache[bytes, str] = LRUCache(max_weight, min_weight)
        cores = threads.cores()
        self._fast = _Lane(CHEAP_SECONDS, nice=0, places=min(MAX_FAST, max(2, cores)))
        self._slow = _Lane(CPU_SECONDS, nice=_SLOW_NICE, places=min(MAX_SLOW, max(1, cores // 2)))
        self._pending: dict[bytes, _Grammar] = {}
        self._running: dict[int, _Grammar] = {}
        self._number = 0
        self._process: ChildProcess | None = None
        self._process_task: asyncio.Task[None] | None = None
        self._message_timeout: asyncio.Timeout | None = None
        self._silence_timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._is_closed = False

    async def validate(self, spec: StructuredOutput, owner: int | str) -> StructuredOutput:
        """Return the grammar in llguidance's format, as the engine takes it. A grammar in the cache
        does not wait and costs nothing; one that is being tried already is not tried a second time.

        owner: whom the request belongs to where clients take turns: the index of its API key, which
            has a budget, or anything else that tells clients apart.

        Raises RequestError for a grammar that cannot be compiled within the limits, naming the
        tools if it has calls that cannot be compiled by themselves; GrammarBudgetError if the API
        key has used up its time, GrammarUnavailableError if the process has failed,
        EngineNotReadyError after `close`.
        """
        try:
            return await self._validate(spec, owner)
        except GrammarBudgetError:
            raise
        except RequestError:
            if 0 < len(spec.calls) <= MAX_GRAMMAR_LENGTH:
                kind = StructuredOutputKind.GRAMMAR
                calls = StructuredOutput(kind=kind, text=spec.calls, param="tools")
                await self._validate(calls, owner)
            raise

    async def _validate(self, spec: StructuredOutput, owner: int | str) -> StructuredOutput:
        if self._is_closed:
            raise shutting_down_error()
        digest = hashlib.sha256(encode(spec)).digest()
        if passed := self._passed.get(digest):
            return passed
        if refusal := self._refused.get(digest):
            raise RequestError(refusal, param=spec.param)
        grammar = self._pending.get(digest)
        if grammar is None:
            grammar = self._pending[digest] = _Grammar(spec, digest, self._fast)
        if owner not in grammar.owners:
            # A second owner of a grammar does not wait for what its first owner has sent before it.
            grammar.owners.add(owner)
            grammar.lane.waiting.push(owner, grammar)
        if self._process_task is None:
            # An empty context, so that its log lines do not carry the id of the request that
            # happens to be first.
            self._process_task = asyncio.create_task(
                self._keep_process_running(), context=Context()
            )
        grammar.num_waiting += 1
        try:
            self._start_trials()
            verdict = await asyncio.shield(grammar.verdict)
        finally:
            grammar.num_waiting -= 1
            if not grammar.num_waiting and not grammar.is_running:
                self._forget(grammar)
        if isinstance(verdict, MinisrvError):
            raise verdict
        return verdict

    def close(self) -> None:
        """End the process, whatever it does, and the requests that wait for it. May be called
        twice."""
        self._is_closed = True
        if self._process_task is not None:
            self._process_task.cancel()
        if self._process is not None:
            self._process.stop()
        for grammar in [*self._pending.values()]:
            self._end(grammar, shutting_down_error())

    # ---- lanes and budgets --------------------------------------------------------------------

    def _start_trials(self) -> None:
        """Start trials in the places that are free, for those whose turn it is."""
        if self._writer is None:
            return
        for lane in (self._fast, self._slow):
            while lane.waiting and lane.taken < lane.places:
                owner, grammar = lane.waiting.pop()
                # The grammar may have been tried in another owner's turn, or nobody may wait for it
                # any more.
                waits = grammar.num_waiting and not (grammar.is_running or grammar.is_over)
                if waits and grammar.lane is lane and not self._is_overdrawn(owner, grammar):
                    self._try(grammar, owner)

    def _try(self, grammar: _Grammar, owner: Hashable) -> None:
        lane = grammar.lane
        lane.taken += 1
        if not self._running:
            self._expect_message(SILENT_SECONDS)
        self._number += 1
        self._running[self._number] = grammar
        grammar.is_running, grammar.charged_owner, grammar.trials = True, owner, grammar.trials + 1
        trial = GrammarTrial(self._number, grammar.spec, lane.cpu_seconds, WALL_SECONDS, lane.nice)
        assert self._writer is not None
        self._writer.write(frame(encode(trial)))

    def _is_overdrawn(self, owner: Hashable, grammar: _Grammar) -> bool:
        """Whether the owner has used up its budget for now. If so, the grammar is refused unless
        another owner waits for it."""
        budget = self._budget(owner)
        if budget is None or budget.left(now := time.monotonic()) > 0:
            return False
        grammar.owners.discard(owner)
        if not grammar.owners:
            seconds = math.ceil(budget.seconds_until(CPU_SECONDS, now))
            self._end(
                grammar,
                GrammarBudgetError(
                    f"{grammar.spec.param}: new grammars of this API key have taken "
                    f"{self._seconds_per_key:g} s of processor time within {BUDGET_PERIOD:g} s, "
                    "which is what a key may use; use those that you have used before, send "
                    f"smaller ones, or try again in {seconds} s.",
                    param=grammar.spec.param,
                    retry_after=seconds,
                ),
            )
        return True

    def _budget(self, owner: Hashable) -> TokenBucket | None:
        if not isinstance(owner, int) or not self._seconds_per_key:
            return None
        if owner not in self._budgets:
            self._budgets[owner] = TokenBucket(self._seconds_per_key, BUDGET_PERIOD)
        return self._budgets[owner]

    # ---- what comes of a trial ----------------------------------------------------------------

    def _remove_running(self, number: int) -> _Grammar:
        grammar = self._running.pop(number)
        grammar.lane.taken -= 1
        grammar.is_running = False
        return grammar

    def _handle_outcome(self, outcome: GrammarOutcome) -> None:
        grammar = self._remove_running(outcome.number)
        spec = grammar.spec
        if budget := self._budget(grammar.charged_owner):
            budget.consume(outcome.seconds, time.monotonic())
        out_of_time = outcome.killed_by == signal.SIGPROF
        if out_of_time and grammar.lane is self._fast:
            self._queue_again(grammar, self._slow)
        elif outcome.late:
            self._end(grammar, _unavailable(spec, "the server is too busy to compile it"))
        elif outcome.killed_by == signal.SIGKILL:
            self._end(grammar, _unavailable(spec, "what tried it was killed"))
        elif outcome.killed_by or outcome.failure:
            if outcome.failure:
                logger.error("trying a grammar failed: %s", outcome.failure)
            # Other signals mean that it aborted because it got no memory.
            too_long = f"takes more than {CPU_SECONDS:g} s of processor time"
            self._refuse(grammar, f"compiling it {too_long if out_of_time else 'fails'}")
        elif outcome.problem:
            self._refused.add(grammar.digest, outcome.problem, len(outcome.problem))
            self._end(grammar, RequestError(outcome.problem, param=spec.param))
        elif len(outcome.lowered) > _MAX_LOWERED:
            self._refuse(grammar, f"it comes to more than {_MAX_LOWERED} characters")
        else:
            passed = spec.as_lowered(outcome.lowered, outcome.seconds)
            self._passed.add(grammar.digest, passed, len(passed.text))
            self._end(grammar, passed)

    def _refuse(self, grammar: _Grammar, why: str) -> None:
        error = grammar_error(grammar.spec, "is too complex", f"{why}; make it smaller")
        self._refused.add(grammar.digest, error.message, len(error.message))
        self._end(grammar, error)

    def _queue_again(self, grammar: _Grammar, lane: _Lane) -> None:
        if not grammar.num_waiting:
            self._forget(grammar)
            return
        if lane is not grammar.lane:
            grammar.lane, grammar.trials = lane, 0
        for owner in grammar.owners:
            lane.waiting.push(owner, grammar)

    def _end(self, grammar: _Grammar, verdict: StructuredOutput | MinisrvError) -> None:
        self._forget(grammar)
        grammar.verdict.set_result(verdict)

    def _forget(self, grammar: _Grammar) -> None:
        if self._pending.get(grammar.digest) is grammar:
            del self._pending[grammar.digest]

    # ---- the process --------------------------------------------------------------------------

    async def _keep_process_running(self) -> None:
        """Run the process until it ends. Another one is started afterwards if somebody waits."""
        why = "has ended"
        try:
            await self._run_process()
        except TimeoutError:
            why = "has stopped or hangs, and is killed"
        except (EOFError, ConnectionError):
            pass
        except OSError as error:  # out of file descriptors or processes
            why = f"cannot be started or talked to ({error.strerror or error})"
        except Exception:
            logger.exception("talking to the process that tries grammars failed")
        finally:
            is_loaded = self._writer is not None
            self._writer = self._message_timeout = self._process_task = None
            self._expect_message(None)
            if self._process is not None:
                self._process.stop()
        logger.error("the process that tries grammars %s", why)
        self._recover(is_loaded=is_loaded)

    async def _run_process(self) -> None:
        """Start the process, and handle its messages. Raises TimeoutError if it hangs, EOFError or
        OSError when it has ended."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        with theirs, closing(writer):
            self._process = ChildProcess(
                "grammars", grammar_trials.serve, theirs, *self._arguments, private_dir=None
            )
            theirs.close()
            async with asyncio.timeout(None) as self._message_timeout:
                self._expect_message(LOADING_SECONDS)
                text = await asyncio.to_thread(self._tokenizer.to_json)
                writer.write(frame(text.encode()))
                while True:
                    head = await reader.readexactly(HEAD_BYTES)
                    report = decode_report(await reader.readexactly(frame_length(head)))
                    self._writer = writer  # its first message says that it has loaded the tokenizer
                    if isinstance(report, GrammarOutcome):
                        self._handle_outcome(report)
                    self._start_trials()
                    self._expect_message(SILENT_SECONDS if self._running else None)

    def _expect_message(self, seconds: float | None) -> None:
        """Expect a message of the process within this many seconds; None if it has nothing to
        do."""
        if self._silence_timer is not None:
            self._silence_timer.cancel()
            self._silence_timer = None
        if seconds is not None:
            self._wait_for_message(seconds / _CHECKS, _CHECKS)

    def _wait_for_message(self, seconds: float, checks: int) -> None:
        """Wait this many seconds for a message, `checks` times. Messages that have arrived are read
        between two waits: if this worker was held up, the process is not taken for silent."""
        loop = asyncio.get_running_loop()
        if checks:
            self._silence_timer = loop.call_later(
                seconds, self._wait_for_message, seconds, checks - 1
            )
        elif self._message_timeout is not None:
            self._message_timeout.reschedule(loop.time())

    def _recover(self, *, is_loaded: bool) -> None:
        """Try the grammars that were being tried once more, in another process. If the process did
        not even load, refuse all that wait."""
        for number in [*self._running]:
            grammar = self._remove_running(number)
            if grammar.trials < _TRIALS:
                self._queue_again(grammar, grammar.lane)
            else:
                self._end(grammar, _unavailable(grammar.spec, "trying to compile it failed"))
        if not is_loaded:
            for grammar in [*self._pending.values()]:
                self._end(grammar, _unavailable(grammar.spec, "nothing can be compiled"))
        if self._pending:
            self._process_task = asyncio.create_task(self._keep_process_running())


@dataclass
class _Lane:
    """The places in which grammars are tried, each trial with this much processor time.

    cpu_seconds: seconds of processor time of each trial.
    nice: what is added to the niceness of each trial.
    places: maximum number of trials at a time.
    taken: number of trials that are running.
    waiting: the grammars whose turn is to come.
    """

    cpu_seconds: float
    nice: int
    places: int
    taken: int = 0
    waiting: FairQueue[_Grammar] = field(default_factory=FairQueue)


@dataclass(eq=False)
class _Grammar:
    """A grammar that requests wait for.

    owners: all owners that have asked for it, in whose queues of the lane it stands.
    num_waiting: number of requests that wait for it.
    trials: number of trials that the lane has started for it.
    charged_owner: the owner in whose turn the last trial started, whose budget pays for it.
    """

    spec: StructuredOutput
    digest: bytes
    lane: _Lane
    owners: set[Hashable] = field(default_factory=set)
    num_waiting: int = 0
    trials: int = 0
    is_running: bool = False
    charged_owner: Hashable = None
    verdict: asyncio.Future[StructuredOutput | MinisrvError] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def is_over(self) -> bool:
        return self.verdict.done()


def _unavailable(spec: StructuredOutput, why: str) -> GrammarUnavailableError:
    return GrammarUnavailableError(
        f"{spec.param}: whether this grammar can be compiled is not known, as {why}; try again "
        "later.",
        param=spec.param,
    )
