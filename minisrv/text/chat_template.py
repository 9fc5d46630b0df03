"""Chat templates: a Jinja program of the checkpoint that spells messages as a prompt.

The environment is the one of Hugging Face transformers (`utils/chat_template_utils.py`), so that
a template renders here as it did in training. Templates come with the checkpoint, never with a
request; they run in Jinja's immutable sandbox all the same, which keeps them from files and from
Python's inner parts.

A checkpoint is a stranger's, and so is its template: it may loop for ever. Each rendering has
`RENDER_SECONDS` of its thread's processor time. That is looked at in each round of a loop, at each
call, filter and test, so that only a single operation of Python's can take longer; those that
compute large numbers or repeat are refused. Nothing here bounds memory: whoever renders does, an
API worker and the process that describes a checkpoint by a limit of their own.

Knows: Jinja and what templates expect of it. Knows nothing of token ids.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minisrv.errors import ModelError, RequestError, shortened

RENDER_SECONDS = 2.0
"""Of processor time. Messages of four megabytes take a hundredth of it."""

MAX_CHARACTERS = 1 << 26
"""Of a prompt; a request's body has four million bytes."""

_MAX_REPEATED = 1 << 22
"""Items of a sequence that is repeated, and what a template may compute has as many bits."""

_MAX_REASON = 400
"""Characters of a template's own error."""

_ROLES = ("user", "system", "assistant", "tool")

_TICK = "_tick"
"""The name of a filter that templates are given."""

_PROBE, _MARK = "a text to find again", "a mark"

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called, the usual name first."""


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
        environment = _Environment()
        used = {name: sources[name] for name in ("default", "tool_use") if name in sources}
        try:
            self._templates = {
                name: environment.from_string(source) for name, source in used.items()
            }
        except Exception as error:  # Python compiles what Jinja makes of it, and fails in its terms
            reason = _reason(error)
            raise ModelError(f"the chat template is not valid: {reason}.") from error
        self.source = "\n".join(used.values())
        self._special_tokens = dict(special_tokens)
        self._forms: dict[tuple[str, str], set[type]] = {}

    def try_out(self) -> None:
        """Raise ModelError if it takes too long, or too much memory, for a short message of some
        role. One that refuses a message, or fails on it, may take others."""
        for name in self._templates:
            for role in _ROLES:
                try:
                    self._find_forms(name, role)
                except RequestError as error:
                    raise ModelError(
                        f"the chat template cannot be used: {error.message}"
                    ) from error

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
            text = self._run(name, {**(variables or {}), **own})
            text.encode()  # JSON may spell a lone surrogate, which is no text
            return text
        except RequestError:
            raise
        except Exception as error:  # a program's, which may fail in any way
            raise RequestError(
                f"the model's chat template does not accept these messages: {_reason(error)}",
                param="messages",
            ) from error

    def _run(self, name: str, variables: Mapping[str, Any]) -> str:
        """Raises RequestError where it takes too long or makes too much, and whatever else."""
        with _bounded():
            try:
                text = self._templates[name].render(variables)
            except MemoryError as error:
                raise RequestError(
                    "the model's chat template takes more memory than there is for these messages.",
                    param="messages",
                ) from error
        if len(text) > MAX_CHARACTERS:
            raise RequestError(
                f"the model's chat template makes a prompt of {len(text)} characters of these "
                f"messages; {MAX_CHARACTERS} are the most.",
                param="messages",
            )
        return text

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
                text = self._run(name, self._variables(filled, False, ()))
            except RequestError:
                raise
            except Exception:  # as in `render`
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


class _Clock(threading.local):
    """The rendering that goes on in this thread.

    began: what its processor time was. look_at: of the monotonic clock, when to look at it again,
        which is a system call.
    """

    began = 0.0
    look_at = float("inf")


_clock = _Clock()


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise RequestError in `_tick` when it has taken too long."""
    _clock.began = time.thread_time()
    _clock.look_at = time.monotonic() + RENDER_SECONDS
    try:
        yield
    finally:
        _clock.look_at = float("inf")


def _tick() -> None:
    """Called wherever a template could go on for long."""
    now = time.monotonic()
    if now < _clock.look_at:
        return
    left = RENDER_SECONDS - (time.thread_time() - _clock.began)
    if left <= 0:
        raise RequestError(
            f"the model's chat template takes more than {RENDER_SECONDS:g} s of processor time for "
            "these messages; send fewer, or have the server given another template.",
            param="messages",
        )
    _clock.look_at = now + left


def _ticking(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)  # with the marks by which Jinja knows what to pass it
    def ticks(*arguments: Any, **named: Any) -> Any:
        _tick()
        return function(*arguments, **named)

    return ticks


@jinja2.pass_context  # so that Jinja does not compute it when compiling
def _tick_filter(context: jinja2.runtime.Context, value: None) -> None:
    _tick()


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, whose templates come by `_tick` in each round, call, filter and test."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.filters["slice"] = _slice
        del self.globals["lipsum"]  # words without end, in one call
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters = {name: _ticking(each) for name, each in self.filters.items()}
        self.tests = {name: _ticking(each) for name, each in self.tests.items()}
        self.filters[_TICK] = _tick_filter

    def _generate(self, source: jinja2.nodes.Template, *arguments: Any, **named: Any) -> str:
        """Jinja's hook between parsing and compiling."""
        for loop in source.find_all(jinja2.nodes.For):
            nothing = jinja2.nodes.Const(None)
            tick = jinja2.nodes.Filter(nothing, _TICK, [], [], None, None)
            loop.body.insert(0, jinja2.nodes.ExprStmt(tick))
        source.set_environment(self)
        return super()._generate(source, *arguments, **named)

    def call(self, *arguments: Any, **named: Any) -> Any:
        """A template's call of anything, macros, blocks and recursive loops included."""
        _tick()
        return super().call(*arguments, **named)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """An operation of `intercepted_binops`: none of a few characters takes for ever."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**":
            size = left.bit_length() * right if numbers else 0
        elif numbers:
            size = left.bit_length() + right.bit_length()
        else:
            size = max(
                (
                    len(one) * other
                    for one, other in ((left, right), (right, left))
                    if isinstance(other, int) and isinstance(one, str | bytes | list | tuple)
                ),
                default=0,
            )
        if size > _MAX_REPEATED:
            raise jinja2.TemplateRuntimeError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _reason(error: Exception) -> str:
    """What a template failed at: in Jinja's words, or in Python's own terms."""
    if isinstance(error, jinja2.TemplateError):
        said = str(error) if isinstance(error, jinja2.TemplateSyntaxError) else error.message
        reason = said or type(error).__name__
    else:
        reason = f"{type(error).__name__}: {error}"
    return shortened(reason, _MAX_REASON)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _slice(value: Any, slices: int, fill_with: Any = None) -> Iterator[Any]:
    """Jinja's own filter, in bounds: it makes so many lists, be they empty."""
    if slices > _MAX_REPEATED:
        raise jinja2.TemplateRuntimeError("the number of slices is too large")
    return jinja2.filters.sync_do_slice(value, slices, fill_with)


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
