"""The metrics count exactly the work of a server that is otherwise idle."""

from __future__ import annotations

from collections import Counter

from tests.e2e.server import Server

FULL = '{mode="FULL",reason="pure_decode"}'
PIECEWISE = '{mode="PIECEWISE",reason="has_prefill"}'


def test_steps_and_padding(cpu_server: Server) -> None:
    """A prefill of 5 tokens and three decode steps are counted, with the padding of the prefill."""
    before = Counter(cpu_server.metrics())
    cpu_server.complete([5, 6, 7, 8, 9], max_tokens=4, ignore_eos=True)
    after = Counter(cpu_server.metrics())
    after.subtract(before)
    expected = {
        f"graph_steps_total{PIECEWISE}": 1,
        f"step_tokens_total{PIECEWISE}": 5,
        f"padded_tokens_total{PIECEWISE}": 3,  # the captured size above 5 tokens is 8
        f"graph_steps_total{FULL}": 3,
        f"step_tokens_total{FULL}": 3,
        f"padded_tokens_total{FULL}": 0,
        'batch_size_steps_total{kind="mixed",size="5"}': 1,
        'batch_size_steps_total{kind="decode",size="1"}': 3,
        "prompt_tokens_total": 5,
        "generation_tokens_total": 4,
        'request_success_total{finished_reason="length"}': 1,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 3,
    }
    assert {name: after[name] for name in expected} == expected


def test_a_prefix_hit(cpu_server: Server) -> None:
    """Only the tokens that are not cached are computed: all but three blocks of 16 tokens."""
    prompt = [*range(1000, 1056)]
    cpu_server.complete(prompt, max_tokens=1)
    before = Counter(cpu_server.metrics())
    cpu_server.complete(prompt, max_tokens=1)
    after = Counter(cpu_server.metrics())
    after.subtract(before)
    expected = {
        "prompt_tokens_total": 56,
        "prefix_cache_queries_total": 56,
        "prefix_cache_hits_total": 48,
        f"step_tokens_total{PIECEWISE}": 8,
    }
    assert {name: after[name] for name in expected} == expected


def test_decode_padding(cpu_server: Server) -> None:
    """Three requests that decode together are padded to the captured size of four."""
    name = f"padded_tokens_total{FULL}"
    before = cpu_server.metrics()
    cpu_server.complete([[5, 6], [7, 8], [9, 10]], max_tokens=6, ignore_eos=True)
    assert cpu_server.metrics()[name] - before.get(name, 0) == 5


def test_eager(eager_server: Server) -> None:
    eager_server.complete([5, 6, 7, 8, 9], max_tokens=4)
    steps = [name for name in eager_server.metrics() if name.startswith("graph_steps_total")]
    assert steps == ['graph_steps_total{mode="NONE",reason="graphs_off"}']
    padded = eager_server.metrics()['padded_tokens_total{mode="NONE",reason="graphs_off"}']
    assert padded == 0, "NONE never pads"


def test_refused_requests_are_counted(server: Server) -> None:
    before = Counter(server.metrics())
    server.post("/v1/completions", prompt="x", max_tokens=-1)
    after = Counter(server.metrics())
    name = 'request_failure_total{status="400"}'
    assert after[name] - before[name] == 1
    assert after["prompt_tokens_total"] == before["prompt_tokens_total"]
