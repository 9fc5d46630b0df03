"""In bfloat16, the type that GPUs serve, greedy tokens are as close to float32's choice as those of
a plain transformers model are.

Rounding decides between tokens whose logits are close, so no two implementations choose the same
ones. So each token is judged behind the engine's own tokens by its regret: how far its logit in
float32 is below the best one. It is compared with the regret of the token that transformers would
have chosen in bfloat16. A kernel that loses more precision than the type does shows in the mean
regret, one that is wrong shows in the largest.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from minisrv import LLM, SamplingParams
from minisrv.checkpoint import resolve_checkpoint
from tests.checkpoints import make_checkpoint

BATCHES = (1, 6, 13, 30, 60)
"""Numbers of requests in a batch: one for each kind of kernel that multiplies few rows."""

TOKENS = 16
WIDE = {"hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
MODELS = {
    "default": None,
    "llama-biases": WIDE | HEADS,
    "qwen2-tied": WIDE | HEADS,
    "qwen3": WIDE | HEADS | {"head_dim": 128},
}
"""The default model, and random ones whose rows are so wide that several parts of a kernel's tile
make up one."""


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = MODELS[request.param]
    if shape is None:
        return resolve_checkpoint(None)
    directory = tmp_path_factory.mktemp("model")
    return make_checkpoint(directory, request.param, dtype=torch.bfloat16, **shape)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Return the logits, float32 [TOKENS, vocab], from which the last TOKENS tokens of `ids` are
    chosen."""
    logits: Tensor = model(torch.tensor([ids[:-1]]), logits_to_keep=TOKENS).logits
    return logits[0].float()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tokens_are_as_good_as_a_plain_models(checkpoint: Path, device: str) -> None:
    """The mean regret is at most about 1.5 times, and the largest about twice, that of transformers
    in bfloat16."""
    llm = LLM(
        str(checkpoint),
        device=device,
        dtype="bfloat16",
        max_num_seqs=64,
        max_num_batched_tokens=128,
        max_model_len=128,
        num_kv_blocks=600,
    )
    draw, vocab = random.Random(0), llm.engine.info.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    exact, plain = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    regrets, plain_regrets = [], []
    for batch in BATCHES:
        prompts = [draw.choices(range(vocab), k=draw.randint(1, 60)) for _ in range(batch)]
        for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
            tokens = output.outputs[0].token_ids
            best = logits_of(exact, prompt + tokens)
            chosen = torch.tensor(tokens), logits_of(plain, prompt + tokens).argmax(dim=1)
            ours, others = (
                best.amax(dim=1) - best.gather(1, choice[:, None]).squeeze(1) for choice in chosen
            )
            regrets.append(ours / best.std(dim=1))
            plain_regrets.append(others / best.std(dim=1))
    ours, others = torch.cat(regrets), torch.cat(plain_regrets)
    print(
        f"regret, in standard deviations of the logits: mean {ours.mean():.2e} and "
        f"{others.mean():.2e}, most {ours.max():.3f} and {others.max():.3f}; not float32's choice: "
        f"{(ours > 0).float().mean():.2%} and {(others > 0).float().mean():.2%}"
    )
    assert ours.mean() <= 1.5 * others.mean() + 1e-4
    assert ours.max() <= 2 * others.max() + 1e-2
