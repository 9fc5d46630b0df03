"""One request: which chunks count as tokens, how many tokens there were, and what is a failure."""

import asyncio
import json
from collections.abc import Sequence

import msgspec
import pytest

from loadgen.client import CompletionStream, find_model, send, simulated_launch_us
from loadgen.errors import ServerError
from loadgen.http import Client
from loadgen.prompts import Conversation, Request, endpoint
from loadgen.records import (
    Failure,
    FailureKind,
    LevelResult,
    Load,
    PromptKind,
    RequestRecord,
    RunConfig,
    StoppedBy,
)
from loadgen.samples import Distribution, itl_samples_ms, tpot_ms
from loadgen.stats import summarize
from tests.loadgen.scripted_server import (
    DONE,
    DROP,
    ScriptedServer,
    Status,
    Step,
    Wait,
    answer,
    chunk,
    event,
    usage,
)

CONFIG = RunConfig(
    base_url="http://unused/v1",
    model="m",
    concurrencies=(1,),
    prompt_kind=PromptKind.TOKENS,
    input_tokens=8,
    token_range=(100, 200),
    output_tokens=4,
    ignore_eos=True,
    requests=1,
    duration_s=None,
    warmup=0,
    processes=1,
    seed=0,
    timeout_s=20.0,
    label="",
)


def ask(*steps: Step, config: RunConfig = CONFIG) -> RequestRecord:
    """Send one request to a server that answers with `steps`, and return its record."""
    with ScriptedServer(lambda number, body: steps) as server:
        config = msgspec.structs.replace(config, base_url=server.url + "/v1")

        async def go() -> RequestRecord:
            with Client(None) as client:
                request = Conversation(config, 0, False, 0).request()
                return await send(client, endpoint(config), request, config)

        return asyncio.run(go())


def body_of(config: RunConfig, level: int, warmup: bool, index: int) -> bytes:
    return Conversation(config, level, warmup, index).request().body


def stream(parts: Sequence[bytes]) -> CompletionStream:
    """Feed `parts` to a stream, the i-th at second i."""
    state = CompletionStream()
    for now, part in enumerate(parts):
        state.feed(part, float(now))
    return state


def delta(**fields: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


def test_good_answer() -> None:
    got = ask(*answer(4))
    assert got.failure is None
    assert got.tokens == 4
    assert got.prompt_tokens == 4
    assert len(got.chunk_times_s) == 4
    assert got.start_s < got.chunk_times_s[0] <= got.chunk_times_s[-1] <= got.end_s


def test_an_answer_without_done_is_whole_if_it_has_a_finish_reason() -> None:
    """transformers serve sends no [DONE]. The answer ends with the response then, and the report
    says so."""
    got = ask(*answer(4)[:-1])
    assert got.failure is None
    assert got.without_done
    assert got.chunk_times_s[-1] <= got.end_s
    summary = summarize(LevelResult(Load(1), StoppedBy.REQUESTS, [got, ask(*answer(4))], [], []))
    assert [text for text in summary.warnings if "1 of 2 answers had a finish reason" in text]


def test_chunks_with_several_tokens() -> None:
    got = ask(*answer(4, per_chunk=2))
    assert got.failure is None
    assert got.tokens == 4
    assert len(got.chunk_times_s) == 2


def test_role_only_and_empty_chunks_are_no_first_token() -> None:
    """The first token's time is that of the first content, for every shape of an empty start."""
    parts = [
        b": keep-alive\n\n",
        delta(role="assistant"),
        delta(role="assistant", content=""),
        delta(content=None),
        chunk(""),
        delta(content="a"),  # This part comes at second 5.
        delta(reasoning_content="b"),
        delta(reasoning="c"),
        chunk("", "stop"),
        usage(3),
    ]
    state = stream(parts)
    assert state.chunk_times_s == [5.0, 6.0, 7.0]
    assert state.done_s is None
    state.feed(DONE, 10.0)
    assert state.done_s == 10.0
    assert state.verdict(3, exact=True) is None


def with_ids(*token_ids: int, text: str = "", finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "token_ids": token_ids, "finish_reason": finish}
    return event({"choices": [choice]})


def test_a_token_without_text_is_one_where_its_id_is_told() -> None:
    """A chunk without text counts as a token if it has a token id, in the stream of a completion
    and of a chat."""
    parts = [with_ids(5), with_ids(6, 7, text="a"), with_ids(8, finish="length"), usage(4)]
    state = stream(parts)
    assert state.chunk_times_s == [0.0, 1.0, 2.0]
    assert state.answer.token_ids == (5, 6, 7, 8)
    choice = {"index": 0, "delta": {"content": ""}, "token_ids": [5], "finish_reason": None}
    assert stream([event({"choices": [choice]}), delta(content="a")]).chunk_times_s == [0.0, 1.0]


@pytest.mark.parametrize(
    ("parts", "times"),
    [
        # There is a chunk for every token: three with text and two without.
        ([chunk(""), chunk("a"), chunk(""), chunk("b"), chunk("c"), usage(5)], [0, 1, 2, 3, 4]),
        # The last token has no text and comes with the finish reason, as vLLM sends it.
        ([chunk(""), chunk("a"), chunk("", "length"), usage(3)], [0, 1]),
        ([delta(role="assistant", content=""), delta(content=""), delta(content="a"), usage(2)],
         [1, 2]),
        # Chunks have two tokens each, so it is not known whether the empty one has any.
        ([chunk(""), chunk("ab"), chunk("cd"), chunk("e"), usage(7)], [1, 2, 3]),
        # There are as many chunks as tokens only if the chunk that ends the choice is counted, and
        # it has none.
        ([chunk("ab"), chunk("c"), chunk("", "length"), usage(3)], [0, 1]),
        ([chunk(""), chunk("a")], [1]),
    ],
)  # fmt: skip
def test_a_chunk_without_text_is_a_token_where_each_token_has_a_chunk(
    parts: list[bytes], times: list[float]
) -> None:
    assert stream(parts).chunk_times_s == times


MS_A_TOKEN = 10.0


def paced(parts: Sequence[bytes], tokens: Sequence[int]) -> tuple[RequestRecord, Distribution]:
    """Return the record of a stream whose i-th part arrives when its tokens have been made, and the
    distribution of its inter-token latencies."""
    state, now_s = CompletionStream(), 0.0
    for part, brought in zip(parts, tokens, strict=True):
        now_s += brought * MS_A_TOKEN / 1e3
        state.feed(part, now_s)
    record = RequestRecord(
        index=0,
        start_s=0.0,
        end_s=now_s,
        chunk_times_s=tuple(state.chunk_times_s),
        chunk_tokens=tuple(state.chunk_tokens),
        prompt_tokens=state.prompt_tokens,
        completion_tokens=state.completion_tokens,
        failure=None,
    )
    itl = Distribution.of(itl_samples_ms(record))
    assert itl is not None
    return record, itl


@pytest.mark.parametrize("per_chunk", [1, 2, 10])
@pytest.mark.parametrize("role", [False, True])
def test_chunks_of_several_tokens_are_as_slow_as_their_tokens(per_chunk: int, role: bool) -> None:
    """A chunk of several tokens counts as so many tokens. The first chunk brings as many as the
    others, but its time is no part of the time that is divided. Chunks without tokens, the role at
    the start and the finish reason and usage at the end, change nothing."""
    total = 100
    parts = answer(total, per_chunk)
    assert all(isinstance(part, bytes) for part in parts)
    counts = [per_chunk] * (total // per_chunk) + [0] * 3
    if role:
        parts, counts = [delta(role="assistant", content=""), *parts], [0, *counts]
    record, itl = paced([part for part in parts if isinstance(part, bytes)], counts)
    for value in (itl.mean, itl.min, itl.p50, itl.p99, itl.max, tpot_ms(record)):
        assert value == pytest.approx(MS_A_TOKEN)
    assert record.tokens == total


RAGGED = [7, 1, 1, 4, 10, 2, 1, 5]


@pytest.mark.parametrize("usage_too", [True, False])
def test_ids_tell_how_many_tokens_each_chunk_has_brought(usage_too: bool) -> None:
    """Token ids tell how many tokens each chunk has brought; the last one has no text, as an end
    token has none."""
    parts = [with_ids(*range(count), text="a long word") for count in RAGGED]
    parts.append(with_ids(3, finish="length"))
    if usage_too:
        parts.append(usage(sum(RAGGED) + 1))
    record, itl = paced(parts, [*RAGGED, 1, 0][: len(parts)])
    assert record.tokens == sum(RAGGED) + 1
    assert record.chunk_tokens == (*RAGGED, 1)
    for value in (itl.mean, itl.min, itl.max, tpot_ms(record)):
        assert value == pytest.approx(MS_A_TOKEN)


@pytest.mark.parametrize("first", [1, 10])
def test_without_ids_text_tells_about(first: int) -> None:
    """Without ids the length of the text tells roughly how many tokens a chunk has brought. The
    stream is like one of speculative decoding: a first chunk with one token (or with ten), then
    several tokens at a time."""
    counts = [first, *RAGGED]
    parts = [chunk("word " * count) for count in counts]
    record, itl = paced([*parts, usage(sum(counts))], [*counts, 0])
    assert sum(record.chunk_tokens) == pytest.approx(sum(counts))
    assert itl.mean == pytest.approx(MS_A_TOKEN, rel=0.05)
    assert tpot_ms(record) == pytest.approx(MS_A_TOKEN, rel=0.05)


def test_more_chunks_than_tokens() -> None:
    """Where a server sends letters, each chunk counts as a part of a token."""
    state = stream([chunk("a")] * 8 + [usage(2)])
    assert state.chunk_tokens == [0.25] * 8


def test_an_answer_without_any_text_is_no_failure_and_cannot_be_timed() -> None:
    got = ask(chunk("", "length"), usage(4), DONE)
    assert got.failure is None
    assert got.tokens == 4
    assert got.ttft_s is None


def test_cached_tokens_are_what_usage_says() -> None:
    assert ask(*answer(4)[:-2], usage(4, cached=3), DONE).cached_tokens == 3
    assert ask(*answer(4)[:-2], usage(4, cached=0), DONE).cached_tokens == 0
    assert ask(*answer(4)).cached_tokens is None


def test_a_server_whose_times_are_simulated_says_so() -> None:
    """Simulated times are read from the server's metrics, also if that needs an API key; a server
    that has no such page, or is gone, says nothing."""
    with ScriptedServer() as server:
        assert asyncio.run(simulated_launch_us(server.url + "/v1", None)) == 0
        server.metrics = 'x 1\nminisrv:simulated_launch_us{engine="0"} 11.5\ny 2\n'
        assert asyncio.run(simulated_launch_us(server.url + "/v1", "sk")) == 11.5
        assert server.metrics_keys == {None, "Bearer sk"}
        assert asyncio.run(simulated_launch_us(server.url + "/nowhere/v1", None)) == 0
    assert asyncio.run(simulated_launch_us("http://127.0.0.1:9/v1", None)) == 0


def test_delayed_first_token_is_after_the_headers() -> None:
    """The first token waits until a second request has arrived; its time is later than that of the
    response's headers, which came long before."""
    gate = Wait(2)
    with ScriptedServer(lambda number, body: [chunk(""), gate, *answer(4)]) as server:
        config = msgspec.structs.replace(CONFIG, base_url=server.url + "/v1")

        async def go() -> list[RequestRecord]:
            with Client(None) as client:
                first, second = (Conversation(config, 0, False, i).request() for i in (0, 1))
                task = asyncio.create_task(send(client, endpoint(config), first, config))
                await asyncio.to_thread(gate.reached.wait, 20)
                return [await send(client, endpoint(config), second, config), await task]

        late, early = asyncio.run(go())
    assert early.start_s < late.start_s < early.chunk_times_s[0]


@pytest.mark.parametrize(
    ("steps", "kind", "status", "words"),
    [
        ([Status(429, {"error": {"message": "queue full"}})], "http", 429, "queue full"),
        ([Status(400, {"error": {"message": "no ignore_eos"}})], "http", 400, "no ignore_eos"),
        ([Status(500, {"detail": "boom"})], "http", 500, "boom"),
        (
            [chunk("a"), event({"error": {"message": "engine died"}}), DONE],
            "error_event",
            None,
            "engine died",
        ),
        ([chunk("a"), chunk("b"), DROP], "broken_stream", None, ""),
        ([DROP], "broken_stream", None, ""),
        ([chunk("a"), chunk("b"), usage(4)], "broken_stream", None, "before [DONE]"),
        ([b"data: {nonsense\n\n", DONE], "broken_stream", None, "unreadable"),
        ([b'{"choices": [{"text": "aaaa"}]}'], "broken_stream", None, "before [DONE]"),
        ([*(chunk("a") for _ in range(4)), usage(4), DONE], "no_finish_reason", None, ""),
        (answer(3), "wrong_token_count", None, "asked for 4 tokens, usage says 3"),
        (answer(5), "wrong_token_count", None, "usage says 5"),
        ([chunk("", "length"), DONE], "no_tokens", None, "usage counts none"),
    ],
)
def test_failures(steps: list[Step], kind: str, status: int | None, words: str) -> None:
    """Each fault is a failure of its own kind. That the bytes end cleanly is not enough for
    success."""
    failure = ask(*steps).failure
    assert failure is not None
    assert (failure.kind, failure.status) == (kind, status)
    assert words in failure.message


def test_without_ignore_eos_fewer_tokens_are_fine_and_more_are_not() -> None:
    config = msgspec.structs.replace(CONFIG, ignore_eos=False)
    assert ask(*answer(3), config=config).failure is None
    failure = ask(*answer(5), config=config).failure
    assert failure is not None
    assert failure.kind is FailureKind.WRONG_TOKEN_COUNT


@pytest.mark.parametrize("counted", [[], [usage(2)]])
def test_an_answer_that_the_model_ends_shows_that_ignore_eos_is_not_obeyed(
    counted: list[Step],
) -> None:
    """A server that takes the field and does not know it is no failure, but is told of."""
    steps = [chunk("a"), chunk("b", "stop"), *counted, DONE]
    got = ask(*steps)
    assert got.failure is None
    assert got.disobeys_ignore_eos
    free = msgspec.structs.replace(CONFIG, ignore_eos=False)
    assert not ask(*steps, config=free).disobeys_ignore_eos
    assert not ask(*answer(4)).disobeys_ignore_eos
    level = LevelResult(Load(1), StoppedBy.REQUESTS, [got], [], [])
    assert any("1 of 1 answers ended before" in text for text in summarize(level).warnings)


def test_missing_usage_falls_back_to_chunks() -> None:
    got = ask(*(chunk("a") for _ in range(3)), chunk("b", "length"), DONE)
    assert got.failure is None
    assert got.completion_tokens is None
    assert got.tokens == 4


def test_timeout() -> None:
    config = msgspec.structs.replace(CONFIG, timeout_s=1.0)
    got = ask(chunk("a"), Wait(2), config=config)
    assert got.failure is not None
    assert got.failure.kind is FailureKind.TIMEOUT
    assert got.ttft_s is not None


def test_refused_connection() -> None:
    async def go() -> Failure | None:
        config = msgspec.structs.replace(CONFIG, base_url="http://127.0.0.1:9/v1")
        with Client(None) as client:
            return (await send(client, endpoint(config), Request(0, 0, b"{}", 4), config)).failure

    failure = asyncio.run(go())
    assert failure is not None
    assert failure.key == "connect_error"


def test_find_model() -> None:
    with ScriptedServer(models=["first", "second"]) as server:
        base = server.url + "/v1"
        assert asyncio.run(find_model(base, None, None, 5.0)) == "first"
        assert asyncio.run(find_model(base, None, "second", 5.0)) == "second"
        with pytest.raises(ServerError, match=r"'third'.*serves: first, second"):
            asyncio.run(find_model(base, None, "third", 5.0))
        with pytest.raises(ServerError, match="404"):
            asyncio.run(find_model(server.url + "/nowhere/v1", None, None, 5.0))
        assert asyncio.run(find_model(server.url + "/nowhere/v1", None, "mine", 5.0)) == "mine"
    with ScriptedServer(models=[]) as server:
        base = server.url + "/v1"
        assert asyncio.run(find_model(base, None, "loaded-when-asked", 5.0)) == "loaded-when-asked"
        with pytest.raises(ServerError, match="lists no model: name one by --model"):
            asyncio.run(find_model(base, None, None, 5.0))


def test_bodies_depend_on_seed_and_place_only() -> None:
    """Fails if two requests of a run share a prompt, or if two runs with the same seed do not send
    the same prompts."""
    bodies = [body_of(CONFIG, *place) for place in ((0, False, 0), (0, False, 1))]
    bodies += [body_of(CONFIG, *place) for place in ((0, True, 0), (1, False, 0))]
    bodies.append(body_of(msgspec.structs.replace(CONFIG, seed=1), 0, False, 0))
    assert len(set(bodies)) == 5
    assert body_of(CONFIG, 0, False, 0) == bodies[0]
    body = json.loads(bodies[0])
    assert len(body.pop("prompt")) == 8
    assert body == {
        "model": "m",
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def test_prompt_kinds_and_range() -> None:
    config = msgspec.structs.replace(CONFIG, token_range=(7, 9), input_tokens=64, ignore_eos=False)
    body = json.loads(body_of(config, 0, False, 0))
    assert set(body["prompt"]) == {7, 8}
    assert "ignore_eos" not in body
    text = msgspec.structs.replace(config, prompt_kind=PromptKind.TEXT)
    assert len(json.loads(body_of(text, 0, False, 0))["prompt"].split()) == 64
    assert endpoint(text).endswith("/v1/completions")
    chat = msgspec.structs.replace(config, prompt_kind=PromptKind.CHAT)
    messages = json.loads(body_of(chat, 0, False, 0))["messages"]
    assert [message["role"] for message in messages] == ["user"]
    assert endpoint(chat).endswith("/v1/chat/completions")
