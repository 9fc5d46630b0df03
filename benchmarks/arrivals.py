"""The requests of a load with shared prefixes: when each is due, its prompt and the length of its
answer. `kv_routing.py` sends them, and `fleet.py` simulates them.

Knows: how they are drawn or read. Knows nothing of who answers them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

TOKENS = range(10, 1000)
"""The ids from which prompts are drawn; ordinary tokens in the vocabulary of most models."""


class Arrival(NamedTuple):
    """A request, due so many milliseconds after the first."""

    due_ms: float
    prompt: list[int]
    output_tokens: int


class Sharing(NamedTuple):
    """How prompts share prefixes.

    fraction: the share of requests that begin with one of `prefixes` shared prefixes.
    tokens: the length of these.
    """

    fraction: float
    prefixes: int
    tokens: int


def drawn(
    number: int,
    rate: float,
    sharing: Sharing,
    own_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    seed: int,
) -> list[Arrival]:
    """Return requests of a Poisson process.

    rate: requests per second.
    own_tokens, output_tokens: the shortest and the longest part of a prompt that is not shared, and
        answer; a request without a shared prefix has as many tokens of its own instead.
    """
    draw = random.Random(seed)
    due = 0.0
    found = []
    for _ in range(number):
        found.append(
            (due, draw.randint(*own_tokens) + sharing.tokens, draw.randint(*output_tokens))
        )
        due += draw.expovariate(rate / 1000)
    return with_prompts(found, sharing, seed)


def recorded(path: Path, sharing: Sharing, seed: int, speedup: float) -> list[Arrival]:
    """Return the requests of a file of `loadgen run --jsonl`, with prompts of the recorded lengths
    that share prefixes as `sharing` says."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [
        (line["due_ms"] / speedup, line["prompt_tokens"], line["output_tokens"])
        for line in lines
        if line["failure"] is None
    ]
    return with_prompts(sorted(found), sharing, seed)


def with_prompts(
    lengths: list[tuple[float, int, int]], sharing: Sharing, seed: int
) -> list[Arrival]:
    """Return requests with random prompts.

    lengths: for each its time, and the lengths of its prompt and answer.
    """
    draw = random.Random(f"prompts {seed}")
    prefixes = [draw.choices(TOKENS, k=sharing.tokens) for _ in range(sharing.prefixes)]
    arrivals = []
    for due, prompt_tokens, output_tokens in lengths:
        shares = draw.random() < sharing.fraction
        prefix = draw.choice(prefixes)[: prompt_tokens - 1] if shares else []
        prompt = [*prefix, *draw.choices(TOKENS, k=prompt_tokens - len(prefix))]
        arrivals.append(Arrival(due, prompt, output_tokens))
    return arrivals


def bounds(text: str) -> tuple[int, int]:
    """Read "16" or "16:64" as the least and the greatest length. Raises ArgumentTypeError."""
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = (0, 0)
    if not 0 < found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; write 16, or 16:64")
    return found
