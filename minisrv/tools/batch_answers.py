"""Answers to the question by which graph one batch runs: `--batch` of `minisrv plan` and `ladder`.

Knows: how a batch is written on a command line, the dispatcher's answer, and how it is said in
words. Knows nothing of engines; times come from those who have measured them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from minisrv.core.dispatcher import Dispatcher
from minisrv.core.graph_times import StepTime
from minisrv.errors import ConfigError
from minisrv.modes import CUDAGraphMode, GraphKey, Reason

REASONS = {
    Reason.PURE_DECODE: "every request decodes, and a FULL graph holds so many",
    Reason.HAS_PREFILL: "some request reads its prompt, and a graph holds so many tokens",
    Reason.SIZE_MISSING: "the graph for so many is not in service, and the next larger one is",
    Reason.CHEAPER: "of the graphs that hold the batch this one was measured to take less time",
    Reason.NO_FULL_GRAPH: "every request decodes, but the mode has no FULL graphs for that",
    Reason.NO_MIXED_GRAPH: "some request reads its prompt, and the mode has no graphs for that",
    Reason.ABOVE_LADDER: "more tokens than the largest graph holds",
    Reason.GRAPHS_OFF: "--enforce-eager, or the mode none",
}
"""Explanations, for the readers of the plan, of the reasons why a batch runs as it does."""

_BATCH = re.compile(
    r"(?:(?:decode:)?(?P<decode>\d{1,7})|mixed:(?P<prefill>\d{1,7})(?:\+(?P<beside>\d{1,7}))?)"
    r"(?::(?P<choice>logprobs|grammar))?"
)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that somebody asks about.

    text: what was asked.
    prefill: the number of tokens of a prompt in it; 0 in a batch for pure decode.
    decodes: the number of requests that decode.
    needs_logits: whether the logits of some request are read or changed.
    has_grammar: whether a grammar restricts some request.
    """

    text: str
    prefill: int
    decodes: int
    needs_logits: bool
    has_grammar: bool

    @classmethod
    def parse(cls, text: str) -> Batch:
        """Return the batch that a text describes. Raises ConfigError."""
        found = _BATCH.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"--batch {text!r} is no batch; write decode:REQUESTS, mixed:PROMPT_TOKENS or "
                "mixed:PROMPT_TOKENS+DECODING_REQUESTS, and :logprobs or :grammar behind it for a "
                "batch in which a request has these."
            )
        prefill = int(found["prefill"] or 0)
        decodes = int(found["decode"] or found["beside"] or 0)
        if found["prefill"] is not None and not prefill:
            raise ConfigError(f"--batch {text}: a mixed batch has prompt tokens; write decode:N.")
        if not prefill and not decodes:
            raise ConfigError(f"--batch {text}: a batch has at least one request.")
        choice = found["choice"]
        return cls(text, prefill, decodes, choice == "logprobs", choice == "grammar")

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return self.prefill + self.decodes

    @property
    def num_reqs(self) -> int:
        """The number of requests; the prompt is one request's."""
        return self.decodes + bool(self.prefill)


def answer(
    batch: Batch, dispatcher: Dispatcher, times: Mapping[GraphKey, StepTime] | None = None
) -> str:
    """Return in one line by which graph a batch runs, and why.

    times: the durations of steps by each graph, if they have been measured.
    Raises ConfigError for a batch that no step can be.
    """
    ladders = dispatcher.ladders
    if batch.num_reqs > ladders.max_num_seqs:
        raise ConfigError(
            f"--batch {batch.text} has {batch.num_reqs} requests, and no step has more than "
            f"--max-num-seqs {ladders.max_num_seqs}."
        )
    if batch.num_tokens > ladders.max_num_batched_tokens:
        raise ConfigError(
            f"--batch {batch.text} has {batch.num_tokens} tokens, and no step has more than "
            f"{ladders.max_num_batched_tokens} (--max-num-batched-tokens, and the context of "
            "--max-num-seqs requests)."
        )
    found = dispatcher.dispatch(
        batch.num_tokens,
        batch.num_reqs,
        query_len=None if batch.prefill else ladders.query_len,
        needs_logits=batch.needs_logits,
        has_structured_output_requests=batch.has_grammar,
    )
    why = f"{found.reason.value}: {REASONS[found.reason]}"
    key = found.descriptor
    unit = "request" if key.uniform_decode else "token"
    size = batch.num_reqs if key.uniform_decode else batch.num_tokens
    if found.mode is CUDAGraphMode.NONE:
        line = f"{batch.text} runs eagerly, without padding ({why})"
    else:
        graph = "a PIECEWISE graph" if found.mode is CUDAGraphMode.PIECEWISE else "a FULL graph"
        line = f"{batch.text} runs by {graph} of {_count(key.num_tokens, unit)}"
        below = _below(found.key, dispatcher)
        line += f", {key.num_tokens - size} of them padding ({why}; {below})"
    if found.epilogue is not None and found.epilogue[0] is not CUDAGraphMode.NONE:
        epilogue = _count(found.epilogue[1].num_tokens, "request")
        line += f", then an epilogue by a FULL graph of {epilogue}"
    measured = (times or {}).get(found.key)
    return f"{line}; {measured.median_ms:.3f} ms." if measured else f"{line}."


def _below(key: GraphKey, dispatcher: Dispatcher) -> str:
    """Return the capture size below that of a graph, in words."""
    sizes = dispatcher.ladders.capture_sizes_of(key[1])
    place = sizes.index(key[1].num_tokens)
    if not place:
        return f"{sizes[place]} is the smallest size"
    return f"the size below is {sizes[place - 1]}"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"
