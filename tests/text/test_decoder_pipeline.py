"""A stream of tokens gives the same text as `tokenizers` decodes from all of them at once, with any
decoder."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeGuard

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders
from tokenizers.models import WordLevel

from minisrv.text.detokenizer import Detokenizer
from minisrv.text.tokenizer import Tokenizer

WORDS = [
    *("hello", "▁hello", "▁world", "▁", "▁▁", " ", "  ", "", "a", "aa", "ab", "b", "日", "😀", "é"),
    *("##ly", "##", ".", "n't", "do not", "'m", "world</w>", "</w>", "a</w>b", "|", "Ġthe", "Ċ"),
    *("<pad>", "<a", "a<", "<0x61>", "<0x20>", "<0xZZ>", " a ", "a|b", "▁a▁b"),
]
CHARACTERS = ["😀", "日", "é", "▁", "\u0301"]
BYTES = [f"<0x{byte:02X}>" for byte in sorted(set("".join(CHARACTERS).encode()))]
LEVEL = ["ð", "Ł", "ĺ", "Ģ", "æ", "Ĺ", "¥"]
SPECIAL, MARKER = "<s>", "<mark>"
VOCABULARY = [*dict.fromkeys([*WORDS, *BYTES, *LEVEL]), SPECIAL, MARKER]
ID = {token: number for number, token in enumerate(VOCABULARY)}
IDS = st.one_of(
    st.lists(st.sampled_from([ID[word] for word in WORDS]), max_size=3),
    st.lists(st.integers(0, len(VOCABULARY) + 3), max_size=3),  # including ids that are no tokens
    st.sampled_from(CHARACTERS).map(lambda c: [ID[f"<0x{byte:02X}>"] for byte in c.encode()]),
    st.just([ID[token] for token in "ðŁĺĢ"]),
)
CHUNKS = st.lists(IDS, max_size=8)


def sequence(*steps: Any) -> Any:
    return decoders.Sequence(list(steps))


SPACE = decoders.Replace("▁", " ")
FALLBACK, FUSE = decoders.ByteFallback(), decoders.Fuse()
CTC = decoders.CTC(pad_token="<pad>", word_delimiter_token="|")
PLAIN: dict[str, Any] = {
    "byte level": decoders.ByteLevel(),
    "llama": sequence(SPACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)),
    "gemma": sequence(SPACE, FALLBACK, FUSE),
    "nested": sequence(sequence(SPACE, FALLBACK), sequence(FUSE)),
}
"""Decoders whose tokens are plain bytes."""
OTHERS: dict[str, Any] = {
    "none": None,
    "no step": sequence(),
    "metaspace": decoders.Metaspace(),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "word piece": decoders.WordPiece(),
    "word piece, as it is": decoders.WordPiece(cleanup=False),
    "words of BPE": decoders.BPEDecoder(),
    "CTC": CTC,
    "CTC, as it is": decoders.CTC(cleanup=False),
    "byte fallback": FALLBACK,
    "fuse": FUSE,
    "strip": decoders.Strip(" ", 1, 0),
    "strip both": decoders.Strip("a", 1, 2),
    "strip the end": sequence(FUSE, decoders.Strip(" ", 0, 2)),
    "strip the text": sequence(FUSE, decoders.Strip("a", 2, 1)),
    "replace": decoders.Replace("a", "bb"),
    "replace nothing": decoders.Replace("", "-"),
    "replace a pattern": decoders.Replace(Regex("a+"), "-"),
    "replace the start": decoders.Replace(Regex("^"), "-"),
    "replace across": sequence(FUSE, decoders.Replace("aab", "-")),
    "replace nothing across": sequence(FUSE, decoders.Replace("", "-")),
    "replace a pattern across": sequence(FUSE, decoders.Replace(Regex("(a+)b"), "-")),
    "late replace": sequence(FALLBACK, FUSE, SPACE, decoders.Strip(" ", 1, 0)),
    "late replace, strip both": sequence(FALLBACK, FUSE, SPACE, decoders.Strip(" ", 1, 1)),
    "late pattern": sequence(FALLBACK, FUSE, decoders.Replace(Regex("▁"), " ")),
    "replace between": sequence(FALLBACK, SPACE, FUSE),
    "fallback of metaspace": sequence(FALLBACK, decoders.Metaspace()),
    "metaspace of fallback": sequence(decoders.Metaspace(), FALLBACK),
    "fallback of words": sequence(FALLBACK, decoders.WordPiece()),
    "words of fallback": sequence(decoders.BPEDecoder(), FALLBACK),
    "level of replace": sequence(decoders.Replace("a", "b"), decoders.ByteLevel()),
    "replace of level": sequence(decoders.ByteLevel(), decoders.Replace("the", "a")),
    "strip of level": sequence(decoders.ByteLevel(), decoders.Strip(" ", 1, 1)),
    "level of fuse": sequence(FUSE, decoders.ByteLevel()),
    "metaspace of CTC": sequence(CTC, decoders.Metaspace()),
    "BPE of CTC": sequence(CTC, decoders.BPEDecoder(), decoders.WordPiece()),
    "CTC of BPE": sequence(decoders.BPEDecoder(), CTC),
    "CTC of fuse": sequence(FUSE, CTC, decoders.Metaspace()),
    "two fuses": sequence(FUSE, SPACE, FUSE, decoders.Strip(" ", 1, 0)),
}
HELD = (
    *("replace nothing across", "replace a pattern across", "late pattern"),
    *("level of fuse", "CTC of fuse"),
)
"""Decoders that must see all of a text, so that a stream holds it back until its end."""
STEPS = [
    *(
        decoders.ByteLevel(),
        FALLBACK,
        FUSE,
        SPACE,
        CTC,
        decoders.BPEDecoder(),
        decoders.WordPiece(),
    ),
    *(decoders.Metaspace(), decoders.Strip(" ", 1, 0), decoders.Strip("a", 1, 2)),
    *(decoders.Replace("aab", "▁"), decoders.Replace(Regex("^a|b$"), "-")),
]


class Decoded:
    """A tokenizer of minisrv with a decoder, and the tokenizer of `tokenizers` that it is made
    from."""

    def __init__(self, name: str, decoder: Any) -> None:
        self.name = name
        self.backend = tokenizers.Tokenizer(WordLevel(ID, unk_token="hello"))
        if decoder is not None:
            self.backend.decoder = decoder
        self.backend.add_special_tokens([SPECIAL, MARKER])
        self.tokenizer = Tokenizer(self.backend)
        self.falls_back = "ByteFallback" in str(self.backend.decoder)

    def __repr__(self) -> str:
        return self.name

    def at_once(self, ids: list[int], skip_special_tokens: bool = True) -> str | None:
        """The text by `tokenizers`; None where it panics, as its Strip does on a text that is too
        short to strip."""
        try:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            assert "Strip" in str(self.backend.decoder)
            return None

    def is_streamed(self, text: str | None) -> TypeGuard[str]:
        """Whether a stream gives exactly this text of `tokenizers`; it does not if the text has
        runs of byte tokens that are no UTF-8."""
        return text is not None and not (self.falls_back and "\ufffd" in text)


NAMED = {name: Decoded(name, decoder) for name, decoder in (PLAIN | OTHERS).items()}
DECODED = st.sampled_from([*NAMED.values()]) | st.lists(
    st.sampled_from(STEPS), min_size=2, max_size=4
).map(lambda steps: Decoded(str(steps), decoders.Sequence(steps)))


def stream(detokenizer: Detokenizer, chunks: list[list[int]]) -> str:
    texts = [detokenizer.push(ids) for ids in chunks]
    return "".join([*texts, detokenizer.push([], final=True)])


@settings(max_examples=500)
@given(decoded=DECODED, chunks=CHUNKS, keeps=st.booleans())
def test_streamed_equals_decoded_at_once(
    decoded: Decoded, chunks: list[list[int]], keeps: bool
) -> None:
    """The text of a stream does not depend on its chunks, and equals that of `tokenizers`. Special
    tokens that are kept are text like others."""
    ids = [i for chunk in chunks for i in chunk]
    make = partial(
        Detokenizer, decoded.tokenizer, visible_special_ids=frozenset({ID[MARKER]} if keeps else ())
    )
    whole = make().push(ids, final=True)
    assert stream(make(), chunks) == whole
    assert stream(make(), [[i] for i in ids]) == whole
    told = [i for i in ids if i != ID[SPECIAL] and (keeps or i != ID[MARKER])]
    expected = decoded.at_once(told, skip_special_tokens=False)
    if decoded.is_streamed(expected):
        assert whole == expected


@settings(max_examples=300)
@given(decoded=DECODED, chunks=CHUNKS, skips=st.booleans())
def test_a_whole_text_is_exact(decoded: Decoded, chunks: list[list[int]], skips: bool) -> None:
    """The text of all tokens at once equals that of `tokenizers`, also with bytes that are no
    UTF-8."""
    ids = [i for chunk in chunks for i in chunk]
    found = decoded.tokenizer.decode(ids, skip_special_tokens=skips)
    expected = decoded.at_once(ids, skips)
    assert expected is None or found == expected


@settings(max_examples=300)
@given(decoded=DECODED, prompt=CHUNKS, chunks=CHUNKS)
def test_a_completion_goes_on_where_the_prompt_ends(
    decoded: Decoded, prompt: list[list[int]], chunks: list[list[int]]
) -> None:
    """The prompt's text and the completion's text together are the text of all tokens, provided
    that the prompt's text by itself is the beginning of that text."""
    before = [i for chunk in prompt for i in chunk][:8]
    ids = [i for chunk in chunks for i in chunk]
    both, alone = decoded.at_once(before + ids), decoded.at_once(before)
    ends_whole = alone is not None and not alone.endswith("\ufffd")
    if decoded.is_streamed(both) and ends_whole and both.startswith(alone):
        detokenizer = Detokenizer(decoded.tokenizer, prompt_token_ids=before)
        assert alone + stream(detokenizer, chunks) == both


CHANGING = {
    *("BPE of CTC", "CTC of BPE", "CTC", "CTC, as it is", "metaspace of CTC", *HELD),
    *("words of BPE", "words of fallback", "fallback of metaspace"),
}
"""Decoders with which a token may have another text inside a sequence than by itself."""


@settings(max_examples=400)
@given(
    decoded=st.sampled_from([made for name, made in NAMED.items() if name not in CHANGING]),
    chunks=CHUNKS,
)
def test_tokens_are_where_their_text_is(decoded: Decoded, chunks: list[list[int]]) -> None:
    """The start of each token, streamed or not, is where its own text stands in the text."""
    tokenizer = decoded.tokenizer
    ids = [i for chunk in chunks for i in chunk]
    located, chunked = (Detokenizer(tokenizer, track_offsets=True) for _ in range(2))
    text = located.push(ids, final=True)
    assert stream(chunked, chunks) == text
    starts = located.pop_text_offsets(len(ids))
    assert starts == chunked.pop_text_offsets(len(ids)) == sorted(starts)
    assert all(start <= len(text) for start in starts)
    if "strip" in decoded.name or "replace" in decoded.name or "\ufffd" in text:
        return
    first = True
    for number, start in zip(ids, starts, strict=True):
        if number in tokenizer.special_ids or not tokenizer.has_token(number):
            continue
        own = tokenizer.token_text(number)[0]
        if not first and "\ufffd" not in own and not VOCABULARY[number].startswith("<0x"):
            assert text[start:].startswith(own.rstrip(" "))
        first &= not own


def test_a_token_that_is_stripped_stands_at_the_end() -> None:
    decoded = NAMED["strip the end"]
    detokenizer = Detokenizer(decoded.tokenizer, track_offsets=True)
    text = detokenizer.push([5, 58], final=True)
    assert all(start <= len(text) for start in detokenizer.pop_text_offsets(2))


def test_an_emoji_of_tokens_that_are_no_plain_bytes() -> None:
    """Text comes as soon as it is final, and never half a character."""
    tokenizer = NAMED["late replace"].tokenizer
    ids = [ID[token] for token in ("hello", "▁")]
    ids += [ID[f"<0x{byte:02X}>"] for byte in "😀日".encode()] + [ID["▁world"]]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in ids]
    assert pieces == ["hello", " ", "", "", "", "😀", "", "", "日", " world"]
    assert detokenizer.push([], final=True) == ""


@pytest.mark.parametrize("name", sorted({*NAMED} - {*HELD}))
def test_little_is_held_back(name: str) -> None:
    """A stream that held back much text would also cost more for each token the longer it
    became."""
    words = ["hello", "▁world", "##ly", "world</w>", "Ġthe", "a</w>b", "😀"]
    tokenizer = NAMED[name].tokenizer
    detokenizer = Detokenizer(tokenizer)
    told = ""
    ids: list[int] = []
    for number in range(60):
        ids.append(ID[words[number % len(words)]])
        told += detokenizer.push(ids[-1:])
        assert len(tokenizer.decode(ids)) - len(told) <= len("world</w>")
    assert told + detokenizer.push([], final=True) == tokenizer.decode(ids)


def test_the_parts_of_a_text_by_themselves() -> None:
    """The text and the bytes of single tokens, with several decoders."""

    def texts(name: str, *tokens: str) -> list[tuple[str, bytes]]:
        return [NAMED[name].tokenizer.token_text(ID[token]) for token in tokens]

    assert texts("metaspace", "▁hello", "hello") == [(" hello", b" hello"), ("hello", b"hello")]
    assert texts("word piece", "##ly", ".") == [("ly", b"ly"), (".", b".")]
    assert texts("words of BPE", "world</w>") == [("world ", b"world ")]
    assert texts("late replace", "▁world", "<0xF0>") == [(" world", b" world"), ("\ufffd", b"\xf0")]
    assert texts("strip of level", "Ġthe", "ð") == [(" the", b" the"), ("\ufffd", b"\xf0")]
    assert texts("none", "hello") == [(" hello", b" hello")]
    beyond = len(VOCABULARY)
    assert NAMED["none"].tokenizer.token_text(beyond)[0].strip() == ""
