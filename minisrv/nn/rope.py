"""Rotary position embedding: the table of cosines and sines that the attention op reads.

Knows: the frequencies of each scaling, equal to transformers'. Knows nothing of heads or layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minisrv.config import RopeConfig, RopeScaling


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2] float32: radians per position of each rotated pair."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.scaling is RopeScaling.LINEAR:
        return frequencies / rope.factor
    if rope.scaling is RopeScaling.LLAMA3:
        return _llama3(rope, frequencies)
    return frequencies


def cos_sin_table(
    rope: RopeConfig, head_dim: int, max_positions: int, dtype: torch.dtype
) -> Tensor:
    """[max_positions, 2 * head_dim]: for each element of a head the cosine of its angle, then the
    sine, negative for the first half: x turned is x * cos + (x with its halves swapped) * sin.

    Computed in float32 and rounded to the serving dtype, as transformers does at each use. Pair i
    of a head is its elements i and i + head_dim / 2.
    """
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos, -sin, sin), dim=-1).to(dtype)


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies
