"""An arena on a CPU: pages go and come back behind the same addresses."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from minisrv.arena import CPUArena
from minisrv.machine import resident_memory

MIB = 1 << 20
DEVICE = torch.device("cpu")


def released_by(arena: CPUArena, *, keep: bool) -> int:
    """Release an arena, and return how many bytes of memory the process has fewer."""
    before = resident_memory()
    arena.release(keep=keep)
    return before - resident_memory()


def test_memory_goes_and_addresses_stay() -> None:
    arena = CPUArena()
    cache = arena.empty((64, MIB), dtype=torch.uint8, device=DEVICE)
    cache.fill_(3)
    address = cache.data_ptr()
    assert released_by(arena, keep=False) > 60 * MIB
    assert arena.is_released
    arena.restore()
    assert not arena.is_released
    assert cache.data_ptr() == address
    assert not cache[1:-1].any()
    assert (cache.fill_(5) == 5).all()


def test_what_is_kept_comes_back_until_it_is_forgotten() -> None:
    """The memory of the host is where a copy would be, so nothing moves."""
    arena = CPUArena()
    weight = torch.full((32 * MIB,), 3, dtype=torch.uint8)
    view = weight[MIB:]
    arena.adopt([weight, view])
    assert released_by(arena, keep=True) < MIB
    arena.restore()
    assert (weight == 3).all()
    arena.release(keep=True)
    before = resident_memory()
    arena.forget()
    assert before - resident_memory() > 30 * MIB
    arena.restore()
    assert not view[:-MIB].any()


def test_a_weight_in_a_layout_of_a_library() -> None:
    plain = torch.randn(2048, 2048)

    def reordered() -> Tensor:
        made: Tensor = torch.ops.mkldnn._reorder_linear_weight(plain)
        return made

    weight = reordered()
    address = torch.ops.mkldnn.data_ptr(weight)
    arena = CPUArena()
    arena.adopt([weight])
    assert released_by(arena, keep=False) > 15 * MIB
    arena.restore()
    weight.copy_(reordered())
    assert torch.equal(weight.to_dense(), plain)
    assert torch.ops.mkldnn.data_ptr(weight) == address


def test_what_lies_beside_stays() -> None:
    """Only whole pages go: those at both ends may hold memory of others."""
    everything = np.full(1 << 20, 7, dtype=np.uint8)
    arena = CPUArena()
    arena.adopt([torch.from_numpy(everything[5000:900_000])])
    arena.release(keep=False)
    arena.restore()
    assert (everything[:5000] == 7).all()
    assert (everything[900_000:] == 7).all()
    assert not everything[5000 + mmap.PAGESIZE : 900_000 - mmap.PAGESIZE].any()


def test_new_values_take_the_place_of_the_old_ones() -> None:
    arena = CPUArena()
    weights = [torch.full((4 * MIB,), number, dtype=torch.uint8) for number in range(3)]
    addresses = [weight.data_ptr() for weight in weights]
    arena.adopt(weights)
    arena.release(keep=False)
    values = [torch.full_like(weight, 7 + number) for number, weight in enumerate(weights)]
    arena.refill(values)
    assert not arena.is_released
    assert not values
    assert [weight.data_ptr() for weight in weights] == addresses
    assert all((weight == 7 + number).all() for number, weight in enumerate(weights))
