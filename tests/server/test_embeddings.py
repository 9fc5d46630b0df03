"""Embeddings over HTTP: inputs in all forms, both encodings, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest

from minisrv.config import ServerConfig
from minisrv.errors import QueueFullError
from minisrv.metrics import Metrics
from minisrv.request import EngineOutput, EngineRequest, FinishReason, Pooling
from minisrv.server import embeddings
from minisrv.server.app import create_app
from minisrv.server.offload import LARGE
from minisrv.text.tokenizer import Tokenizer
from tests.server.conftest import GENERATION, HOUR
from tests.server.fake_engine import INFO, FakeEngine
from tests.server.live_server import serve

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
PATH = "/v1/embeddings"
SIZE = 4


def sums(request: EngineRequest) -> Iterable[EngineOutput]:
    """The hidden state of token i is [i, 1, 0, -2]; two chunks report them, and one reports
    nothing."""
    ids = request.prompt_token_ids
    pooled = ids if request.params.pooling is Pooling.MEAN else ids[-1:]
    states = np.array([[i, 1, 0, -2] for i in pooled], np.float32)
    for part in (states[:1], states[:0], states[1:]):
        told = part.sum(axis=0).tobytes() if len(part) else b""
        yield EngineOutput(request_id=request.request_id, hidden_sum=told)
    yield EngineOutput(request_id=request.request_id, finish_reason=FinishReason.LENGTH)


def expected(ids: list[int], *, mean: bool) -> np.ndarray:
    first = np.mean(ids) if mean else ids[-1]
    vector = np.array([first, 1, 0, -2])
    return vector / np.linalg.norm(vector)


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine(sums)
    engine.info = msgspec.structs.replace(INFO, hidden_size=SIZE)
    return engine


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    "given", ["hello", ["hello", "stop here"], [5, 7, 9], [[5, 7, 9], [3]], ["x"] * 100]
)
async def test_inputs(
    connect: Connect, tokenizer: Tokenizer, engine: FakeEngine, pooling: str, given: Any
) -> None:
    async with connect(engine, settings=ServerConfig(pooling=pooling)) as client:
        response = await client.post(PATH, json={"input": given, "model": "tiny", "user": "u"})
    assert response.status_code == 200, response.text
    body = response.json()
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    prompts = [tokenizer.encode(each) if isinstance(each, str) else each for each in inputs]
    assert [item["index"] for item in body["data"]] == list(range(len(prompts)))
    for item, ids in zip(body["data"], prompts, strict=True):
        wanted = expected(ids, mean=pooling == "mean")
        np.testing.assert_allclose(item["embedding"], wanted, rtol=1e-6)
    total = sum(map(len, prompts))
    assert body["usage"] == {"prompt_tokens": total, "total_tokens": total}
    assert body["model"] == "tiny"
    assert {request.params.max_tokens for request in engine.requests} == {0}


async def test_base64_is_the_same_vector(connect: Connect, engine: FakeEngine) -> None:
    async with connect(engine) as client:
        for encoding in ("float", "base64"):
            body = {"input": [5, 7], "encoding_format": encoding, "dimensions": SIZE}
            [item] = (await client.post(PATH, json=body)).json()["data"]
            found = item["embedding"]
            if encoding == "base64":
                found = np.frombuffer(base64.b64decode(found), "<f4")
            np.testing.assert_allclose(found, expected([5, 7], mean=False), rtol=1e-6)


async def test_many_vectors_become_text_beside_the_event_loop(
    connect: Connect, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long that takes depends on the number of inputs, not only on the size of each vector."""
    size, threads = 128, set()

    def ones(request: EngineRequest) -> Iterable[EngineOutput]:
        states, end = np.ones(size, np.float32).tobytes(), FinishReason.LENGTH
        yield EngineOutput(request_id=request.request_id, hidden_sum=states, finish_reason=end)

    def encode(value: object) -> bytes:
        threads.add(threading.current_thread())
        return msgspec.json.encode(value)

    engine.script = ones
    engine.info = msgspec.structs.replace(INFO, hidden_size=size)
    monkeypatch.setattr(embeddings, "_encode", encode)
    async with connect(engine) as client:
        for number, in_loop in ((1, True), (LARGE // size + 1, False)):
            response = await client.post(PATH, json={"input": [[5]] * number})
            vectors = [item["embedding"] for item in response.json()["data"]]
            np.testing.assert_allclose(vectors, np.full((number, size), size**-0.5), rtol=1e-6)
            assert (threading.current_thread() in threads) is in_loop
            threads.clear()


async def test_inputs_are_cut(connect: Connect, engine: FakeEngine) -> None:
    long = [5] * INFO.max_model_len
    async with connect(engine) as client:
        body: dict[str, Any] = {"input": [[1, *long], [1, 2, 3]]}
        assert (await client.post(PATH, json=body)).status_code == 400
        await client.post(PATH, json=body | {"truncate_prompt_tokens": -1})
        await client.post(PATH, json=body | {"truncate_prompt_tokens": 2})
    told = [request.prompt_token_ids for request in engine.requests]
    assert told == [long, [1, 2, 3], [5, 5], [2, 3]]


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"input": []}, "input", 400),
        ({"input": [""]}, "input", 400),
        ({"input": [[]]}, "input", 400),
        ({"input": ["a", [1]]}, "input", 400),
        ({"input": [INFO.vocab_size]}, "input", 400),
        ({"input": ["x"] * 2049}, "input", 400),
        ({"input": ["x"] * 105}, "input", 400),  # the server runs and queues 104 at most
        ({"dimensions": SIZE - 1}, "dimensions", 400),
        ({"dimensions": 0}, "dimensions", 400),
        ({"encoding_format": "hex"}, "encoding_format", 400),
        ({"normalize": False}, "normalize", 400),
        ({"model": "other"}, "model", 404),
        ({"n": 2}, "n", 400),
    ],
)
async def test_what_is_refused(
    connect: Connect, engine: FakeEngine, fields: dict[str, Any], param: str, status: int
) -> None:
    async with connect(engine) as client:
        response = await client.post(PATH, json={"input": "x", **fields})
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []
    assert engine.admission.num_taken == 0


async def test_a_full_engine(connect: Connect, engine: FakeEngine) -> None:
    engine.script = lambda request: [QueueFullError("full")]
    async with connect(engine) as client:
        response = await client.post(PATH, json={"input": "x"})
    assert response.status_code == 429
    assert engine.admission.num_taken == 0


async def test_the_end_of_its_time(
    connect: Connect, engine: FakeEngine, end_time: Callable[[], None]
) -> None:
    """A request that takes too long ends with an error, also when some inputs are done."""

    def script(request: EngineRequest) -> Iterable[Any]:
        if request.prompt_token_ids == [5]:
            yield from sums(request)
        yield asyncio.Event()

    engine.script = script
    async with connect(engine, settings=ServerConfig(request_timeout=HOUR)) as client:
        asked = asyncio.create_task(client.post(PATH, json={"input": [[5], [6]]}))
        await engine.started.wait()
        end_time()
        response = await asked
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert engine.requests[1].request_id in engine.aborted
    assert engine.admission.num_taken == 0


async def test_what_the_engine_drops_is_no_embedding(connect: Connect, engine: FakeEngine) -> None:
    def script(request: EngineRequest) -> Iterable[EngineOutput]:
        yield EngineOutput(request_id=request.request_id, finish_reason=FinishReason.ABORT)

    engine.script = script
    async with connect(engine) as client:
        response = await client.post(PATH, json={"input": "x"})
    assert response.status_code == 503
    assert engine.admission.num_taken == 0


async def test_an_input_is_counted_by_the_times_of_its_first_chunk(
    connect: Connect, engine: FakeEngine
) -> None:
    def script(request: EngineRequest) -> Iterable[EngineOutput]:
        first, *others = sums(request)
        now = time.perf_counter()
        yield msgspec.structs.replace(first, queued_at=now - 8, scheduled_at=now - 3)
        yield from others

    engine.script, metrics = script, Metrics()
    async with connect(engine, metrics=metrics) as client:
        await client.post(PATH, json={"input": [[5, 7, 9], [3]]})
    found = {sample.name: sample.value for each in metrics.families(200) for sample in each.samples}
    assert found["minisrv:request_queue_time_seconds_sum"] == pytest.approx(10)
    assert 6 <= found["minisrv:request_prefill_time_seconds_sum"] < HOUR
    assert found["minisrv:request_prompt_tokens_sum"] == 4
    assert found["minisrv:request_generation_tokens_count"] == 2


@pytest.fixture
async def client(tokenizer: Tokenizer, engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    app = create_app(engine, tokenizer, served_model_names=("tiny",), generation=GENERATION)
    async with serve(app) as (host, port):
        url = f"http://{host}:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


async def test_the_official_client(client: openai.AsyncOpenAI) -> None:
    """It asks for base64 unless it is told otherwise, and decodes it."""
    for options in ({}, {"encoding_format": "float"}):
        answer = await client.embeddings.create(model="tiny", input=[[5, 7], [9]], **options)
        for item, ids in zip(answer.data, ([5, 7], [9]), strict=True):
            np.testing.assert_allclose(item.embedding, expected(ids, mean=False), rtol=1e-6)
        assert answer.usage.total_tokens == 3
