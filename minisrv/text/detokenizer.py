"""From one request's token ids to its text, as they come, up to its first stop string.

The pieces put together equal the text of all ids at once: nothing is emitted before it is
certain. A character whose bytes are split over tokens is held back until it is whole; bytes that
cannot become a character turn into U+FFFD, as `tokenizers` does, and decoding goes on behind
them. Special tokens have no text.

A chat answer starts a text of its own. A completion continues its prompt: where the tokenizer
strips a space from the start of a text (SentencePiece), the space is kept there.

Knows: the tokenizer and characters. Does not know why a request ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from minisrv.text.stop import StopMatcher
from minisrv.text.token_bytes import TokenBytes
from minisrv.text.tokenizer import Tokenizer

_CONTEXT = 8
"""Tokens that decide the text of the next, where tokens are not plain bytes."""

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one request.

    stop: the text ends before the first of these; empty strings are not allowed.
    min_tokens: tokens in whose text a stop string does not count.
    include_stop: it ends behind that one instead, and a stop token's text is part of it.
    prompt_token_ids: the prompt that the text continues, or nothing for a text of its own.
    keep: special tokens that are text all the same, as markers are to who looks for them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        prompt_token_ids: Sequence[int] = (),
        keep: frozenset[int] = frozenset(),
    ) -> None:
        self._special = tokenizer.special_ids - keep
        prompt = [i for i in prompt_token_ids[-_CONTEXT:] if i not in self._special]
        self._decoder: _Decoder = (
            _WindowDecoder(tokenizer, prompt)
            if tokenizer.token_bytes is None
            else _ByteDecoder(tokenizer.token_bytes, starts_text=not prompt)
        )
        self._matcher = StopMatcher(stop, include_stop=include_stop) if stop else None
        self._include_stop = include_stop
        self._min_left = min_tokens if stop else 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the text is complete, whatever follows."""
        return self._matcher is not None and self._matcher.stopped

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found, if one was."""
        return self._matcher.found if self._matcher is not None and self.stopped else None

    def without_stop_token(self, token_ids: list[int]) -> list[int]:
        """Of tokens that end with the stop token, those whose text is wanted."""
        return token_ids if self._include_stop else token_ids[:-1]

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Add tokens; returns the text that has become certain.

        final: no tokens follow, so nothing is held back.
        """
        matcher = self._matcher
        if matcher is not None and matcher.stopped:
            return ""
        special = self._special
        if self._min_left and token_ids:
            assert matcher is not None
            early, later = token_ids[: self._min_left], token_ids[self._min_left :]
            self._min_left -= len(early)
            text = self._decoder.push([i for i in early if i not in special], False)
            return matcher.push(text, may_stop=False) + self.push(later, final)
        text = self._decoder.push([i for i in token_ids if i not in special], final)
        if matcher is None:
            return text
        text = matcher.push(text)
        return text + matcher.flush() if final else text


class _Decoder(Protocol):
    def push(self, token_ids: Sequence[int], final: bool) -> str: ...


class _ByteDecoder:
    """Tokens are bytes: UTF-8 decides what is certain."""

    def __init__(self, pieces: TokenBytes, *, starts_text: bool) -> None:
        self._pieces = pieces
        self._utf8 = _utf8_decoder(errors="replace")
        self._strip = pieces.strip_start if starts_text else 0
        self._holds_back = False

    def push(self, token_ids: Sequence[int], final: bool) -> str:
        pieces = self._pieces
        data = b"".join([pieces[i] for i in token_ids])
        if data.isascii() and not self._holds_back and not self._strip:
            return data.decode("ascii")  # certain by itself
        text = self._utf8.decode(data, final)
        self._holds_back = bool(self._utf8.getstate()[0])
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
            else:
                self._strip -= 1
                text = text[1:]
        return text


class _WindowDecoder:
    """Tokens are words: the text of a token depends on a few tokens before it. No special token
    that is to be skipped comes here."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = context

    def push(self, token_ids: Sequence[int], final: bool) -> str:
        before = self._tokenizer.decode(self._window, skip_special_tokens=False)
        self._window.extend(token_ids)
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        del self._window[:-_CONTEXT]
        return text[len(before) :]
