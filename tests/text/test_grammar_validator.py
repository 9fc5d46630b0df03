"""Grammars that would block an engine are refused by a separate process, which survives them, and
delay nobody else."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from minisrv.checkpoint import resolve_checkpoint
from minisrv.errors import (
    GrammarBudgetError,
    GrammarUnavailableError,
    MinisrvError,
    RequestError,
)
from minisrv.logs import REQUEST_ID
from minisrv.request import StructuredOutput
from minisrv.request import StructuredOutputKind as Kind
from minisrv.text import grammar_validator
from minisrv.text.grammar_trials import BEAT_SECONDS
from minisrv.text.grammar_validator import GrammarValidator
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from tests.text.random_schemas import random_schema
from tests.text.tiny_tokenizer import tokenizer_of
from tests.waiting import until, wait_until

_T = TypeVar("_T")

ROOT = Path(__file__).parents[2]
VOCAB_SIZE, EOS = 4096, 2
OBJECT = StructuredOutput(kind=Kind.JSON_OBJECT)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(resolve_checkpoint(None))


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """No process is taken for dead on a busy machine; tests of these time limits set their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LOADING_SECONDS", "SILENT_SECONDS", "WALL_SECONDS"):
            patch.setattr(grammar_validator, name, 3600.0)
        yield


class Asked:
    """A validator, and the event loop in which it runs."""

    def __init__(self, runner: asyncio.Runner, tokenizer: Tokenizer, **options: Any) -> None:
        self.validator = GrammarValidator(tokenizer, VOCAB_SIZE, [EOS], **options)
        self._runner = runner

    def run(self, work: Callable[[GrammarValidator], Awaitable[_T]]) -> _T:
        async def awaited() -> _T:
            return await work(self.validator)

        return self._runner.run(awaited())

    def __call__(self, spec: StructuredOutput, owner: int | str = "one") -> StructuredOutput:
        """The validated grammar. Raises the error that the validator raises."""
        return self.run(lambda validator: validator.validate(spec, owner))

    @property
    def pid(self) -> int:
        assert self.validator._process is not None
        return self.validator._process.pid

    @property
    def trials(self) -> int:
        """The number of trials so far."""
        return self.validator._number


@pytest.fixture(scope="module")
def ask(runner: asyncio.Runner, tokenizer: Tokenizer) -> Iterator[Asked]:
    """A validator that many tests share."""
    asked = Asked(runner, tokenizer)
    yield asked
    asked.validator.close()


@pytest.fixture
def new(runner: asyncio.Runner, tokenizer: Tokenizer) -> Iterator[Callable[..., Asked]]:
    """A function that makes validators which have no process at first."""
    made: list[Asked] = []

    def make(**options: Any) -> Asked:
        made.append(Asked(runner, tokenizer, **options))
        return made[-1]

    yield make
    for asked in made:
        asked.validator.close()


def schema(document: dict[str, Any]) -> StructuredOutput:
    return StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(document))


def hostile(number: int = 0) -> StructuredOutput:
    """A grammar that takes minutes to compile; each number gives another one."""
    return schema({"type": "integer", "multipleOf": 1_000_003 + number})


def named(name: str) -> StructuredOutput:
    """A grammar that compiles at once; each name gives another one."""
    return schema({"const": name})


def properties(number: int, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {} for i in range(number)}, **more}


@pytest.mark.parametrize(
    "spec",
    [
        StructuredOutput(kind=Kind.JSON_OBJECT),
        StructuredOutput(kind=Kind.CHOICE, choices=("yes", "no")),
        StructuredOutput(kind=Kind.REGEX, text=""" ("a"|'b')* """),
        *(schema(random_schema(seed)) for seed in range(5)),
        schema({"enum": [f"value{i}" for i in range(4000)]}),
        schema(properties(240)),
        schema(properties(1000, required=[f"p{i}" for i in range(1000)])),
        # These repetitions are as large as texts may be, and harmless since they are not unrolled.
        schema({"type": "array", "items": {"type": "string"}, "maxItems": 10**6}),
        schema({"type": "string", "minLength": 10**9}),
        StructuredOutput(kind=Kind.REGEX, text="((((a*)*)*)*)*b"),
        StructuredOutput(kind=Kind.REGEX, text="(a|b)*a(a|b){200}"),
        StructuredOutput(kind=Kind.REGEX, text="((a{1000}){1000}){1000}"),
        StructuredOutput(kind=Kind.REGEX, text="a{1000000}"),
    ],
)
def test_what_can_be_compiled_passes(
    ask: Asked, tokenizer: Tokenizer, spec: StructuredOutput
) -> None:
    """A grammar that compiles is returned in the form that the engine needs, with the seconds that
    its trial took."""
    passed = ask(spec)
    assert passed.lowered
    assert (passed.kind, passed.param) == (spec.kind, spec.param)
    assert passed.compile_seconds > 0
    lowered = GrammarBackend(tokenizer, VOCAB_SIZE, [EOS]).lower(spec)
    passed = msgspec.structs.replace(passed, compile_seconds=0.0)
    assert passed == lowered, "the engine has nothing to add"


def patterns(number: int) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": f"x.*y.*z{i}"} for i in range(number)]}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (schema({"$ref": "#/$defs/nope"}), "does not exist"),
        (schema({"$ref": "#"}), "no text satisfies it"),
        (schema(properties(2000)), "Too many items"),
        (schema({"allOf": [{"anyOf": [properties(i) for i in range(5)]}] * 8}), "too large"),
        # These would compile for minutes and take gigabytes if nothing ended them.
        (schema({"type": "integer", "multipleOf": 1_000_003}), "processor time"),
        (schema({"allOf": [{"multipleOf": p} for p in (7, 11, 13, 17, 19, 23)]}), "processor time"),
        (schema(patterns(30)), "processor time"),
        # Reasoning that may come before the output does not hide its fault.
        (
            msgspec.structs.replace(schema(properties(2000)), reasoning_end="</think>"),
            "Too many items",
        ),
    ],
)
def test_what_would_stop_an_engine_is_refused(
    ask: Asked, spec: StructuredOutput, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal names the field, the process can be used again, and a second request costs no
    trial."""
    if reason != "processor time":
        # A slow machine may reach the limit before another reason is found.
        monkeypatch.setattr(ask.validator._slow, "cpu_seconds", 3600.0)
    with pytest.raises(RequestError, match=reason) as raised:
        ask(spec)
    assert raised.value.param == "response_format"
    ask(OBJECT)
    trials = ask.trials
    with pytest.raises(RequestError, match=reason):
        ask(spec)
    assert ask.trials == trials, "it costs once"


async def verdicts(
    validator: GrammarValidator, asked: Sequence[tuple[StructuredOutput, int | str]]
) -> list[StructuredOutput | MinisrvError]:
    """The results for grammars that are requested at the same time, in this order."""
    work = (validator.validate(spec, owner) for spec, owner in asked)
    found = await asyncio.gather(*work, return_exceptions=True)
    assert all(isinstance(one, StructuredOutput | MinisrvError) for one in found)
    return found


def passed(found: Sequence[object]) -> list[bool]:
    return [isinstance(one, StructuredOutput) for one in found]


def test_many_at_once(ask: Asked) -> None:
    """Twenty concurrent requests for two grammars cost two trials."""
    trials = ask.trials
    good, bad = named("at once"), schema({"const": "at once", "type": 1})
    found = ask.run(lambda validator: verdicts(validator, [(good, "one"), (bad, "one")] * 10))
    assert passed(found) == [True, False] * 10
    assert ask.trials == trials + 2, "the same is tried once"


def test_cheap_ones_wait_for_no_costly_one(new: Callable[..., Asked]) -> None:
    """Grammars that compile at once wait neither for the costly ones of another owner nor for those
    that the same owner has sent before."""
    asked = new()
    asked.validator._slow.cpu_seconds = 3600  # none of the costly ones ends while this test lasts

    async def work(validator: GrammarValidator) -> list[bool]:
        costly = [
            asyncio.create_task(validator.validate(hostile(number), "one")) for number in range(12)
        ]
        await asyncio.sleep(0)  # the costly ones are queued first
        cheap = [(named("mine"), "one"), (named("another's"), "another")]
        found = await verdicts(validator, cheap)
        assert not any(task.done() for task in costly)
        for task in costly:
            task.cancel()
        await asyncio.gather(*costly, return_exceptions=True)
        return passed(found)

    assert asked.run(work) == [True, True]


@pytest.mark.parametrize("lane", ["_fast", "_slow"])
def test_owners_take_turns(new: Callable[..., Asked], lane: str) -> None:
    asked = new()
    validator = asked.validator
    validator._fast.places = validator._slow.places = 1
    # Each trial takes more processor time than the least that a timer can give, which is 20 ms with
    # some kernels, and so moves to the slow lane.
    validator._fast.cpu_seconds = 3600 if lane == "_fast" else 1e-6
    validator._slow.cpu_seconds = 3600
    order: list[str] = []

    async def one(name: str) -> None:
        number = 60_013 + int(name, base=16)
        await validator.validate(schema({"type": "integer", "multipleOf": number}), owner=name[0])
        order.append(name)

    async def work(validator: GrammarValidator) -> None:
        await asyncio.gather(*map(one, ("a0", "a1", "a2", "b0", "b1", "c0")))

    asked.run(work)
    assert order == ["a0", "b0", "c0", "a1", "b1", "a2"]
    assert (asked.trials == 6) == (lane == "_fast")


def test_who_asks_for_the_same_does_not_wait_in_anothers_queue(new: Callable[..., Asked]) -> None:
    """A grammar that several owners request is tried when the turn of any of them comes."""
    asked = new()
    validator = asked.validator
    validator._fast.places = 1
    order: list[str] = []

    async def one(name: str, owner: str) -> None:
        await validator.validate(named(f"same {name}"), owner)
        order.append(owner + name)

    async def work(validator: GrammarValidator) -> None:
        mine = [one(str(number), "a") for number in range(4)]
        await asyncio.gather(*mine, one("3", "b"))

    asked.run(work)
    assert order.index("b3") < order.index("a1")
    assert asked.trials == 4


def test_a_grammar_that_nobody_waits_for_is_not_tried(new: Callable[..., Asked]) -> None:
    """Grammars whose requests are all cancelled before their trial are dropped from the queue."""
    asked = new()
    asked.validator._fast.places = 1

    async def work(validator: GrammarValidator) -> None:
        kept = asyncio.create_task(validator.validate(named("kept"), "one"))
        gone = [
            asyncio.create_task(validator.validate(named(f"gone {number}"), "one"))
            for number in range(3)
        ]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await kept
        await validator.validate(named("next"), "one")

    asked.run(work)
    assert asked.trials == 2
    assert not asked.validator._pending


def test_a_key_has_a_budget(new: Callable[..., Asked]) -> None:
    """A key with no budget left gets no new trials, but grammars that have been tried; addresses
    have no budget."""
    asked = new(seconds_per_key=1e-6)
    asked(named("first"), 0)
    for _ in range(2):
        with pytest.raises(GrammarBudgetError, match="API key") as raised:
            asked(named("second"), 0)
        assert raised.value.param == "response_format"
        assert raised.value.retry_after >= 1
    asked(named("first"), 0)
    asked(named("second"), 1)
    asked(named("second"), 0)
    for number in range(2):
        asked(named(f"address {number}"), "127.0.0.1")


def test_a_budget_counts_what_is_queued_when_its_turn_comes(new: Callable[..., Asked]) -> None:
    """The budget is checked again when a queued grammar's turn comes, and a grammar that another
    key waits for too is still tried."""
    asked = new(seconds_per_key=1e-6)
    asked.validator._fast.places = 1
    many = [(named(f"many {number}"), 0) for number in range(4)]
    found = asked.run(lambda validator: verdicts(validator, [*many, (many[3][0], 1)]))
    assert passed(found) == [True, False, False, True, True], "the last is another key's as well"
    assert asked.trials == 2


def kill(asked: Asked) -> None:
    os.kill(asked.pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def test_a_killed_process_is_replaced(ask: Asked) -> None:
    ask(named("before"))
    kill(ask)
    ask(named("behind"))


def test_what_is_logged_of_the_process_names_no_request(new: Callable[..., Asked]) -> None:
    """A new process is logged with no request's id, although a request has started it."""
    asked = new()
    found: list[str] = []
    log = logging.Handler()
    log.emit = lambda record: found.append(REQUEST_ID.get())  # type: ignore[method-assign]

    async def ask_for(validator: GrammarValidator, name: str) -> None:
        REQUEST_ID.set(name)
        await validator.validate(named(name), "one")

    grammar_validator.logger.addHandler(log)
    try:
        asked.run(lambda validator: ask_for(validator, "first"))
        kill(asked)
        asked.run(lambda validator: ask_for(validator, "second"))
    finally:
        grammar_validator.logger.removeHandler(log)
    assert found == [""]


@pytest.mark.parametrize("times", [1, 2])
def test_what_was_tried_is_tried_again_once(new: Callable[..., Asked], times: int) -> None:
    """A grammar whose process dies during its trial is tried a second time, and not a third."""
    asked = new()
    asked.validator._slow.cpu_seconds = 3600

    async def kill_beside(validator: GrammarValidator) -> None:
        task = asyncio.create_task(validator.validate(hostile(), "one"))
        killed: list[int] = []
        for _ in range(times):
            await until(lambda: validator._slow.taken == 1 and asked.pid not in killed)
            killed.append(asked.pid)
            kill(asked)
        await until(lambda: task.done() or (asked.pid not in killed and validator._slow.taken == 1))
        if times == 1:
            assert not task.done()
            task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError if times == 1 else GrammarUnavailableError):
        asked.run(kill_beside)
    asked(named("behind all this"))


def test_a_stopped_process_is_replaced(
    new: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped, and so gives no sign of life, is killed and replaced."""
    monkeypatch.setattr(grammar_validator, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(grammar_validator, "_TRIALS", 100)  # a busy machine is silent as well
    asked = new()
    asked(named("before"))
    stopped = asked.pid
    os.kill(stopped, signal.SIGSTOP)
    asked(named("behind"))
    assert is_gone(stopped)


def test_why_no_process_can_be_had_is_logged(
    new: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    asked = new()
    with monkeypatch.context() as patch:
        patch.setattr(grammar_validator.socket, "socketpair", fail)
        with pytest.raises(GrammarUnavailableError):
            asked(OBJECT)
    assert "cannot be started or talked to (Too many open files)" in caplog.text
    asked(OBJECT)


def test_a_process_is_not_silent_where_nobody_listened(
    new: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker may have been stopped or without a processor, so silence counts only while it
    listened."""
    monkeypatch.setattr(grammar_validator, "SILENT_SECONDS", 3 * BEAT_SECONDS)
    asked = new()
    asked.validator._slow.cpu_seconds = 3600

    async def hold_up(validator: GrammarValidator) -> None:
        task = asyncio.create_task(validator.validate(hostile(), "one"))
        await until(lambda: validator._slow.taken == 1)
        before = asked.pid
        time.sleep(4 * BEAT_SECONDS)
        await validator.validate(named("behind"), "two")
        assert asked.pid == before
        task.cancel()

    asked.run(hold_up)


def test_closing_ends_a_stopped_process(new: Callable[..., Asked]) -> None:
    asked = new()
    asked(OBJECT)
    pid = asked.pid
    os.kill(pid, signal.SIGSTOP)
    asked.validator.close()
    assert is_gone(pid)


def test_a_trial_that_gets_no_time_is_ended_and_not_held_against_the_grammar(
    new: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that runs out of wall time ends with an error that leaves the grammar open; one that
    runs out of processor time refuses it."""
    asked = new()
    asked(OBJECT)
    monkeypatch.setattr(grammar_validator, "WALL_SECONDS", 0.0)
    asked.validator._fast.cpu_seconds = 3600
    with pytest.raises(GrammarUnavailableError, match="busy"):
        asked(hostile())
    monkeypatch.undo()
    asked.validator._fast.cpu_seconds = 1e-6
    asked.validator._slow.cpu_seconds = 1e-6
    with pytest.raises(RequestError, match="processor time"):
        asked(hostile())


def test_a_process_that_does_not_start_keeps_nobody_waiting(
    new: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request for a grammar fails if the process cannot start, and the next one starts a new
    process."""
    asked = new()
    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "to_json", lambda self: "no tokenizer")
        with pytest.raises(GrammarUnavailableError):
            asked(OBJECT)
    asked(OBJECT)


def test_it_has_no_thread_when_it_forks(ask: Asked) -> None:
    """Forking a process with threads is unsafe, so the process that forks for each trial has one
    thread."""
    ask(OBJECT)
    assert len([*Path(f"/proc/{ask.pid}/task").iterdir()]) == 1


def test_what_has_passed_is_not_tried_again(ask: Asked) -> None:
    """A known grammar is returned without waiting, also while another is tried; with reasoning
    before it, it is another grammar."""
    good = named("good")
    ask(good)

    async def work(validator: GrammarValidator) -> None:
        costly = asyncio.create_task(validator.validate(hostile(77), "one"))
        await until(lambda: bool(validator._running))
        # On a busy machine the costly one may be in the slow lane by now, in a second trial.
        trials = ask.trials
        coroutine = validator.validate(good, "one")
        with pytest.raises(StopIteration):
            coroutine.send(None)  # returns without waiting
        assert ask.trials == trials
        costly.cancel()

    ask.run(work)
    trials = ask.trials
    ask(msgspec.structs.replace(good, reasoning_end="</think>"))
    assert ask.trials > trials


@pytest.mark.parametrize("limit", ["_MAX_CACHED", "_MAX_CACHED_CHARACTERS"])
def test_as_many_are_remembered_as_there_is_room_for(
    ask: Asked, new: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """The grammar that was requested longest ago is forgotten when there is no room, by number or
    by characters."""
    specs = [named(f"one of three: {number}, {limit}") for number in range(3)]
    room = 2 if limit == "_MAX_CACHED" else 2 * len(ask(specs[0]).text)
    monkeypatch.setattr(grammar_validator, limit, room)
    ask = new()
    for spec in (*specs[:2], specs[0], specs[2]):
        ask(spec)
    trials = ask.trials
    for spec in (specs[0], specs[2]):
        ask(spec)
    assert ask.trials == trials
    ask(specs[1])
    assert ask.trials == trials + 1, "it was asked for longest ago"


PARENT = """
import asyncio, os, sys
from minisrv.checkpoint import resolve_checkpoint
from minisrv.text import grammar_validator
from minisrv.text.grammar_validator import GrammarValidator
from tests.text.test_grammar_validator import hostile
from tests.text.tiny_tokenizer import tokenizer_of

grammar_validator.LOADING_SECONDS = 3600.0
grammar_validator.SILENT_SECONDS = grammar_validator.WALL_SECONDS = 3600.0

async def main():
    validator = GrammarValidator(tokenizer_of(resolve_checkpoint(None)), 4096, [2])
    validator._slow.cpu_seconds = 3600
    trial = asyncio.create_task(validator.validate(hostile(), "one"))
    while not validator._slow.taken:
        await asyncio.sleep(0.01)
    print(validator._process.pid, flush=True)
    await trial

if __name__ == "__main__":
    asyncio.run(main())
"""


def numbers(path: Path) -> list[int]:
    return [*map(int, path.read_text().split())]


def test_stopped_processes_do_not_outlive_the_server(tmp_path: Path) -> None:
    """Neither the process that forks nor the one that tries a grammar outlives the server, even if
    stopped."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        children = Path(f"/proc/{pid}/task/{pid}/children")

        def tries() -> list[int]:
            """Children whose oom_score_adj is 1000: they have asked the kernel before to end with
            their parent."""
            scores = {each: Path(f"/proc/{each}/oom_score_adj") for each in numbers(children)}
            return [each for each, score in scores.items() if score.read_text() == "1000\n"]

        wait_until(lambda: bool(tries()))
        pids = [pid, *tries()]
        for each in pids:
            os.kill(each, signal.SIGSTOP)
        parent.kill()
    for each in pids:
        wait_until(lambda each=each: is_gone(each))
