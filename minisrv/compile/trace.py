"""Traces the forward of a model as one graph, for any number of tokens, without weights.

Knows: how a model is made of tensors that have shapes and no memory, what Dynamo has to be told to
trace it once, and where in the model each tensor of the graph is found. Knows nothing of attention,
of pieces or of how a graph is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from minisrv.compile.values import Argument, Path, Source, Weight
from minisrv.errors import CompilationError
from minisrv.kernels.linear import LinearMethod
from minisrv.kernels.linear_op import TracedLinearMethod

EXAMPLE_ROWS = 6
"""Number of tokens in the step that is traced. With one or none, Dynamo would make a graph for that
number only."""

ARGUMENTS = ("input_ids", "positions", "out")
"""The arguments of a model's forward."""


@dataclass(frozen=True)
class Trace:
    """The graph of a model's forward.

    graph: torch's operations, in the order in which they run; those on static buffers are in place.
        A node's `meta["example_value"]` is its value in the step that was traced.
    sources: for each tensor that is an input of the graph, by the name of its node, where it is
        found.
    rows: the number of tokens as the symbol that stands for it.
    """

    graph: fx.GraphModule
    sources: dict[str, Source]
    rows: torch.SymInt


class _TracedError(Exception):
    """Ends the step that is traced."""


def fake_mode() -> FakeTensorMode:
    """Return the mode in which tensors have shapes and no memory, and sizes may be symbols."""
    # Some models make tensors on the meta device in a way that this mode does not see.
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def trace(make_model: Callable[[], Any], device: str) -> Trace:
    """Trace the forward of a model.

    make_model: returns the model, ready to run; it is called where tensors have no memory.
    device: the device of the model.
    Raises CompilationError if there is anything in the forward that is not in the graph.
    """
    with fake_mode():
        model = make_model()
        model.allocate_buffers(EXAMPLE_ROWS)
        make_products_ops(model)
        ids, positions = (
            torch.empty(EXAMPLE_ROWS, dtype=torch.int64, device=device) for _ in range(2)
        )
        hidden = (EXAMPLE_ROWS, model.config.hidden_size)
        arguments = ids, positions, torch.empty(hidden, dtype=model.dtype, device=device)
    forward = type(model).forward

    def step(input_ids: Tensor, positions: Tensor, out: Tensor) -> None:
        # Without this there would be a symbol for each of the three lengths.
        torch._check(input_ids.shape[0] == positions.shape[0])
        torch._check(input_ids.shape[0] == out.shape[0])
        forward(model, input_ids, positions, out)

    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        graphs.append((graph, examples))

        def stop(*_: Any) -> Any:
            raise _TracedError

        return stop

    for name, argument in zip(ARGUMENTS, arguments, strict=True):
        torch._dynamo.mark_dynamic(argument, model.dynamic_dims[name])
    torch._dynamo.reset()
    try:
        with torch.no_grad(), suppress(_TracedError):
            torch.compile(step, fullgraph=True, backend=backend)(*arguments)
    except Unsupported as error:
        raise CompilationError(f"the model cannot be traced as one graph: {error}") from error
    [(graph, examples)] = graphs
    places: dict[int, Source]
    places = {id(tensor): Weight(path) for path, tensor in _tensors_of(model)}
    places |= {
        id(tensor): Argument(name) for name, tensor in zip(ARGUMENTS, arguments, strict=True)
    }
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    sources: dict[str, Source] = {}
    for node, example in zip(inputs, examples, strict=True):
        if isinstance(example, Tensor):
            if id(example) not in places:
                raise CompilationError(
                    f"the model uses a tensor that is none of its parameters or buffers: {node}."
                )
            sources[node.name] = places[id(example)]
    [first] = [node for node in inputs if sources.get(node.name) == Argument("input_ids")]
    return Trace(graph, sources, first.meta["example_value"].shape[0])


def make_products_ops(model: nn.Module) -> None:
    """Make each product of the model one op."""
    for module in model.modules():
        if isinstance(method := getattr(module, "method", None), LinearMethod):
            width: Any = module.out_features
            module.method = TracedLinearMethod(method, width)  # type: ignore[assignment]


def _tensors_of(model: nn.Module) -> list[tuple[Path, Tensor]]:
    """Return the parameters, the buffers, and the tensors of the linear methods, by their paths."""
    named = [*model.named_parameters(), *model.named_buffers()]
    found = [(tuple(name.split(".")), tensor) for name, tensor in named]
    for name, module in model.named_modules():
        method = getattr(module, "method", None)
        if isinstance(method, LinearMethod):
            path = (*name.split("."), "method", "tensors")
            found += [((*path, str(i)), tensor) for i, tensor in enumerate(method.tensors)]
    return found
