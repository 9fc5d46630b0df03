"""An arena on a GPU: memory goes and comes back, and addresses and graphs stay valid."""

from __future__ import annotations

import pytest
import torch

from minisrv.arena.cuda import CHUNK_BYTES, CUDAArena, Driver, Span
from tests.gpu_memory import used

pytestmark = pytest.mark.gpu

MIB = 1 << 20
DEVICE = torch.device("cuda", 0)


def arena() -> CUDAArena:
    torch.ones(1, device=DEVICE).fill_(2)  # so that CUDA has loaded what it loads at first
    torch.cuda.empty_cache()  # so that no two tensors of a test share what torch has cached
    return CUDAArena(DEVICE)


def test_memory_is_free_for_others_while_it_is_released() -> None:
    made, before = arena(), used()
    cache = made.empty((512, MIB), dtype=torch.uint8, device=DEVICE)
    assert used() - before >= 512 * MIB
    address = cache.data_ptr()
    for _ in range(3):
        cache.fill_(3)
        made.release(keep=False)
        assert used() - before < 8 * MIB
        made.restore()
        assert used() - before >= 512 * MIB
        assert cache.data_ptr() == address
    del made, cache
    assert used() - before < 8 * MIB


def test_weights_of_several_chunks_come_back_with_their_views() -> None:
    made = arena()
    draw = torch.Generator("cuda").manual_seed(0)
    sizes = (CHUNK_BYTES // 2 + 3, 17, CHUNK_BYTES // 2, 5 * MIB)
    weights = [torch.randn(size, generator=draw, device="cuda") for size in sizes]
    views = [weights[0][4:], weights[3].view(5, MIB).t()]
    parameter = torch.nn.Parameter(weights[2], requires_grad=False)
    copies = [weight.clone() for weight in (*weights, *views)]
    before = used()
    made.adopt([*weights, *views, parameter])
    tensors = [*weights, *views]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert views[0].data_ptr() == weights[0].data_ptr() + 16
    assert parameter.data_ptr() == weights[2].data_ptr()
    assert all(tensor.data_ptr() % 16 == 0 for tensor in weights)
    assert abs(used() - before) < 16 * MIB
    for _ in range(2):
        made.release(keep=True)
        assert before - used() > 4 * sum(sizes) - 16 * MIB
        made.restore()
        assert [tensor.data_ptr() for tensor in tensors] == addresses
        assert all(map(torch.equal, tensors, copies))


def test_a_view_whose_tensor_is_gone_keeps_no_memory() -> None:
    """Linear methods keep a weight turned, and drop the parameter."""
    made = arena()
    weight = torch.nn.Parameter(torch.randn(64, MIB, device=DEVICE), requires_grad=False).t()
    copy, before = weight.clone(), used()
    made.adopt([weight])
    assert abs(used() - before) < 16 * MIB
    made.release(keep=True)
    assert before - used() > 240 * MIB
    made.restore()
    assert torch.equal(weight, copy)


def test_new_values_are_hardly_ever_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that holds a model has no room for another one of its size."""
    made, nbytes = arena(), 100 * MIB
    weights = [torch.zeros(nbytes // 4, device=DEVICE) for _ in range(12)]
    stored = [*weights, weights[3][8:], torch.empty(0, device=DEVICE)]
    made.adopt(stored)
    addresses = [tensor.data_ptr() for tensor in stored]
    made.release(keep=False)
    torch.cuda.empty_cache()
    others = torch.cuda.memory_reserved()
    new = [torch.full_like(weight, 1.0 + number) for number, weight in enumerate(weights)]
    values = [*new, new[3][8:], torch.empty(0, device=DEVICE)]
    del new
    held, map_next = [], Span.map_next

    def noting(span: Span) -> torch.Tensor:
        chunk = map_next(span)
        held.append(torch.cuda.memory_reserved() - others + span.mapped)
        return chunk

    monkeypatch.setattr(Span, "map_next", noting)
    made.refill(values)
    assert not values
    # The fourth stays until its view has been copied.
    assert max(held) <= len(weights) * nbytes + CHUNK_BYTES + 3 * nbytes
    assert [tensor.data_ptr() for tensor in stored] == addresses
    assert all((weight == 1.0 + number).all() for number, weight in enumerate(weights))


def test_a_graph_is_valid_behind_a_release() -> None:
    made = arena()
    weight = torch.randn(512, 512, device="cuda")
    made.adopt([weight])
    x, out = torch.randn(4, 512, device="cuda"), torch.empty(4, 512, device="cuda")
    torch.mm(x, weight, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(x, weight, out=out)
        weight_copy = weight.clone()
    graph.replay()
    expected = out.clone()
    made.release(keep=True)
    made.restore()
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(weight_copy, weight)


def test_memory_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was mapped before the driver had no more is free again, and a later attempt succeeds."""
    made = arena()
    small, large = (made.empty((64, MIB), dtype=torch.uint8, device=DEVICE) for _ in range(2))
    made.release(keep=False)
    before = used()
    put, left = Driver.map, [64 * MIB]

    def with_little_left(driver: Driver, address: int, nbytes: int) -> None:
        if nbytes > left[0]:
            raise torch.OutOfMemoryError("there is no more")
        left[0] -= nbytes
        put(driver, address, nbytes)

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "map", with_little_left)
        with pytest.raises(torch.OutOfMemoryError):
            made.restore()
    assert not left[0], "the first of the two was mapped"
    assert made.is_released
    assert used() - before < 8 * MIB
    made.restore()
    small.fill_(1)
    large.fill_(2)
    assert (small == 1).all()
