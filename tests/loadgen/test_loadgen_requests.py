"""What requests are made of: drawn lengths, shared prefixes, and the requests of traces."""

import json
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import pytest
from msgspec.structs import replace

from loadgen import traces
from loadgen.errors import ConfigError
from loadgen.lengths import LogNormal, Normal, Uniform, draw, parse
from loadgen.prompts import Conversation
from loadgen.records import Trace
from loadgen.traces import Arrival
from tests.loadgen.test_loadgen_delays import CONFIG


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("7", 7),
        ("uniform:2:9", Uniform(2, 9)),
        ("normal:100:10", Normal(100.0, 10.0, 1_000_000)),
        ("lognormal:100:50.5:300", LogNormal(100.0, 50.5, 300)),
    ],
)
def test_how_lengths_are_written(text: str, length: object) -> None:
    assert parse(text) == length
    assert parse(str(length)) == length


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "uniform:3", "normal:0:1", "normal:nan:1", "normal:9:-1", "x:1:2"],
)
def test_what_is_no_length(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text)


@pytest.mark.parametrize("text", ["normal:200:20", "lognormal:200:100", "uniform:101:299"])
def test_drawn_lengths_have_the_mean_and_the_deviation(text: str) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(parse(text), rng) for _ in range(20_000)]
    deviation = {"normal": 20, "lognormal": 100, "uniform": 199 / 12**0.5}[text.split(":")[0]]
    assert fmean(drawn) == pytest.approx(200, rel=0.02)
    assert pstdev(drawn) == pytest.approx(deviation, rel=0.05)


def test_drawn_lengths_are_within_bounds() -> None:
    rng = np.random.default_rng(0)
    drawn = {draw(parse("lognormal:5:50:9"), rng) for _ in range(2000)}
    assert (min(drawn), max(drawn)) == (1, 9)
    assert {draw(parse("uniform:2:4"), rng) for _ in range(200)} == {2, 3, 4}


def test_prompts_share_as_many_prefixes_as_asked_for() -> None:
    """The measurement finds the prefixes that its warm-up has sent, and no other level has them."""
    config = replace(CONFIG, concurrencies=(1, 2), prefix_tokens=16, num_prefixes=3, input_tokens=4)

    def prompts(level: int, warmup: bool) -> list[list[int]]:
        bodies = [Conversation(config, level, warmup, i).request().body for i in range(60)]
        found: list[list[int]] = [json.loads(body)["prompt"] for body in bodies]
        assert {len(prompt) for prompt in found} == {20}
        return found

    def prefixes(level: int, warmup: bool) -> set[tuple[int, ...]]:
        return {tuple(prompt[:16]) for prompt in prompts(level, warmup)}

    assert len(prefixes(0, False)) == 3
    assert prefixes(0, False) == prefixes(0, True)
    assert not prefixes(0, False) & prefixes(1, False)
    assert len({tuple(prompt) for prompt in prompts(0, False)}) == 60


def test_the_blocks_of_a_trace_are_not_in_its_warm_up(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [7]}\n')
    config = replace(CONFIG, trace=Trace(str(path), 1, 1.0))
    bodies = [Conversation(config, 0, warmup, 0).request().body for warmup in (False, True)]
    assert json.loads(bodies[0])["prompt"] != json.loads(bodies[1])["prompt"]


def test_a_trace_of_azure(tmp_path: Path) -> None:
    """The times have seven digits after the second, and the requests need not be in order."""
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:47.1805900,396,109\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
    )
    first, second = traces.read(str(path))
    assert (first.input_length, first.output_length) == (374, 44)
    assert (second.input_length, second.output_length) == (396, 109)
    assert second.timestamp - first.timestamp == pytest.approx(500)


def test_other_fields_of_a_trace_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('\n{"timestamp": 3.5, "input_length": 4, "output_length": 5, "model": "m"}\n')
    assert traces.read(str(path)) == (Arrival(3.5, 4, 5),)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.jsonl", "", "no requests"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 4}\n', "line 1: .*output_length"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 0, "output_length": 1}\n', "line 1: .*>= 1"),
        ("t.csv", "TIMESTAMP,Tokens\n2023-11-16 18:15:46,3\n", "no column 'ContextTokens'"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,3,4\n", "request 1: .*noon"),
        ("t.jsonl", b"\xff\xfe", "t.jsonl: "),
    ],
)
def test_a_trace_that_cannot_be_read(
    name: str, text: str | bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words):
        traces.read(str(path))
