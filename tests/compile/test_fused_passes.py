"""What products and the attention op take over from the code around them, on models of a few
operations: each pass finds its pattern however it is written, and leaves alone what only looks like
it. The result is that of the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from minisrv.compile.decorator import support_torch_compile
from minisrv.compile.passes import apply_passes
from minisrv.compile.program import Program
from minisrv.compile.split import split
from minisrv.compile.trace import trace
from minisrv.compile.values import Description
from minisrv.kernels.linear import UnquantizedLinearMethod
from minisrv.nn.transformers_model import Linear
from tests.compile.interpreted import InterpretedPiece

HIDDEN = 32
EPS = 1e-5

Block = Callable[["Tiny", Tensor], Tensor]


@support_torch_compile(dynamic_dims={"input_ids": 0, "positions": 0, "out": 0})
class Tiny(nn.Module):
    """A model whose forward is a block behind an embedding and a product that is added to it."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.dtype = block, dtype
        self.config = SimpleNamespace(hidden_size=HIDDEN)
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> nn.Parameter:
            value = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
            return nn.Parameter(value.to(dtype), requires_grad=False)

        def linear(width: int, inputs: int = HIDDEN) -> Linear:
            return Linear(UnquantizedLinearMethod(drawn(width, inputs).detach(), None), width)

        self.embedding, self.weight, self.bias = drawn(10, HIDDEN), drawn(HIDDEN), drawn(HIDDEN)
        self.first, self.second, self.up = linear(HIDDEN), linear(HIDDEN), linear(HIDDEN)
        self.gate_up, self.down = linear(2 * HIDDEN), linear(HIDDEN, 2 * HIDDEN)

    def allocate_buffers(self, max_num_tokens: int) -> None:
        self.qkv = self.attn_out = torch.zeros(max_num_tokens, 1)

    def forward(self, input_ids: Tensor, positions: Tensor, out: Tensor) -> None:
        embedded = self.embedding[input_ids][None]
        out.copy_(self.block(self, embedded + self.first(2 * embedded))[0])


def rewritten(block: Block, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Return the number of matches of each pass in a model of this block, once the result has been
    found to be that of the model."""
    traced = trace(lambda: Tiny(block, dtype), "cpu")
    matches = apply_passes(traced)
    schedule = split(traced)
    model = Tiny(block, dtype)
    model.allocate_buffers(8)
    pieces = [InterpretedPiece(piece) for piece in schedule.pieces]
    program = Program(Description(8, {}, [], schedule.calls), pieces, model)  # type: ignore[arg-type]
    ids = torch.tensor([3, 1, 4, 1, 5])
    expected, computed = (torch.empty(5, HIDDEN, dtype=dtype) for _ in range(2))
    with torch.inference_mode():
        model.forward(ids, ids, expected)
        program(ids, ids, computed)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(computed, expected, atol=tolerance, rtol=tolerance)
    return matches


def llama(model: Tiny, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return model.weight * normed.to(x.dtype)


def gemma(model: Tiny, x: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + model.weight.float())).type_as(x)


def weight_in_float32(model: Tiny, x: Tensor) -> Tensor:
    wide = x.float()
    root = torch.pow(torch.mean(wide * wide, dim=-1, keepdim=True) + EPS, -0.5)
    return (root * wide * model.weight).to(x.dtype)


def torchs(model: Tiny, x: Tensor) -> Tensor:
    return rms_norm(x, (HIDDEN,), model.weight, EPS)


NORMS = [llama, gemma, weight_in_float32, torchs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_every_form_of_a_norm_is_found(norm: Block, dtype: torch.dtype):
    matches = rewritten(lambda model, x: model.second(norm(model, x)), dtype)
    assert matches["products added to residuals"] == 1
    assert matches["norms in products"] == 1


def root_of_half(model: Tiny, x: Tensor) -> Tensor:
    """Norms by the mean of half of the elements."""
    return x * torch.rsqrt(x[..., : HIDDEN // 2].pow(2).mean(-1, keepdim=True) + EPS) * model.weight


def of_rows(model: Tiny, x: Tensor) -> Tensor:
    """Norms the columns."""
    return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + EPS) * model.weight


def cubes(model: Tiny, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS) * model.weight


def weightless(model: Tiny, x: Tensor) -> Tensor:
    return rms_norm(x, (HIDDEN,), None, EPS)


def of_layer(model: Tiny, x: Tensor) -> Tensor:
    return layer_norm(x, (HIDDEN,), model.weight, model.bias, EPS)


@pytest.mark.parametrize("norm", [root_of_half, of_rows, cubes, weightless, of_layer])
def test_what_looks_like_a_norm_is_none(norm: Block):
    matches = rewritten(lambda model, x: model.second(norm(model, x)))
    assert matches["norms in products"] == 0


def test_a_norm_of_each_head_is_not_fused():
    def block(model: Tiny, x: Tensor) -> Tensor:
        heads = llama(model, model.gate_up(x).unflatten(-1, (2, HIDDEN)))
        return model.down(heads.flatten(-2))

    assert rewritten(block)["norms in products"] == 0


def test_a_norm_that_something_else_needs_is_not_fused():
    def block(model: Tiny, x: Tensor) -> Tensor:
        normed = llama(model, x)
        return model.second(normed) * normed

    assert rewritten(block)["norms in products"] == 0


def test_a_norm_of_what_a_kernel_of_the_compiler_makes_is_not_fused():
    matches = rewritten(lambda model, x: model.second(llama(model, x * 2)))
    assert matches["norms in products"] == 0


def test_a_norm_of_what_has_changed_since_is_not_fused():
    def block(model: Tiny, x: Tensor) -> Tensor:
        normed = llama(model, x)
        total = x + model.second(2 * normed)
        return total * model.up(normed.clone())

    matches = rewritten(block)
    assert matches["products added to residuals"] == 2
    assert matches["norms in products"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_a_normed_product_is_added_and_normed_for_the_next(norm: Block, dtype: torch.dtype):
    def block(model: Tiny, x: Tensor) -> Tensor:
        total = x + norm(model, model.second(2 * x))
        return norm(model, model.up(norm(model, total))) + total

    matches = rewritten(block, dtype)
    assert matches["normed products added to residuals"] == 1, "no product comes behind the second"
    assert matches["norms in products"] == 0, "it has been done"


def test_a_normed_product_is_added_for_a_product_without_a_norm():
    def block(model: Tiny, x: Tensor) -> Tensor:
        total = llama(model, model.second(2 * x)) + x
        return model.up(total) * total

    assert rewritten(block)["normed products added to residuals"] == 1


def test_a_norm_with_another_eps_is_left_alone():
    def block(model: Tiny, x: Tensor) -> Tensor:
        total = x + llama(model, model.second(2 * x))
        return model.up(rms_norm(total, (HIDDEN,), model.weight, 2 * EPS))

    assert rewritten(block)["normed products added to residuals"] == 0


def test_what_looks_like_a_normed_product_that_is_added_is_none():
    def fused(added: Block) -> int:
        matches = rewritten(lambda model, x: model.up(added(model, x)))
        return matches["normed products added to residuals"]

    def used_twice(model: Tiny, x: Tensor) -> Tensor:
        normed = llama(model, model.second(2 * x))
        return x + normed + normed

    def of_both_halves(model: Tiny, x: Tensor) -> Tensor:
        heads = llama(model, model.gate_up(x).unflatten(-1, (2, HIDDEN)))
        return (x[:, :, None] + heads).sum(-2)

    assert fused(lambda model, x: x + llama(model, model.second(2 * x))) == 1
    assert fused(lambda model, x: x + llama(model, model.second(x).tanh())) == 0
    assert fused(lambda model, x: x - llama(model, model.second(x))) == 0
    assert fused(lambda model, x: (x + llama(model, model.second(x))) * x) == 0
    assert fused(used_twice) == 0
    assert fused(of_both_halves) == 0


def test_a_residual_is_not_overwritten_by_what_is_normed_if_it_is_read_later():
    def block(model: Tiny, x: Tensor) -> Tensor:
        return model.up(x + llama(model, model.second(2 * x))) * x

    assert rewritten(block)["normed products added to residuals"] == 0


def test_a_residual_that_is_read_later_is_kept():
    def block(model: Tiny, x: Tensor) -> Tensor:
        return (x + model.second(x)) * x

    assert rewritten(block)["products added to residuals"] == 1, "the one before the block"


def test_a_product_that_is_read_besides_is_kept():
    def block(model: Tiny, x: Tensor) -> Tensor:
        product = model.second(x)
        return x + product + product.tanh()

    assert rewritten(block)["products added to residuals"] == 1, "the one before the block"


def test_a_scaled_product_is_not_added():
    matches = rewritten(lambda model, x: x + 0.5 * model.second(x))
    assert matches["products added to residuals"] == 1, "the one before the block"


def test_gate_and_up_of_one_product_or_of_two_are_gated():
    def two(model: Tiny, x: Tensor) -> Tensor:
        normed = llama(model, x)
        return silu(model.second(normed)) * model.up(normed)

    def one(model: Tiny, x: Tensor) -> Tensor:
        gate, up = model.gate_up(llama(model, x)).chunk(2, dim=-1)
        return up * silu(gate)

    assert rewritten(two)["gates in products"] == rewritten(one)["gates in products"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gate", [silu, partial(gelu, approximate="tanh")])
def test_every_gate_is_fused(gate: Callable[[Tensor], Tensor], norm: bool, dtype: torch.dtype):
    def block(model: Tiny, x: Tensor) -> Tensor:
        first, second = model.gate_up(llama(model, x) if norm else x).chunk(2, dim=-1)
        return gate(first) * second

    assert rewritten(block, dtype)["gates in products"] == 1


def test_other_gates_are_left_alone():
    def gated(gate: Callable[[Tensor, Tensor], Tensor]) -> int:
        def block(model: Tiny, x: Tensor) -> Tensor:
            first, second = model.gate_up(llama(model, x)).chunk(2, dim=-1)
            return gate(first, second)

        return rewritten(block)["gates in products"]

    assert gated(lambda first, second: gelu(first) * second) == 0
    assert gated(lambda first, second: first * silu(second)) == 0, "the second half is the gate"
    assert gated(lambda first, second: silu(first) * second * second) == 0
    assert gated(lambda first, second: silu(first) * first) == 0
