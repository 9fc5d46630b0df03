"""The bookkeeping of a step on CUDA does what the CPU's does, in Triton's interpreter without a GPU
and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minisrv.kernels.step_inputs import Write, gather_mixed, write_values
from minisrv.kernels.triton_step_inputs import gather_mixed as triton_gather_mixed
from minisrv.kernels.triton_step_inputs import write_values as triton_write_values

INTERPRETED = pytest.param(
    "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no interpreter")
)
DEVICES = pytest.mark.parametrize(
    "device", [INTERPRETED, pytest.param("cuda", marks=pytest.mark.gpu)]
)


@DEVICES
@pytest.mark.parametrize("number", [1, 255, 256, 700])
def test_values_go_to_their_places(device: str, number: int) -> None:
    """Values of every kind are written, in order or by index, long beside short and empty, and
    nothing else is written."""
    draw = np.random.default_rng(number)
    large = np.array([2**62 + 1, -(2**62), -1], np.int64)
    places = draw.permutation(1000)[:number].astype(np.int64)
    floats = draw.normal(size=number)

    def writes(where: str) -> list[Write]:
        ints = draw.integers(-(2**31), 2**31, number)
        return [
            Write(torch.full((1000,), 7, device=where), ints, None),
            Write(torch.full((1000,), 7, dtype=torch.int32, device=where), ints, None),
            Write(torch.full((20, 50), 7, dtype=torch.int32, device=where), ints, places),
            Write(torch.full((5,), 7, device=where), large, np.array([4, 0, 2])),
            Write(torch.full((1000,), 7.0, device=where), floats, places),
            Write(torch.full((3,), 7, device=where), ints[:0], None),
        ]

    expected = writes("cpu")
    found = [write._replace(target=write.target.to(device, copy=True)) for write in expected]
    write_values(expected, torch.from_numpy)
    triton_write_values(found, lambda packed: torch.from_numpy(packed).to(device))
    for right, own in zip(expected, found, strict=True):
        assert torch.equal(own.target.cpu(), right.target)
    assert expected[3].target.tolist() == [-(2**62), 7, -1, 7, 2**62 + 1]
    assert (expected[2].target == 7).sum() >= 1000 - number


@DEVICES
@pytest.mark.parametrize(
    ("decodes", "lengths"),
    [(1, []), (3, []), (0, [1]), (1, [1]), (0, [300, 1, 40]), (3, [300, 1, 40])],
)
@pytest.mark.parametrize("padding", [0, 1, 400])
def test_what_lies_by_slot_is_gathered(
    device: str, decodes: int, lengths: list[int], padding: int
) -> None:
    """The inputs of a mixed step are gathered for decodes, chunks behind histories, empty rows and
    padding tokens; of a block table as many entries as are in use."""
    lengths = [1] * decodes + lengths
    empty = 2 if padding else 0
    tokens, rows = sum(lengths), len(lengths) + empty
    size, width = 16, 40
    g = torch.Generator().manual_seed(tokens)
    starts = torch.randint(300, (rows,), generator=g)
    counts = torch.tensor(lengths + [0] * empty)
    starts[len(lengths) :] = 0
    pad = torch.zeros(padding, dtype=torch.int64)
    token_rows = torch.repeat_interleave(torch.arange(rows), counts)
    positions = torch.cat([starts[r] + torch.arange(int(n)) for r, n in enumerate(counts)])
    req_indices = 1 + torch.randperm(20, generator=g)[:rows]
    req_indices[len(lengths) :] = 0
    inputs: dict[str, Any] = {
        "req_indices": req_indices,
        "last_token": torch.randint(1000, (21,), generator=g),
        "req_block_tables": torch.randint(900, (21, width), generator=g, dtype=torch.int32),
        "positions": torch.cat([positions, pad]),
        "token_rows": torch.cat([token_rows, pad]),
        "seq_lens": (starts + counts).to(torch.int32),
        "input_ids": torch.arange(5000, 5000 + tokens + padding),
        "slot_mapping": torch.full((tokens + padding,), -1),
        "block_table": torch.full((rows, width), -1, dtype=torch.int32),
    }
    sizes = {"num_decodes": decodes, "num_tokens": tokens, "block_size": size}
    expected = {name: tensor.clone() for name, tensor in inputs.items()}
    gather_mixed(**expected, **sizes)
    found = {name: tensor.to(device, copy=True) for name, tensor in inputs.items()}
    triton_gather_mixed(**found, **sizes)
    for name in ("input_ids", "slot_mapping"):
        assert torch.equal(found[name].cpu(), expected[name]), name
    for row in range(rows):
        used = -(-int(expected["seq_lens"][row]) // size)
        own = found["block_table"][row].cpu()
        assert torch.equal(own[:used], expected["block_table"][row, :used])
    assert (expected["slot_mapping"][tokens:] == 0).all()
    assert expected["input_ids"][:decodes].tolist() == [
        int(inputs["last_token"][req_index]) for req_index in req_indices[:decodes]
    ]
