"""The ladders of captured sizes, and what they leave uncovered.

Knows: which padded sizes get a graph. Rungs of decode and of epilogues count requests,
mixed rungs count tokens.
Knows nothing of batches in flight (the dispatcher's), of tensors, or of what a graph costs.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from minisrv.config import EngineConfig
from minisrv.errors import ConfigError, CoverageError
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Epilogue, GraphKey

MIXED_TOP = 2048
"""No default rung of the mixed ladder is higher. On an H100 an eager step of Qwen3-0.6B takes 1.8
times as long as a PIECEWISE one at 1,024 tokens and 1.16 times at 2,048 (docs/results): above there
is little to win, and a graph's memory grows with its tokens."""


@dataclass(frozen=True)
class Ladders:
    """The rungs of one server, ascending. An empty ladder means its mode is not captured.

    decode: padded numbers of requests with a FULL graph for pure decode.
    mixed: padded numbers of tokens with graphs for any batch, PIECEWISE or FULL as the mode says.
    epilogues: padded numbers of requests with a FULL graph of what follows the hidden states.
    """

    mode: CUDAGraphMode
    decode: tuple[int, ...]
    mixed: tuple[int, ...]
    epilogues: tuple[int, ...]
    max_num_seqs: int
    max_num_batched_tokens: int

    def keys(self) -> list[GraphKey]:
        """Every graph to capture, largest first of each kind: the first capture sizes the memory
        that the smaller ones share. Epilogues come before the steps that they end."""
        epilogues = [
            (CUDAGraphMode.FULL, epilogue_descriptor(num_reqs, epilogue))
            for num_reqs in self.epilogues
            for epilogue in (Epilogue.TOKENS, Epilogue.LOGITS)
        ]
        mixed = [self.mixed_key(num_tokens) for num_tokens in self.mixed]
        decode = [
            (CUDAGraphMode.FULL, decode_descriptor(num_reqs, epilogue))
            for num_reqs in self.decode
            for epilogue in (Epilogue.TOKENS, Epilogue.HIDDEN)
        ]
        return epilogues[::-1] + mixed[::-1] + decode[::-1]

    def rungs_of(self, descriptor: BatchDescriptor) -> tuple[int, ...]:
        """The ladder that a graph belongs to."""
        if not descriptor.forward:
            return self.epilogues
        return self.decode if descriptor.uniform_decode else self.mixed

    def epilogue_key(self, num_reqs: int, *, needs_logits: bool) -> GraphKey:
        """What follows the hidden states of a step of so many requests; NONE, unpadded, where no
        rung holds them."""
        rung = rung_of(self.epilogues, num_reqs)
        mode = CUDAGraphMode.NONE if rung is None else CUDAGraphMode.FULL
        epilogue = Epilogue.LOGITS if needs_logits else Epilogue.TOKENS
        return mode, epilogue_descriptor(rung or num_reqs, epilogue)

    def mixed_key(self, num_tokens: int) -> GraphKey:
        """The graph of a mixed rung. One that holds attention holds rows: as many as a batch of so
        many tokens can have."""
        mode = self.mode.mixed_mode
        num_reqs = min(num_tokens, self.max_num_seqs) if mode is CUDAGraphMode.FULL else None
        return mode, BatchDescriptor(num_tokens, num_reqs)

    def check_coverage(self) -> None:
        """Raise CoverageError unless every decode batch has the kind of graph that the
        configured mode promises it."""
        promised = self.mode.decode_mode
        if promised is CUDAGraphMode.NONE:
            return
        rungs = self.decode if promised is CUDAGraphMode.FULL else self.mixed
        top = rungs[-1] if rungs else 0
        if top < self.max_num_seqs:
            raise CoverageError(
                f"cudagraph_capture_sizes leave decode batches of {top + 1} to "
                f"{self.max_num_seqs} requests without a {promised.name} graph; add "
                f"{self.max_num_seqs} to the sizes, or lower max_num_seqs to {top}."
            )


def decode_descriptor(num_reqs: int, epilogue: Epilogue) -> BatchDescriptor:
    """The key of a pure decode batch: one token a request."""
    return BatchDescriptor(num_reqs, num_reqs, uniform_decode=True, epilogue=epilogue)


def epilogue_descriptor(num_reqs: int, epilogue: Epilogue) -> BatchDescriptor:
    """The key of what follows the hidden states: one of them a request."""
    return replace(decode_descriptor(num_reqs, epilogue), forward=False)


def rung_of(ladder: tuple[int, ...], size: int) -> int | None:
    """The smallest rung that holds `size`; None above the top."""
    index = bisect_left(ladder, size)
    return ladder[index] if index < len(ladder) else None


def build_ladders(
    mode: CUDAGraphMode,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    sizes: tuple[int, ...] | None = None,
) -> Ladders:
    """The ladders of `mode`: the user's `sizes` as they are given, or the default ones.

    A default ladder holds its exact top. Of the user's sizes only those are left out that no
    batch could ever reach (`plan` shows what is captured).
    """
    decode: tuple[int, ...] = ()
    mixed: tuple[int, ...] = ()
    epilogues: tuple[int, ...] = ()
    if mode.decode_mode is CUDAGraphMode.FULL:
        decode = _reachable(sizes or _default_decode(max_num_seqs), max_num_seqs)
        epilogues = _reachable(sizes or _default_epilogues(max_num_seqs), max_num_seqs)
    if mode.mixed_mode is not CUDAGraphMode.NONE:
        top = min(max_num_batched_tokens, MIXED_TOP)
        mixed = _reachable(sizes or _default_mixed(top), max_num_batched_tokens)
    return Ladders(mode, decode, mixed, epilogues, max_num_seqs, max_num_batched_tokens)


def captures_mixed(device: str) -> bool:
    """Whether a graph may hold attention for mixed batches: whether its kernels take nothing of
    their lengths from the host. For "auto" the engine asks again when it knows."""
    return device != "cpu"


def ladders_of(config: EngineConfig) -> Ladders:
    """The ladders that a configuration serves with. Raises CoverageError for a gap, and ConfigError
    for graphs of mixed batches that hold attention, on a device where they cannot."""
    if config.graph_mode is CUDAGraphMode.FULL and not captures_mixed(config.device):
        raise ConfigError(
            "cudagraph_mode=full captures mixed batches in one graph, and on "
            f"device={config.device} the attention kernels take the lengths of a mixed batch from "
            "the host; use full-and-piecewise (the default here) or full-decode-only, or a GPU."
        )
    ladders = build_ladders(
        config.graph_mode,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.cudagraph_capture_sizes,
    )
    ladders.check_coverage()
    return ladders


def _default_decode(top: int) -> tuple[int, ...]:
    """1, 2, 4, then steps of 8 up to 64, of 16 up to 256, of 32 above."""
    rungs = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, top, 32)]
    return (*(rung for rung in rungs if rung < top), top)


def _default_epilogues(top: int) -> tuple[int, ...]:
    """Powers of two: beside the weights of lm_head, which any number of rows reads once, and the
    step before it, a row of padding costs little."""
    rungs = [1 << bits for bits in range(top.bit_length())]
    return (*(rung for rung in rungs if rung < top), top)


def _default_mixed(top: int) -> tuple[int, ...]:
    """Powers of two, from 32 on with the half steps between them."""
    rungs = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    return (*(rung for rung in rungs if rung < top), top)


def _reachable(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Ascending, without repeats, up to the first size that holds `most`."""
    rungs = sorted(set(sizes))
    below = [rung for rung in rungs if rung < most]
    return (*below, *rungs[len(below) : len(below) + 1])
