"""A scrape of a server with two API workers, under our names and under vLLM's, after some work: it
has what vLLM's readers look for, and what our dashboard and alerts read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from minisrv.engine.messages import CompilationReport, EngineStats
from minisrv.metrics import Metrics
from tests import vllm_names
from tests.e2e.server import SMALL, Server
from tests.engine.kv_events_consumer import Consumer
from tests.promql import parse
from tests.test_dashboards import alerts, dashboard_expressions

Families = dict[str, Metric]
PROMPT = [*range(5, 45)]


def parsed(text: str) -> Families:
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.fixture(scope="module")
def events() -> Iterator[Path]:
    """A directory for the sockets of KV cache events, with a path that is short enough."""
    with TemporaryDirectory(prefix="kv-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def families(tiny: Path, events: Path) -> Iterator[Families]:
    """The scrape after three requests of four choices together, one of which is refused."""
    server = Server(
        *("--model", str(tiny), "--served-model-name", "tiny", *SMALL),
        *("--api-workers", "2", "--metrics-names", "both", "--itl-target-ms", "200"),
        *("--kv-events-endpoint", f"ipc://{events}/events"),
        *("--kv-events-replay-endpoint", f"ipc://{events}/replay"),
    )
    try:
        server.wait_ready()
        # Only what is sampled can differ between choices, and lengths must not.
        server.complete(PROMPT, max_tokens=6, ignore_eos=True)
        server.complete(PROMPT, max_tokens=3, n=3, ignore_eos=True)
        assert server.post("/v1/completions", prompt="a", max_tokens=-1).status_code == 400
        yield parsed(server.get("/metrics").text)
    finally:
        server.stop()


def histogram(family: Metric) -> tuple[float, float]:
    """The count and the sum of a histogram."""
    values = {sample.name: sample.value for sample in family.samples if "le" not in sample.labels}
    return values[f"{family.name}_count"], values[f"{family.name}_sum"]


def test_names_types_and_labels_are_vllm_s(families: Families) -> None:
    """The names, types, labels and buckets of vLLM's release are served, except for those that are
    told to be absent, and nothing else is."""
    ours = {
        name.removeprefix("vllm:"): family
        for name, family in families.items()
        if name.startswith("vllm:")
    }
    cache = ours.pop("cache_config_info")
    assert (cache.type, cache.samples[0].value) == ("gauge", 1)
    assert set(cache.samples[0].labels) == vllm_names.CACHE_CONFIG_LABELS
    assert ours.keys() == vllm_names.METRICS.keys()
    assert not ours.keys() & vllm_names.ABSENT.keys()
    for name, (kind, labels) in vllm_names.METRICS.items():
        family = ours[name]
        assert family.type == kind, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(labels), name
            assert {**sample.labels, "model_name": "tiny", "engine": "0"} == sample.labels
        if kind == "histogram":
            bounds = [s.labels["le"] for s in family.samples if s.name.endswith("_bucket")]
            assert " ".join(bounds) == vllm_names.BUCKETS[name]


def test_a_router_reads_the_size_of_the_cache(families: Families) -> None:
    """The gateway's model-server protocol takes these labels, and three gauges, from a scrape."""
    labels = families["vllm:cache_config_info"].samples[0].labels
    assert int(labels["block_size"]) == 16
    assert int(labels["num_gpu_blocks"]) > 1
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        (sample,) = families[f"vllm:{name}"].samples
        assert 0 <= sample.value < 1  # what certifies graphs may hold some blocks


def test_both_workers_requests_are_in_one_scrape_under_both_names(families: Families) -> None:
    expected = {
        "request_prompt_tokens": (4, 160),
        "request_generation_tokens": (4, 15),
        "request_prefill_kv_computed_tokens": (4, 40 + 3 * 8),  # two blocks of 16 are found
        "request_max_num_generation_tokens": (2, 9),
        "request_params_max_tokens": (4, 15),
        "request_params_n": (2, 4),
    }
    for prefix in ("minisrv:", "vllm:"):
        found = {name: histogram(families[prefix + name]) for name in expected}
        assert found == expected
        assert histogram(families[f"{prefix}iteration_tokens_total"])[1] == 40 + 3 * 8 + 11
    success = {
        sample.labels["finished_reason"]: sample.value
        for sample in families["vllm:request_success"].samples
    }
    assert success == {"stop": 0, "length": 4, "abort": 0, "error": 0}


def test_the_phases_of_requests_add_up(families: Families) -> None:
    """Queue, prefill and decode time together are the time of a request but for what its worker
    does before the engine has it; none is negative."""
    phases = [
        histogram(families[f"minisrv:request_{phase}_time_seconds"])
        for phase in ("queue", "prefill", "decode")
    ]
    assert [count for count, _ in phases] == [4, 4, 4]
    assert all(seconds > 0 for _, seconds in phases)
    _, latency = histogram(families["minisrv:e2e_request_latency_seconds"])
    assert sum(seconds for _, seconds in phases) <= latency


def test_the_settings_are_told(families: Families) -> None:
    (sample,) = families["minisrv:model_config_info"].samples
    told = sample.labels
    assert (told["model_name"], told["max_model_len"], told["max_num_seqs"]) == ("tiny", "512", "8")


ADDED = {"instance", "job"}
"""The labels that Prometheus adds at a scrape."""


def test_the_dashboard_and_the_alerts_read_what_is_there(families: Families) -> None:
    """Each series that an expression reads is in the scrape, with the labels by which it is chosen
    and grouped."""
    labels: dict[str, set[str]] = {"up": set()}  # Prometheus makes that one itself
    # Compiled code is asked for on a GPU only, so its series come from a report of it.
    report = CompilationReport(refusals={"slower": 1}, seconds={"compile": 1.0})
    text = Metrics().render(EngineStats(compilation=report), None, "ready", ["ready"]).decode()
    of_compilation = {
        name: family
        for name, family in parsed(text).items()
        if name in ("minisrv:generation_refusals", "minisrv:compilation_seconds")
    }
    for family in (families | of_compilation).values():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    expressions = [*dashboard_expressions(), *(alert["expr"] for alert in alerts())]
    assert len(expressions) > 50
    for expression in expressions:
        read = parse(expression)
        known = set().union(*(labels.get(name, set()) for name, _ in read.selectors))
        assert read.grouped <= known | ADDED, expression
        for name, chosen in read.selectors:
            assert name in labels, expression
            assert chosen <= labels[name] | ADDED, expression


def test_a_router_knows_which_beginning_of_a_prompt_is_cached(
    families: Families, events: Path
) -> None:
    """The events of a server tell of the two full blocks of the prompt, the second after the
    first, also to a reader that comes when all is over."""
    consumer = Consumer(f"ipc://{events}/events", f"ipc://{events}/replay")
    try:
        consumer.catch_up()
    finally:
        consumer.close()
    found = {tuple(block.token_ids): block for block in consumer.blocks.values()}
    first, second = found[tuple(PROMPT[:16])], found[tuple(PROMPT[16:32])]
    assert (first.parent, first.extra_keys) == (None, None)
    assert second.parent is not None
    assert consumer.blocks[second.parent] is first
