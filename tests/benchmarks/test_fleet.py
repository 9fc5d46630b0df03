"""benchmarks/fleet.py and kv_routing.py: what a router knows of caches, and simulated replicas."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from benchmarks import fleet
from benchmarks.arrivals import Arrival, Sharing, drawn
from benchmarks.kv_routing import KnownCache, predictions, seen
from benchmarks.routers import ROUTERS, Replica, block_hashes, make_router
from minisrv.core.budget import PrefillBudget
from minisrv.core.kv_events import RecordingBlockPool, RecordingScheduler
from minisrv.core.step import SchedulerOutput
from minisrv.engine.kv_events import KVEventBatch
from minisrv.modes import CUDAGraphMode, GraphKey
from minisrv.request import EngineRequest, SamplingParams

BLOCK = 4


def steps(ms_per_token: float = 0.1) -> Iterator[dict[str, Any]]:
    """Steps of a replica that takes a millisecond and a time for each token."""
    for number, rung in enumerate((1, 2, 4, 8, 16, 32, 64)):
        for mode, decode_rows in (("FULL", rung), ("PIECEWISE", 0)):
            if mode == "FULL" and rung > 8:
                continue
            names = [f"{mode}-{number}-{row}" for row in range(decode_rows or 1)]
            yield {
                "type": "step",
                "mode": mode,
                "rung": rung,
                "rung_requests": rung if decode_rows else None,
                "decode_rows": decode_rows,
                "prefill_tokens": 0 if decode_rows else rung,
                "context": rung,
                "wall_ms": 1 + ms_per_token * rung,
                "requests": [(name, 1 if decode_rows else rung) for name in names],
            }


def trace(kv_blocks: int = 200, ahead: bool = False) -> list[str]:
    header = {
        "type": "header",
        "mode": CUDAGraphMode.FULL_AND_PIECEWISE.value,
        "ladders": {
            "decode": [1, 2, 4, 8],
            "mixed": [1, 2, 4, 8, 16, 32, 64],
            "epilogue": [1, 2, 4, 8],
        },
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 400,
        "block_size": BLOCK,
        "kv_blocks": kv_blocks,
        "async_scheduling": ahead,
        "itl_target_ms": None,
    }
    return [json.dumps(line) for line in (header, *steps())]


SHARING = Sharing(fraction=0.8, prefixes=12, tokens=80)


def load(number: int = 200, rate: float = 50.0) -> list[Arrival]:
    return drawn(number, rate, SHARING, (1, 20), (1, 12), seed=3)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("ahead", [False, True])
def test_every_request_is_answered_whole_by_one_replica(router: str, ahead: bool) -> None:
    replica = fleet.MeasuredReplica.of(trace(ahead=ahead))
    requests = fleet.serve(replica, 3, router, load())
    assert len(requests) == 200
    assert {each["replica"] for each in requests} == {0, 1, 2}
    for each, arrival in zip(requests, load(), strict=True):
        assert len(each["chunk_ms"]) == arrival.output_tokens
        assert each["chunk_ms"] == sorted(each["chunk_ms"])
        assert each["chunk_ms"][0] > 1, "its prompt takes a step"
        assert each["cached_tokens"] < len(arrival.prompt)


def test_an_idle_replica_takes_the_times_of_its_steps() -> None:
    """Of the sizes that were measured: 32 tokens of a prompt, then one token after the other."""
    replica = fleet.MeasuredReplica.of(trace())
    [request] = fleet.serve(replica, 1, "random", [Arrival(7.0, [*range(32)], 3)], request_ms=5)
    assert request["chunk_ms"] == pytest.approx([5 + 4.2, 5 + 4.2 + 1.1, 5 + 4.2 + 2.2])
    found = seen([request])
    assert found["ttft_p50_ms"] == pytest.approx(9.2)
    assert found["itl_p99_ms"] == pytest.approx(1.1)


def test_routers_that_know_prefixes_find_more_of_them() -> None:
    """Each cache has room for a part of the prefixes, so it matters where they are."""
    replica = fleet.MeasuredReplica.of(trace(kv_blocks=160))
    hits = {name: seen(fleet.serve(replica, 4, name, load(600)))["hit_rate"] for name in ROUTERS}
    others = max(hits["random"], hits["round-robin"], hits["two-choices"])
    assert hits["kv-events"] > 1.2 * others
    assert hits["prefix-hash"] > 1.2 * others


def test_a_busy_replica_does_not_get_more() -> None:
    for name in ROUTERS:
        replicas = [Replica(set()), Replica(set())]
        choose = make_router(name)
        hashes = block_hashes([*range(40)], BLOCK)
        for _ in range(100):
            replicas[choose(replicas, hashes)].sent(hashes)
        loads = [replica.open_requests for replica in replicas]
        assert min(loads) >= 25, name


class Recorder:
    """A scheduler with events, which serves one request after the other or several at a time."""

    def __init__(self) -> None:
        self.pool = RecordingBlockPool(80, BLOCK)
        self.scheduler = RecordingScheduler(
            self.pool, PrefillBudget(64), max_num_seqs=4, max_model_len=200, max_waiting=100
        )
        self.cache = KnownCache()
        self.number = 0

    def turn(self) -> list[Any]:
        step = self.scheduler.schedule()
        if step is None:
            return []
        outputs = self.scheduler.update(step.step_id, [[1] for _ in range(step.num_rows)])
        if events := self.pool.take_events():
            batch = msgspec.msgpack.encode(KVEventBatch(0.0, events, 0))
            self.cache.read((b"", self.number.to_bytes(8, "big"), batch))
            self.number += 1
        return outputs


def test_events_predict_exactly_what_a_prefix_cache_finds() -> None:
    """With a cache that is too small for all prefixes, so that blocks are evicted all the time."""
    recorder = Recorder()
    replica = Replica(recorder.cache)
    requests = []
    for index, arrival in enumerate(load(400)):
        params = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
        hashes = block_hashes(arrival.prompt, BLOCK)
        told, expected = replica.num_cached(hashes), replica.num_expected(hashes)
        assert told == expected, "nothing is being computed"
        recorder.scheduler.add(
            EngineRequest(request_id=str(index), prompt_token_ids=arrival.prompt, params=params), 0
        )
        outputs = []
        while recorder.scheduler.has_work:
            outputs += recorder.turn()
        request = {"told_tokens": told * BLOCK, "expected_tokens": expected * BLOCK}
        requests.append(request | {"cached_tokens": outputs[0].num_cached_tokens})
    found = predictions(requests)
    assert found["reported_tokens"] > 1000
    assert found["told"]["wrong"] == found["expected"]["wrong"] == 0
    assert recorder.cache.num_missed == 0
    assert set(recorder.pool._block_of) == recorder.cache._cached
    assert len(recorder.cache._hash_of) > 3 * recorder.pool.total, "hardly anything was evicted"


def test_what_is_being_computed_is_expected_to_be_there() -> None:
    """A prompt that follows another with the same beginning finds it, though no event has told,
    unless both wait for the same step."""
    replica = Replica(KnownCache())
    hashes = block_hashes([*range(41)], BLOCK)
    replica.sent(hashes[:6])
    assert (replica.num_cached(hashes), replica.num_expected(hashes)) == (0, 6)
    replica.sent(hashes)
    assert replica.num_expected(hashes) == 6
    replica.computed(hashes[:6])
    assert replica.num_expected(hashes) == 10
    replica.computed(hashes)
    assert replica.num_expected(hashes) == 0


def test_simulated_caches_find_what_routers_expect() -> None:
    """Also where several prompts with the same beginning come during a step."""
    replica = fleet.MeasuredReplica.of(trace(kv_blocks=2000))
    found = predictions(fleet.serve(replica, 2, "kv-events", load(400, rate=400)))
    assert found["expected"]["absolute_error"] < 0.01
    assert found["told"]["wrong"] > found["expected"]["wrong"]


def test_the_work_of_traced_steps_is_that_of_the_scheduler() -> None:
    """Also of chunks behind tokens that were found in the cache, which a trace does not name."""
    replica = fleet.MeasuredReplica.of(trace())
    engine = replica.start(random.Random(1))
    ran: list[tuple[SchedulerOutput, GraphKey, float]] = []
    engine.ran = lambda *step: ran.append(step)  # type: ignore[method-assign]
    draw = random.Random(1)
    for index, arrival in enumerate(load(60)):
        params = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
        engine.add(
            EngineRequest(request_id=str(index), prompt_token_ids=arrival.prompt, params=params)
        )
        while engine.scheduler.waiting or (engine.has_work and draw.random() < 0.7):
            engine.step()  # so that no step has two new requests
    lines = []
    for output, (mode, descriptor), ms in ran:
        context = sum(row.num_computed_tokens + row.num_tokens for row in output.rows)
        line = {"mode": mode.name, "rung": descriptor.num_tokens, "wall_ms": ms}
        line |= {"rung_requests": descriptor.num_reqs, "decode_rows": output.num_decodes}
        line |= {"prefill_tokens": output.num_tokens - output.num_decodes, "context": context}
        line["requests"] = [(row.request_id, row.num_tokens) for row in output.rows]
        lines.append(line)
    samples = [*fleet.samples_of(lines, replica.shape.ladders)]
    assert engine.scheduler.prefix_cache_hits > 1000
    for sample, (output, key, _) in zip(samples, ran, strict=True):
        kind = (sample.key[0], sample.key[1].num_tokens, sample.key[1].uniform_decode)
        assert kind == (key[0], key[1].num_tokens, key[1].uniform_decode)
        assert sample.work == output.work
