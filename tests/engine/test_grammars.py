"""Requests with a grammar, in engines of every mode: their text keeps to the grammar whatever a
random model prefers, and the tokens of other requests do not change."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest
import torch

from minisrv.config import EngineConfig
from minisrv.core.step import ScheduledRow
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.errors import RequestError
from minisrv.kernels import ALL, apply_bitmask
from minisrv.modes import CUDAGraphMode
from minisrv.request import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    StructuredOutput,
)
from minisrv.request import StructuredOutputKind as Kind
from minisrv.runner.token_masks import TokenMasks
from minisrv.text.structured import Matcher
from minisrv.text.tokenizer import Tokenizer
from tests.checkpoints import EOS, VOCAB_SIZE, make_checkpoint
from tests.text.random_schemas import random_schema, recurses
from tests.text.tiny_tokenizer import tokenizer_of
from tests.waiting import GUARD_SECONDS, wait_until

MODES = ("none", "piecewise", "full-and-piecewise", "full")
TOKENS = 400
"""Maximum number of tokens of an answer."""


def _asks_and_ends(schema: dict[str, Any]) -> bool:
    return bool(schema["properties"]) and not recurses(schema)


SCHEMAS = [*filter(_asks_and_ends, (random_schema(seed, TOKENS) for seed in range(100)))][:20]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return tokenizer_of(checkpoint)


@pytest.fixture
def start(checkpoint: Path, tape_holds_mixed_batches: None) -> Any:
    def make(mode: str = "none", steps_ahead: int = 0, **settings: Any) -> EngineCore:
        limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 4}
        config = EngineConfig(
            model=str(checkpoint),
            device="cpu",
            dtype="float32",
            cudagraph_mode=CUDAGraphMode(mode),
            async_scheduling=bool(steps_ahead),
            **{**limits, **settings},
        )
        return EngineCore(build_engine(config, check_addresses=True))

    return make


def request(
    name: str, spec: StructuredOutput | None = None, *, tokens: int = 500, **params: Any
) -> EngineRequest:
    """Make a request with a prompt of its own for each name, sampled in such a way that a random
    model comes to an end."""
    draw = {"temperature": 1.0, "seed": len(name), "max_tokens": None, **params}
    prompt = [3 + ord(letter) for letter in name]
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(**draw),
        structured_output=spec,
    )


def schema_of(schema: object) -> StructuredOutput:
    return StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(schema))


def run(engine: EngineCore, *requests: EngineRequest) -> dict[str, list[EngineOutput]]:
    """Run the requests to their end and return all outputs of each. The engine is idle afterwards
    and nothing is left in use."""
    waiting = list(requests)
    found: dict[str, list[EngineOutput]] = {}
    while waiting or engine.has_work:
        while waiting and engine.has_room:
            engine.add(waiting.pop(0))
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.num_used == 0
    assert not engine._grammars._matchers
    assert not engine._grammars.compiling
    for outputs in found.values():
        ends = [o.finish_reason is not None or o.error is not None for o in outputs]
        assert ends == [False] * (len(ends) - 1) + [True]
    return found


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def kept(schema: object, outputs: list[EngineOutput], tokenizer: Tokenizer) -> bool:
    """Whether the text is complete and valid by the schema; False if it was cut off by its
    length."""
    ids = tokens(outputs)
    if outputs[-1].finish_reason is FinishReason.LENGTH:
        return False
    assert ids.pop() == EOS
    jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)
    return True


def test_every_mode_and_lag_keeps_every_schema_with_the_same_tokens(start, tokenizer) -> None:
    """Every mode, with and without a step launched ahead, keeps to every schema and gives the same
    tokens, in a cache so small that requests are preempted, beside requests without a grammar."""
    asked = [request(f"json {i}", schema_of(schema)) for i, schema in enumerate(SCHEMAS)]
    plain = [request(f"text {i}", max_tokens=40, logprobs=[None, 2][i % 2]) for i in range(6)]
    mixed = [r for pair in zip(asked, plain, strict=False) for r in pair] + asked[len(plain) :]
    seen: list[dict[str, list[int]]] = []
    for mode in MODES:
        for steps_ahead in (0, 1):
            engine = start(mode, steps_ahead, num_kv_blocks=60)
            found = run(engine, *mixed)
            assert engine.stats().preemptions, "the cache is small"
            assert not any(outputs[-1].error for outputs in found.values())
            done = sum(
                kept(schema, found[f"json {i}"], tokenizer) for i, schema in enumerate(SCHEMAS)
            )
            assert done == len(SCHEMAS) == 20
            seen.append({name: tokens(outputs) for name, outputs in found.items()})
    for other in seen[1:]:
        assert other == seen[0]


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_others_get_the_tokens_that_they_get_alone(start, mode: str, steps_ahead: int) -> None:
    plain = [request(f"text {i}", max_tokens=30, temperature=i % 2) for i in range(4)]
    engine, alone = start(mode, steps_ahead), {}
    for one in plain:
        alone |= run(engine, one)
    grammars = [request(f"json {i}", schema_of(SCHEMAS[i]), max_tokens=40) for i in range(4)]
    beside = run(start(mode, steps_ahead), *grammars[:2], *plain, *grammars[2:])
    for one in plain:
        assert tokens(beside[one.request_id]) == tokens(alone[one.request_id])


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_only_steps_with_a_grammar_wait(start, steps_ahead: int) -> None:
    """Only the epilogues of steps with a grammar wait for the step before; the model itself still
    runs one step ahead."""
    engine = start("full-and-piecewise", steps_ahead)
    before: dict[str, list[tuple[bool, int]]] = {"execute_model": [], "sample_tokens": []}

    def watch(part: str, call: Any) -> Any:
        def watched(output: Any, dispatch: Any) -> Any:
            others = sum(step.output is not output for step in engine._in_flight)
            before[part].append((output.has_structured_output_requests, others))
            return call(output, dispatch)

        return watched

    for part in before:
        setattr(engine.runner, part, watch(part, getattr(engine.runner, part)))
    choice = StructuredOutput(kind=Kind.REGEX, text="a{8}")
    engine.add(request("plain", max_tokens=40, ignore_eos=True))
    for _ in range(8):
        engine.step()
    engine.add(request("grammar", choice))
    engine._grammars.wait(GUARD_SECONDS)  # or the other request ends meanwhile
    run(engine)
    started, finished = ({n for masked, n in steps[1:] if masked} for steps in before.values())
    assert sum(masked for masked, _ in before["sample_tokens"]) >= 8
    assert (started, finished) == ({steps_ahead}, {0})
    for steps in before.values():
        others = [n for masked, n in steps[1:] if not masked]
        assert set(others[:6]) == set(others[-6:]) == {steps_ahead}


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_grammar_that_cannot_be_compiled_ends_its_own_request(start, steps_ahead: int) -> None:
    broken = request("broken", StructuredOutput(kind=Kind.REGEX, text="(a"))
    alone = run(start(steps_ahead=steps_ahead), request("text", max_tokens=20))
    found = run(start(steps_ahead=steps_ahead), request("text", max_tokens=20), broken)
    assert tokens(found["text"]) == tokens(alone["text"])
    [end] = found["broken"]
    assert end.error is not None
    assert (end.error.kind, end.error.param) == ("RequestError", "response_format")
    assert "unclosed group" in end.error.message


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("where", ["fill", "accept"])
def test_a_grammar_that_fails_on_its_way_ends_its_own_request(
    start, monkeypatch: pytest.MonkeyPatch, steps_ahead: int, where: str
) -> None:
    """A matcher that fails while it fills a mask or accepts a token ends its own request with an
    error, and no other request."""
    spec = StructuredOutput(kind=Kind.REGEX, text="a+b{20}")
    engine = start(steps_ahead=steps_ahead)
    matchers = engine._grammars._matchers

    def break_one() -> None:
        matchers["one"].accept([VOCAB_SIZE - 1])  # This is a token that the grammar does not allow.

    count = 0

    def fill(rows: list[ScheduledRow], bitmask: Any) -> None:
        nonlocal count
        count += 1
        if where == "fill" and count == 4:
            break_one()
        real_fill(rows, bitmask)
        if where == "accept" and count == 4:
            break_one()

    real_fill = engine._grammars.fill_bitmask
    monkeypatch.setattr(engine._grammars, "fill_bitmask", fill)
    found = run(engine, request("one", spec), request("two two", spec), request("text"))
    error = found["one"][-1].error
    assert error is not None
    assert error.param == "response_format"
    assert found["two two"][-1].finish_reason is FinishReason.STOP
    assert found["text"][-1].error is None


def test_a_long_answer_leaves_its_grammar_usable(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that needs more states than the server keeps of a grammar is refused as too much
    for this server. A request that shares these states with it may be sent again, and later
    requests with the same grammar have the states for themselves."""
    limits = llguidance.LLParserLimits(max_lexer_states=1000, verbose_errors=False)
    monkeypatch.setattr("minisrv.text.structured.LIMITS", limits)
    text = {"type": "string", "minLength": 2000}
    spec = schema_of({"type": "object", "properties": {"a": text}, "required": ["a"]})
    long, short = request("long", spec), request("short", spec, max_tokens=20)
    engine = start()
    alone = run(engine, long)["long"][-1].error
    assert alone is not None
    assert (alone.kind, alone.param) == ("RequestError", "response_format")
    assert "within the limits of this server" in alone.message
    assert run(engine, short)["short"][-1].finish_reason is FinishReason.LENGTH
    together = run(engine, long, request("other", spec))
    errors = {outputs[-1].error and outputs[-1].error.kind for outputs in together.values()}
    assert errors == {"GrammarFullError"}
    again = run(engine, request("other", spec, max_tokens=20))
    assert again["other"][-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_the_last_grammar_of_a_batch_ends_while_the_next_step_runs(start, steps_ahead: int) -> None:
    """The step launched ahead has a row with a grammar that has ended meanwhile; llguidance accepts
    no empty batch, so it must not be called for that step."""
    alone = run(start(steps_ahead=steps_ahead), request("text", max_tokens=20))
    spec = StructuredOutput(kind=Kind.CHOICE, choices=("a",))
    found = run(
        start(steps_ahead=steps_ahead), request("text", max_tokens=20), request("short", spec)
    )
    assert found["short"][-1].finish_reason is FinishReason.STOP
    assert tokens(found["text"]) == tokens(alone["text"])


def test_an_abort_while_the_grammar_is_compiled(start) -> None:
    engine = start()
    engine.add(request("json", schema_of(SCHEMAS[0])))
    assert engine.stats().waiting == 1
    last = engine.abort("json")
    assert last is not None
    assert last.finish_reason is FinishReason.ABORT
    assert not engine.has_work
    assert run(engine, request("text", max_tokens=3)).keys() == {"text"}


def test_requests_that_wait_for_their_grammars_have_places(start) -> None:
    """Requests whose grammar is still being compiled count like any others against the limit of
    requests."""
    engine = start(max_num_seqs=1, max_waiting=2)
    for name in ("a", "b", "c"):
        assert engine.has_room
        engine.add(request(name, StructuredOutput(kind=Kind.CHOICE, choices=("x",))))
    assert not engine.has_room
    found = run(engine)
    assert all(outputs[-1].finish_reason is FinishReason.STOP for outputs in found.values())


def test_log_probabilities_are_of_the_unmodified_distribution(start) -> None:
    """Log-probabilities are those of the logits before the grammar's mask."""
    spec = StructuredOutput(kind=Kind.CHOICE, choices=("zebra",))
    params = {"temperature": 0, "logprobs": 3, "max_tokens": 1}
    [masked], [free] = (
        run(start(), request("name", grammar, **params))["name"] for grammar in (spec, None)
    )
    assert masked.token_ids != free.token_ids
    assert masked.logprobs[0].top == free.logprobs[0].top


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_what_is_complete_ends_before_min_tokens_and_nothing_else_does(
    start, tokenizer: Tokenizer, mode: str, steps_ahead: int
) -> None:
    """min_tokens does not keep the end token away where the grammar allows nothing else: such a
    mask would leave no token at all."""
    texts = ("yes", "no")
    asked = {
        "choice": StructuredOutput(kind=Kind.CHOICE, choices=texts),
        "open": StructuredOutput(kind=Kind.REGEX, text="x[a-z ]*"),
        "bounded": StructuredOutput(kind=Kind.REGEX, text="x[a-z]{0,12}"),
        "stopped": StructuredOutput(kind=Kind.REGEX, text="x{4}y*"),
        "thinking": StructuredOutput(kind=Kind.REGEX, text="x*", reasoning_end="x"),
    }
    x, y, n = (tokenizer.encode(letter)[0] for letter in "xyn")
    # Bias and penalties change logits too, but rule out no token.
    against = {"logit_bias": dict.fromkeys([y, n, EOS], -100.0), "repetition_penalty": 2.0}
    requests = []
    for number, params in enumerate([{}, against, {"temperature": 0.0, **against}]):
        for name, spec in asked.items():
            stop = (x,) if name == "stopped" else ()
            limits = {"min_tokens": 20, "max_tokens": 60, "stop_token_ids": stop}
            requests.append(request(f"{name} {number}", spec, **limits, **params))
    requests.append(request("plain", min_tokens=20, max_tokens=60))
    found = run(start(mode, steps_ahead), *requests)
    for name, outputs in found.items():
        ids = tokens(outputs)
        text = tokenizer.decode(ids)
        assert outputs[-1].error is None, name
        match name.split()[0]:
            case "choice":
                assert text in texts
                assert ids[-1] == EOS
            case "bounded":
                assert ids[-1] == EOS
                assert len(ids) > 20 or len(text) == 13
            case "stopped":
                # The stop token is not sampled while another token is possible, and ends the text
                # wherever it is the only one.
                assert ids[-1] == x or len(ids) > 20
            case _:
                assert len(ids) >= 20


def test_min_tokens_of_schemas(start, tokenizer: Tokenizer) -> None:
    """With min_tokens no schema fails and every text is complete, most of them in fewer than the
    300 tokens."""
    asked = [request(f"json {i}", schema_of(s), min_tokens=300) for i, s in enumerate(SCHEMAS)]
    found = run(start("full-and-piecewise", 1), *asked)
    short = 0
    for i, schema in enumerate(SCHEMAS):
        assert found[f"json {i}"][-1].error is None
        assert kept(schema, found[f"json {i}"], tokenizer)
        short += len(tokens(found[f"json {i}"])) < 300
    assert short > 10


class Compiling:
    """Stands in for the compiler of `engine`: it notes the order of the grammars, and a test may
    hold each of them back."""

    def __init__(self, engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self.holds: dict[str, threading.Event] = {}
        self._real = engine._grammars._backend.compile
        monkeypatch.setattr(engine._grammars._backend, "compile", self._compile)

    def hold(self, text: str) -> threading.Event:
        """Return an event; the compilation of this grammar does not end until it is set."""
        return self.holds.setdefault(text, threading.Event())

    def _compile(self, spec: StructuredOutput) -> Matcher:
        self.order.append(spec.text)
        if spec.text in self.holds:
            assert self.holds[spec.text].wait(GUARD_SECONDS)
        return self._real(spec)


def took(text: str, seconds: float) -> StructuredOutput:
    """Make a regular expression that took an API worker `seconds` to compile."""
    return StructuredOutput(kind=Kind.REGEX, text=text, compile_seconds=seconds)


def test_a_cheap_grammar_waits_for_no_costly_one(start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    compiling = Compiling(engine, monkeypatch)
    let = [compiling.hold(f"a{{{number}}}") for number in range(1, 4)]
    for number in range(1, 4):
        engine.add(request(f"costly {number}", took(f"a{{{number}}}", 0.9)))
    engine.add(request("cheap", took("b", 0.001)))
    ended = []
    while "cheap" not in ended:
        ended += [o.request_id for o in engine.step() if o.finish_reason is not None]
    assert ended == ["cheap"]
    for event in let:
        event.set()
    run(engine)


@pytest.mark.parametrize("scale", [1, 100])
def test_what_takes_least_is_compiled_first(
    start, monkeypatch: pytest.MonkeyPatch, scale: int
) -> None:
    engine = start()
    compiling = Compiling(engine, monkeypatch)
    first = compiling.hold("first")
    engine.add(request("0", took("first", 0.004 * scale)))
    wait_until(lambda: compiling.order == ["first"])
    for text, seconds in {"c": 0.003, "a": 0.001, "b": 0.002, "d": 0.003}.items():
        engine.add(request(text, took(text, seconds * scale)))
    first.set()
    run(engine)
    assert compiling.order == ["first", "a", "b", "c", "d"]


def test_the_same_grammar_is_compiled_once(start, tokenizer, monkeypatch) -> None:
    """A grammar is compiled once, whichever worker it comes from and however long it took there;
    each request keeps its own position in it."""
    engine = start()
    compiling = Compiling(engine, monkeypatch)
    asked = [request("x" * n, took("(ab|c){3}", 0.001 * n), seed=n) for n in range(1, 9)]
    texts = {tokenizer.decode(tokens(found)[:-1]) for found in run(engine, *asked).values()}
    assert len(texts) > 1
    assert all(re.fullmatch("(ab|c){3}", text) for text in texts)
    assert len(compiling.order) == 1
    costly = request("costly", took("(ab|c){3}", 0.9))
    compiling.hold("other")  # Now the thread for costly grammars is busy.
    engine.add(request("other", took("other", 0.9)))
    engine.add(costly)
    while not any(output.request_id == "costly" for output in engine.step()):
        pass
    compiling.hold("other").set()
    run(engine)


def test_as_many_are_kept_as_there_is_room_for(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisrv.engine.grammars.MAX_CACHED_SECONDS", 100)
    monkeypatch.setattr("minisrv.engine.grammars.MAX_CACHED_GRAMMARS", 2)
    engine = start()
    compiling = Compiling(engine, monkeypatch)
    for number, text in enumerate("abacab"):
        run(engine, request(str(number), took(text, 0.001)))
    assert compiling.order == ["a", "b", "c", "b"], "the one that was asked for longest ago goes"


def test_a_panic_ends_its_own_request(start, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """Stands for a panic of Rust code, which is no subclass of Exception."""

    def compile(spec: StructuredOutput) -> Matcher:
        raise Panic

    engine = start()
    monkeypatch.setattr(engine._grammars._backend, "compile", compile)
    [end] = run(engine, request("x", took("a", 0.001)))["x"]
    assert end.error is not None
    assert end.error.kind == "EngineError"


def test_what_a_worker_has_lowered_is_taken_as_it_is(
    start, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar that a worker has lowered is not lowered again in the engine: that is Python's
    work, for which the steps of all requests would wait."""
    engine = start()
    lowered = engine._grammars._backend.lower(schema_of({"enum": ["a", "b"]}))
    monkeypatch.delattr("minisrv.text.structured.GrammarBackend.lower")
    found = run(engine, request("x", lowered))["x"]
    assert tokenizer.decode(tokens(found)[:-1]) in ('"a"', '"b"')


def test_a_grammar_and_ignore_eos_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="leave one of them out") as raised:
        request("x", StructuredOutput(kind=Kind.JSON_OBJECT), ignore_eos=True)
    assert raised.value.param == "ignore_eos"


def test_a_model_without_an_end_is_told_why(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        shutil.copy(path, tmp_path)
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        config = json.loads((checkpoint / name).read_text())
        config |= {"eos_token_id": None, "eos_token": None}
        (tmp_path / name).write_text(json.dumps(config))
    engine = EngineCore(
        build_engine(EngineConfig(model=str(tmp_path), device="cpu", enforce_eager=True))
    )
    [end] = run(engine, request("x", StructuredOutput(kind=Kind.JSON_OBJECT)))["x"]
    assert end.error is not None
    assert "does not allow structured output" in end.error.message


@pytest.mark.parametrize("vocab_size", [32, 33, 70])
def test_bits_are_columns(vocab_size: int) -> None:
    """Bit i of a row's mask stands for token i, and a mask that was applied allows everything
    again."""
    rows = [
        ScheduledRow(str(i), i, 0, 1, [], True, True, None, use_structured_output=i != 1)
        for i in range(3)
    ]

    class Odd:
        bitmask_words = 4

        def fill_bitmask(self, rows: list[ScheduledRow], bitmask: Any) -> None:
            for index, row in enumerate(rows):
                if row.use_structured_output:
                    bitmask[index] = 0x55555555 << index % 2

    logits = torch.randn(3, vocab_size)
    masked = logits.clone()
    bitmask = torch.full((4, -(-vocab_size // 32)), ALL, dtype=torch.int32)
    TokenMasks(bitmask).upload(rows, Odd())
    apply_bitmask(masked, bitmask[:3])
    assert (bitmask == ALL).all(), "the next step finds that all is allowed"
    column = torch.arange(vocab_size)
    for index in (0, 2):
        dropped = column % 2 == 1
        assert torch.equal(masked[index] == -torch.inf, dropped)
        assert torch.equal(masked[index][~dropped], logits[index][~dropped])
    assert torch.equal(masked[1], logits[1])


def test_the_matcher_is_not_asked_for_chunks_that_sample_nothing(
    start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask is filled only for steps that sample a token of the request."""
    fills = []
    monkeypatch.setattr(
        "minisrv.text.structured.GrammarBackend.fill_bitmasks",
        lambda self, matchers, bitmask: fills.extend(_fill_alone(matchers, bitmask)),
    )
    engine = start(max_num_batched_tokens=8)
    long = request("x" * 60, StructuredOutput(kind=Kind.CHOICE, choices=("a",)))
    ids = tokens(run(engine, long)[long.request_id])
    assert len(fills) == len(ids)


def _fill_alone(matchers: list[tuple[Matcher, int]], bitmask: Any) -> list[int]:
    for matcher, row in matchers:
        matcher.fill_bitmask(bitmask[row])
    return [row for _, row in matchers]
