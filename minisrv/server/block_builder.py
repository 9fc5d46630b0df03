"""What the responses of two APIs have in common, Anthropic's messages and OpenAI's responses: one
answer, which is a list of blocks (text, reasoning or a call), each of which ends before the next
begins.

Knows: the parser of an answer. Knows nothing of the shape of a response.
"""

from __future__ import annotations

from minisrv.server.preprocessing import Prepared
from minisrv.server.response_builders import ResponseBuilder
from minisrv.text.chat_deltas import ChatDelta, ContentDelta, ToolCallArguments, ToolCallStart


class BlockResponseBuilder(ResponseBuilder):
    """A response that is one answer in blocks."""

    def begin(self, prepared: Prepared) -> None:
        super().begin(prepared)
        assert prepared.answer is not None
        self._parser = prepared.answer.parser()
        self._last_part: ChatDelta | None = None
        self._called = False
        """Whether a tool was called."""

    def _parts(self, text: str, *, ends: bool) -> list[ChatDelta]:
        """Return what a piece of the text adds to the answer. `ends`: it is the last piece."""
        if self._parser is None:
            return [ContentDelta(text)] if text else []
        parts = self._parser.feed(text)
        return [*parts, *self._parser.finish()] if ends else parts

    def _begins_block(self, part: ChatDelta) -> bool:
        """Return whether a block begins with this part. Must be called once for each part, in their
        order."""
        last, self._last_part = self._last_part, part
        match part:
            case ToolCallStart():
                self._called = True
                return True
            case ToolCallArguments():
                return False
            case _:
                return type(last) is not type(part)
