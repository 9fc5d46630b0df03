"""Rotary position embedding: the table of cosines and sines that the attention op reads.

Knows: the frequencies of each scaling, equal to transformers'. Knows nothing of heads or layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minisrv.model_config import RopeConfig, RopeScaling


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return [head_dim / 2] float32, the radians per position of each rotated pair."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    match rope.scaling:
        case RopeScaling.DEFAULT | RopeScaling.DYNAMIC:
            return frequencies
        case RopeScaling.LINEAR:
            return frequencies / rope.factor
        case RopeScaling.LLAMA3:
            return _llama3(rope, frequencies)
        case RopeScaling.YARN:
            return _yarn(rope, frequencies, head_dim)


def cos_sin_table(
    rope: RopeConfig, head_dim: int, max_positions: int, dtype: torch.dtype
) -> Tensor:
    """Return the `rotation_table` of a model."""
    frequencies = inverse_frequencies(rope, head_dim)
    return rotation_table(frequencies, rope.attention_factor, max_positions, dtype)


def rotation_table(
    frequencies: Tensor, scale: float, max_positions: int, dtype: torch.dtype
) -> Tensor:
    """Return [max_positions, 2 * head_dim]: for each element of a head the cosine of its angle,
    then the sine, negative for the first half. The rotation of x is x * cos + (x with its halves
    swapped) * sin.

    frequencies: [head_dim / 2] float32, the radians per position of each rotated pair.
    scale: the factor of cosines and sines.

    The table is computed in float32 and rounded to the dtype of serving, as transformers does at
    each use. Pair i of a head consists of its elements i and i + head_dim / 2.
    """
    positions = torch.arange(max_positions, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos, -sin, sin), dim=-1).to(dtype)


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Return frequencies with long waves stretched by `factor`, short ones kept and those between
    blended."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """Return frequencies by YaRN (arXiv:2309.00071): pairs that turn often within the original
    context are kept, those that turn rarely are stretched by `factor`, and those between are
    blended along a ramp."""

    def pair_that_turns(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # as transformers does, for a step rather than a division by zero
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)
    stretched = ramp.clamp(0.0, 1.0)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)
