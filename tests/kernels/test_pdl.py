"""Programmatic dependent launch: a capture gets edges of that type, and no bit of the results
changes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from minisrv.kernels import (
    AttentionLayer,
    AttentionMetadata,
    add_rms_norm_op,
    attention,
    gather_decode_op,
    rms_norm_op,
    take_rows_op,
    tiles,
    triton_launch,
)
from minisrv.kernels.linear import LINEAR_METHODS, Norm

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, BLOCK, LAYERS, VOCAB = 8, 4, 64, 512, 16, 6, 100
INTERMEDIATE = 4608
"""A width at which, with 64 rows, cuBLAS computes the gate and up product, between kernels that are
launched programmatically."""
PROGRAMMATIC = 1
"""The value of cudaGraphDependencyTypeProgrammatic."""


class Chain:
    """The kernels of a decode step up to its last layer, launched as in a model, for `rows`
    requests of random lengths.

    behind: whether the model norms behind its products too, as Gemma does.
    state: the tensors by request index from which the step gathers its inputs.
    inputs: the tensors that it gathers.
    """

    def __init__(self, rows: int, capacity: int, behind: bool) -> None:
        self.behind = behind
        self.g = g = torch.Generator("cuda").manual_seed(rows)
        self.rows, self.capacity = rows, capacity
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, device="cuda", dtype=dtype)

        def layer() -> tuple[Tensor, ...]:
            return (
                draw(width, HIDDEN) / 20,
                draw(HIDDEN, HEADS * HEAD_DIM) / 20,
                draw(2 * INTERMEDIATE, HIDDEN) / 20,
                draw(HIDDEN, INTERMEDIATE) / 50,
            )

        make = LINEAR_METHODS[None]
        self.layers = [[make(weight, None) for weight in layer()] for _ in range(LAYERS)]
        self.norm, self.embedding = Norm(draw(HIDDEN), 1e-5), draw(VOCAB, HIDDEN)
        blocks = capacity // BLOCK
        shape = (rows * blocks + 1, BLOCK, 2, KV_HEADS, HEAD_DIM)
        self.caches = [draw(*shape) for _ in self.layers]
        self.req_indices = torch.arange(1, rows + 1, device="cuda")
        self.last_token, self.next_position = zeros(rows + 1), zeros(rows + 1)
        self.req_block_tables = zeros(rows + 1, blocks, dtype=torch.int32)
        self.inputs = (
            *(zeros(rows), zeros(rows), zeros(rows, dtype=torch.int32), zeros(rows)),
            zeros(rows, blocks, dtype=torch.int32),
        )
        self.starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
        self.cos_sin = draw(capacity, 2 * HEAD_DIM)
        self.qkv, self.out = draw(rows, width), draw(rows, HEADS * HEAD_DIM)
        self.gated, self.residual = draw(rows, INTERMEDIATE), draw(rows, HIDDEN)
        self.product, self.normed = draw(rows, HIDDEN), draw(rows, HIDDEN)
        self.draw_state()

    def draw_state(self) -> None:
        """Draw other lengths, tokens and blocks."""
        g, blocks = self.g, self.req_block_tables.shape[1]
        draw = partial(torch.randint, generator=g, device="cuda")
        self.next_position[1:] = draw(0, self.capacity, (self.rows,))
        self.last_token[1:] = draw(0, VOCAB, (self.rows,))
        order = torch.randperm(self.rows * blocks, generator=g, device="cuda") + 1
        self.req_block_tables[1:] = order.view(self.rows, blocks)

    def poison(self) -> None:
        """Fill inputs and results with values of no step, so that a kernel that reads one too early
        gives another result."""
        made = self.residual, self.qkv, self.out, self.gated, self.product, self.normed
        for tensor in made:
            tensor.fill_(torch.nan)
        for tensor in self.inputs:
            tensor.zero_()

    def run(self) -> None:
        ids, positions, lengths, mapping, table = self.inputs
        state = self.req_indices, self.last_token, self.next_position, self.req_block_tables
        gather_decode_op(*state, *self.inputs, block_size=BLOCK)
        take_rows_op(self.embedding, ids, self.residual)
        metadata = AttentionMetadata(mapping, table, lengths, self.starts, max_query_len=1)
        if self.behind:
            rms_norm_op(self.residual, self.norm.weight, self.normed, eps=self.norm.eps)
        for (qkv, o, gate_up, down), cache in zip(self.layers, self.caches, strict=True):
            if self.behind:
                qkv.apply_to(self.normed, self.qkv)
            else:
                qkv.apply_with_norm(self.residual, self.norm, self.qkv)
            layer = AttentionLayer(
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                scale=HEAD_DIM**-0.5,
                q_norm=None,
                k_norm=None,
                eps=1e-5,
                cos_sin=self.cos_sin,
                kv_cache=cache,
            )
            attention(layer, self.qkv, positions, metadata, self.out)
            if self.behind:
                o.apply_to(self.out, self.product)
                self.add_normed()
                gate_up.apply_gated(self.normed, None, "gelu_tanh", self.gated)
                down.apply_to(self.gated, self.product)
                self.add_normed()
                continue
            o.apply_with_residual(self.out, self.residual)
            gate_up.apply_gated(self.residual, self.norm, "silu", self.gated)
            down.apply_with_residual(self.gated, self.residual)

    def add_normed(self) -> None:
        """Add the normed product to the residual, and norm that."""
        weight, eps = self.norm
        add_rms_norm_op(self.product, weight, self.residual, weight, self.normed, eps=eps)


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph


def edge_types(graph: torch.cuda.CUDAGraph) -> list[int]:
    """Return the types of the graph's edges from CUDA's runtime: a dependency's type is byte 2 of
    its `cudaGraphEdgeData`."""
    runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).split('.')[0]}")
    handle, number = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(0)
    assert runtime.cudaGraphGetEdges(handle, None, None, None, ctypes.byref(number)) == 0
    ends = (ctypes.c_void_p * number.value)(), (ctypes.c_void_p * number.value)()
    data = (ctypes.c_uint8 * (8 * number.value))()
    assert runtime.cudaGraphGetEdges(handle, *ends, data, ctypes.byref(number)) == 0
    return [data[8 * index + 2] for index in range(number.value)]


@pytest.mark.parametrize(("behind", "kernels"), [(False, 2 + 5 * LAYERS), (True, 3 + 7 * LAYERS)])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_the_captured_edges_are_programmatic(rows: int, behind: bool, kernels: int) -> None:
    types = edge_types(captured(Chain(rows, 256, behind).run))
    assert types.count(PROGRAMMATIC) == kernels - 1, "all but the first kernel's"


def test_a_chain_may_hold_cublas() -> None:
    """At 64 rows the gate and up product has no tile and is cuBLAS's, so the tests at that size
    cover a library kernel between programmatic launches."""

    def of(rows: int, n: int, k: int, *, gated: bool = False) -> object:
        return tiles.tile(rows, n, k, 2, gated=gated, add=not gated)

    assert of(64, 2 * INTERMEDIATE, HIDDEN, gated=True) is None
    assert of(64, HIDDEN, INTERMEDIATE) is not None
    assert of(32, 2 * INTERMEDIATE, HIDDEN, gated=True) is not None


@pytest.mark.parametrize("capacity", [128, 2048])
@pytest.mark.parametrize("rows", [1, 2, 8, 32, 64, 65])
@pytest.mark.parametrize("behind", [False, True])
def test_no_bit_depends_on_it(
    behind: bool, rows: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(rows, capacity, behind)
    caches = [cache.clone() for cache in chain.caches]

    def replayed(graph: torch.cuda.CUDAGraph) -> list[Tensor]:
        for cache, before in zip(chain.caches, caches, strict=True):
            cache.copy_(before)
        chain.poison()
        graph.replay()
        return [tensor.clone() for tensor in (chain.residual, *chain.caches)]

    monkeypatch.setattr(triton_launch, "enabled", lambda: False)
    without = captured(chain.run)
    monkeypatch.undo()
    with_it = captured(chain.run)
    for _ in range(30):
        chain.draw_state()
        expected = replayed(without)
        assert expected[0].isfinite().all()
        assert all(map(torch.equal, replayed(with_it), expected))
