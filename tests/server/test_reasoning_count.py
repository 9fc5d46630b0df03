"""How many tokens of an answer are reasoning, however the answer comes in pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.server.reasoning_count import ReasoningCount
from minisrv.text.chat_format import ChatFormat
from minisrv.text.tokenizer import Tokenizer

FORMAT = ChatFormat.of_template("{# <think></think> #}")
TEXTS = (
    "<think>\nWhy not?\n</think>\n\nYes.",
    "<think></think>Yes.",
    "<think>\nWhy",
    "<think>Why </thin",
    "Yes, </think>",
    "<thi",
)


def expected(tokenizer: Tokenizer, ids: list[int]) -> int:
    text = tokenizer.decode(ids)
    if not text.startswith("<think>"):
        return 0
    ends = (n for n in range(len(ids)) if "</think>" in tokenizer.decode(ids[:n]))
    return next(ends, len(ids))


@pytest.mark.parametrize("text", TEXTS)
@given(cuts=st.sets(st.integers(1, 60)))
def test_the_number_does_not_depend_on_the_pieces(
    tokenizer: Tokenizer, text: str, cuts: set[int]
) -> None:
    """A delta may hold the end of the reasoning and the beginning of the content, as it does for a
    client that reads slowly. The number is right after each of them."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    parser = FORMAT.parser("")
    assert parser is not None
    count = ReasoningCount(parser, tokenizer)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    for begin, end in pairwise(bounds):
        count.add(ids[begin:end])
        parser.feed(tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[:begin])) :])
        if parser.has_reasoned:
            assert count.number == expected(tokenizer, ids[:end])
    assert count.number == expected(tokenizer, ids)


def test_content_alone_has_none(tokenizer: Tokenizer) -> None:
    count = ReasoningCount(None, tokenizer)
    count.add([5, 7])
    assert count.number == 0
