"""Detects how a checkpoint's chat model spells reasoning and tool calls, from its chat template.

A template spells the calls and reasoning of earlier turns as the model has learned to write them,
so its text holds the markers. Markers that it does not hold, the model has not learned.

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
    """Parses one answer: reasoning first, then content and tool calls.

    The markers of reasoning or of tool calls are content if there is no parser for them.
    parallel: whether calls after the first are kept; if not, they are dropped.
    """

    def __init__(
        self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, parallel: bool = True
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._parallel = parallel

    @property
    def has_reasoned(self) -> bool:
        """Whether the answer has begun with reasoning, which may be empty."""
        return self._reasoning is not None and self._reasoning.has_begun

    @property
    def reasoning_has_ended(self) -> bool:
        """Whether the reasoning has ended; its end may be held back."""
        return self._reasoning is not None and self._reasoning.has_ended

    def feed(self, text: str) -> list[ChatDelta]:
        """Add text; return what has become certain."""
        if self._reasoning is None:
            return self._answer([ContentDelta(text)] if text else [])
        return self._answer(self._reasoning.feed(text))

    def finish(self) -> list[ChatDelta]:
        """End the text; return what was held back."""
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
    """The chat format of a model, as its chat template shows it.

    tool_parser: the parser that finds the model's tool calls; None if the model has not learned to
        make any, or not in a way that is known here.
    reasons: whether the model reasons before it answers.
    knows_tools: whether the template writes tools into the prompt.
    spells_calls: whether the template writes the calls of earlier turns into the prompt.
    why: the reason for this tool parser, or for none.
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
        return cls(
            tool_parser,
            reasons,
            knows_tools="tools" in template.replace("tool_calls", ""),
            spells_calls=calls,
            why=why,
        )

    @property
    def forced_parser(self) -> type[ToolParser]:
        """The parser whose spelling a grammar forces on required calls: the one that the model has
        learned, or else the most common one."""
        return self.tool_parser or HermesToolParser

    def behind_reasoning(self, spec: StructuredOutput, prompt: str) -> StructuredOutput:
        """Return the structured output for an answer to `prompt` that must follow `spec`, possibly
        behind reasoning."""
        if not self._reasons_behind(prompt):
            return spec
        start = "" if _inside_reasoning(prompt) else REASONING_START
        return replace(spec, reasoning_start=start, reasoning_end=REASONING_END)

    def _reasons_behind(self, prompt: str) -> bool:
        """Whether the answer may begin with reasoning: a prompt may have ended it already."""
        return self.reasons and not prompt.rstrip(BLANK).endswith(REASONING_END)

    def ending(self, continued: str) -> str:
        """Return an ending of a prompt behind which an answer is parsed as it is behind the text of
        an answer that is continued: inside its reasoning, or behind it."""
        is_inside = continued.rfind(REASONING_START) > continued.rfind(REASONING_END)
        return REASONING_START if is_inside else REASONING_END

    def parser(
        self, prompt: str, *, tools: type[ToolParser] | None = None, parallel: bool = True
    ) -> ChatParser | None:
        """Return a parser for the answer to `prompt`, the text that the template has rendered, or
        its end; None if all of the answer is content.

        tools: the parser that finds tool calls, if these are looked for.
        parallel: as in ChatParser.
        """
        reasoning = None
        if self._reasons_behind(prompt):
            reasoning = ReasoningParser(starts_inside=_inside_reasoning(prompt))
        if reasoning is None and tools is None:
            return None
        return ChatParser(reasoning, None if tools is None else tools(), parallel=parallel)

    def markers(self, tools: type[ToolParser] | None) -> list[str]:
        """Return the markers that the parsers look for, for which a tokenizer may have special
        tokens."""
        reasoning = [REASONING_START, REASONING_END] if self.reasons else []
        return reasoning + ([*tools.opening, *tools.closing] if tools else [])


def _inside_reasoning(prompt: str) -> bool:
    return prompt.rstrip(BLANK).endswith(REASONING_START)


def _tool_parser(template: str) -> tuple[type[ToolParser] | None, str]:
    """Choose the parser by the first marker found, most telling first; return it and the reason."""
    if "<function=" in template:
        return None, "the chat template has <function=, calls in XML, which are not supported"
    if "<tool_call>" in template:
        return HermesToolParser, "the chat template has <tool_call>"
    for sign in ("<|python_tag|>", "Environment: ipython"):
        if sign in template and '"parameters"' in template:
            return Llama3JsonToolParser, f'the chat template has {sign} and "parameters"'
    return None, "the chat template has no marker of tool calls that is known here"
