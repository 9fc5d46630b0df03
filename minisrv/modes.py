"""The terms that scheduler, dispatcher and graphs share: modes, graph keys and reasons.

Knows: which runtime modes exist, what identifies a captured graph, and every reason for which a
step can run in a mode, or with a number of prompt tokens. Knows nothing of tensors, requests or
models.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from minisrv.errors import ConfigError


class CUDAGraphMode(enum.Enum):
    """The mode in which a step runs, or in which a server is configured to run its steps.

    The names and meanings are vLLM's. A *runtime* mode is NONE, PIECEWISE or FULL; the *configured*
    mode is any of the five.
    """

    NONE = "none"
    PIECEWISE = "piecewise"
    FULL = "full"
    FULL_DECODE_ONLY = "full-decode-only"
    FULL_AND_PIECEWISE = "full-and-piecewise"

    @classmethod
    def parse(cls, text: str) -> CUDAGraphMode:
        """Return the mode named by `text`, in vLLM's spelling (FULL_AND_PIECEWISE) or with hyphens.

        Raises ConfigError if there is no such mode.
        """
        try:
            return cls(text.lower().replace("_", "-"))
        except ValueError:
            allowed = ", ".join(mode.value for mode in cls)
            raise ConfigError(f"cudagraph_mode={text!r} is none of: {allowed}.") from None

    @property
    def decode_mode(self) -> CUDAGraphMode:
        """The best runtime mode that this configured mode offers to a pure decode batch."""
        return self if self in (self.NONE, self.PIECEWISE) else CUDAGraphMode.FULL

    @property
    def mixed_mode(self) -> CUDAGraphMode:
        """The best runtime mode that this configured mode offers to a batch that holds prefill."""
        if self in (self.PIECEWISE, self.FULL_AND_PIECEWISE):
            return CUDAGraphMode.PIECEWISE
        return CUDAGraphMode.FULL if self is self.FULL else CUDAGraphMode.NONE


class Stage(enum.Enum):
    """A part of a step that is launched as a whole. Every graph runs one stage."""

    MODEL = "model"
    """The model, and in a pure decode batch whatever precedes and follows it, as far as the graph's
    output says."""
    EPILOGUE = "epilogue"
    """Everything that follows the hidden states, if the stage of the model ends with them."""


class StageOutput(enum.Enum):
    """The last result that a stage computes.

    HIDDEN: the hidden states of every token. The rest (the gather of the rows that sample, lm_head
        and sampling) depends on the number of requests only, and is a stage of its own.
    LOGITS: one row of logits per request; sampling follows outside the graph.
    TOKENS: the sampled tokens; the next inputs of the requests are scattered to their rows of the
        persistent tensors too.
    """

    HIDDEN = "hidden"
    LOGITS = "logits"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class BatchDescriptor:
    """The key of a captured graph, which is also the padded shape of a stage.

    num_tokens: the number of tokens, padding included; for an epilogue the number of hidden states
        that it takes.
    num_reqs: the number of requests, padding included. It is None where the graph does not depend
        on it: the pieces of a PIECEWISE capture see only tokens. A FULL graph contains attention,
        which works on the rows of requests.
    query_len: the number of tokens of each request, where it is the same for all of them: in a pure
        decode batch and in its epilogue. None for any other batch.
    stage: the part of the step that the graph runs.
    output: the last result that the graph computes.
    """

    num_tokens: int
    num_reqs: int | None = None
    query_len: int | None = None
    stage: Stage = Stage.MODEL
    output: StageOutput = StageOutput.HIDDEN

    @property
    def uniform_decode(self) -> bool:
        """Whether every request has the same number of tokens and decodes."""
        return self.query_len is not None


GraphKey = tuple[CUDAGraphMode, BatchDescriptor]
"""The identity of a captured graph: its runtime mode and its descriptor."""


class Reason(enum.StrEnum):
    """The reason for which a step ran in its mode. Every step is counted by (mode, reason)."""

    PURE_DECODE = "pure_decode"
    """FULL: every request of the batch is decoding, and a captured decode size holds them."""
    HAS_PREFILL = "has_prefill"
    """PIECEWISE, or FULL where the configured mode is `full`: the batch holds prefill tokens, and a
    captured size for mixed batches holds it."""
    CHEAPER = "cheaper"
    """FULL or PIECEWISE: the graph is not the smallest one that holds the batch, but one that was
    measured to take less time."""
    SIZE_MISSING = "size_missing"
    """The graph of the smallest captured size that holds the batch is not in service: it has not
    been captured yet, was refused, or is quarantined. Another graph runs it, or none (NONE)."""
    NO_FULL_GRAPH = "no_full_graph"
    """PIECEWISE for a pure decode batch: the configured mode captures no FULL graphs."""
    NO_MIXED_GRAPH = "no_mixed_graph"
    """NONE: the batch holds prefill, for which the configured mode captures no graph."""
    ABOVE_LADDER = "above_ladder"
    """NONE: the batch has more tokens than the largest captured size for mixed batches. The cost of
    launches is small beside such a step."""
    GRAPHS_OFF = "graphs_off"
    """NONE: `--enforce-eager` was given, or the configured mode is `none`."""


class BudgetReason(enum.StrEnum):
    """The reason for which a step has its number of prompt tokens. Every step for which prompt
    tokens waited is counted by it."""

    ALL_WAITING = "all_waiting"
    """All prompt tokens that waited are in the step."""
    STEP_LIMIT = "step_limit"
    """The step has `max_num_batched_tokens` tokens."""
    ITL_TARGET = "itl_target"
    """A larger step was predicted to take longer than `itl_target_ms`."""
    FAST_ENOUGH = "fast_enough"
    """A larger step was predicted to compute hardly more tokens per millisecond, or fewer."""
    OVER_ITL_TARGET = "over_itl_target"
    """Every step with prompt tokens was predicted to take longer than `itl_target_ms`, and this one
    does not take much longer than the shortest of them."""
