"""How a checkpoint's chat model spells reasoning and tool calls, read off its chat template.

A template spells earlier calls and reasoning of a chat as the model has learned to write them, so
its text holds the markers. What it does not hold, the model has not learned.

Knows: which markers belong to which parser. Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from minisrv.request import StructuredOutput
from minisrv.text.chat_deltas import (
    BLANK,
    ChatDelta,
    ContentDelta,
    ToolCallArguments,
    ToolCallStart,
)
from minisrv.text.reasoning import REASONING_END, REASONING_START, ReasoningParser
from minisrv.text.tool_parsers import HermesToolParser, Llama3JsonToolParser, ToolParser


class ChatParser:
    """One answer: reasoning first, then content and tool calls.

    Without a parser for either, its markers are content.
    parallel: calls behind the first count; else they are dropped.
    """

    def __init__(
        self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, parallel: bool = True
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._parallel = parallel

    def feed(self, text: str) -> list[ChatDelta]:
        """Add text; returns what has become certain."""
        if self._reasoning is None:
            return self._answer([ContentDelta(text)] if text else [])
        return self._answer(self._reasoning.feed(text))

    def finish(self) -> list[ChatDelta]:
        """The text ends here: returns what was held back."""
        deltas = self._answer([] if self._reasoning is None else self._reasoning.finish())
        return deltas if self._tools is None else deltas + self._wanted(self._tools.finish())

    def _answer(self, deltas: list[ChatDelta]) -> list[ChatDelta]:
        if self._tools is None:
            return deltas
        found: list[ChatDelta] = []
        for delta in deltas:
            found += self._tools.feed(delta.text) if isinstance(delta, ContentDelta) else [delta]
        return self._wanted(found)

    def _wanted(self, deltas: list[ChatDelta]) -> list[ChatDelta]:
        if self._parallel:
            return deltas
        calls = (ToolCallStart, ToolCallArguments)
        return [delta for delta in deltas if not (isinstance(delta, calls) and delta.index)]


@dataclass(frozen=True)
class ChatFormat:
    """What a template says of its model.

    tool_parser: finds its tool calls; None if it has not learned to make any, or not in a way
        that is known here.
    reasons: does it reason before it answers?
    knows_tools: are the tools part of its prompt?
    spells_calls: are earlier calls of a chat part of it?
    why: why it is this tool parser, or none.
    """

    tool_parser: type[ToolParser] | None
    reasons: bool
    knows_tools: bool
    spells_calls: bool
    why: str

    @classmethod
    def of_template(cls, template: str) -> ChatFormat:
        """Detect the format from the text of a chat template."""
        tool_parser, why = _tool_parser(template)
        reasons, calls = REASONING_END in template, "tool_calls" in template
        return cls(tool_parser, reasons, "tools" in template.replace("tool_calls", ""), calls, why)

    @property
    def forced_parser(self) -> type[ToolParser]:
        """How calls are spelled that a grammar forces: as the model has learned it, or if it has
        not, in the way that is most common."""
        return self.tool_parser or HermesToolParser

    def behind_reasoning(self, spec: StructuredOutput, prompt: str) -> StructuredOutput:
        """What the answer to `prompt` must be if it is to be `spec` behind the reasoning, if there
        is any."""
        if not self._reasons_behind(prompt):
            return spec
        start = "" if _inside_reasoning(prompt) else REASONING_START
        return replace(spec, reasoning_start=start, reasoning_end=REASONING_END)

    def _reasons_behind(self, prompt: str) -> bool:
        """Whether the answer may begin with reasoning: the prompt may have ended it already."""
        return self.reasons and not prompt.rstrip(BLANK).endswith(REASONING_END)

    def parser(
        self, prompt: str, *, tools: type[ToolParser] | None = None, parallel: bool = True
    ) -> ChatParser | None:
        """A parser for the answer to `prompt`, the text that the template has made, or its end;
        None if all of the answer is content.

        tools: finds tool calls, if these are looked for.
        parallel: as in ChatParser.
        """
        reasoning = None
        if self._reasons_behind(prompt):
            reasoning = ReasoningParser(starts_inside=_inside_reasoning(prompt))
        if reasoning is None and tools is None:
            return None
        return ChatParser(reasoning, None if tools is None else tools(), parallel=parallel)

    def markers(self, tools: type[ToolParser] | None) -> list[str]:
        """What the parsers look for, as far as a tokenizer may have a token for it."""
        reasoning = [REASONING_START, REASONING_END] if self.reasons else []
        return reasoning + ([*tools.opening, *tools.closing] if tools else [])


def _inside_reasoning(prompt: str) -> bool:
    return prompt.rstrip(BLANK).endswith(REASONING_START)


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
