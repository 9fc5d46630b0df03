"""Models that torch.compile compiles as a whole, in the process that serves them: modes 1 and 2.

Knows: torch.compile's options, and on which steps a model is run so that it is compiled before it
serves. Attention is not computed in these runs, so no KV cache is needed. Knows nothing of requests
or graphs.

Mode 1 keeps Dynamo's guards, so a step unlike all before it is compiled when it comes. Mode 2
drops them: what has been traced serves every step, and a second trace is an error.

What Inductor keeps on disk is code, and pickles of code, which the next start runs. It lies in the
cache directory of this server, which nobody else may write to; torch's own choice is a name in /tmp
that anybody can know beforehand.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minisrv.cache import cache_directory
from minisrv.compile.decorator import CompiledForward, Forward
from minisrv.compile.modes import CompilationMode
from minisrv.compile.toolchain import choose_cxx
from minisrv.compile.trace import make_products_ops
from minisrv.errors import CompilationError
from minisrv.graph.forward_context import ForwardContext, set_forward_context
from minisrv.modes import BatchDescriptor, CUDAGraphMode
from minisrv.nn.model import Model

logger = logging.getLogger(__name__)

TRACED_TOKENS = 8
"""Maximum number of tokens of the step that is traced. See also `MIN_TOKENS`."""


def compile_whole(
    model: Model, mode: CompilationMode, progress: Callable[[int, int], None]
) -> None:
    """Compile a model whose buffers are allocated, for at least `MIN_TOKENS`, and run the steps of
    `warm_up_sizes`. It runs compiled from here on.

    mode: one of those that are `whole`.
    progress: is called with the number of steps that have been run, and the number of all.

    Raises CompilationError.
    """
    assert mode.whole, "other modes compile pieces, or nothing"
    assert isinstance(model, nn.Module)
    _choose_directory()
    max_num_tokens = len(model.qkv)
    # Each product chooses its kernel by the rows of each step, below what is traced.
    make_products_ops(model)
    sizes = list(warm_up_sizes(max_num_tokens))
    stock = mode is CompilationMode.STOCK_TORCH_COMPILE
    # What a GPU runs is compiled by Triton.
    options = {"cpp.cxx": (choose_cxx(),)} if model.qkv.device.type == "cpu" else {}
    compiled = _stock(model, options) if stock else _traced_once(model, options)
    try:
        for done, size in enumerate(sizes):
            progress(done, len(sizes))
            _run(model, compiled, _arguments(model, size, mark_dynamic=not stock))
    except Exception as error:  # a compiler raises errors of many classes
        raise CompilationError(
            f"torch.compile failed on {type(model).__name__} in mode {mode.name} "
            f"({type(error).__name__}: {str(error).strip()[:400]}); serve it with "
            "--compilation-mode NONE."
        ) from error
    progress(len(sizes), len(sizes))
    model.compiled = CompiledForward(compiled)


def warm_up_sizes(max_num_tokens: int) -> Iterator[int]:
    """Yield the number of tokens of each step that is run before a compiled model serves: first
    that which mode 2 traces, then 1, for which mode 1 compiles apart, the powers of two, and the
    most."""
    traced = min(TRACED_TOKENS, max_num_tokens - 1)
    yield traced
    sizes = {1 << bits for bits in range(max_num_tokens.bit_length())} | {max_num_tokens}
    yield from sorted(sizes - {traced})


def _choose_directory() -> None:
    """Choose where Inductor keeps its files."""
    try:
        directory = str(cache_directory("inductor"))
    except (OSError, RuntimeError) as error:
        logger.warning("what is compiled is not kept: %s", error)
        directory = tempfile.mkdtemp(prefix="minisrv-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory


def _stock(model: Model, options: dict[str, Any]) -> Forward:
    """Return the forward of a model by torch.compile.

    options: settings of Inductor.
    """
    compiled: Forward = torch.compile(model.forward, dynamic=True, options=options)
    return compiled


def _traced_once(model: Model, options: dict[str, Any]) -> Forward:
    """Return the forward of a model, traced at its first call and never again.

    options: settings of Inductor.
    Errors of the second trace are raised by the call that would need it.
    """
    traces = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal traces
        traces += 1
        if traces > 1:
            raise RuntimeError("the model is traced a second time, which mode 2 never does")
        # Inductor takes more than a second to import.
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, config_patches=options)

    traced: Forward = torch.compile(
        model.forward,
        fullgraph=True,
        dynamic=False,  # all but the dimensions that are marked
        backend=backend,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )
    return traced


def _arguments(model: Model, num_tokens: int, *, mark_dynamic: bool) -> tuple[Tensor, ...]:
    """Return the arguments of a step of tokens 0 at positions 0.

    mark_dynamic: whether Dynamo is told which dimensions differ from step to step.
    """
    device = model.qkv.device
    ids, positions = (torch.zeros(num_tokens, dtype=torch.int64, device=device) for _ in range(2))
    out = torch.empty(num_tokens, model.config.hidden_size, dtype=model.dtype, device=device)
    arguments = (ids, positions, out)
    if mark_dynamic:
        names = inspect.signature(model.forward).parameters
        for name, argument in zip(names, arguments, strict=True):
            torch._dynamo.mark_dynamic(argument, model.dynamic_dims[name])
    return arguments


@torch.no_grad()
def _run(model: Model, compiled: Forward, arguments: tuple[Tensor, ...]) -> None:
    """Run a compiled forward without attention."""
    context = ForwardContext(
        CUDAGraphMode.NONE, BatchDescriptor(len(arguments[0])), graph_break=lambda attention: None
    )
    with set_forward_context(context):
        compiled(*arguments)
