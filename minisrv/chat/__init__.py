"""`minisrv chat`: a conversation in the terminal, with a model in this process (`local`) or one
behind a server's API (`remote`); `terminal` reads and prints.

Knows: what the parts say to each other. An answer comes in pieces; `ContentDelta` and
`ReasoningDelta` are the text's.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from minisrv.text.chat_deltas import ContentDelta, ReasoningDelta

Message = dict[str, str]
"""`role` and `content`."""

NO_TEMPLATE = (
    "This model has no chat template: each message is a text that it goes on with, without a "
    "system prompt and without what was said before."
)
COMPLETION_TOKENS = 256
"""Of a text that goes on, unless told otherwise: such a model seldom ends by itself."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something that the user should know, which is not the model's."""

    text: str


Piece = ContentDelta | ReasoningDelta | Note


class Model(Protocol):
    """Who answers. name: what to call it."""

    name: str

    def answer(self, messages: list[Message]) -> Generator[Piece, None, None]:
        """The answer to the last message, as it comes. To close it ends the answer.

        Raises KeyboardInterrupt once Ctrl-C has been pressed, ContextLengthError if the
        conversation does not fit, and other branches of MinisrvError.
        """
