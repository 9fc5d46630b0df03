"""Sampling: the noise is distributed as it should be, the filters keep the right tokens, and rows
do not influence each other."""

from __future__ import annotations

import pytest
import torch

from minisrv.kernels.sampling import gumbel_noise, sample, scores

VOCAB = 64


def parameters(count: int, **given: object) -> dict[str, torch.Tensor]:
    """Make the parameters of `count` request indices, all the same unless a list is given."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    integers = {"top_k", "seed"}
    return {
        name: torch.tensor(
            value if isinstance(value, list) else [value] * count,
            dtype=torch.int64 if name in integers else torch.float32,
        )
        for name, value in (defaults | given).items()
    }


def draw(logits: torch.Tensor, positions: torch.Tensor, **given: object) -> torch.Tensor:
    rows = len(logits)
    out = torch.full((rows,), -1)
    sample(logits, torch.arange(rows), positions, **parameters(rows, **given), out=out)
    return out


def test_greedy_is_argmax_and_ignores_the_filters():
    logits = torch.randn(5, VOCAB)
    found = draw(logits, torch.arange(5), temperature=0.0, top_k=1, top_p=0.1, min_p=1.0)
    assert torch.equal(found, logits.argmax(dim=-1))


def test_samples_follow_the_softmax():
    """A chi-squared test with a fixed outcome over 20,000 positions of one request."""
    count, vocab = 20_000, 8
    logits = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    found = draw(logits.expand(count, vocab), torch.arange(count), temperature=1.3, seed=5)
    seen = torch.bincount(found, minlength=vocab).double()
    wanted = torch.softmax(logits / 1.3, dim=0).double() * count
    chi2 = float(((seen - wanted) ** 2 / wanted).sum())
    assert chi2 < 24.3, "7 degrees of freedom, 0.1%"


def test_noise_is_standard_gumbel_and_uncorrelated():
    noise = gumbel_noise(torch.arange(40), torch.arange(40) * 3, 4096)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.04)
    for other in (
        gumbel_noise(torch.arange(40), torch.arange(40) * 3 + 1, 4096),
        gumbel_noise(torch.arange(40) + (1 << 40), torch.arange(40) * 3, 4096),
        noise.roll(1, dims=1),
        noise.roll(1, dims=0),
    ):
        together = torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))
        assert abs(float(together[0, 1])) < 0.01


def test_positions_are_no_permutations_of_each_other():
    """The noise of different positions consists of different numbers, and not of the same ones in
    another order."""
    noise = gumbel_noise(torch.zeros(200, dtype=torch.int64), torch.arange(200), 512)
    shared = len(noise.flatten().unique())
    assert shared > 0.98 * noise.numel()


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 1, 2**31, 2**63 - 1])
def test_every_seed_is_usable_and_its_own(seed):
    logits = torch.zeros(50, VOCAB)
    found = draw(logits, torch.arange(50), seed=seed)
    assert torch.equal(found, draw(logits, torch.arange(50), seed=seed))
    assert not torch.equal(found, draw(logits, torch.arange(50), seed=seed ^ (1 << 45)))


def test_a_row_does_not_depend_on_the_batch():
    """A sampled row is the same alone and in a batch (vllm#5898 and vllm#17524: the same request
    beside others gave other tokens)."""
    torch.manual_seed(0)
    logits = torch.randn(9, VOCAB)
    mixed = {
        "temperature": [0.0, 0.7, 1.0, 0.0, 2.0, 1.0, 0.3, 1.0, 1.0],
        "top_k": [0, 5, 0, 1, 0, 3, 0, 0, 7],
        "top_p": [1.0, 0.9, 1.0, 0.5, 0.8, 1.0, 1.0, 0.2, 1.0],
        "min_p": [0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0],
        "seed": [3, 1, 4, 1, 5, 9, 2, 6, 5],
    }
    positions = torch.arange(9) + 100
    together = draw(logits, positions, **mixed)
    for row in range(9):
        alone = {name: values[row : row + 1] for name, values in mixed.items()}
        found = draw(logits[row : row + 1], positions[row : row + 1], **alone)
        assert found.item() == together[row].item()


def kept(logits: torch.Tensor, **given: object) -> list[list[int]]:
    rows = len(logits)
    values = scores(logits, torch.arange(rows), **parameters(rows, **given))
    return [row.isfinite().nonzero().flatten().tolist() for row in values]


PROBS = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": -1}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.75}, [1, 3, 4]),
        ({"top_p": 1e-6}, [1]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        # Top-p works on what top-k leaves, renormalised: 0.4 / 0.7 is less than 0.6.
        ({"top_k": 2, "top_p": 0.5}, [1]),
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),
        ({"top_p": 0.75, "min_p": 0.5}, [1, 3]),
        # The temperature comes first: it flattens the distribution that the filters see.
        ({"temperature": 2.0, "min_p": 0.4}, [0, 1, 3, 4]),
    ],
)
def test_filters_keep(given, tokens):
    assert kept(PROBS.log(), **given) == [tokens]


def test_ties_are_cut_at_k_and_always_alike():
    logits = torch.zeros(3, 10)
    assert kept(logits, top_k=4) == [[0, 1, 2, 3]] * 3


def test_half_precision_logits_are_sampled_in_float32():
    logits = torch.randn(4, VOCAB).bfloat16()
    positions = torch.arange(4)
    assert torch.equal(draw(logits, positions), draw(logits.float(), positions))


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-12, 9e-6])
def test_a_temperature_close_to_zero_is_greedy(temperature):
    """A temperature close to 0 is treated as greedy. Dividing by it gave infinities, their
    differences gave NaN, and those token 0."""
    logits = torch.randn(3, VOCAB) * 20
    assert torch.equal(draw(logits, torch.arange(3), temperature=temperature), logits.argmax(-1))


def test_the_smallest_real_temperature_samples_finite_scores():
    values = scores(
        torch.randn(1, VOCAB) * 50,
        torch.zeros(1, dtype=torch.int64),
        **parameters(1, temperature=2e-5),
    )
    assert values.isfinite().all()


def test_filters_of_a_neighbour_change_nothing():
    """A row with top_p 1 keeps all its tokens beside a row that is filtered. A float32 sum of the
    most likely tokens reaches 1 before the last of them, so such a row lost its tail."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4096) * 3
    assert kept(logits) == [list(range(4096))]
    beside = kept(logits.expand(2, -1), top_k=[0, 5], top_p=[1.0, 0.5])
    assert beside[0] == list(range(4096))
