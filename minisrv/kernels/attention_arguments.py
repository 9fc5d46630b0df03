"""The arguments of attention: the description of a layer, and the metadata of a step.

A step is described once for all layers, and a layer once for all steps, so that the kernels for
both devices take the same two objects beside a layer's input and output. Knows nothing of how
attention is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minisrv.model_config import MAX_HEAD_DIM


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one layer: its shape, its weights and its part of the KV cache.

    num_heads, num_kv_heads: the numbers of query heads and of key heads; the first is a multiple of
        the second.
    head_dim: the number of elements of a head, `MAX_HEAD_DIM` at most; kernels take any number.
    scale: the factor of scores before the softmax.
    q_norm, k_norm: [head_dim] RMSNorm weights of queries and keys, both or neither.
    eps: the number that these norms add to the mean square.
    cos_sin: [max_positions, 2 * head_dim], the rotation table (`nn.rope`), for an even head_dim;
        None where queries and keys are not rotated, or have been.
    kv_cache: [num_blocks, block_size, 2 (k, v), num_kv_heads, head_dim].
    sliding_window: the number of positions that a query sees, at least 1, its own included:
        position i sees those j for which i - sliding_window < j <= i. Entries before the window of
        all queries of a row are not read, nor are their blocks looked up. None: it sees all.
    logit_soft_cap: the bound, above 0, of scores after scaling: a score becomes
        logit_soft_cap * tanh(score / logit_soft_cap). None: there is no bound.
    sinks: [num_heads], one more score for each head, neither scaled nor bounded, which takes part
        in the softmax without a value: it only makes the other weights smaller. None: there is
        none.

    All tensors have the model's dtype.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    cos_sin: Tensor | None
    kv_cache: Tensor
    sliding_window: int | None = None
    logit_soft_cap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.head_dim <= MAX_HEAD_DIM, "checked with the config"
        assert self.sliding_window is None or self.sliding_window > 0, "checked with the config"


@dataclass(frozen=True)
class AttentionMetadata:
    """The description of a step for attention. Tensors are views of static buffers.

    There are R rows (requests) and T tokens in the padded step. Tokens beyond `query_start_loc[R]`
    belong to no request, and attention writes zeros as their output. Where a graph contains
    attention too, rows are padded as well; the padding rows of a mixed batch are empty.

    slot_mapping: [T] int64, the cache position (block * block_size + offset) that each token
        writes; padding tokens write to the null block.
    block_table: [R, max_blocks] int32, padded with the null block 0.
    seq_lens: [R] int32, the number of tokens in the cache once the step has written its own.
    query_start_loc: [R + 1] int32, monotone; the step's tokens of row r are query_start_loc[r] to
        query_start_loc[r + 1], and are the last of its sequence. A row may be empty.
    max_query_len: an upper bound of the number of tokens in a row; 1 only where every row has one
        token and T is R. It is a Python number, so that a graph which contains attention keeps the
        value from its capture.
    """

    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
