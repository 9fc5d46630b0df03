"""Steps are verified while an engine serves: a graph that is broken in service is found by the
first step that it spoils, and a right one never is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from minisrv.certification import shadow
from minisrv.certification.faults import Fault, break_graph
from minisrv.core.ladder import decode_descriptor, epilogue_descriptor
from minisrv.engine import background, verification
from minisrv.engine.core import EngineCore
from minisrv.modes import CUDAGraphMode, GraphKey, StageOutput
from minisrv.request import (
    EngineOutput,
    EngineRequest,
    Pooling,
    SamplingParams,
    StructuredOutput,
    StructuredOutputKind,
)
from minisrv.runner.model_runner import ModelRunner
from tests.checkpoints import make_checkpoint
from tests.runner.stepping import BOTH, Model, start

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
DECODE_8 = (FULL, decode_descriptor(8, StageOutput.TOKENS))
EPILOGUES = [(FULL, epilogue_descriptor(size, StageOutput.TOKENS)) for size in (1, 2, 4, 8)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


def request(name: str, prompt: list[int], max_tokens: int, **params: Any) -> EngineRequest:
    params = {"temperature": 0.0, "ignore_eos": True, **params}
    asked = SamplingParams(max_tokens=max_tokens, **params)
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=asked)


def decodes() -> list[EngineRequest]:
    """Seven requests that decode in a graph for eight. The first, which in a new engine has request
    index 1, and the last end before the others, so that padding of index 1 and a stale tail are not
    those of a row."""
    return [request(str(n), [10 + n, 11 + n], 4 if n in (0, 6) else 9) for n in range(7)]


def prefills() -> list[EngineRequest]:
    """A request whose prompt fills a graph for eight tokens, and one whose prompt runs beside its
    first decode and leaves padding there."""
    return [request("long", [*range(20, 28)], 7), request("late", [30, 31, 32, 33, 34], 5)]


def run(
    engine: EngineCore, requests: list[EngineRequest], *, apart: bool = False
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Run requests to their ends, and return the tokens and the errors by request.

    apart: whether each comes when the one before has its first token, or an error.
    """
    tokens: dict[str, list[int]] = {each.request_id: [] for each in requests}
    errors: dict[str, str] = {}
    waiting = requests[::-1]
    while waiting or engine.has_work:
        others = {each.request_id for each in waiting} | errors.keys()
        while waiting and (not apart or all(tokens[n] for n in tokens.keys() - others)):
            engine.add(waiting.pop())
            if apart:
                break
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.error is not None:
                errors[output.request_id] = output.error.kind
        engine.advance_background()
    engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.num_used == 0
    return tokens, errors


def wrong_constant(runner: ModelRunner, key: GraphKey) -> None:
    """Capture a graph again with another epsilon in its last norm: an argument of a kernel that
    the graph keeps."""
    norm = runner.model.norm
    right, norm.eps = norm.eps, 0.01
    try:
        runner.install(key, runner.capture(key))
    finally:
        norm.eps = right


def breaks_by(fault: Fault) -> Callable[[ModelRunner, GraphKey], None]:
    return lambda runner, key: break_graph(runner, key, fault)


BREAKERS = {fault.value: breaks_by(fault) for fault in Fault} | {"constant": wrong_constant}


@cache
def right_engine(model: Model) -> EngineCore:
    return start(model)


def check_that_it_is_found(
    engine: EngineCore,
    right: EngineCore,
    serve: Callable[[EngineCore], tuple[dict[str, list[int]], dict[str, str]]],
    key: GraphKey,
    breaker: Callable[[ModelRunner, GraphKey], None],
) -> None:
    """Break a graph of an engine, and check that no token that it spoils is sent, that everybody
    who ran is told, and that requests that come later are served.

    right: an engine whose graphs are right.
    """
    expected, none = serve(right)
    assert not none
    quarantined = engine.describe().ladder.quarantined.keys()
    breaker(engine.runner, key)
    found, errors = serve(engine)
    assert set(errors.values()) == {"GraphQuarantinedError"}
    assert all(expected[name][: len(tokens)] == tokens for name, tokens in found.items())
    assert {name for name in found if found[name] != expected[name]} == errors.keys()
    assert engine.describe().ladder.quarantined.keys() > quarantined
    assert key not in engine.runner.graphs
    assert key not in engine.dispatcher.in_service
    # Other sizes round differently, so only whether they are served is compared, not the tokens.
    again, errors = serve(engine)
    assert not errors
    assert {name: len(tokens) for name, tokens in again.items()} == (
        {name: len(tokens) for name, tokens in expected.items()}
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("breaker", BREAKERS.values(), ids=BREAKERS)
def test_a_graph_that_is_broken_in_service_is_found(
    checkpoint: str, device: str, mode: CUDAGraphMode, ahead: bool, breaker: Any
) -> None:
    """Both a graph for decode and one for mixed batches, one after the other."""
    model = Model(checkpoint, device, mode)
    engine = start(model, verify_graphs=1.0, async_scheduling=ahead)
    right = right_engine(model)
    check_that_it_is_found(engine, right, lambda each: run(each, decodes()), DECODE_8, breaker)
    mixed = engine.runner.ladders.mixed_key(8)
    check_that_it_is_found(
        engine, right, lambda each: run(each, prefills(), apart=True), mixed, breaker
    )
    assert engine.verification.counts["disagreed"] == 2
    assert engine.verification.counts.keys() == {"agreed", "disagreed"}
    assert engine.stats().verified_steps == engine.verification.counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ahead", [False, True])
def test_an_epilogue_that_is_broken_in_service_is_found(
    checkpoint: str, device: str, ahead: bool
) -> None:
    """It is blamed alone, where the model before it gave the same."""
    engine = start(Model(checkpoint, device), verify_graphs=1.0, async_scheduling=ahead)
    expected, _ = run(engine, decodes())
    break_graph(engine.runner, EPILOGUES[-1], Fault.ADDRESS_DRIFT)
    tokens, errors = run(engine, decodes())
    assert errors.keys() == tokens.keys()
    assert not any(tokens.values())
    (name, why), *others = engine.describe().ladder.quarantined.items()
    assert (name, others) == ("FULL epilogue 8 TOKENS", [])
    assert "tokens differ from the eager run's" in why
    # The first step of all has no epilogue in a graph now, and its tokens are the same.
    assert run(engine, decodes()) == (expected, {})


def test_a_caller_who_gives_the_work_between_steps_no_turns_gets_its_steps(
    checkpoint: str,
) -> None:
    engine = start(Model(checkpoint, "cpu"), verify_graphs=1.0)
    break_graph(engine.runner, DECODE_8, Fault.ADDRESS_DRIFT)
    for each in decodes():
        engine.add(each)
    errors = {
        output.request_id: output.error
        for _ in range(1000)
        if engine.has_work
        for output in engine.step()
    }
    assert not engine.has_work
    assert all(error is not None for error in errors.values())
    assert engine.advance_background(), "what has changed is told at the first turn"
    assert not engine.advance_background()


def test_requests_that_have_had_no_step_go_on(checkpoint: str) -> None:
    engine = start(Model(checkpoint, "cpu"), verify_graphs=1.0)
    break_graph(engine.runner, DECODE_8, Fault.ADDRESS_DRIFT)
    more = [request(f"more{n}", [40 + n, 41], 3) for n in range(6)]
    tokens, errors = run(engine, [*(request(str(n), [10 + n, 11], 3) for n in range(8)), *more])
    assert errors.keys() == {str(n) for n in range(8)}
    assert {name: len(found) for name, found in tokens.items() if name not in errors} == (
        dict.fromkeys((each.request_id for each in more), 3)
    )


def test_a_request_that_was_preempted_before_its_first_token_has_had_a_step(
    checkpoint: str,
) -> None:
    """A part of its result, such as the hidden states of its prompt, has been sent."""
    engine = start(Model(checkpoint, "cpu"), verify_graphs=1.0)
    pooled = SamplingParams(max_tokens=0, pooling=Pooling.MEAN)
    prompt = [*range(10, 50)]  # longer than a step
    engine.add(EngineRequest(request_id="pooled", prompt_token_ids=prompt, params=pooled))
    sent: list[EngineOutput] = []
    while not sent:
        sent = engine.step()
    engine.scheduler._preempt(engine.scheduler.running[0])
    engine.add(request("new", [1, 2], 1))
    engine.verification._withdraw([DECODE_8], "it was broken.")
    assert [name for name, _ in engine.verification.take_failures()] == ["pooled"]


def test_what_a_wrong_graph_has_cached_is_forgotten(checkpoint: str) -> None:
    """The wrong step fills a block, which a later prompt would have found in the prefix cache."""
    engine = start(Model(checkpoint, "cpu"), verify_graphs=1.0)
    run(engine, [request("first", [*range(10, 22)], 2)])
    assert engine.scheduler.block_pool._hash_of
    break_graph(engine.runner, DECODE_8, Fault.ADDRESS_DRIFT)
    run(engine, decodes())
    assert not engine.scheduler.block_pool._hash_of


def test_without_free_blocks_a_step_is_not_verified(checkpoint: str) -> None:
    """A prompt leaves too few blocks for a copy, and none is taken from the request that waits."""
    engine = start(Model(checkpoint, "cpu"), verify_graphs=1.0, num_kv_blocks=9, max_num_seqs=2)
    _, errors = run(engine, [request("0", [*range(10, 24)], 2), request("1", [*range(24, 38)], 2)])
    assert not errors
    assert engine.verification.counts["skipped"] > 0
    assert engine.scheduler.num_preemptions == 0


def test_under_a_cache_that_is_always_full_the_log_says_that_nothing_is_verified(
    checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and not for single steps that are skipped."""
    engine = start(Model(checkpoint, "cpu"), verify_graphs=1.0, num_kv_blocks=9, max_num_seqs=2)
    for steps, warnings in ((verification.MANY_SKIPPED - 2, 0), (14, 1)):
        caplog.clear()
        run(engine, [request(str(n), [*range(10, 24)], steps) for n in range(2)])
        found = [each for each in caplog.messages if "too few blocks" in each]
        assert len(found) == warnings, engine.verification.counts
        assert engine.verification.counts["skipped"] > 0


def test_a_step_for_which_there_are_blocks_is_verified_in_place_of_one_without(
    checkpoint: str,
) -> None:
    """One step is drawn, the first, where the prompts leave too few blocks."""
    engine = start(Model(checkpoint, "cpu"), verify_graphs=0.5, num_kv_blocks=9, max_num_seqs=2)
    drawn = iter([0.0])
    engine.verification._draw.random = lambda: next(drawn, 0.9)  # type: ignore[method-assign]
    prompts = [[*range(10, 24)], [*range(24, 31)]]
    _, errors = run(engine, [request("0", prompts[0], 2), request("1", prompts[1], 9)])
    assert not errors
    assert engine.verification.counts == {"skipped": 1, "agreed": 1}


@pytest.mark.parametrize(
    "where",
    [
        (shadow, "entry_digests"),
        (shadow, "model_results"),
        (shadow, "final_results"),
        (shadow.ShadowTrial, "run"),
    ],
    ids=lambda where: where[1],
)
def test_a_verification_that_fails_ends_nothing(
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: tuple[Any, str],
) -> None:
    """Neither where a step is recorded as it is launched, nor where it runs again."""

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("there is no more")

    engine = start(Model(checkpoint, "cpu"), verify_graphs=1.0)
    expected, _ = run(engine, decodes())
    monkeypatch.setattr(*where, fails)
    assert run(engine, decodes()) == (expected, {})
    assert engine.verification.counts["failed"] > 5
    assert caplog.text.count("could not be verified") == 1


def test_a_share_of_the_steps_is_verified(checkpoint: str) -> None:
    engine = start(Model(checkpoint, "cpu"), verify_graphs=0.1)
    for turn in range(12):
        run(engine, [request(str(turn), [turn, 2], 40)])
    assert 20 < engine.verification.counts["agreed"] < 90


def test_every_step_is_verified_also_where_other_work_waits_for_its_time(checkpoint: str) -> None:
    """As the look at the batches does, which comes once a minute."""
    engine = start(Model(checkpoint, "cpu"), verify_graphs=1.0, cudagraph_refit="propose")
    engine.advance_background()
    run(engine, decodes())
    replayed = sum(count.steps for count in engine.stats().steps if count.mode != "NONE")
    assert engine.verification.counts == {"agreed": replayed}


def test_an_engine_whose_requests_wait_for_a_verdict_is_no_idle_one() -> None:
    """A work that follows in the turn in which the verification ends must not take its time."""
    works, seen = background.Background(), []

    def ends() -> background.Work:
        seen.append("ends")
        return
        yield

    def follows() -> background.Work:
        seen.append(f"busy: {works.busy}")
        yield True

    works.add(follows())
    works.add(ends(), first=True)
    works.advance(busy=False, running=2)
    assert seen == ["ends", "busy: True"]


# ---- right graphs --------------------------------------------------------------------------------


def traffic(seed: int) -> Iterator[EngineRequest]:
    """Requests of all kinds: prompts with common beginnings, of one token and longer than a step,
    sampled and greedy, with log-probabilities, penalties and grammars."""
    draw = random.Random(seed)
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    for index in range(1_000_000):
        kind = draw.randrange(6)
        params: dict[str, Any] = {"ignore_eos": True, "max_tokens": draw.randint(1, 24)}
        if kind in (1, 2):
            params |= {"temperature": 1.1, "seed": index, "top_k": 50}
        else:
            params |= {"temperature": 0.0}
        if kind == 2:
            params |= {"repetition_penalty": 1.2, "presence_penalty": 0.4}
        if kind == 3:
            params |= {"logprobs": 2}
        grammar = None
        if kind == 4:
            grammar = StructuredOutput(kind=StructuredOutputKind.JSON_SCHEMA, text=schema)
            params["ignore_eos"] = False
        common = [5, 6, 7, 8, 9, 10, 11, 12][: draw.choice((0, 0, 4, 8))]
        own = [draw.randrange(3, 300) for _ in range(draw.choice((1, 2, 5, 12, 25)))]
        yield EngineRequest(
            request_id=str(index),
            prompt_token_ids=[*common, *own],
            params=SamplingParams(**params),
            structured_output=grammar,
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_whose_masks_come_late_is_not_launched_beside_a_verification(
    checkpoint: str, device: str, ahead: bool
) -> None:
    """With a step launched ahead, its epilogue would wait for tokens of the step that is verified,
    while the trial uses the buffers in which its hidden states are."""
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    grammar = StructuredOutput(kind=StructuredOutputKind.JSON_SCHEMA, text=schema)
    asked = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    restricted = EngineRequest(
        request_id="restricted",
        prompt_token_ids=[20, 21],
        params=asked,
        structured_output=grammar,
    )
    requests = [restricted, request("free", [30, 31], 12)]
    model = Model(checkpoint, device)
    engine = start(model, verify_graphs=1.0, async_scheduling=ahead)
    assert run(engine, requests) == run(right_engine(model), requests)
    assert engine.verification.counts.keys() == {"agreed"}


def test_no_step_is_verified_while_other_work_waits_for_blocks(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests hold all blocks when the rest of the ladder needs some for its trials: it keeps the
    turns until steps have retired."""
    monkeypatch.setattr(background, "LEAST_GAP", 0.0)
    monkeypatch.setattr(background, "REST", 0.0)
    settings = {"cudagraph_capture": "covering", "num_kv_blocks": 20}
    engine = start(Model(checkpoint, "cpu"), verify_graphs=1.0, **settings)
    had_to_wait, fruitless, number = False, 0, 0
    while not (had_to_wait and engine.verification.counts):
        while len(engine.scheduler.waiting) < 4 and engine.has_room:
            number += 1
            engine.add(request(str(number), [number % 100] * 3, 40))
        fruitless = 0 if engine.step() else fruitless + 1
        assert fruitless < 1000, "no step retires any more"
        engine.advance_background()
        had_to_wait |= engine.background.is_in_the_middle and engine.background.turn.waits
        assert had_to_wait or not engine.filling.is_whole


FEW_BLOCKS = 48


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("mode", "ahead", "turn", "blocks"),
    [
        (CUDAGraphMode.FULL_AND_PIECEWISE, False, 1.0, FEW_BLOCKS),
        (CUDAGraphMode.FULL_AND_PIECEWISE, True, 0.0, 100),  # makes way wherever it can
        (CUDAGraphMode.FULL, True, 1.0, 100),
        (CUDAGraphMode.FULL, False, 0.0, 100),
        (CUDAGraphMode.PIECEWISE, True, 1.0, 100),
        (CUDAGraphMode.FULL_DECODE_ONLY, True, 1.0, 100),
    ],
)
def test_right_steps_agree(
    checkpoint: str,
    device: str,
    mode: CUDAGraphMode,
    ahead: bool,
    turn: float,
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hundreds of steps with prefix hits, grammars and aborts; where blocks are few, and with them
    the steps that can be verified, also with preemptions."""
    monkeypatch.setattr(background, "TURN", turn)
    settings = {"async_scheduling": ahead, "num_kv_blocks": blocks}
    engine = start(Model(checkpoint, device, mode), verify_graphs=1.0, **settings)
    requests, draw, counts = traffic(int(ahead)), random.Random(1), engine.verification.counts
    open_requests: list[str] = []
    while counts.get("agreed", 0) < 100:
        while len(open_requests) < 12 and engine.has_room:
            new = next(requests)
            engine.add(new)
            open_requests.append(new.request_id)
        for output in engine.step():
            assert output.error is None
            if output.finish_reason is not None:
                open_requests.remove(output.request_id)
        if draw.random() < 0.01:
            engine.abort(open_requests.pop(draw.randrange(len(open_requests))))
        engine.advance_background()
    assert counts.keys() <= {"agreed", "skipped"}
    assert blocks != FEW_BLOCKS or engine.scheduler.num_preemptions > 0
    assert engine.scheduler.prefix_cache_hits > 0
    for name in open_requests:
        engine.abort(name)
    while engine.has_work:
        engine.step()
        engine.advance_background()
    engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.num_used == 0
