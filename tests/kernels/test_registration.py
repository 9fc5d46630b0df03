"""Every op is registered in the one way, and its implementations take the same arguments."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload

from minisrv import kernels
from minisrv.kernels import DIRECT
from minisrv.kernels.linear import skinny_gemm_op
from minisrv.kernels.registration import imported_at_first_call, register_op

OPS = [op for op in vars(kernels).values() if isinstance(op, OpOverload)] + [skinny_gemm_op]
SOURCES = Path(kernels.__file__).parent.glob("*.py")
PLACES = sorted(
    {
        place
        for source in SOURCES
        for place in re.findall(r'"(minisrv\.kernels\.\w+:\w+)"', source.read_text())
    }
)
"""The places of functions that are imported at their first call."""


def double(x: Tensor, out: Tensor) -> None:
    torch.mul(x, 2, out=out)


@pytest.mark.parametrize("device", ["cpu", "every_device"])
def test_an_op_runs_its_function_and_traces_as_one_call(device: str) -> None:
    name, schema = f"double_on_{device}", "(Tensor x, Tensor(a!) out) -> ()"
    op = register_op(name, schema, **{device: double})  # type: ignore[arg-type]
    assert DIRECT.pop(op) is double
    x, out = torch.ones(3), torch.zeros(3)
    op(x, out)
    assert out.tolist() == [2, 2, 2]
    torch.library.opcheck(op, (x, out))


def test_an_op_cannot_be_defined_twice() -> None:
    schema = "(Tensor x, Tensor weight, Tensor(a!) out, *, float eps) -> ()"
    with pytest.raises(RuntimeError, match="rms_norm"):
        register_op("rms_norm", schema, cpu=double)


def test_a_module_is_imported_at_the_first_call() -> None:
    call = imported_at_first_call("minisrv.kernels.no_such_module:function")
    with pytest.raises(ImportError, match="no_such_module"):
        call()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name())
def test_ops_write_and_return_nothing(op: OpOverload) -> None:
    assert not op._schema.returns
    assert any(argument.is_write for argument in op._schema.arguments)


@pytest.mark.parametrize("path", PLACES)
def test_functions_for_cuda_are_where_they_are_said_to_be(path: str) -> None:
    """No type checker sees these names. The function of an op takes the op's arguments."""
    pytest.importorskip("triton")
    function = resolve_name(path)
    name = path.partition(":")[2]
    ops = [op for op in OPS if op.name() == f"minisrv::{name}"]
    assert ops or name == "write_values"
    for op in ops:
        expected = [(a.name, a.kwarg_only) for a in op._schema.arguments]
        parameters = inspect.signature(function).parameters.values()
        assert [(p.name, p.kind is p.KEYWORD_ONLY) for p in parameters] == expected
