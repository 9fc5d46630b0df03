"""Prepares a request before it reaches the engine: its prompts, the form that the answer must have,
and how a chat's answer is parsed.

Knows: chat templates' formats, and the fields of tools. Knows nothing of engines or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisrv.errors import RequestError
from minisrv.request import MAX_GRAMMAR_LENGTH, StructuredOutput
from minisrv.server.messages import Message
from minisrv.server.request_schemas import ChatCompletionRequest
from minisrv.server.tools import Function, Tool
from minisrv.text.chat_format import ChatFormat, ChatParser
from minisrv.text.chat_template import REASONING_SWITCHES
from minisrv.text.detokenizer import Detokenizer
from minisrv.text.tokenizer import Tokenizer
from minisrv.text.tool_grammar import Tool as GrammarTool
from minisrv.text.tool_grammar import tool_call_grammar
from minisrv.text.tool_parsers import ToolParser

_CUT = "\u2402 the answer goes on here \u2403"
"""A mark behind the text of the message that is continued, at which the rendered chat is cut."""


@dataclass(frozen=True)
class AnswerFormat:
    """The settings for parsing the answer to one chat.

    prompt: the text that the chat template has rendered, or an ending that the parser takes alike.
    tools: the parser class that finds tool calls; None if none are looked for.
    parallel: whether calls after the first are kept.
    """

    format: ChatFormat
    prompt: str
    tools: type[ToolParser] | None
    parallel: bool

    def parser(self) -> ChatParser | None:
        """Return a new parser for one choice; None if all of the answer is content."""
        return self.format.parser(self.prompt, tools=self.tools, parallel=self.parallel)

    def kept_tokens(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the special tokens whose text the parser needs to see."""
        ids = (tokenizer.token_id(marker) for marker in self.format.markers(self.tools))
        return frozenset(token_id for token_id in ids if token_id is not None)


@dataclass(frozen=True)
class Echo:
    """A prompt as it stands at the beginning of a completion's text.

    text_offsets: the index in the text at which each token begins; needed for log-probabilities
        only, and empty without them.
    """

    text: str
    text_offsets: list[int]


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine.

    prompts: the token ids of each prompt; each prompt has the request's `n` choices.
    form: the form that the text of every choice must have; None for any text.
    answer: how the answer is parsed; None for a completion, whose text is not parsed.
    bad_words_token_ids: the tokens of the words that no choice may contain.
    echoes: the text that the choices of each prompt begin with: that of the prompt, or in a chat
        that of the last message; None if there is none.
    """

    prompts: list[list[int]]
    form: StructuredOutput | None
    answer: AnswerFormat | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    echoes: list[Echo] | None = None


def encode_prompt(
    tokenizer: Tokenizer, text: str, *, track_offsets: bool
) -> tuple[list[int], Echo]:
    """Return the token ids of a prompt, and its echo.

    track_offsets: whether the echo holds where its tokens begin.
    """
    if track_offsets:
        ids, starts = tokenizer.encode_with_offsets(text)
        return ids, Echo(text, starts)
    return tokenizer.encode(text), Echo(text, [])


def decode_prompt(tokenizer: Tokenizer, ids: list[int], *, track_offsets: bool) -> Echo:
    """Return the echo of a prompt that was sent as token ids; special tokens are spelled out in
    it."""
    detokenizer = Detokenizer(
        tokenizer, visible_special_ids=tokenizer.special_ids, track_offsets=track_offsets
    )
    text = detokenizer.push(ids, final=True)
    return Echo(text, detokenizer.pop_text_offsets(len(ids)))


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Tool] = (),
    variables: Mapping[str, Any] | None = None,
    *,
    continue_final_message: bool = False,
) -> str:
    """Render a chat as the text of a prompt.

    continue_final_message: whether the prompt ends within the last message, behind its text.
    Raises what `Tokenizer.render_chat` raises, and RequestError if the message that is to be
    continued is no text of an assistant, or the template does not write it.
    """
    last = messages[-1]
    if continue_final_message and (last.role != "assistant" or last.calls):
        raise RequestError(
            "continue_final_message needs a last message of an assistant, without tool calls.",
            param="continue_final_message",
        )
    template_tools = [tool.for_template() for tool in tools]

    def spell(whole_calls: bool) -> str:
        chat = [message.for_template(whole_calls=whole_calls) for message in messages]
        if continue_final_message:
            chat[-1]["content"] = last.text + _CUT
        return tokenizer.render_chat(chat, add_generation_prompt, template_tools, variables)

    try:
        text = spell(whole_calls=False)
    except RequestError:
        # Some templates iterate over the arguments of a call and fail if they are not an object.
        if not any(message.holds_broken_calls for message in messages):
            raise
        text = spell(whole_calls=True)
    if not continue_final_message:
        return text
    begin, mark, _ = text.rpartition(_CUT)
    if not mark:
        raise RequestError(
            "continue_final_message is not supported by this model: its chat template does not "
            "write the text of the last message; leave it out.",
            param="continue_final_message",
        )
    return begin


def template_variables(
    request: ChatCompletionRequest, tokenizer: Tokenizer, format: ChatFormat
) -> dict[str, Any]:
    """Return the variables that a request gives to the chat template. Raises RequestError for a
    `reasoning_effort` that the template cannot express."""
    given, effort, param = (
        request.chat_template_kwargs,
        request.reasoning_effort,
        request.effort_param,
    )
    if effort is None:
        return given
    known = tokenizer.chat_template_variables
    switch = next((name for name in REASONING_SWITCHES if name in known), None)
    by_effort: dict[str, Any] = {}
    if "reasoning_effort" in known and (switch is None or effort != "none"):
        by_effort = {"reasoning_effort": effort}
    elif switch is not None:
        by_effort = {switch: effort != "none"}
    elif effort != ("medium" if format.reasons else "none"):  # which is what such a model does
        raise RequestError(
            f"{param} is not supported by this model: its chat template has no variable for it; "
            "leave it out.",
            param=param,
        )
    if both := given.keys() & by_effort.keys():
        raise RequestError(
            f"{param} and {', '.join(both)} in chat_template_kwargs say the same; send one of "
            "them.",
            param=param,
        )
    return {**given, **by_effort}


def turn_starts(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """Return the number of system messages that a chat begins with, and the indices at which its
    second and each further turn begins, with a message of a user."""
    head = next((i for i, m in enumerate(messages) if not m.is_system), len(messages))
    starts = [i for i, message in enumerate(messages) if message.role == "user" and i > head]
    return head, starts


def check_tools(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    format: ChatFormat,
    params: tuple[str, str] = ("tools", "tool_choice"),
) -> None:
    """Raise RequestError if the chat template would leave out tool calls, their results or tools.

    params: the fields that hold the tools and the choice of one.
    """
    if any(message.speaks_of_tools for message in messages) and not format.spells_calls:
        raise RequestError(
            "The chat holds tool calls or their results, which this model's chat template does not "
            "know; leave them out.",
            param="messages",
        )
    if tools and not format.knows_tools:
        field, choice = params
        raise RequestError(
            f"{field} is not supported by this model: its chat template does not tell it of any; "
            f'leave {field} out, or send {choice} "none".',
            param=field,
        )


def tool_parser(request: ChatCompletionRequest, format: ChatFormat) -> type[ToolParser] | None:
    """Return the parser that finds the answer's tool calls; None if there are no tools. Raises
    RequestError if the model has not learned what is asked for."""
    field, choice = request.tool_params
    check_tools(request.messages, request.offered_tools, format, (field, choice))
    if not request.offered_tools:
        return None
    if request.required_tools:
        return format.forced_parser
    if format.tool_parser is None:
        required = '"required", ' if request.tools else ""
        raise RequestError(
            f'{choice} "auto" is not supported by this model, as {format.why}; send '
            f'{required}a function\'s name or "none".',
            param=choice,
        )
    return format.tool_parser


def answer_form(
    request: ChatCompletionRequest, answer: AnswerFormat, tokenizer: Tokenizer
) -> StructuredOutput | None:
    """Return the form that the answer must have behind its reasoning, or None for any text. Where
    tools may be called, the form of a text allows calls as well. Raises RequestError for a form
    that is too large."""
    form = request.structured_output
    if request.constrained_tools:
        assert answer.tools is not None
        length = sum(len(tool.function.parameters or "") for tool in request.constrained_tools)
        if length > MAX_GRAMMAR_LENGTH:
            field, _ = request.tool_params
            raise RequestError(
                f"{field}: parameters of {length} characters are too long for a call that must "
                f"follow them: at most {MAX_GRAMMAR_LENGTH} are allowed.",
                param=field,
            )
        several = not request.requires_one_call
        tools = [_for_grammar(tool.function) for tool in request.constrained_tools]
        text_form = None if request.required_tools else form
        form = tool_call_grammar(tools, answer.tools, tokenizer, parallel=several, form=text_form)
    return form and answer.format.behind_reasoning(form, answer.prompt)


def _for_grammar(function: Function) -> GrammarTool:
    schema = function.parameters
    return GrammarTool(
        name=function.name, parameters=None if schema is None else json.loads(schema)
    )
