"""Separates reasoning from the answer: `<think>...</think>`, as Qwen3 and DeepSeek write it.

Reasoning comes first or not at all; markers later in the answer are part of its text. White space
around the markers belongs to them. The result does not depend on how the text is cut into pieces.

Knows: the two markers. Knows nothing of tool calls.
"""

from __future__ import annotations

from collections.abc import Callable

from minisrv.text.chat_deltas import BLANK, ChatDelta, ContentDelta, ReasoningDelta
from minisrv.text.stop import StopMatcher

REASONING_START = "<think>"
REASONING_END = "</think>"


class ReasoningParser:
    """Splits one answer into reasoning and content.

    starts_inside: whether the prompt ends with the start marker, so that the text begins as
        reasoning.
    """

    def __init__(self, *, starts_inside: bool) -> None:
        self._held = ""
        self._end = StopMatcher([REASONING_END])
        self.has_begun = starts_inside
        """Whether there is reasoning, which may be empty."""
        self.has_ended = False
        """Whether the marker at the end of the reasoning has come."""
        self._state: Callable[[str], list[ChatDelta]] = (
            self._before_reasoning if starts_inside else self._at_start
        )

    def feed(self, text: str) -> list[ChatDelta]:
        """Add text; return what has become certain."""
        return self._state(text) if text else []

    def finish(self) -> list[ChatDelta]:
        """End the text; return what was held back."""
        held, self._held = self._held, ""
        if self._state == self._at_start:
            return [ContentDelta(held)] if held else []
        held += self._end.flush()
        return [ReasoningDelta(held)] if held.strip(BLANK) else []

    def _at_start(self, text: str) -> list[ChatDelta]:
        self._held += text
        begin = self._held.lstrip(BLANK)
        if begin.startswith(REASONING_START):
            self._held = ""
            self.has_begun = True
            self._state = self._before_reasoning
            return self.feed(begin[len(REASONING_START) :])
        if REASONING_START.startswith(begin):
            return []
        held, self._held = self._held, ""
        self._state = self._content
        return [ContentDelta(held)]

    def _before_reasoning(self, text: str) -> list[ChatDelta]:
        text = text.lstrip(BLANK)
        if text:
            self._state = self._reasoning
        return self.feed(text)

    def _reasoning(self, text: str) -> list[ChatDelta]:
        text = self._held + self._end.push(text)
        reasoning = text.rstrip(BLANK)
        deltas: list[ChatDelta] = []
        if reasoning:
            deltas.append(ReasoningDelta(reasoning))
        self._held = text[len(reasoning) :]
        if self._end.stopped:
            self._held = ""
            self.has_ended = True
            self._state = self._before_content
            deltas += self.feed(self._end.rest)
        return deltas

    def _before_content(self, text: str) -> list[ChatDelta]:
        text = text.lstrip(BLANK)
        if text:
            self._state = self._content
        return self.feed(text)

    def _content(self, text: str) -> list[ChatDelta]:
        return [ContentDelta(text)]
