"""What is measured of a server with exactly known delays is exactly that, in virtual time."""

import asyncio
import json
import multiprocessing
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from loadgen import client, http, worker
from loadgen.arrivals import Arrivals
from loadgen.records import (
    Leg,
    LevelResult,
    Objective,
    PromptKind,
    RequestRecord,
    RunConfig,
    StoppedBy,
    Trace,
)
from loadgen.stats import LevelSummary, summarize
from loadgen.worker import Phase, Shared, run_phase
from tests.loadgen.scripted_server import DONE, ScriptedServer, Sleep, Step, chunk, usage
from tests.loadgen.virtual_time import VirtualLoop

CONFIG = RunConfig(
    base_url="http://unused/v1",
    model="m",
    concurrencies=(),
    prompt_kind=PromptKind.TOKENS,
    input_tokens=4,
    token_range=(100, 200),
    output_tokens=5,
    ignore_eos=True,
    requests=4,
    duration_s=None,
    warmup=0,
    processes=1,
    seed=0,
    timeout_s=100.0,
    label="",
    burstiness=inf,
)
PRECISION_MS = 0.1

Run = Callable[..., tuple[list[RequestRecord], list[dict[str, Any]]]]


def paced(ttft_s: float, itl_s: float) -> Callable[[int, dict[str, Any]], list[Step]]:
    """Return a script that sends the first token after `ttft_s` and each other after `itl_s`."""

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        steps: list[Step] = [Sleep(ttft_s), chunk("t")]
        for _ in range(body["max_tokens"] - 1):
            steps += [Sleep(itl_s), chunk("t")]
        return [*steps, chunk("", "length"), usage(body["max_tokens"]), DONE]

    return script


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the only level of a configuration against a script, and return the records and the bodies
    that the server received."""

    def run(config: RunConfig, script: Callable[..., Any]) -> Any:
        server = ScriptedServer(script)
        shared = Shared(multiprocessing.get_context("spawn"))
        loop = VirtualLoop()
        for module in (client, http, worker):
            monkeypatch.setattr(module, "clock", loop.clock)

        async def go() -> list[RequestRecord]:
            async with server.served():
                (leg,) = Leg.of(replace(config, base_url=server.url + "/v1"))
                limit_s, lanes = config.time_limit_s, config.in_flight_at(leg.load)
                start_s = loop.clock() if leg.load.is_open else None
                requests = config.requests_at(leg.load)
                phase = Phase(leg, False, lanes, requests, limit_s, start_s)
                with http.Client(None) as connection:
                    return (await run_phase(phase, connection, shared)).records

        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            records = runner.run(go())
        assert [record.failure for record in records] == [None] * len(records)
        return sorted(records, key=lambda record: record.due_s), server.bodies

    return run


def summary(config: RunConfig, records: list[RequestRecord]) -> LevelSummary:
    return summarize(
        LevelResult(
            config.loads[0], StoppedBy.REQUESTS, records, [], [], objectives=config.objectives
        )
    )


def ms(*values: float) -> Any:
    return pytest.approx(values, abs=PRECISION_MS)


def test_a_closed_loop(run: Run) -> None:
    """Two streams of two requests each: 500 ms to the first token, then 100 ms for each of four
    others; the rates are those of 1.8 s."""
    config = replace(CONFIG, concurrencies=(2,))
    records, _ = run(config, paced(0.5, 0.1))
    found = summary(config, records)
    for distribution, value in (
        (found.ttft_ms, 500),
        (found.itl_ms, 100),
        (found.tpot_ms, 100),
        (found.e2e_ms, 900),
    ):
        assert distribution is not None
        assert (distribution.min, distribution.p50, distribution.max) == ms(value, value, value)
    assert found.send_delay_ms is None
    assert found.window_s == pytest.approx(1.8, abs=1e-4)
    assert found.output_tokens_per_s == pytest.approx(4 * 5 / 1.8, rel=1e-4)
    assert found.in_flight == pytest.approx(2.0, rel=1e-3)


def test_an_open_loop_counts_from_the_scheduled_time(run: Run) -> None:
    """Requests are due every 500 ms and take 900 ms, and only one may be in flight: the k-th is
    sent 400 k ms late. The test fails by coordinated omission if that is left out of a latency."""
    config = replace(CONFIG, request_rates=(2.0,), max_concurrency=1)
    records, _ = run(config, paced(0.5, 0.1))
    due = [record.due_s for record in records]
    assert np.diff(due) * 1e3 == ms(500, 500, 500)
    assert [record.send_delay_s * 1e3 for record in records] == ms(0, 400, 800, 1200)
    assert [(record.ttft_s or 0) * 1e3 for record in records] == ms(500, 900, 1300, 1700)
    assert [record.e2e_s * 1e3 for record in records] == ms(900, 1300, 1700, 2100)
    found = summary(config, records)
    assert found.send_delay_ms is not None
    assert (found.send_delay_ms.min, found.send_delay_ms.max) == ms(0, 1200)
    assert found.itl_ms is not None
    assert found.itl_ms.max == pytest.approx(100, abs=PRECISION_MS)
    assert "client-bound: requests were sent up to 1200.0 ms late" in found.warnings[0]


def test_an_open_loop_does_not_wait_for_the_server(run: Run) -> None:
    """The first answer takes 10 s. Three requests that are due meanwhile are sent in time, and
    their answers come as if there had been no other."""

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        return paced(10.0 if number == 0 else 0.25, 0.1)(number, body)

    config = replace(CONFIG, request_rates=(2.0,))
    records, _ = run(config, script)
    assert [record.send_delay_s * 1e3 for record in records] == ms(0, 0, 0, 0)
    assert [(record.ttft_s or 0) * 1e3 for record in records] == ms(10_000, 250, 250, 250)


def test_goodput_is_that_of_the_known_delays(run: Run) -> None:
    """Requests are due every 500 ms, take 900 ms and are sent one at a time, so the k-th has a TTFT
    of 500 + 400 k ms, of which the first two are within 1 s. One of them pauses for 300 ms between
    two tokens, and so misses the limit of its ITL, and another its E2E."""

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        steps = paced(0.5, 0.1)(number, body)
        return [*steps[:4], Sleep(0.2), *steps[4:]] if number == 3 else steps

    limits = (Objective("ttft", 1000), Objective("itl", 250), Objective("e2e", 1500))
    config = replace(CONFIG, request_rates=(2.0,), max_concurrency=1, objectives=limits)
    records, _ = run(config, script)
    goodput = summary(config, records).goodput
    assert goodput is not None
    assert goodput.missed == {"ttft:1000": 2, "itl:250": 1, "e2e:1500": 2}
    assert (goodput.attained, goodput.requests, goodput.attainment) == (2, 4, 0.5)
    window_s = 4 * 0.9 + 0.2
    assert goodput.requests_per_s == pytest.approx(2 / window_s, rel=1e-4)


def test_itl_by_batch_is_that_of_the_requests_that_decode(run: Run) -> None:
    """Two streams, of which the second decodes while the first does, at 100 ms a token; then the
    first goes on alone at 50 ms a token."""

    def script(number: int, body: dict[str, Any]) -> list[Step]:
        tokens: list[Step] = [step for _ in range(4) for step in (Sleep(0.1), chunk("t"))]
        alone: list[Step] = [step for _ in range(6) for step in (Sleep(0.05), chunk("t"))]
        count = 11 if number == 0 else 5
        rest = alone if number == 0 else []
        end = [chunk("", "length"), usage(count), DONE]
        return [chunk("t"), *tokens, *rest, *end]

    config = replace(CONFIG, concurrencies=(2,), requests=2, ignore_eos=False, output_tokens=11)
    records, _ = run(config, script)
    by_batch = summary(config, records).by_batch
    assert {batch: found.tokens for batch, found in by_batch.items()} == {1: 6, 2: 8}
    assert by_batch[1].p50_ms == pytest.approx(50, abs=PRECISION_MS)
    assert by_batch[2].p50_ms == pytest.approx(100, abs=PRECISION_MS)


def test_what_is_due_after_the_duration_is_not_sent(run: Run) -> None:
    config = replace(CONFIG, request_rates=(2.0,), requests=None, duration_s=2.2)
    records, _ = run(config, paced(0.5, 0.1))
    assert len(records) == 4


def test_a_trace_is_replayed(run: Run, tmp_path: Path) -> None:
    """Twice as fast as recorded, with its lengths; the two prompts that share their first hash id
    share 512 tokens, and no others."""
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 7000, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 9000, "input_length": 520, "output_length": 1, "hash_ids": [1, 3]},
        {"timestamp": 8000, "input_length": 5, "output_length": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(CONFIG, requests=None, trace=Trace(str(path), 3, 2.0))
    records, bodies = run(config, paced(0.1, 0.1))
    assert np.diff([record.due_s for record in records]) * 1e3 == ms(500, 500)
    assert [(len(body["prompt"]), body["max_tokens"]) for body in bodies] == [
        (600, 3),
        (5, 2),
        (520, 1),
    ]
    first, _, second = (body["prompt"] for body in bodies)
    assert first[:512] == second[:512]
    assert first[512:520] != second[512:]


def test_a_chat_holds_its_turns_and_each_counts_from_its_own_start(run: Run) -> None:
    """Two chats of three turns behind one shared system message. Later turns are due when the
    answer before them has come, and hold it."""
    config = replace(
        CONFIG,
        request_rates=(2.0,),
        requests=2,
        prompt_kind=PromptKind.CHAT,
        turns=3,
        prefix_tokens=6,
    )
    records, bodies = run(config, paced(0.5, 0.1))
    assert [(record.index, record.turn) for record in records] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
        (0, 2),
        (1, 2),
    ]
    assert [(record.ttft_s or 0) * 1e3 for record in records] == ms(*[500] * 6)
    assert {record.scheduled_s is None for record in records if record.turn} == {True}
    assert {record.answer for record in records} == {None}
    chats = [body["messages"] for body in bodies if len(body["messages"]) == 6]
    for chat in chats:
        roles = [message["role"] for message in chat]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
        assert chat[2]["content"] == "ttttt"
        assert len(chat[0]["content"].split()) == 6
        assert chat[1]["content"] != chat[3]["content"]
        assert chat[:4] in [body["messages"] for body in bodies]
    assert chats[0][0] == chats[1][0]
    assert chats[0][1] != chats[1][1]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_variance_of_the_burstiness(
    burstiness: float,
) -> None:
    """The squared coefficient of variation of a gamma distribution is 1 / shape."""
    config = replace(CONFIG, request_rates=(50.0,), burstiness=burstiness)
    arrivals = Arrivals(config, 0)
    gaps = np.diff([arrivals.at(index) for index in range(20_000)])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_arrivals_do_not_depend_on_the_order_in_which_they_are_asked_for() -> None:
    """Each client process asks for other indices, and all must agree."""
    config = replace(CONFIG, request_rates=(5.0, 7.0), burstiness=0.5)
    one, other = Arrivals(config, 0), Arrivals(config, 0)
    last = one.at(3000)
    assert [other.at(index) for index in (0, 1500, 3000)] == [one.at(0), one.at(1500), last]
    assert Arrivals(config, 1).at(0) != one.at(0)


def test_the_rate_ramps_up() -> None:
    """With 10 requests per second after a ramp of 4 s, the k-th of the first 20 is due where the
    integral of the growing rate, 10 t^2 / 8, is k; the others follow every 100 ms."""
    config = replace(CONFIG, request_rates=(10.0,), ramp_up_s=4.0)
    arrivals = Arrivals(config, 0)
    for index in range(20):
        assert 10 * arrivals.at(index) ** 2 / 8 == pytest.approx(index + 1)
    assert arrivals.at(19) == pytest.approx(4.0)
    assert arrivals.at(29) == pytest.approx(5.0)
