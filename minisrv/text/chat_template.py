"""Chat templates: a Jinja program of the checkpoint that spells messages as a prompt.

The environment is the one of Hugging Face transformers (`utils/chat_template_utils.py`), so that
a template renders here as it did in training. Templates come with the checkpoint, never with a
request; they run in Jinja's immutable sandbox all the same.

Knows: Jinja and what templates expect of it. Knows nothing of token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minisrv.errors import ModelError, RequestError

_PROBE, _MARK = "a text to find again", "a mark"

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called, the usual name first."""

_FAILURES = (
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    RecursionError,
)
"""How a template that computes with what it is given fails, in Python's own terms."""


class ChatTemplate:
    """A checkpoint's template, or several of which each has its use.

    sources: by name, as transformers has them: `default`, and perhaps `tool_use`, which goes before
        it where there are tools.
    special_tokens: variables of the templates, e.g. `bos_token`.
    source: the text of all of them, which also tells how the model spells tool calls and reasoning.
    Raises ModelError if a source is not valid Jinja.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        assert "default" in sources, "the tokenizer sees to it"
        environment = _environment()
        used = {name: sources[name] for name in ("default", "tool_use") if name in sources}
        try:
            self._templates = {
                name: environment.from_string(source) for name, source in used.items()
            }
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template is not valid: {error}.") from error
        self.source = "\n".join(used.values())
        self._special_tokens = dict(special_tokens)
        self._forms: dict[tuple[str, str], set[type]] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for these messages, special tokens spelled out.

        messages: the content of each is a string or a list of text parts; the template gets of the
            two what it takes. What is None counts as absent, as templates expect.
        tools: what the model may call, as OpenAI's API spells it.
        variables: what else the template may ask for.
        Raises RequestError if the template refuses the messages or fails on them, or if a variable
        would take the place of one of its own.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        own = self._variables(
            [self._with_content(name, message) for message in messages],
            add_generation_prompt,
            tools,
        )
        taken = (own.keys() | self._templates[name].environment.globals.keys()) & (
            variables or {}
        ).keys()
        if taken:
            raise RequestError(
                f"chat_template_kwargs: {', '.join(sorted(taken))} cannot be set by a request.",
                param="chat_template_kwargs",
            )
        try:
            text = self._templates[name].render({**(variables or {}), **own})
            text.encode()  # JSON may spell a lone surrogate, which is no text
            return text
        except jinja2.TemplateError as error:
            reason = error.message or type(error).__name__
        except _FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
        raise RequestError(
            f"the model's chat template does not accept these messages: {reason}", param="messages"
        )

    def _variables(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        return {
            "messages": messages,
            # Templates ask for either.
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }

    def _with_content(self, name: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message without what is None, its reasoning under each name that templates know, as
        transformers does, and its content in a form that the template takes: as it is, or parts
        made of it, or the texts of its parts joined by newlines, as vLLM does."""
        told = {key: value for key, value in message.items() if value is not None}
        if reasoning := [told[key] for key in _REASONING if key in told]:
            told = {"thinking": reasoning[0], **told, "reasoning_content": reasoning[0]}
        content, role = told.get("content"), str(message.get("role"))
        if (name, role) not in self._forms:
            self._forms[name, role] = self._find_forms(name, role)
        forms = self._forms[name, role]
        if isinstance(content, str) and forms == {list}:
            told["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and list not in forms:
            told["content"] = "\n".join(part["text"] for part in content)
        return told

    def _find_forms(self, name: str, role: str) -> set[type]:
        """Which of strings and lists of parts come out where they are the content of this role's
        messages, parts without all else that is in them. Some templates loop over parts and would
        render a string as nothing, without an error."""
        forms: set[type] = set()
        question: dict[str, Any] = {"role": "user", "content": _PROBE}
        call = {"type": "function", "function": {"name": "f", "arguments": {}}, "id": "000000000"}
        chats = {
            "system": [{"role": "system"}, question],
            "assistant": [question, {"role": "assistant"}],
            "tool": [
                question,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "name": "f"},
            ],
        }
        chat = chats.get(role, [{"role": role}])
        for content in (_PROBE, [{"type": "text", "text": _PROBE, "mark": _MARK}]):
            others = [{**each, "content": ""} if each is question else each for each in chat]
            filled = [{"content": content, **each} for each in others]
            try:
                text = self._templates[name].render(self._variables(filled, False, ()))
            except (jinja2.TemplateError, *_FAILURES):
                continue
            if _PROBE in text and _MARK not in text:
                forms.add(type(content))
        return forms


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes characters for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
