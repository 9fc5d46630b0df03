"""A tape of requests, the engine run that plays it, and the reference model that judges the tokens.

The tape has requests of mixed lengths: one-token prompts, prompts in chunks, prompts that share a
prefix and whole prompts that come again, under several cache salts; greedy and sampled requests,
late arrivals and aborts. The cache it is played on is so small that requests are preempted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.kernels.sampling import scores
from minisrv.request import EngineRequest, FinishReason, SamplingParams
from tests.checkpoints import make_checkpoint

EPSILON = 1e-3
"""Scores (logits / temperature + noise) that are closer than this may be put in either order by
rounding."""

VOCAB = 4096

LIMITS = {
    "dtype": "float32",
    "max_num_seqs": 12,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "block_size": 4,
    "num_kv_blocks": 90,
}
"""Small limits of the engine, so that prompts come in chunks, decode batches pass many captured
sizes, and the cache is too small for all requests."""


@dataclass(frozen=True)
class Entry:
    """One request, the step at which it arrives, and the number of tokens after which its client
    leaves (None if it stays)."""

    arrival: int
    request: EngineRequest
    abort_after: int | None


def make_model(directory: Path) -> str:
    """Write a model for the tape on a CPU, whose steps take little of the time of a test."""
    return str(make_checkpoint(directory, "qwen3-tied", vocab_size=VOCAB, num_hidden_layers=3))


def make_tape(count: int, vocab_size: int, seed: int = 0) -> list[Entry]:
    """Make a tape of `count` requests. Each request has a seed of its own, because a seed that the
    engine draws would depend on the order of arrival."""
    draw = random.Random(seed)
    stems = [[draw.randrange(vocab_size) for _ in range(120)] for _ in range(3)]
    tape: list[Entry] = []
    for index in range(count):
        length = draw.choice([1, 1, 2, 15, 16, 17, draw.randint(3, 60), draw.randint(60, 200)])
        greedy = draw.random() < 0.5
        params = SamplingParams(
            max_tokens=draw.choice([1, 2, draw.randint(3, 16), draw.randint(40, 56)]),
            temperature=0.0 if greedy else draw.choice([0.5, 0.8, 1.0, 1.7]),
            top_k=draw.choice([0, 0, 1, 5, 40]),
            top_p=draw.choice([1.0, 1.0, 0.9, 0.5]),
            min_p=draw.choice([0.0, 0.0, 0.1]),
            seed=draw.randint(-(2**63), 2**63 - 1),
            ignore_eos=draw.random() < 0.5,
            stop_token_ids=tuple(draw.sample(range(vocab_size), 8)),
            logprobs=draw.choice([None] * 7 + [0, 2]),
        )
        prompt = [draw.randrange(vocab_size) for _ in range(length)]
        arrival, kind = draw.randint(0, count), draw.random()
        # Prompts with a common stem arrive close to each other, or the stem would be evicted from
        # the cache before it is found.
        if kind < 0.4:
            shared = draw.randint(1, 120)
            prompt = stems[arrival * 3 // (count + 1)][:shared] + prompt[: 200 - shared]
        elif kind < 0.6 and tape:
            again = draw.choice(tape)
            arrival = again.arrival + draw.randint(0, 2)
            prompt = again.request.prompt_token_ids
        request = EngineRequest(
            request_id=str(index),
            prompt_token_ids=prompt,
            params=params,
            cache_salt=draw.choice([None, None, None, "salt", "pepper"]),
        )
        leaves = draw.randint(0, 12) if draw.random() < 0.1 else None
        tape.append(Entry(arrival, request, leaves))
    return sorted(tape, key=lambda entry: entry.arrival)


@dataclass
class Played:
    """The outcome of a run of the tape: tokens and finish reason by request, and the engine."""

    tokens: dict[str, list[int]]
    reasons: dict[str, FinishReason]
    engine: EngineCore


def play(tape: list[Entry], config: EngineConfig) -> Played:
    """Run the tape to its end, while the ladders fill between its steps, and check that no block or
    request index is left in use."""
    engine = EngineCore(build_engine(config, check_addresses=True))
    tokens: dict[str, list[int]] = {entry.request.request_id: [] for entry in tape}
    reasons: dict[str, FinishReason] = {}
    leaves = {entry.request.request_id: entry.abort_after for entry in tape}
    waiting = list(tape)
    step = 0
    while waiting or engine.has_work:
        while waiting and (waiting[0].arrival <= step or not engine.has_work):
            engine.add(waiting.pop(0).request)
        ended = []
        for output in engine.step():
            name = output.request_id
            assert name not in reasons, "nothing follows the end"
            tokens[name] += output.token_ids
            if output.finish_reason is not None:
                reasons[name] = output.finish_reason
            elif leaves[name] is not None and len(tokens[name]) > leaves[name]:
                ended.append(name)
        for name in ended:
            output = engine.abort(name)
            assert output is not None
            reasons[name] = output.finish_reason
        engine.advance_background()
        if not engine.background.has_work:
            engine.scheduler.check_integrity()  # else a trial may hold blocks
        step += 1
    assert reasons.keys() == tokens.keys()
    while engine.background.has_work:
        engine.advance_background()
    assert engine.filling.report.graphs == len(engine.runner.ladders.keys())
    assert engine.scheduler.block_pool.num_used == 0
    assert engine.scheduler.req_indices.num_used == 0
    return Played(tokens, reasons, engine)


@torch.no_grad()
def judge(model: PreTrainedModel, entry: Entry, tokens: list[int]) -> tuple[int, list[str]]:
    """Compare a request's tokens with those that the reference model would have chosen behind the
    same tokens. Return how many differ within EPSILON, and a line for each that differs by more."""
    if not tokens:
        return 0, []
    prompt, params = entry.request.prompt_token_ids, entry.request.params
    ids = torch.tensor([prompt + tokens[:-1]])
    logits = model(ids).logits[0, len(prompt) - 1 :].float()
    rows = len(tokens)
    positions = torch.arange(len(prompt), len(prompt) + rows)
    values = scores(
        logits,
        positions,
        temperature=torch.full((rows,), params.temperature),
        top_k=torch.full((rows,), params.top_k),
        top_p=torch.full((rows,), params.top_p),
        min_p=torch.full((rows,), params.min_p),
        seed=torch.full((rows,), params.seed),
    )
    best = values.max(dim=-1)
    chosen = values.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    close, wrong = 0, []
    for row in (best.indices != torch.tensor(tokens)).nonzero().flatten().tolist():
        gap = float(best.values[row] - chosen[row])
        if gap < EPSILON:
            close += 1
        else:
            wrong.append(f"request {entry.request.request_id} token {row}: gap {gap:.4g}")
    return close, wrong
