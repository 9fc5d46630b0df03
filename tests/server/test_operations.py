"""Routes for operators: models, health, readiness, version, metrics and the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from minisrv.config import ServerConfig
from minisrv.engine.client import EngineState
from minisrv.engine.messages import CompilationReport, CompilationState, LadderReport, Loading
from minisrv.errors import EngineDeadError
from minisrv.request import EngineOutput
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs, sse

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]


async def get(engine: Any, connect: Connect, path: str) -> httpx.Response:
    async with connect(engine) as client:
        return await client.get(path)


async def test_models(connect: Connect) -> None:
    engine = FakeEngine(outputs([300]))
    body = (await get(engine, connect, "/v1/models")).json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "org/tiny"]
    for card in body["data"]:
        assert (await get(engine, connect, f"/v1/models/{card['id']}")).json().keys() == card.keys()
        assert card["object"] == "model"
        assert card["max_model_len"] == 200
        assert (card["root"], card["parent"]) == ("tiny", None)
    missing = await get(engine, connect, "/v1/models/gpt")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_load_and_tokenizer(connect: Connect, tokenizer: Tokenizer) -> None:
    engine = FakeEngine(outputs([300]))
    assert (await get(engine, connect, "/load")).json() == {"server_load": 3}
    info = (await get(engine, connect, "/tokenizer_info")).json()
    assert info["vocab_size"] == tokenizer.vocab_size
    assert info["special_token_ids"] == sorted(tokenizer.special_ids)
    assert info["eos_token_ids"] == [2]
    assert info["chat_template"] == tokenizer.chat_template_source
    assert info["chat_template_variables"] == []


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"prompt": "x"}, "text_completion"),
        ({"messages": [{"role": "user", "content": "x"}]}, "chat.completion"),
        ({"input": "x"}, "list"),
        ({}, "messages"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": 5}, "prompt"),
        ([], None),
    ],
)
async def test_invocations(connect: Connect, body: Any, kind: str | None) -> None:
    """The required field says what is asked for; without any, a chat is. Refusals name a field."""
    async with connect(FakeEngine(outputs([300]))) as client:
        response = await client.post("/invocations", json=body)
    if response.status_code == 200:
        assert response.json()["object"] == kind
    else:
        assert response.json()["error"]["param"] == kind


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/invocations"])
@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}])
async def test_usage_in_every_stream(connect: Connect, path: str, options: Any) -> None:
    """With the flag, every stream ends with its usage; other answers have it anyway."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    if path == "/v1/completions":
        body = {"prompt": "x", "stream": True}
    for forced in (False, True):
        settings = ServerConfig(enable_force_include_usage=forced)
        async with connect(FakeEngine(outputs([300])), settings=settings) as client:
            streamed = await client.post(path, json=body | {"stream_options": options})
            whole = await client.post(path, json=body | {"stream": False})
        told = sse(streamed.text)[-1].get("usage")
        assert (told is not None) == (forced or bool(options and options["include_usage"]))
        assert whole.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        ("loading", 200, 503),
        ("ready", 200, 200),
        ("asleep", 200, 503),
        ("draining", 200, 503),
        ("dead", 503, 503),
    ],
)
async def test_health_and_readiness(connect: Connect, state: str, health: int, ready: int) -> None:
    engine = FakeEngine(outputs([300]))
    engine.state = EngineState(state)
    engine.loading = Loading("capturing graphs", 3, 9)
    response = await get(engine, connect, "/health")
    assert (response.status_code, response.json()) == (health, {"state": state})
    async with connect(engine) as client:
        for answer in (await client.get("/ping"), await client.post("/ping")):
            assert (answer.status_code, answer.json()) == (health, {"state": state})
    response = await get(engine, connect, "/ready")
    assert response.status_code == ready
    assert response.json()["state"] == state
    assert ("retry-after" in response.headers) == (state in ("loading", "asleep", "draining"))
    if state == "loading":
        progress = response.json()["loading"]
        assert (progress["phase"], progress["done"], progress["total"]) == (
            "capturing graphs",
            3,
            9,
        )


async def test_ready_says_which_generation_serves_and_why(connect: Connect) -> None:
    engine = FakeEngine(outputs([300]))
    assert (await get(engine, connect, "/ready")).json()["compilation"] == {
        "state": "off",
        "generation": 0,
        "reason": "",
    }
    report = CompilationReport(CompilationState.REFUSED, reason="slower: by much.")
    engine.info = replace(INFO, compilation=report)
    assert (await get(engine, connect, "/ready")).json()["compilation"] == {
        "state": "refused",
        "generation": 0,
        "reason": "slower: by much.",
    }


async def test_ready_says_which_graphs_serve(connect: Connect) -> None:
    engine = FakeEngine(outputs([300]))
    ladder = LadderReport(5, 9, (1, 8), (1, 16), (8,), {"FULL decode 2 TOKENS": "it differs."})
    engine.info = replace(INFO, ladder=ladder)
    assert (await get(engine, connect, "/ready")).json()["graphs"] == {
        "graphs": 5,
        "total": 9,
        "missing": 3,
        "decode": [1, 8],
        "mixed": [1, 16],
        "epilogues": [8],
        "refused": {"FULL decode 2 TOKENS": "it differs."},
        "quarantined": {},
        "stopped": "",
    }
    engine.info = replace(INFO, ladder=replace(ladder, quarantined={"FULL decode 1 TOKENS": "no."}))
    graphs = (await get(engine, connect, "/ready")).json()["graphs"]
    assert (graphs["missing"], graphs["quarantined"]) == (2, {"FULL decode 1 TOKENS": "no."})
    engine.info = replace(INFO, ladder=replace(ladder, stopped="the memory is full."))
    assert (await get(engine, connect, "/ready")).json()["graphs"]["missing"] == 0


async def test_version(connect: Connect) -> None:
    response = await get(outputs([300]), connect, "/version")
    assert response.json() == {"version": version("minisrv")}


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """The values of all series of /metrics, by their name and the values of their labels."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_a_scrape_may_ask_for_names(connect: Connect) -> None:
    async def prefixes(query: str) -> set[str]:
        text = (await client.get(f"/metrics{query}")).text
        return set(re.findall("^(minisrv|vllm):num_requests_running", text, re.MULTILINE))

    async with connect(outputs([300]), settings=ServerConfig(metrics_names="vllm")) as client:
        assert await prefixes("") == {"vllm"}
        assert await prefixes("?names=minisrv") == {"minisrv"}
        assert await prefixes("?names=both") == {"minisrv", "vllm"}
        refused = await client.get("/metrics?names=prometheus")
    assert refused.status_code == 400
    assert "names must be one of minisrv, vllm, both" in refused.json()["error"]["message"]


async def test_metrics_of_the_engine(connect: Connect) -> None:
    async with connect(outputs([300])) as client:
        found = await scrape(client)
    expected = {
        ("minisrv:graph_steps_total", "FULL", "pure_decode"): 12,
        ("minisrv:graph_steps_total", "PIECEWISE", "has_prefill"): 2,
        ("minisrv:step_tokens_total", "FULL", "pure_decode"): 30,
        ("minisrv:padded_tokens_total", "PIECEWISE", "has_prefill"): 24,
        ("minisrv:num_requests_running",): 2,
        ("minisrv:num_requests_waiting",): 1,
        ("minisrv:kv_cache_usage_perc",): 0.25,
        ("minisrv:num_preemptions_total",): 3,
        ("minisrv:prompt_tokens_total",): 40,
        ("minisrv:generation_tokens_total",): 30,
        ("minisrv:prefix_cache_queries_total",): 36,
        ("minisrv:prefix_cache_hits_total",): 16,
        ("minisrv:simulated_launch_us",): 11.5,
        ("minisrv:engine_state", "ready"): 1,
        ("minisrv:engine_state", "dead"): 0,
    }
    assert found.items() >= expected.items()


async def test_real_times_are_told_from_simulated_ones_by_a_zero(connect: Connect) -> None:
    """The metric simulated_launch_us is 0 where no launch times are simulated, and while the engine
    loads."""
    engine = FakeEngine(outputs([300]))
    # None: the engine is still loading.
    for engine.info in (replace(INFO, simulated_launch_us=0.0), None):
        async with connect(engine) as client:
            assert (await scrape(client))["minisrv:simulated_launch_us",] == 0


async def test_metrics_of_requests(connect: Connect) -> None:
    fail = False

    def script(request: Any) -> Any:
        if fail:
            first = EngineOutput(request_id=request.request_id, token_ids=[300])
            return [first, EngineDeadError("gone")]
        return outputs([300, 301, 302])(request)

    async with connect(script) as client:
        await client.post("/v1/completions", json={"prompt": ["a", "b"]})
        await client.post("/v1/completions", json={"prompt": "a", "n": 0})
        await client.post("/invocations", json={"prompt": "a", "n": 0})
        await client.get("/ready?x")
        await client.get("/nowhere")
        fail = True
        await client.post("/v1/completions", json={"prompt": "a", "stream": True})
        found = await scrape(client)
    assert found["minisrv:request_success_total", "length"] == 2
    assert found["minisrv:request_failure_total", "400"] == 2
    assert found["minisrv:request_failure_total", "503"] == 1
    assert ("minisrv:request_failure_total", "404") not in found
    assert found["minisrv:time_to_first_token_seconds_count",] == 3
    assert found["minisrv:inter_token_latency_seconds_count",] == 4
    assert found["minisrv:e2e_request_latency_seconds_count",] == 2


async def test_each_application_has_metrics_of_its_own(connect: Connect) -> None:
    async with connect(outputs([300])) as client:
        await client.post("/v1/completions", json={"prompt": "a"})
    async with connect(outputs([300])) as client:
        assert (await scrape(client))["minisrv:request_success_total", "length"] == 0


async def test_the_openapi_document_describes_the_bodies(connect: Connect) -> None:
    schema = (await get(outputs([300]), connect, "/openapi.json")).json()
    bodies = schema["components"]["schemas"]
    assert len(bodies["CompletionRequest"]["properties"]["prompt"]["anyOf"]) == 4
    assert bodies["ChatCompletionRequest"]["properties"]["temperature"]["description"]
    assert set(schema["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/metrics"}
