"""Chat templates: Jinja programs of the checkpoint that render messages as a prompt.

The Jinja environment is that of Hugging Face transformers (`utils/chat_template_utils.py`), so that
a template renders here as it did in training. Templates come with the checkpoint, never with a
request; they still run in Jinja's immutable sandbox, which keeps them from files and from Python's
internals.

A checkpoint comes from a stranger, and so does its template, which may loop for ever. Each
rendering may take `RENDER_SECONDS` of its thread's processor time. This is checked in each round of
a loop and at each call, filter and test, so that only a single operation of Python's can take
longer; operations that compute large numbers or long repetitions are refused. Memory is not bounded
here, but by a limit on the process that renders: an API worker, or the process that describes a
checkpoint.

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
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minisrv.errors import ModelError, RequestError, shown, truncated
from minisrv.text.reasoning import REASONING_END

RENDER_SECONDS = 2.0
"""Seconds of processor time that one rendering may take. Messages of four megabytes take a
hundredth of it."""

MAX_CHARACTERS = 1 << 26
"""Maximum number of characters of a rendered prompt; a request's body has four million bytes."""

_MAX_REPEATED = 1 << 22
"""Maximum number of items of a repeated sequence, and of bits of a number that a template
computes."""

_MAX_REASON = 400
"""Maximum number of characters of a template's own error that are passed on."""

_ROLES = ("user", "system", "assistant", "tool")

_MAX_ROLES = 64
"""Maximum number of roles whose forms of content are remembered."""

_TICK = "_tick"
"""Name of the internal filter that checks the time limit."""

_PROBE, _MARK = "a text to find again", "a mark"

REASONING_SWITCHES = ("enable_thinking", "thinking")
"""Names of a template's variable that says whether the model reasons."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the field that holds a message's reasoning, the usual one first."""


class ChatTemplate:
    """A checkpoint's chat template, or several of which each has its own use.

    sources: the templates by name, as transformers has them: `default`, and perhaps `tool_use`,
        which is preferred if there are tools.
    special_tokens: variables of the templates, e.g. `bos_token`.
    source: the text of all templates in use, which also shows how the model spells tool calls and
        reasoning.
    variables: the variables that the templates read and a request may set.
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
        except Exception as error:  # Python compiles Jinja's output, and raises errors of its own
            reason = _reason(error)
            raise ModelError(f"the chat template is not valid: {reason}.") from error
        self.source = "\n".join(used.values())
        self._special_tokens = dict(special_tokens)
        own = self._variables([], False, ()).keys() | environment.globals.keys()
        read = (jinja2.meta.find_undeclared_variables(environment.parse(s)) for s in used.values())
        self.variables = frozenset[str]().union(*read) - own
        self._forms: dict[tuple[str, str], set[type]] = {}

    def try_out(self) -> None:
        """Raise ModelError if a template takes too long, or too much memory, for a short message of
        some role. A template that refuses a message, or fails on it, is accepted, as it may accept
        others."""
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
        """Return the prompt for these messages, with special tokens spelled out.

        messages: the content of each is a string or a list of text parts, and is converted to
            whichever of the two the template takes. A field that is None counts as absent, as
            templates expect.
        tools: the tools that the model may call, as OpenAI's API spells them.
        variables: further variables of the template.
        Raises RequestError if the template refuses the messages or fails on them, if a variable
        would replace one of the template's own, or if no template reads it.
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
        self._check_read(variables or {})
        try:
            text = self._run(name, {**(variables or {}), **own})
            text.encode()  # JSON may hold a lone surrogate, which cannot be encoded
            return text
        except RequestError:
            raise
        except Exception as error:  # a template is a program, which may fail in any way
            raise RequestError(
                f"the model's chat template does not accept these messages: {_reason(error)}",
                param="messages",
            ) from error

    def _check_read(self, variables: Mapping[str, Any]) -> None:
        """Raise RequestError for a variable that no template reads, unless it turns off a reasoning
        that the model does not do anyway."""
        for name, value in variables.items():
            asks_nothing = name in REASONING_SWITCHES and value is False
            if name in self.variables or (asks_nothing and REASONING_END not in self.source):
                continue
            known = ", ".join(sorted(self.variables)) or "none"
            raise RequestError(
                f"chat_template_kwargs: this model's chat template does not read {shown(name)}; it "
                f"reads: {known}.",
                param="chat_template_kwargs",
            )

    def _run(self, name: str, variables: Mapping[str, Any]) -> str:
        """Render a template. Raises RequestError if it takes too long or produces too much, and
        whatever else the template raises."""
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
            # None suits templates that test for an empty list as well as those that test for none.
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }

    def _with_content(self, name: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the message without fields that are None, with its reasoning under each name that
        templates know, as in transformers, and with its content in a form that the template takes:
        unchanged, or as a list with one part, or as the texts of its parts joined by newlines, as
        in vLLM."""
        fields = {key: value for key, value in message.items() if value is not None}
        if reasoning := [fields[key] for key in _REASONING if key in fields]:
            fields = {"thinking": reasoning[0], **fields, "reasoning_content": reasoning[0]}
        content, role = fields.get("content"), str(message.get("role"))
        forms = self._forms.get((name, role))
        if forms is None:
            forms = self._find_forms(name, role)
            if len(self._forms) < _MAX_ROLES:  # clients name the roles
                self._forms[name, role] = forms
        if not forms and role not in _ROLES:
            raise RequestError(
                f"messages: the role {shown(role)} is not one that this model's chat template "
                f"renders; use one of {', '.join(_ROLES)}.",
                param="messages",
            )
        if isinstance(content, str) and forms == {list}:
            fields["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and list not in forms:
            fields["content"] = "\n".join(part["text"] for part in content)
        return fields

    def _find_forms(self, name: str, role: str) -> set[type]:
        """Find which content types, string or list of parts, the template renders for messages of
        this role; for parts, only their text and nothing else of them may be rendered. Some
        templates loop over parts and would render a string as nothing, without an error."""
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
    """The tag `{% generation %}`, which marks the assistant's words for training; here it does
    nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Clock(threading.local):
    """The time limit of the rendering that runs in this thread.

    began: the thread's processor time in seconds when the rendering began.
    look_at: when to check the processor time again, which is a system call, by `time.monotonic`.
    """

    began = 0.0
    look_at = float("inf")


_clock = _Clock()


@contextmanager
def _bounded() -> Iterator[None]:
    """Let `_tick` raise RequestError within this context once it has taken too long."""
    _clock.began = time.thread_time()
    _clock.look_at = time.monotonic() + RENDER_SECONDS
    try:
        yield
    finally:
        _clock.look_at = float("inf")


def _tick() -> None:
    """Check the time limit; called wherever a template could run for long."""
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
    @functools.wraps(function)  # keeps the attributes by which Jinja knows what to pass
    def ticks(*arguments: Any, **named: Any) -> Any:
        _tick()
        return function(*arguments, **named)

    return ticks


@jinja2.pass_context  # so that Jinja does not evaluate it at compile time
def _tick_filter(context: jinja2.runtime.Context, value: None) -> None:
    _tick()


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which templates call `_tick` in each round of a loop, call, filter and
    test."""

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
        """Insert a tick into each loop; Jinja calls this between parsing and compiling."""
        for loop in source.find_all(jinja2.nodes.For):
            nothing = jinja2.nodes.Const(None)
            tick = jinja2.nodes.Filter(nothing, _TICK, [], [], None, None)
            loop.body.insert(0, jinja2.nodes.ExprStmt(tick))
        source.set_environment(self)
        return super()._generate(source, *arguments, **named)

    def call(self, *arguments: Any, **named: Any) -> Any:
        """Call anything that a template calls, macros, blocks and recursive loops included."""
        _tick()
        return super().call(*arguments, **named)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Compute an operation of `intercepted_binops`, unless its result would be so large that it
        takes very long."""
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
    """Return the reason for which a template failed: in Jinja's words, or in Python's own terms."""
    if isinstance(error, jinja2.TemplateError):
        message = str(error) if isinstance(error, jinja2.TemplateSyntaxError) else error.message
        reason = message or type(error).__name__
    else:
        reason = f"{type(error).__name__}: {error}"
    return truncated(reason, _MAX_REASON)


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
    """Return plain JSON: Jinja's own filter escapes characters for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
