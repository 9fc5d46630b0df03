"""The incremental detokenizer: one request's token ids to its text, up to the first stop string.

The pieces put together equal the text of all ids at once: nothing is returned before it is certain.
A character whose bytes are split over tokens is held back until it is complete; bytes that cannot
become a character turn into U+FFFD, as in `tokenizers`, and decoding goes on behind them. Special
tokens have no text.

A chat answer starts a text of its own. A completion continues its prompt: where the tokenizer
strips a space from the start of a text (SentencePiece), the space is kept there, and a character
that the prompt's last token began is completed.

Knows: the tokenizer and characters. Does not know why a request ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from minisrv.text.stop import StopMatcher
from minisrv.text.token_bytes import TokenBytes, utf8_decoder
from minisrv.text.tokenizer import Tokenizer

_CONTEXT = 8
"""Number of tokens at the end of a prompt that may affect the text of the next token."""


class Detokenizer:
    """Decodes the text of one request.

    stop: stop strings; the text ends before the first of these. Empty strings are not allowed.
    min_tokens: number of first tokens in whose text a stop string does not count.
    include_stop: the text ends behind the stop string instead, and a stop token's text is part of
        it.
    prompt_token_ids: the prompt that the text continues; empty for a text of its own.
    visible_special_ids: special tokens that are decoded as text all the same, such as markers that
        a parser needs.
    track_offsets: record where in the text each token begins, for `pop_text_offsets`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        prompt_token_ids: Sequence[int] = (),
        visible_special_ids: frozenset[int] = frozenset(),
        track_offsets: bool = False,
    ) -> None:
        self._special = tokenizer.special_ids - visible_special_ids
        self._decoder = _decoder(tokenizer)
        self._prompt_rest = ""
        """Text of the prompt that the decoder has held back and may still return; it is not part of
        the completion."""
        prompt = [i for i in prompt_token_ids[-_CONTEXT:] if i not in self._special]
        if prompt:
            self._decoder.push(prompt, False)
            prompt_alone = _decoder(tokenizer)
            prompt_alone.push(prompt, False)
            self._prompt_rest = prompt_alone.push([], True)
        self._matcher = StopMatcher(stop, include_stop=include_stop) if stop else None
        self._include_stop = include_stop
        self._min_left = min_tokens if stop else 0
        self._tokenizer = tokenizer if track_offsets else None
        self._text_offsets: list[int] = []
        self._last_offset = 0
        self._length = 0
        """Number of characters of the text so far, before any cut at a stop string; counted to
        locate tokens."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the text is complete, whatever follows."""
        return self._matcher is not None and self._matcher.stopped

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, if one was."""
        return self._matcher.found if self._matcher is not None and self.stopped else None

    def without_stop_token(self, token_ids: list[int]) -> list[int]:
        """Return the tokens whose text is wanted, of tokens that end with the stop token."""
        return token_ids if self._include_stop else token_ids[:-1]

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Add tokens; return the text that has become certain.

        final: no tokens follow, so nothing is held back.
        """
        matcher = self._matcher
        if matcher is not None and matcher.stopped:
            return ""
        if self._min_left and token_ids:
            assert matcher is not None
            early, later = token_ids[: self._min_left], token_ids[self._min_left :]
            self._min_left -= len(early)
            text = self._decode(early, False)
            return matcher.push(text, may_stop=False) + self.push(later, final)
        text = self._decode(token_ids, final)
        if matcher is None:
            return text
        text = matcher.push(text)
        return text + matcher.flush() if final else text

    def pop_text_offsets(self, count: int) -> list[int]:
        """Return where in the text each of the last `count` tokens begins. Tokens that were not
        pushed, or came after a stop string, are placed at the end of the text so far. A stop string
        cuts the text, so an index may lie behind its end.

        Tokens that make up a character together begin where it does, and a token without text
        begins where the next one may. Returns nothing unless `track_offsets` is set.
        """
        if self._tokenizer is None:
            return []
        starts, self._text_offsets = self._text_offsets, []
        return starts + [self._length] * (count - len(starts))

    def _decode(self, token_ids: Sequence[int], final: bool) -> str:
        if self._tokenizer is None:
            return self._decode_visible(token_ids, final)
        texts = []
        for token_id in token_ids:
            before = self._length
            text = self._decode_visible([token_id], False)
            self._length += len(text)
            # Text of this token may be held back, and text of earlier tokens come with it.
            end = self._length + max(0, self._decoder.held - len(self._prompt_rest))
            own = len(self._tokenizer.token_text(token_id)[0])
            self._last_offset = max(self._last_offset, before, end - own)
            self._text_offsets.append(self._last_offset)
            texts.append(text)
        if final:
            texts.append(self._decode_visible((), True))
            self._length += len(texts[-1])
            # Text that was held back may have been dropped, such as spaces that are stripped.
            self._text_offsets = [min(start, self._length) for start in self._text_offsets]
        return "".join(texts)

    def _decode_visible(self, token_ids: Sequence[int], final: bool) -> str:
        """Return the text of tokens, without special tokens and the prompt's text."""
        special = self._special
        text = self._decoder.push([i for i in token_ids if i not in special], final)
        if self._prompt_rest and text:
            length = min(len(self._prompt_rest), len(text))
            if text[:length] != self._prompt_rest[:length]:
                self._prompt_rest = ""  # the bytes at the prompt's end now begin a character
            else:
                self._prompt_rest, text = self._prompt_rest[length:], text[length:]
        return text


class _Decoder(Protocol):
    @property
    def held(self) -> int:
        """Number of characters that are held back, as far as it can be told; part of a character
        counts."""

    def push(self, token_ids: Sequence[int], final: bool) -> str: ...


def _decoder(tokenizer: Tokenizer) -> _Decoder:
    if tokenizer.pipeline is not None:
        return tokenizer.pipeline.decoder()
    assert tokenizer.token_bytes is not None
    return _ByteDecoder(tokenizer.token_bytes)


class _ByteDecoder:
    """Decodes tokens that are plain bytes, by UTF-8."""

    def __init__(self, pieces: TokenBytes) -> None:
        self._pieces = pieces
        self._utf8 = utf8_decoder(errors="replace")
        self._strip = pieces.strip_start
        self.held = False

    def push(self, token_ids: Sequence[int], final: bool) -> str:
        pieces = self._pieces
        data = b"".join([pieces[i] for i in token_ids])
        if data.isascii() and not self.held and not self._strip:
            return data.decode("ascii")  # certain by itself
        text = self._utf8.decode(data, final)
        self.held = bool(self._utf8.getstate()[0])
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
            else:
                self._strip -= 1
                text = text[1:]
        return text
