"""Programmatic dependent launch: the edges that a capture gets, and that it changes no bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from minisrv.kernels import triton_launch
from minisrv.kernels.attention import attention_op
from minisrv.kernels.linear import Norm, lay_out

pytestmark = pytest.mark.gpu
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, BLOCK, LAYERS = 8, 4, 64, 512, 16, 6
PROGRAMMATIC = 1
"""cudaGraphDependencyTypeProgrammatic."""


class Chain:
    """Layers of a decoder, as a decode step launches them, on `rows` rows of random lengths."""

    def __init__(self, rows: int, capacity: int) -> None:
        g = torch.Generator("cuda").manual_seed(rows)
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)

        def layer() -> tuple[Tensor, ...]:
            return (
                draw(width, HIDDEN) / 20,
                draw(HIDDEN, HEADS * HEAD_DIM) / 20,
                draw(2 * 1024, HIDDEN) / 20,
                draw(HIDDEN, 1024) / 20,
            )

        self.layers = [[lay_out(weight, None) for weight in layer()] for _ in range(LAYERS)]
        self.norm = Norm(draw(HIDDEN), 1e-5)
        blocks = capacity // BLOCK
        shape = (rows * blocks + 1, BLOCK, 2, KV_HEADS, HEAD_DIM)
        self.caches = [draw(*shape) for _ in self.layers]
        self.table = torch.arange(1, rows * blocks + 1, device="cuda", dtype=torch.int32)
        self.table = self.table.view(rows, blocks)
        self.lengths = torch.randint(
            1, capacity, (rows,), generator=g, device="cuda", dtype=torch.int32
        )
        self.starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
        self.cos_sin = draw(capacity, 2 * HEAD_DIM)
        self.x = draw(rows, HIDDEN)
        self.qkv, self.out = draw(rows, width), draw(rows, HEADS * HEAD_DIM)
        self.gated = draw(rows, 1024)
        self.residual = torch.empty_like(self.x)

    def run(self) -> None:
        self.residual.copy_(self.x)
        positions = self.lengths.long() - 1
        block = self.table.gather(1, (positions // BLOCK)[:, None])[:, 0]
        slots = block.long() * BLOCK + positions % BLOCK
        for (qkv, o, gate_up, down), cache in zip(self.layers, self.caches, strict=True):
            qkv.write_to(self.qkv, self.residual, self.norm)
            attention_op(
                self.qkv,
                positions,
                cache,
                slots,
                self.table,
                self.lengths,
                self.starts,
                self.out,
                max_query_len=1,
                cos_sin=self.cos_sin,
                q_norm=None,
                k_norm=None,
                eps=1e-5,
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
            )
            o.add_to(self.residual, self.out)
            gate_up.write_gated_to(self.gated, self.residual, self.norm)
            down.add_to(self.residual, self.gated)


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph


def edge_types(graph: torch.cuda.CUDAGraph) -> list[int]:
    """By CUDA's runtime: a dependency's type is byte 2 of its `cudaGraphEdgeData`."""
    runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).split('.')[0]}")
    handle, number = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(0)
    assert runtime.cudaGraphGetEdges(handle, None, None, None, ctypes.byref(number)) == 0
    ends = (ctypes.c_void_p * number.value)(), (ctypes.c_void_p * number.value)()
    data = (ctypes.c_uint8 * (8 * number.value))()
    assert runtime.cudaGraphGetEdges(handle, *ends, data, ctypes.byref(number)) == 0
    return [data[8 * index + 2] for index in range(number.value)]


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_the_captured_edges_are_programmatic(rows: int) -> None:
    types = edge_types(captured(Chain(rows, 256).run))
    assert types.count(PROGRAMMATIC) >= 5 * LAYERS - 1


@pytest.mark.parametrize("capacity", [128, 2048])
@pytest.mark.parametrize("rows", [1, 2, 8, 32])
def test_no_bit_depends_on_it(rows: int, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(rows, capacity)
    monkeypatch.setattr(triton_launch, "enabled", lambda: False)
    without = captured(chain.run)
    without.replay()
    expected = chain.residual.clone(), [cache.clone() for cache in chain.caches]
    monkeypatch.undo()
    with_it = captured(chain.run)
    for _ in range(50):
        chain.residual.fill_(torch.nan)
        with_it.replay()
        assert torch.equal(chain.residual, expected[0])
    for cache, written in zip(chain.caches, expected[1], strict=True):
        assert torch.equal(cache, written)
