"""The words that scheduler, dispatcher and graphs share: modes, keys, reasons.

Knows: which runtime modes exist, what identifies a captured graph, and every reason for
which a step can run in a mode. Knows nothing of tensors, requests or models.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from minisrv.errors import ConfigError


class CUDAGraphMode(enum.Enum):
    """How a step runs, or (the last two as well) how a server is configured to run its steps.

    The names and meanings are vLLM's. A *runtime* mode is NONE, PIECEWISE or FULL; the
    *configured* mode is any of the five.
    """

    NONE = "none"
    PIECEWISE = "piecewise"
    FULL = "full"
    FULL_DECODE_ONLY = "full-decode-only"
    FULL_AND_PIECEWISE = "full-and-piecewise"

    @classmethod
    def parse(cls, text: str) -> CUDAGraphMode:
        """The mode of that name, in vLLM's spelling (FULL_AND_PIECEWISE) or with hyphens.

        Raises ConfigError.
        """
        try:
            return cls(text.lower().replace("_", "-"))
        except ValueError:
            allowed = ", ".join(mode.value for mode in cls)
            raise ConfigError(f"cudagraph_mode={text!r} is none of: {allowed}.") from None

    @property
    def decode_mode(self) -> CUDAGraphMode:
        """The best runtime mode this configured mode offers a pure decode batch."""
        return self if self in (self.NONE, self.PIECEWISE) else CUDAGraphMode.FULL

    @property
    def mixed_mode(self) -> CUDAGraphMode:
        """The best runtime mode this configured mode offers a batch that holds prefill."""
        if self in (self.PIECEWISE, self.FULL_AND_PIECEWISE):
            return CUDAGraphMode.PIECEWISE
        return CUDAGraphMode.FULL if self is self.FULL else CUDAGraphMode.NONE


class Epilogue(enum.Enum):
    """What a step's graph leaves behind.

    HIDDEN: hidden states of every token. What follows depends on rows only, and is a graph of its
        own: row gather, lm_head and what comes behind it.
    LOGITS: one row of logits per request; sampling follows outside the graph.
    TOKENS: sampled tokens, and the requests' next inputs scattered to their slots.
    """

    HIDDEN = "hidden"
    LOGITS = "logits"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class BatchDescriptor:
    """The key of a captured graph, and the padded shape of a step.

    `num_reqs` is None where the graph does not depend on it: pieces of a PIECEWISE capture
    see tokens only. A FULL graph holds attention, which sees rows.
    `forward` is False where the model is not in it: the epilogue of a step that has ended at the
    hidden states, which takes one of them for each request.
    """

    num_tokens: int
    num_reqs: int | None = None
    uniform_decode: bool = False
    epilogue: Epilogue = Epilogue.HIDDEN
    forward: bool = True


class Part(enum.Enum):
    """Of what a step launches."""

    FORWARD = "forward"
    """The step's graph: all of it, or up to the hidden states."""
    EPILOGUE = "epilogue"
    """What follows hidden states."""


GraphKey = tuple[CUDAGraphMode, BatchDescriptor]
"""A captured graph: its runtime mode and its descriptor."""


class Reason(enum.StrEnum):
    """Why a step ran in the mode it ran in. Every step is counted by (mode, reason)."""

    PURE_DECODE = "pure_decode"
    """FULL: every request of the batch is decoding and a decode rung holds them."""
    HAS_PREFILL = "has_prefill"
    """PIECEWISE, or FULL where the configured mode is `full`: the batch holds prefill tokens and a
    mixed rung holds it."""
    CHEAPER = "cheaper"
    """FULL or PIECEWISE: not the smallest graph that holds the batch, but one that was measured to
    take less time."""
    NO_FULL_GRAPH = "no_full_graph"
    """PIECEWISE for a pure decode batch: the configured mode captures no FULL graphs."""
    NO_MIXED_GRAPH = "no_mixed_graph"
    """NONE: the batch holds prefill, for which the configured mode captures nothing."""
    ABOVE_LADDER = "above_ladder"
    """NONE: more tokens than the top mixed rung; a launch costs little beside such a step."""
    GRAPHS_OFF = "graphs_off"
    """NONE: `--enforce-eager`, or the configured mode is `none`."""
