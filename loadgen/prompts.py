"""Makes the bodies of requests.

A body is a pure function of (config, level, phase, index), and, in a chat of several turns, of the
answers before it: two runs with the same seed send the same requests, whatever their order or the
number of processes. No two requests of a run share a prompt, so that the server's prefix cache has
no chance hits, unless shared prefixes, chats of several turns or a trace with them are asked for.

Knows: the JSON of /completions and /chat/completions. Knows nothing of how bodies are sent.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from loadgen import traces
from loadgen.lengths import draw
from loadgen.records import PromptKind, RunConfig

_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work night point "
    "home water room mother area money story fact month lot right study book eye job word business "
    "issue side kind head house service friend father power hour game line end member law car city"
)
_WORDS = _TEXT.split()

_PREFIXES, _BLOCKS = 3, 4
"""The third number of the seeds of prefixes and of a trace's blocks: others are 0 or 1, the phase,
and 2 for the times of `arrivals`."""


class Request(msgspec.Struct, frozen=True):
    """One request that can be sent."""

    index: int
    """The index of its conversation in the phase."""
    turn: int
    body: bytes
    output_tokens: int
    """The number of tokens that it asks for."""


def endpoint(config: RunConfig) -> str:
    """Return the URL to which requests are sent."""
    chat = config.prompt_kind is PromptKind.CHAT
    return config.base_url + ("/chat/completions" if chat else "/completions")


class Conversation:
    """The requests that are sent one after the other, each when the answer to the last has come.
    Most conversations have one request; only chats may have more."""

    def __init__(self, config: RunConfig, level: int, warmup: bool, index: int) -> None:
        """Make conversation `index` of the `level`-th load.

        warmup: whether it belongs to the warm-up, or else to the measurement.
        """
        self._config = config
        self._seed = [config.seed, level]
        self._warmup = warmup
        self._index = index
        self._rng = np.random.default_rng([*self._seed, int(warmup), index])
        self._turn = 0
        self._messages: list[dict[str, str]] = []
        self.turns = draw(config.turns, self._rng)

    def request(self) -> Request:
        """Return the next request. Those after the first need `add_answer` before."""
        config = self._config
        output_tokens, ids = self._lengths_and_ids()
        body: dict[str, object] = {
            "model": config.model,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if config.ignore_eos:
            body["ignore_eos"] = True
        if config.return_token_ids:
            body["return_token_ids"] = True
        prefix = self._prefix() if self._turn == 0 else []
        if config.prompt_kind is PromptKind.TOKENS:
            body["prompt"] = prefix + ids
        elif config.prompt_kind is PromptKind.TEXT:
            body["prompt"] = _text(prefix + ids)
        else:
            if prefix:
                self._messages.append({"role": "system", "content": _text(prefix)})
            self._messages.append({"role": "user", "content": _text(ids)})
            body["messages"] = self._messages
        self._turn += 1
        body |= config.extra_body
        return Request(self._index, self._turn - 1, msgspec.json.encode(body), output_tokens)

    def add_answer(self, text: str) -> None:
        """Add the answer to the last request, which the next one holds."""
        self._messages.append({"role": "assistant", "content": text})

    def _lengths_and_ids(self) -> tuple[int, list[int]]:
        """Return the length of the answer, and the prompt without a shared prefix, as token ids or
        as indices of words."""
        config = self._config
        if config.trace is None:
            input_tokens = draw(config.input_tokens, self._rng)
            return draw(config.output_tokens, self._rng), self._ids(self._rng, input_tokens)
        arrivals = traces.read(config.trace.path)
        arrival = arrivals[self._index % len(arrivals)]
        ids = []
        for block in arrival.hash_ids:
            # The warm-up has blocks of its own, so that it fills no cache for the measurement.
            rng = np.random.default_rng([*self._seed, _BLOCKS, int(self._warmup), block])
            ids += self._ids(rng, traces.BLOCK_TOKENS)
        ids += self._ids(self._rng, max(0, arrival.input_length - len(ids)))
        return arrival.output_length, ids[: arrival.input_length]

    def _prefix(self) -> list[int]:
        """Return the shared prefix of this conversation, which may be empty. The warm-up has the
        same ones, so that the measurement finds them in a cache."""
        config = self._config
        if not config.prefix_tokens:
            return []
        number = int(self._rng.integers(config.num_prefixes))
        rng = np.random.default_rng([*self._seed, _PREFIXES, number])
        return self._ids(rng, config.prefix_tokens)

    def _ids(self, rng: np.random.Generator, count: int) -> list[int]:
        tokens = self._config.prompt_kind is PromptKind.TOKENS
        low, high = self._config.token_range if tokens else (0, len(_WORDS))
        ids: list[int] = rng.integers(low, high, count).tolist()
        return ids


def _text(ids: Sequence[int]) -> str:
    return " ".join(_WORDS[i] for i in ids)
