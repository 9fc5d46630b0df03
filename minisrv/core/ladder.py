"""The ladders of captured sizes, and the check that they leave no gap.

Knows: which padded sizes get a graph. The sizes of decode graphs and of epilogues count requests,
and the sizes of graphs for mixed batches count tokens. Knows nothing of batches in flight (see the
dispatcher), of tensors, or of what a graph costs.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from minisrv.core.capture_sizes import (
    covering,
    default_decode,
    default_epilogues,
    default_mixed,
    reachable,
)
from minisrv.device_kind import ResolvedConfig
from minisrv.errors import CoverageError
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Stage, StageOutput


@dataclass(frozen=True)
class Ladders:
    """The captured sizes of one server, ascending. If a ladder is empty, no graph of its kind is
    captured.

    decode: the padded numbers of requests with a FULL graph for pure decode.
    mixed: the padded numbers of tokens with graphs for any batch, PIECEWISE or FULL as the mode
        says.
    epilogues: the padded numbers of requests with a FULL graph of everything that follows the
        hidden states.
    max_num_batched_tokens: the number of tokens of the largest step.
    query_len: the number of tokens per request in a graph for pure decode.
    """

    mode: CUDAGraphMode
    decode: tuple[int, ...]
    mixed: tuple[int, ...]
    epilogues: tuple[int, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    query_len: int = 1

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The sizes by kind, in words."""
        return {"decode": self.decode, "mixed": self.mixed, "epilogue": self.epilogues}

    @property
    def eager_sizes(self) -> tuple[int, ...]:
        """The numbers of tokens, ascending, to which steps with prefill are filled that no graph
        holds: a sixteenth of the largest step apart, or without a mixed ladder the default sizes.
        Such a step is not padded, so any number would do; these are enough to choose from."""
        most = self.max_num_batched_tokens
        if not self.mixed:
            return default_mixed(most)
        apart = -(-most // 16)
        sizes = range(self.mixed[-1] + apart, most, apart)
        return (*sizes, most) if self.mixed[-1] < most else ()

    def keys(self) -> list[GraphKey]:
        """Return the key of every graph to capture, the largest of each kind first: the first
        capture determines the size of the memory that the smaller ones share. Epilogues come before
        the steps that they complete."""
        epilogues = [
            (CUDAGraphMode.FULL, epilogue_descriptor(num_reqs, output))
            for num_reqs in self.epilogues
            for output in (StageOutput.TOKENS, StageOutput.LOGITS)
        ]
        mixed = [self.mixed_key(num_tokens) for num_tokens in self.mixed]
        decode = [
            (CUDAGraphMode.FULL, decode_descriptor(num_reqs, output, self.query_len))
            for num_reqs in self.decode
            for output in (StageOutput.TOKENS, StageOutput.HIDDEN)
        ]
        return epilogues[::-1] + mixed[::-1] + decode[::-1]

    def covering(self) -> Ladders:
        """Return ladders of few of these sizes, which hold every batch that these hold. The largest
        sizes are the same, so that a batch is padded further but never left without its graph."""
        return replace(
            self,
            decode=covering(self.decode),
            mixed=covering(self.mixed),
            epilogues=covering(self.epilogues),
        )

    def capture_sizes_of(self, descriptor: BatchDescriptor) -> tuple[int, ...]:
        """Return the ladder to which the graph of `descriptor` belongs."""
        if descriptor.stage is Stage.EPILOGUE:
            return self.epilogues
        return self.decode if descriptor.uniform_decode else self.mixed

    def epilogue_key(self, num_reqs: int, *, needs_logits: bool) -> GraphKey:
        """Return the key of the epilogue of a step of `num_reqs` requests. Its mode is NONE,
        unpadded, if no capture size holds them."""
        capture_size = pad_to_capture_size(self.epilogues, num_reqs)
        mode = CUDAGraphMode.NONE if capture_size is None else CUDAGraphMode.FULL
        output = StageOutput.LOGITS if needs_logits else StageOutput.TOKENS
        return mode, epilogue_descriptor(capture_size or num_reqs, output)

    def mixed_key(self, num_tokens: int) -> GraphKey:
        """Return the key of the mixed graph of `num_tokens` tokens, which is a capture size.

        A FULL graph contains attention and so has a number of rows: as many as a batch of
        `num_tokens` tokens can have.
        """
        mode = self.mode.mixed_mode
        num_reqs = min(num_tokens, self.max_num_seqs) if mode is CUDAGraphMode.FULL else None
        return mode, BatchDescriptor(num_tokens, num_reqs)

    def check_coverage(self) -> None:
        """Raise CoverageError unless every decode batch has the kind of graph that the configured
        mode promises."""
        promised = self.mode.decode_mode
        if promised is CUDAGraphMode.NONE:
            return
        sizes = self.decode if promised is CUDAGraphMode.FULL else self.mixed
        top = sizes[-1] if sizes else 0
        if top < self.max_num_seqs:
            raise CoverageError(
                f"cudagraph_capture_sizes leave decode batches of {top + 1} to "
                f"{self.max_num_seqs} requests without a {promised.name} graph; add "
                f"{self.max_num_seqs} to the sizes, or lower max_num_seqs to {top}."
            )


def decode_descriptor(num_reqs: int, output: StageOutput, query_len: int = 1) -> BatchDescriptor:
    """Return the key of a pure decode batch with `query_len` tokens per request."""
    return BatchDescriptor(num_reqs * query_len, num_reqs, query_len, output=output)


def epilogue_descriptor(num_reqs: int, output: StageOutput) -> BatchDescriptor:
    """Return the key of an epilogue, which takes one hidden state per request."""
    return BatchDescriptor(num_reqs, num_reqs, 1, Stage.EPILOGUE, output)


def pad_to_capture_size(ladder: tuple[int, ...], size: int) -> int | None:
    """Return the smallest capture size that holds `size`; None if the largest does not."""
    index = bisect_left(ladder, size)
    return ladder[index] if index < len(ladder) else None


def build_ladders(
    mode: CUDAGraphMode,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    sizes: tuple[int, ...] | None = None,
    *,
    max_model_len: int | None = None,
    max_default_mixed: int = 2048,
) -> Ladders:
    """Return the ladders of `mode`, from the user's `sizes` or the default ones.

    max_model_len: the maximum number of tokens of a request, if it is known. It bounds the tokens
        of a step, as a request has at most one row in it.

    The last size of a default ladder is exactly the largest size that a batch can have (for mixed
    batches at most `max_default_mixed`). Only those of the user's sizes are left out that no
    batch could ever reach (`plan` shows what is captured).
    """
    if max_model_len is not None:
        max_num_batched_tokens = min(max_num_batched_tokens, max_num_seqs * max_model_len)
    decode: tuple[int, ...] = ()
    mixed: tuple[int, ...] = ()
    epilogues: tuple[int, ...] = ()
    if mode.decode_mode is CUDAGraphMode.FULL:
        decode = reachable(sizes or default_decode(max_num_seqs), max_num_seqs)
        epilogues = reachable(sizes or default_epilogues(max_num_seqs), max_num_seqs)
    if mode.mixed_mode is not CUDAGraphMode.NONE:
        top = min(max_num_batched_tokens, max_default_mixed)
        mixed = reachable(sizes or default_mixed(top), max_num_batched_tokens)
    return Ladders(mode, decode, mixed, epilogues, max_num_seqs, max_num_batched_tokens)


def ladders_of(config: ResolvedConfig, max_model_len: int | None = None) -> Ladders:
    """Return the ladders with which a configuration is served. Raises CoverageError for a gap.

    max_model_len: see `build_ladders`. It changes nothing about gaps.
    """
    ladders = build_ladders(
        config.cudagraph_mode,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.cudagraph_capture_sizes,
        max_model_len=max_model_len,
        max_default_mixed=config.kind.max_default_mixed,
    )
    ladders.check_coverage()
    return ladders
