"""Texts that follow a grammar with the default model's tokenizer: random ones, and given ones."""

from __future__ import annotations

import random

import numpy as np

from minisrv.request import StructuredOutput
from minisrv.text.structured import GrammarBackend, Matcher
from minisrv.text.tokenizer import Tokenizer

EOS = 2
"""The id of the default model's end-of-sequence token."""


def allowed(backend: GrammarBackend, matcher: Matcher) -> list[int]:
    """The ids of the tokens that may come next."""
    row = np.full(backend.bitmask_words, -1, np.int32)
    matcher.fill_bitmask(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(
    backend: GrammarBackend, tokenizer: Tokenizer, spec: StructuredOutput, rng: random.Random
) -> str:
    """A random text that follows `spec`; after 40 tokens it mostly closes strings, arrays and
    objects where it can."""
    closing = [tokenizer.token_id(token) for token in ('"', "]", "}", ",", "0")]
    matcher = backend.compile(spec)
    ids: list[int] = []
    while len(ids) < 3000:
        choices = allowed(backend, matcher)
        assert matcher.error is None
        assert choices
        assert max(choices) < tokenizer.vocab_size
        if EOS in choices and (len(ids) > 40 or len(choices) == 1 or rng.random() < 0.3):
            assert matcher.accept([EOS])
            return tokenizer.decode(ids)
        texts = [i for i in choices if i != EOS]
        close = [i for i in closing if i in texts]
        ids.append(rng.choice(close if close and len(ids) > 40 and rng.random() < 0.7 else texts))
        assert matcher.accept(ids[-1:])
    raise AssertionError(f"no end: {tokenizer.decode(ids)[:200]!r}")


def stretch(
    backend: GrammarBackend, tokenizer: Tokenizer, spec: StructuredOutput, rng: random.Random
) -> str:
    """A random text that follows `spec`, closes nothing and does not end as long as it can go
    on."""
    closing = {tokenizer.token_id(token) for token in ('"', "]", "}")}
    matcher = backend.compile(spec)
    ids: list[int] = []
    while (choices := allowed(backend, matcher)) != [EOS]:
        texts = [i for i in choices if i != EOS]
        ids.append(rng.choice([i for i in texts if i not in closing] or texts))
        assert matcher.accept(ids[-1:])
    return tokenizer.decode(ids)


def follow(
    backend: GrammarBackend, tokenizer: Tokenizer, spec: StructuredOutput, text: str
) -> bool:
    """Whether `text` as a whole follows `spec`."""
    matcher = backend.compile(spec)
    return (
        matcher.accept(tokenizer.encode(text, add_special_tokens=False))
        and EOS in allowed(backend, matcher)
        and matcher.error is None
    )
