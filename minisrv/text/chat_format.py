"""How a checkpoint's chat model spells reasoning and tool calls, read off its chat template.

A template spells earlier calls and reasoning of a chat as the model has learned to write them, so
its text holds the markers. What it does not hold, the model has not learned.

Knows: which markers belong to which parser. Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.text.chat_deltas import BLANK, ChatDelta, ContentDelta
from minisrv.text.reasoning import REASONING_END, REASONING_START, ReasoningParser
from minisrv.text.tool_parsers import HermesToolParser, Llama3JsonToolParser, ToolParser


class ChatParser:
    """One answer: reasoning first, then content and tool calls.

    Without a parser for either, its markers are content.
    """

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def feed(self, text: str) -> list[ChatDelta]:
        """Add text; returns what has become certain."""
        if self._reasoning is None:
            return self._answer([ContentDelta(text)] if text else [])
        return self._answer(self._reasoning.feed(text))

    def finish(self) -> list[ChatDelta]:
        """The text ends here: returns what was held back."""
        deltas = self._answer([] if self._reasoning is None else self._reasoning.finish())
        return deltas if self._tools is None else deltas + self._tools.finish()

    def _answer(self, deltas: list[ChatDelta]) -> list[ChatDelta]:
        if self._tools is None:
            return deltas
        found: list[ChatDelta] = []
        for delta in deltas:
            found += self._tools.feed(delta.text) if isinstance(delta, ContentDelta) else [delta]
        return found


@dataclass(frozen=True)
class ChatFormat:
    """What a template says of its model.

    tool_parser: finds its tool calls; None if it has not learned to make any, or not in a way
        that is known here.
    reasons: does it reason before it answers?
    why: one sentence for each of the two.
    """

    tool_parser: type[ToolParser] | None
    reasons: bool
    why: tuple[str, str]

    @classmethod
    def of_template(cls, template: str) -> ChatFormat:
        """Detect the format from the text of a chat template."""
        tool_parser, why_tools = _tool_parser(template)
        reasons = REASONING_END in template
        has = "has" if reasons else "does not have"
        return cls(tool_parser, reasons, (why_tools, f"the chat template {has} {REASONING_END}"))

    def parser(self, prompt: str, *, tools: bool) -> ChatParser:
        """A parser for the answer to `prompt`, the text that the template has made.

        tools: whether tool calls are looked for. Needs `tool_parser`.
        """
        reasoning = None
        if self.reasons:
            inside = prompt.rstrip(BLANK).endswith(REASONING_START)
            reasoning = ReasoningParser(starts_inside=inside)
        assert self.tool_parser is not None or not tools
        return ChatParser(reasoning, self.tool_parser() if self.tool_parser and tools else None)


def _tool_parser(template: str) -> tuple[type[ToolParser] | None, str]:
    """The candidates in order, most telling first, and why it is this one."""
    if "<function=" in template:
        return None, "the chat template has <function=, calls in XML, which are not supported"
    if "<tool_call>" in template:
        return HermesToolParser, "the chat template has <tool_call>"
    for sign in ("<|python_tag|>", "Environment: ipython"):
        if sign in template and '"parameters"' in template:
            return Llama3JsonToolParser, f'the chat template has {sign} and "parameters"'
    return None, "the chat template has no marker of tool calls that is known here"
