"""Random requests, greedy or seeded, whose answers do not depend on other requests.

All features of the API are mixed in them.

Knows: the bodies of completions and chats, how an answer is read, streamed or not, and when two
answers are the same. Knows nothing of servers and engines.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

LOGPROB_TOLERANCE = 1e-3
"""Largest difference of log-probabilities that count as the same. In float32 sampled tokens are the
same in every batch, but the last bits of their logits are not."""

_WORDS = (
    *("the", "sea", "a", "house", "by", "red", "wind", "of", "night", "over", "seven", "lanterns"),
    *("they", "count", "stones", "until", "morning", "with", "rain", "on", "nobody", "quiet"),
)
TOKEN_IDS = (300, 4000)
"""The range of the random token ids, which are words both in the default model's vocabulary and in
larger ones."""
MAX_TOKENS = (1, 8, 24, 40, 80, 120)
"""The values of `max_tokens` that questions have."""

_FILTERS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("top_p", (0.3, 0.9)),
    ("top_k", (1, 5, 40)),
    ("min_p", (0.05, 0.3)),
)

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
}
FORMS: tuple[dict[str, Any], ...] = (
    {"response_format": {"type": "json_object"}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": _PERSON},
        }
    },
    {"structured_outputs": {"json": {"type": "array", "items": {"type": "integer"}}}},
    {"structured_outputs": {"choice": ["yes", "no", "it depends"]}},
    {"structured_outputs": {"regex": "[ab]{1,40}"}},
    {"structured_outputs": {"regex": "(the|a) [a-z]{2,9}( and [a-z]{2,9}){0,3}"}},
    {"structured_outputs": {"grammar": 'start: item ("," item)*\nitem: /[0-9]{1,3}/'}},
    {"structured_outputs": {"json": {"enum": ["Rome", "Oslo", 7, None]}}},
)
"""Fields of requests for structured output. They are few, so that the number of grammars is
bounded."""


def _tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


_TOOLS = [
    _tool("weather", city={"enum": ["Rome", "Oslo"]}, days={"type": "integer", "maximum": 9}),
    _tool("clock", zone={"type": "string", "maxLength": 8}),
]


class Question(NamedTuple):
    """A request: its path and its body, without the field `stream`."""

    path: str
    body: dict[str, Any]

    @property
    def may_stream(self) -> bool:
        return "prompt_logprobs" not in self.body


class Answer(NamedTuple):
    """The content of an answer, whether it was streamed or not.

    exact: text, tool calls, token ids and finish reason of each choice, and the usage.
    logprobs: all log-probabilities that are reported, in a fixed order; those of a token's
        alternatives are sorted, the largest first.
    """

    exact: Any
    logprobs: list[float]

    def same_as(self, other: Answer) -> bool:
        """Whether the two answers differ at most in the last bits of log-probabilities."""
        return (
            self.exact == other.exact
            and len(self.logprobs) == len(other.logprobs)
            and all(
                abs(a - b) <= LOGPROB_TOLERANCE
                for a, b in zip(self.logprobs, other.logprobs, strict=True)
            )
        )

    def apart(self, other: Answer) -> tuple[Any, Any]:
        """Return what differs between two answers that are not the same, of this and of the other:
        the exact parts, or the log-probabilities."""
        if self.exact != other.exact:
            return self.exact, other.exact
        return self.logprobs, other.logprobs


class Questions:
    """Draws random requests. Many of them share prefixes: documents of token ids, or the first
    messages of chats.


    token_ids: the range of the random token ids in prompts: the first, and the end.
    max_tokens: the values of `max_tokens` that questions have.
    tools: whether some chats offer tools, for which a small tokenizer makes long prompts.
    """

    def __init__(
        self,
        seed: int,
        *,
        token_ids: tuple[int, int] = TOKEN_IDS,
        max_tokens: tuple[int, ...] = MAX_TOKENS,
        tools: bool = True,
    ) -> None:
        self._random = random.Random(seed)
        self._ids = token_ids
        self._max_tokens = max_tokens
        self._tools = tools
        self._documents = [self._token_ids(self._random.randint(64, 160)) for _ in range(5)]
        self._systems = [self._text(self._random.randint(5, 30)) for _ in range(4)]

    def draw(self) -> Question:
        """Return the next request. Its prompt and answer together take less than 1024 tokens, even
        with one token per byte."""
        rng = self._random
        body = self._sampling()
        self._shape(body)
        chat = rng.random() < 0.4
        tools = self._tools and chat and rng.random() < 0.25
        if not tools and rng.random() < 0.25:
            body |= rng.choice(FORMS)
        elif not tools and rng.random() < 0.25:
            body["ignore_eos"] = True
        if rng.random() < 0.08:
            body["prompt_logprobs"] = rng.randrange(3)
        if chat:
            body["messages"] = self._messages()
            if rng.random() < 0.25:
                body |= {"logprobs": True, "top_logprobs": rng.randrange(4)}
            if tools:
                named = {"type": "function", "function": {"name": "clock"}}
                body |= {"tools": _TOOLS, "tool_choice": rng.choice(["auto", "required", named])}
            return Question(CHAT, body)
        body["prompt"] = self._prompt()
        if rng.random() < 0.25:
            body["logprobs"] = rng.randrange(5)
        if rng.random() < 0.1:
            body["echo"] = True
        return Question(COMPLETIONS, body)

    def fresh_grammar(self, number: int) -> tuple[Question, str]:
        """Return a request whose grammar is unique to `number`, and a regular expression that its
        answer must match."""
        pattern = f"[a-f]{{1,12}}-{number}-[x-z]{{1,8}}"
        body = {"prompt": self._text(4), "structured_outputs": {"regex": pattern}}
        sampling = {"temperature": 1.0, "seed": number, "max_tokens": 80}
        return Question(COMPLETIONS, body | sampling | {"return_token_ids": True}), pattern

    def endless(self) -> Question:
        """Return a request for a long answer without a seed, for a client that goes away before its
        end."""
        limits = {"max_tokens": 200, "ignore_eos": True, "n": self._random.choice((1, 1, 3))}
        if self._random.random() < 0.3:
            return Question(CHAT, {"messages": self._messages()} | limits)
        return Question(COMPLETIONS, {"prompt": self._prompt()} | limits)

    def _sampling(self) -> dict[str, Any]:
        rng = self._random
        body: dict[str, Any] = {"temperature": 0}
        if rng.random() < 0.55:
            body = {"temperature": rng.choice((0.5, 0.8, 1.0, 1.4)), "seed": rng.randrange(1000)}
            if rng.random() < 0.4:
                for name, values in rng.sample(_FILTERS, rng.choice((1, 1, 1, 2, 3))):
                    body[name] = rng.choice(values)
        for name, values in (
            ("presence_penalty", (0.5, -0.5)),
            ("frequency_penalty", (0.7, -0.3)),
            ("repetition_penalty", (1.3, 0.9)),
        ):
            if rng.random() < 0.15:
                body[name] = rng.choice(values)
        if rng.random() < 0.15:
            ids = (str(rng.randrange(*self._ids)) for _ in range(rng.randint(1, 5)))
            body["logit_bias"] = {token_id: rng.choice((-100, -2, 3, 6)) for token_id in ids}
        return body

    def _shape(self, body: dict[str, Any]) -> None:
        """Add to `body` the fields on the length, the number and the end of answers, on sharing of
        prefixes, and on priority."""
        rng = self._random
        body["max_tokens"] = rng.choice(self._max_tokens)
        body["return_token_ids"] = rng.random() < 0.85
        if rng.random() < 0.15:
            body["n"] = rng.randint(2, 4)
        if rng.random() < 0.15:
            body["stop"] = rng.sample(["e", "the", " a", "ing", "\n"], rng.randint(1, 2))
            body["include_stop_str_in_output"] = rng.random() < 0.5
        if rng.random() < 0.1:
            body["stop_token_ids"] = [rng.randrange(*self._ids) for _ in range(3)]
        if rng.random() < 0.1:
            body["min_tokens"] = rng.randint(0, body["max_tokens"])
        if rng.random() < 0.2:
            body["cache_salt"] = rng.choice("abc")
        if rng.random() < 0.1:
            body["priority"] = rng.randint(-2, 2)

    def _prompt(self) -> Any:
        rng = self._random
        match rng.randrange(5):
            case 0:
                return self._text(rng.randint(1, 40))
            case 1:
                return [self._text(rng.randint(1, 12)) for _ in range(rng.randint(2, 3))]
            case 2:
                return self._token_ids(rng.choice((1, 15, 16, 17, 100)))
            case _:
                shared = rng.choice(self._documents)
                return shared[: rng.randint(20, len(shared))] + self._token_ids(rng.randint(0, 20))

    def _messages(self) -> list[dict[str, str]]:
        rng = self._random
        messages = [{"role": "user", "content": self._text(rng.randint(1, 12))}]
        if rng.random() < 0.6:
            messages.insert(0, {"role": "system", "content": rng.choice(self._systems)})
        if rng.random() < 0.3:
            messages.append({"role": "assistant", "content": self._text(5)})
            messages.append({"role": "user", "content": self._text(3)})
        return messages

    def _text(self, words: int) -> str:
        return " ".join(self._random.choice(_WORDS) for _ in range(words))

    def _token_ids(self, count: int) -> list[int]:
        return [self._random.randrange(*self._ids) for _ in range(count)]


def parse(text: bytes, stream: bool) -> Answer:
    """Parse an answer with status 200. Raises ValueError if it holds an error, or is not
    complete."""
    if not stream:
        return _collect([json.loads(text)])
    data = [line[6:] for line in text.split(b"\n") if line.startswith(b"data: ")]
    if not data or data.pop().strip() != b"[DONE]":
        raise ValueError("a stream without its end")
    return _collect(map(json.loads, data))


def _collect(events: Iterable[dict[str, Any]]) -> Answer:
    choices: dict[int, dict[str, Any]] = {}
    logprobs: dict[tuple[int, int], list[float]] = {}
    of_the_prompt: list[float] = []
    usage: dict[str, Any] = {}
    for event in events:
        if "error" in event:
            raise ValueError(f"an error event: {event['error'].get('message')}")
        usage = event.get("usage") or usage
        of_the_prompt += _prompt_logprobs(event)
        for part in event["choices"]:
            index = part["index"]
            whole = choices.setdefault(
                index, {"text": "", "calls": {}, "token_ids": [], "finish_reason": None}
            )
            said = part.get("message") or part.get("delta") or part
            whole["text"] += said.get("text") or said.get("content") or ""
            for place, call in enumerate(said.get("tool_calls") or ()):
                function = whole["calls"].setdefault(call.get("index", place), ["", ""])
                function[0] += call["function"].get("name") or ""
                function[1] += call["function"].get("arguments") or ""
            whole["token_ids"] += part.get("token_ids") or ()
            whole["finish_reason"] = part.get("finish_reason") or whole["finish_reason"]
            of_the_prompt += _prompt_logprobs(part)
            for kind, values in enumerate(_logprobs(part.get("logprobs") or {})):
                logprobs.setdefault((index, kind), []).extend(values)
    if not choices or not all(choice["finish_reason"] for choice in choices.values()):
        raise ValueError("a choice without its end")
    tokens = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    return Answer(
        exact=[[choices[index] for index in sorted(choices)], tokens],
        logprobs=of_the_prompt + [value for key in sorted(logprobs) for value in logprobs[key]],
    )


def _logprobs(reported: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return the log-probabilities of an answer's tokens, and those of their alternatives, which
    completions report in two lists."""
    found = reported.get("token_logprobs") or ()
    tokens = [value for value in found if value is not None]
    others = [_ordered((others or {}).values()) for others in reported.get("top_logprobs") or ()]
    for token in reported.get("content") or ():
        tokens.append(token["logprob"])
        others.append(_ordered(other["logprob"] for other in token["top_logprobs"]))
    return tokens, list(chain.from_iterable(others))


def _prompt_logprobs(reported: dict[str, Any]) -> list[float]:
    """Return the log-probabilities of the prompt, which completions report in each choice, and
    chats beside their choices."""
    tokens = reported.get("prompt_logprobs") or ()
    found = (_ordered(one["logprob"] for one in (token or {}).values()) for token in tokens)
    return list(chain.from_iterable(found))


def _ordered(logprobs: Iterable[float]) -> list[float]:
    """Return the log-probabilities sorted, the largest first, because two that are nearly equal may
    come in either order."""
    return sorted(logprobs, reverse=True)
