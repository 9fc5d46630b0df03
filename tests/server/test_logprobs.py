"""`logprobs` of completions and chats: offsets into the text are right, and no entry is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minisrv.request import EngineOutput, FinishReason, TokenLogprobs
from minisrv.server.choices import coalesce
from minisrv.text.output_processor import CompletionDelta
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs, scored, sse, token_logprobs
from tests.text import tiny_tokenizer

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
BEYOND = INFO.vocab_size - 1
"""An id within the model's vocabulary that is no token of the tokenizer."""


async def complete(
    client: httpx.AsyncClient, url: str = "/v1/completions", **body: Any
) -> tuple[str, dict[str, list[Any]]]:
    """The text of the only choice, and its lists of logprobs. Also checks that no chunk has an
    offset into text that has not come so far."""
    async with client:
        response = await client.post(url, json={"prompt": "hi", "logprobs": 2, **body})
    assert response.status_code == 200, response.text
    bodies = sse(response.text) if body.get("stream") else [response.json()]
    text = ""
    found: dict[str, list[Any]] = {
        name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    for choice in (body["choices"][0] for body in bodies):
        text += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            found[name] += values
        assert all(offset <= len(text) for offset in found["text_offset"])
    return text, found


def word_pieces() -> Tokenizer:
    """A WordPiece tokenizer that changes case and composes characters."""
    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "world", "##ly", ".", "café", "!"]
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece("##")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return Tokenizer(backend)


def trimming() -> Tokenizer:
    """Byte-level BPE whose offsets leave out spaces, with a special token in front, as Llama 3 has
    it."""
    backend = tiny_tokenizer.byte_level()
    start = ("<|im_start|>", backend.token_to_id("<|im_start|>"))
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[start]),
        ]
    )
    return Tokenizer(backend)


def late_replace() -> Tokenizer:
    """SentencePiece with byte fallback, whose decoder replaces the space character only after it
    has joined all tokens."""
    backend = tiny_tokenizer.byte_fallback()
    backend.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace("▁", " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


def words_of_bpe() -> Tokenizer:
    """A tokenizer of words that end with `</w>`, with BPE's decoder."""
    words = ["hello</w>", "world</w>", "wor", "!</w>"]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="wor"))
    backend.decoder = decoders.BPEDecoder()
    return Tokenizer(backend)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: Tokenizer(tiny_tokenizer.byte_level()),
    "trimming": trimming,
    "byte fallback": lambda: Tokenizer(tiny_tokenizer.byte_fallback()),
    "late replace": late_replace,
}
TEXT = "a€b 漢字c hello, naïve 🎉 world!"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stream", [False, True])
async def test_offsets_behind_characters_of_several_tokens(
    connect: Connect, name: str, stream: bool
) -> None:
    """The offset of a token is the number of whole characters before it, also where characters are
    spread over several tokens."""
    tokenizer = TOKENIZERS[name]()
    ids = [i for i in tokenizer.encode(TEXT) if i not in tokenizer.special_ids]
    engine = FakeEngine(outputs([*ids, 2], FinishReason.STOP, logprobs=2))
    text, found = await complete(connect(engine, tokenizer=tokenizer), stream=stream)
    assert text.lstrip(" ") == TEXT
    pieces = [tokenizer.token_text(i)[1] for i in ids]
    prefixes = [b"".join(pieces[:i]) for i in range(len(pieces) + 1)]
    assert found["text_offset"] == [len(p.decode(errors="ignore")) for p in prefixes]
    assert found["text_offset"][-1] == len(text), "the token that ends it has no text"


async def test_the_offset_of_a_letter_behind_three_bytes(
    connect: Connect, tokenizer: Tokenizer
) -> None:
    """Offsets count characters, not bytes: a letter after a character of three bytes is one
    further."""
    ids = tokenizer.encode("a€b 漢字c")
    _, found = await complete(connect(outputs(ids, logprobs=0)), logprobs=0)
    offset = dict(zip(found["tokens"], found["text_offset"], strict=True))
    assert (offset["a"], offset["b"], offset["c"]) == (0, 2, 6)


@pytest.mark.parametrize("stream", [False, True])
async def test_offsets_behind_bytes_that_are_no_character(
    connect: Connect, tokenizer: Tokenizer, stream: bool
) -> None:
    half = tokenizer.encode("€")[:2]
    ids = [*tokenizer.encode("a"), *half, *tokenizer.encode("b"), half[0]]
    text, found = await complete(connect(outputs(ids, logprobs=0)), logprobs=0, stream=stream)
    assert text == "a\ufffdb\ufffd"
    assert found["text_offset"] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_that_are_not_shown_stand_between(
    connect: Connect, tokenizer: Tokenizer, stream: bool
) -> None:
    """Special tokens and ids that are no tokens, which have no text, get an entry with the offset
    at which they stand."""
    first, *others = tokenizer.encode("€")
    ids = [1, *tokenizer.encode("a"), BEYOND, first, 1, *others, 2, *tokenizer.encode("b")]
    text, found = await complete(connect(outputs(ids, logprobs=1)), logprobs=1, stream=stream)
    assert text == "a€b"
    assert found["text_offset"] == [0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert found["tokens"][2] == f"token_id:{BEYOND}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("stop", "end"), [("world", "hello "), ("lo w", "hel"), ("o, never", "hello world, hello!")]
)
async def test_offsets_and_a_stop_string(
    connect: Connect, stream: bool, include: bool, stop: str, end: str
) -> None:
    """The stop string may begin inside a token, or only begin at the end of the text; no offset is
    beyond the text."""
    tokenizer = Tokenizer(tiny_tokenizer.byte_fallback())
    ids = tokenizer.encode("hello world, hello!")
    options = {"stop": [stop], "include_stop_str_in_output": include, "stream": stream}
    script = outputs(ids, logprobs=2)
    text, found = await complete(connect(script, tokenizer=tokenizer), prompt="h", **options)
    if "never" not in stop:
        assert text.lstrip() == (end + stop if include else end)
    else:
        assert text.lstrip() == end
    texts = [tokenizer.token_text(i)[0] for i in ids]
    starts = [len("".join(texts[:n])) for n in range(len(ids))]
    expected = [min(start, len(text)) for start in starts]
    assert found["text_offset"] == expected[: len(found["tokens"])]
    assert len(found["tokens"]) == next(
        (n for n in range(len(ids)) if stop in "".join(texts[:n])), len(ids)
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_offsets_where_a_stop_string_does_not_count_yet(
    connect: Connect, tokenizer: Tokenizer, stream: bool
) -> None:
    """A stop string before `min_tokens` is text, and offsets go on after it."""
    ids = tokenizer.encode("stop €, stop here")
    options = {"stop": ["stop"], "min_tokens": 2, "max_tokens": 50, "stream": stream}
    text, found = await complete(connect(outputs(ids, logprobs=2)), **options)
    assert text == "stop €, "
    pieces = [tokenizer.token_text(i)[1] for i in ids]
    starts = [len(b"".join(pieces[:n]).decode(errors="ignore")) for n in range(len(ids))]
    told = len(found["tokens"])
    assert found["text_offset"] == [min(start, len(text)) for start in starts[:told]]


def test_deltas_that_are_told_together() -> None:
    """When the deltas of a slow reader are merged, their tokens keep their offsets."""
    deltas = [
        CompletionDelta(0, "a", [1], [token_logprobs(1, 0)], text_offsets=[0]),
        CompletionDelta(
            0, "bc", [2, 3], [token_logprobs(i, 0) for i in (2, 3)], text_offsets=[1, 2]
        ),
    ]
    [delta] = coalesce(deltas)
    assert (delta.text, delta.text_offsets) == ("abc", [0, 1, 2])
    assert [position.token_id for position in delta.logprobs or ()] == [1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
async def test_offsets_of_an_echo(connect: Connect, name: str, as_ids: bool, stream: bool) -> None:
    """With echo, the tokens of the prompt and of the answer stand at their offsets in one text."""
    tokenizer = TOKENIZERS[name]()
    ids, answer = tokenizer.encode(TEXT), tokenizer.encode("é€h")
    answer = [i for i in answer if i not in tokenizer.special_ids]
    script = scored(outputs(answer, logprobs=2), 2)
    text, found = await complete(
        connect(script, tokenizer=tokenizer),
        prompt=ids if as_ids else TEXT,
        echo=True,
        stream=stream,
    )
    added = "<|im_start|>" if name == "trimming" and as_ids else ""
    assert text.replace(" é", "é") == added + TEXT + "é€h"
    assert len(found["tokens"]) == len(ids) + len(answer)
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<|im_start|>")) and offset:
            assert text[offset:].startswith(token)
    assert found["text_offset"] == sorted(found["text_offset"])
    assert found["text_offset"][-len(answer)] == len(added + TEXT)


async def test_an_echo_is_the_text_that_was_sent(connect: Connect) -> None:
    """A tokenizer that changes text still gives offsets into the text that was sent."""
    tokenizer = word_pieces()
    prompt = "HELLO  Cafe\u0301, worldly."
    script = scored(outputs([4, 5, 8], logprobs=1), 1)
    text, found = await complete(
        connect(script, tokenizer=tokenizer), prompt=prompt, echo=True, logprobs=1
    )
    assert text == prompt + " worldly!"
    assert found["tokens"] == [
        *("[CLS]", " hello", " café", "[UNK]", " world", "ly", ".", "[SEP]"),
        *(" world", "ly", "!"),
    ]
    rests = [text[offset:] for offset in found["text_offset"]]
    assert rests[:4] == [prompt + " worldly!", prompt + " worldly!", text[5:], text[12:]]
    assert rests[4].startswith(" worldly.")
    assert rests[5:] == ["ly. worldly!", ". worldly!", *[" worldly!"] * 2, "ly!", "!"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("make", "ids", "expected", "starts"),
    [
        (word_pieces, [3, 4, 5, 6, 3], "hello worldly. hello", [0, 5, 11, 13, 14]),
        (words_of_bpe, [0, 2, 1, 3], "hello worworld !", [0, 6, 9, 15]),
    ],
)
async def test_offsets_where_tokens_are_words(
    connect: Connect,
    make: Callable[[], Tokenizer],
    ids: list[int],
    expected: str,
    starts: list[int],
    stream: bool,
) -> None:
    engine = FakeEngine(outputs(ids, logprobs=0))
    client = connect(engine, tokenizer=make())
    text, found = await complete(client, prompt=[BEYOND], logprobs=0, stream=stream)
    assert text == expected
    assert found["text_offset"] == starts


def one_step(*top: tuple[int, float], sampled: tuple[int, float]) -> Callable[[Any], Any]:
    """A script of one token, with these most likely tokens and this sampled one."""

    def script(request: Any) -> list[EngineOutput]:
        told = TokenLogprobs(*sampled, list(top), rank=len(top))
        return [
            EngineOutput(
                request_id=request.request_id,
                token_ids=[sampled[0]],
                logprobs=[told],
                finish_reason=FinishReason.LENGTH,
            )
        ]

    return script


async def test_entries_with_the_same_text_are_all_there(connect: Connect) -> None:
    """If two tokens have the same text, the text names the sampled one, or else the more likely
    one; the other is named by its id."""
    tokenizer = Tokenizer(tiny_tokenizer.byte_fallback())
    letter, byte = tokenizer.token_id("h"), tokenizer.token_id("<0x68>")
    assert letter is not None
    assert byte is not None
    top = [(byte, -0.5), (BEYOND, -1.0), (letter, -2.0), (BEYOND - 1, -3.0), (3 + 0xF0, -4.0)]
    client = connect(one_step(*top, sampled=(letter, -2.0)), tokenizer=tokenizer)
    _, found = await complete(client, logprobs=5)
    assert found["tokens"] == ["h"]
    assert list(found["top_logprobs"][0].items()) == [
        (f"token_id:{byte}", -0.5),
        (f"token_id:{BEYOND}", -1.0),
        ("h", -2.0),
        (f"token_id:{BEYOND - 1}", -3.0),
        ("bytes:\\xf0", -4.0),
    ]
    client = connect(one_step(*top, sampled=(BEYOND, -1.0)), tokenizer=tokenizer)
    _, found = await complete(client, logprobs=5)
    assert found["tokens"] == [f"token_id:{BEYOND}"]
    assert [*found["top_logprobs"][0]][::2] == ["h", f"token_id:{letter}", "bytes:\\xf0"]
    client = connect(one_step(*top[:2], sampled=(letter, -2.0)), tokenizer=tokenizer)
    _, found = await complete(client, logprobs=2)
    assert [*found["top_logprobs"][0]] == [f"token_id:{byte}", f"token_id:{BEYOND}", "h"]


async def test_tokens_that_differ_at_the_start_of_a_text_only(connect: Connect) -> None:
    """By themselves, both tokens would be `true`."""
    backend = Backend(models.WordLevel({"▁true": 0, "true": 1, "?": 2}, unk_token="?"))
    backend.decoder = decoders.Metaspace()
    client = connect(
        one_step((0, -0.5), (1, -1.5), sampled=(0, -0.5)), tokenizer=Tokenizer(backend)
    )
    text, found = await complete(client)
    assert text == " true", "behind a prompt"
    assert found["top_logprobs"] == [{" true": -0.5, "true": -1.5}]


async def test_a_replacement_character_is_text(connect: Connect, tokenizer: Tokenizer) -> None:
    """A token whose text is U+FFFD itself is shown as text and not as bytes."""
    backend = tiny_tokenizer.byte_level()
    backend.add_tokens([AddedToken("\ufffd", normalized=False)])
    script = outputs(backend.encode("\ufffd").ids, logprobs=1)
    _, found = await complete(connect(script, tokenizer=Tokenizer(backend)), logprobs=1)
    assert found["tokens"] == ["\ufffd"]


async def test_a_chat_names_ids_that_are_no_tokens(connect: Connect, tokenizer: Tokenizer) -> None:
    top: Sequence[tuple[int, float]] = [(BEYOND, -0.5), (BEYOND - 1, -1.0), (300, -2.0)]
    async with connect(one_step(*top, sampled=(300, -2.0))) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
        response = await client.post("/v1/chat/completions", json={**body, "top_logprobs": 3})
    [position] = response.json()["choices"][0]["logprobs"]["content"]
    text, piece = tokenizer.token_text(300)
    assert position["top_logprobs"] == [
        {"token": f"token_id:{BEYOND}", "logprob": -0.5, "bytes": None},
        {"token": f"token_id:{BEYOND - 1}", "logprob": -1.0, "bytes": None},
        {"token": text, "logprob": -2.0, "bytes": list(piece)},
    ]


async def test_prompt_logprobs_name_ids_that_are_no_tokens(connect: Connect) -> None:
    engine = FakeEngine(scored(outputs([300]), 1))
    async with connect(engine) as client:
        body = {"prompt": [5, BEYOND], "prompt_logprobs": 0}
        response = await client.post("/v1/completions", json=body)
    told = response.json()["choices"][0]["prompt_logprobs"]
    assert told[1][str(BEYOND)]["decoded_token"] == f"token_id:{BEYOND}"
