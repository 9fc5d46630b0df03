"""`minisrv chat`: a conversation in the terminal.

The model is in this process (`local`) or behind the API of a server (`remote`); `terminal` reads
messages and prints answers.

Knows: the interface between these modules. An answer comes in pieces, which are text
(`ContentDelta`, `ReasoningDelta`) or notes for the user (`Note`).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from minisrv.text.chat_deltas import ContentDelta, ReasoningDelta

Message = dict[str, str]
"""A message of the conversation, with `role` and `content`."""

NO_TEMPLATE = (
    "This model has no chat template: each message is a text that it goes on with, without a "
    "system prompt and without what was said before."
)
COMPLETION_TOKENS = 256
"""Maximum number of tokens of an answer by a model without a chat template, unless the user or, for
a model in this process, the checkpoint sets one: such a model seldom ends by itself."""


@dataclass(frozen=True, slots=True)
class Note:
    """A remark for the user that is not text of the model."""

    text: str


Piece = ContentDelta | ReasoningDelta | Note


class Model(Protocol):
    """A model that answers messages.

    name: the name of the model, for the user.
    """

    name: str

    def answer(self, messages: list[Message]) -> Generator[Piece, None, None]:
        """Yield the answer to the last message piece by piece. Closing the generator ends the
        answer.

        Raises KeyboardInterrupt once Ctrl-C has been pressed, ContextLengthError if the
        conversation does not fit, and other branches of MinisrvError.
        """
