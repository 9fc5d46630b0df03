"""The pieces of text that a detokenizer streams add up to the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.text.detokenizer import Detokenizer
from minisrv.text.tokenizer import Tokenizer

IDS = st.integers(min_value=0, max_value=350)  # the vocabulary, and ids beyond it
CHUNKS = st.lists(st.lists(IDS, max_size=4), max_size=12)


@pytest.fixture(scope="module")
def tiny(tokenizer: Tokenizer) -> Tokenizer:
    assert tokenizer.vocab_size < 350
    return tokenizer


def pieces(detokenizer: Detokenizer, chunks: list[list[int]]) -> list[str]:
    """The pieces of text for each of the chunks, and the rest at the end."""
    texts = [detokenizer.push(ids) for ids in chunks]
    return [*texts, detokenizer.push([], final=True)]


@given(chunks=CHUNKS)
def test_streamed_equals_decoded_at_once(tiny: Tokenizer, chunks: list[list[int]]) -> None:
    ids = [i for chunk in chunks for i in chunk]
    streamed = pieces(Detokenizer(tiny), chunks)
    assert "".join(streamed) == tiny.decode(ids)
    assert Detokenizer(tiny).push(ids, final=True) == tiny.decode(ids)


@given(text=st.text(max_size=40))
def test_valid_text_never_shows_a_replacement_character(tiny: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    streamed = pieces(Detokenizer(tiny), [[i] for i in tiny.encode(text)])
    assert all("\ufffd" not in piece for piece in streamed)
    assert "".join(streamed) == tiny.decode(tiny.encode(text))


@given(chunks=CHUNKS, stop=st.lists(st.sampled_from(["e", "he", "��", "o w"]), min_size=1))
def test_stop_strings_cut_the_same_however_it_is_streamed(
    tiny: Tokenizer, chunks: list[list[int]], stop: list[str]
) -> None:
    ids = [i for chunk in chunks for i in chunk]
    at_once = Detokenizer(tiny, stop)
    expected = at_once.push(ids, final=True)
    streamed = Detokenizer(tiny, stop)
    assert "".join(pieces(streamed, chunks)) == expected
    assert streamed.stopped == at_once.stopped
    assert not any(s in expected for s in stop)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The ids of the tokens that stand for the single bytes of `data`."""
    assert tokenizer.token_bytes is not None
    single = {tokenizer.token_bytes[i]: i for i in range(tokenizer.vocab_size)}
    return [single[bytes([byte])] for byte in data]


@pytest.mark.parametrize("text", ["é", "世", "🎉", "e\u0301"])
def test_a_split_character_comes_whole(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    out = [detokenizer.push([i]) for i in byte_ids(tokenizer, text.encode())]
    assert "".join(out) == text
    assert all("\ufffd" not in piece for piece in out)


def test_an_incomplete_character_at_the_end_becomes_one_replacement(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(byte_ids(tokenizer, b"a\xf0\x9f\x8e")) == "a"
    assert detokenizer.push([], final=True) == "\ufffd"


def test_decoding_recovers_behind_invalid_bytes(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    out = [detokenizer.push([i]) for i in byte_ids(tokenizer, b"\xff\x80\xe4\xb8ok")]
    assert out == ["\ufffd", "\ufffd", "", "", "\ufffdo", "k"]


def test_special_tokens_have_no_text_and_do_not_split_a_character(tokenizer: Tokenizer) -> None:
    first, second = byte_ids(tokenizer, "é".encode())
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in (first, 1, second)] == ["", "", "é"]


def test_nothing_comes_behind_a_stop_string(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["stop"])
    assert detokenizer.push(tokenizer.encode("go on, stop here")) == "go on, "
    assert detokenizer.stopped
    assert detokenizer.push(tokenizer.encode("more"), final=True) == ""


@given(text=st.text(alphabet="helo wrd,!é世🎉\n", max_size=20))
def test_sentence_piece_streams_what_it_decodes(
    byte_fallback_tokenizer: Tokenizer, text: str
) -> None:
    ids = byte_fallback_tokenizer.encode(text)
    streamed = pieces(Detokenizer(byte_fallback_tokenizer), [[i] for i in ids])
    assert "".join(streamed) == byte_fallback_tokenizer.decode(ids) == text


def test_a_completion_keeps_the_space_that_a_chat_answer_drops(
    byte_fallback_tokenizer: Tokenizer,
) -> None:
    """SentencePiece drops the space at the start of a text, but a completion continues the prompt
    and keeps it."""
    tokenizer = byte_fallback_tokenizer
    prompt, ids = tokenizer.encode("hello"), tokenizer.encode("world")
    assert Detokenizer(tokenizer).push(ids, final=True) == "world"
    assert Detokenizer(tokenizer, prompt_token_ids=prompt).push(ids, final=True) == " world"
    assert Detokenizer(tokenizer, prompt_token_ids=[1]).push(ids, final=True) == "world"


def test_byte_fallback_gives_up_invalid_bytes_only(byte_fallback_tokenizer: Tokenizer) -> None:
    """Only the bytes that are no UTF-8 become a replacement character."""
    detokenizer = Detokenizer(byte_fallback_tokenizer)
    assert detokenizer.push(byte_ids(byte_fallback_tokenizer, b"\xc3\xa9\xff!")) == "é\ufffd!"


@given(ids=st.lists(st.integers(0, 6), max_size=40))
def test_tokens_that_are_words(word_tokenizer: Tokenizer, ids: list[int]) -> None:
    streamed = pieces(Detokenizer(word_tokenizer), [[i] for i in ids])
    assert "".join(streamed) == word_tokenizer.decode(ids)


def test_a_special_token_that_is_kept_is_text(tokenizer: Tokenizer) -> None:
    marker = next(iter(tokenizer.special_ids))
    text = tokenizer.decode([marker], skip_special_tokens=False)
    ids = [*tokenizer.encode("a"), marker, *tokenizer.encode("b")]
    assert Detokenizer(tokenizer).push(ids, final=True) == "ab"
    kept = Detokenizer(tokenizer, visible_special_ids=frozenset({marker}))
    assert kept.push(ids, final=True) == f"a{text}b"
