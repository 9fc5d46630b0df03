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


class ChatTemplate:
    """A compiled template. `special_tokens` are variables of it, e.g. `bos_token`.

    source: its text, which also tells how its model spells tool calls and reasoning.
    Raises ModelError if the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the checkpoint's chat template is not valid: {error}") from error
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for these messages, special tokens spelled out.

        tools: what the model may call, as OpenAI's API spells it.
        variables: what else the template may ask for.
        Raises RequestError if the template refuses the messages or fails on them, or if a variable
        would take the place of one of its own.
        """
        own: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            # Templates ask for either.
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }
        taken = (own.keys() | self._template.environment.globals.keys()) & (variables or {}).keys()
        if taken:
            raise RequestError(
                f"chat_template_kwargs: {', '.join(sorted(taken))} cannot be set by a request.",
                param="chat_template_kwargs",
            )
        try:
            text = self._template.render({**(variables or {}), **own})
            text.encode()  # JSON may spell a lone surrogate, which is no text
            return text
        except jinja2.TemplateError as error:
            reason = error.message or type(error).__name__
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A template that computes with what it is given fails in Python's own terms.
            reason = f"{type(error).__name__}: {error}"
        raise RequestError(
            f"the model's chat template does not accept these messages: {reason}", param="messages"
        )


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
