"""Compiles a piece into a package of machine code, ahead of time.

Knows: torch.export and AOTInductor. Knows nothing of models, caches or processes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import fx
from torch._ops import OpOverload

from minisrv.compile.artifacts import Package
from minisrv.compile.split import Piece, TensorSpec
from minisrv.compile.trace import EXAMPLE_ROWS, fake_mode

OPTIONS: dict[str, Any] = {
    # A header that is compiled before saves time from the second package of a kind on.
    "aot_inductor.precompile_headers": False,
    # Graphs are this server's own.
    "triton.cudagraphs": False,
    # The number of threads is that of the process that runs the package.
    "cpp.dynamic_threads": True,
}
CUDA_OPTIONS: dict[str, Any] = {
    # The files of a package are gone when its kernels are first launched.
    "aot_inductor.embed_kernel_binary": True,
    # The code of the host does no arithmetic. To try which vector instructions it could use takes
    # longer than all else.
    "cpp.vec_isa_ok": False,
}
"""Further options for a GPU."""


def compile_piece(piece: Piece, max_rows: int, device: str, *, threads: int, cxx: str) -> Package:
    """Compile a piece for 1 to `max_rows` rows, and for so many threads on a CPU.

    cxx: the path of the C++ compiler.
    Raises whatever torch raises.
    """
    rows = torch.export.Dim("rows", min=2, max=max_rows)
    with fake_mode(), torch.no_grad():
        examples = tuple(_example(spec, device) for spec in piece.arguments)
        shapes = tuple(
            {dim: rows for dim, size in enumerate(spec.shape) if size is None} or None
            for spec in piece.arguments
        )
        exported = torch.export.export(piece.graph, examples, dynamic_shapes=shapes)
    written = _written(exported.graph)
    with tempfile.TemporaryDirectory(prefix="minisrv-") as scratch:
        path = str(Path(scratch, "piece.pt2"))
        options = OPTIONS | (CUDA_OPTIONS if device == "cuda" else {})
        torch._inductor.aoti_compile_and_package(
            exported,
            package_path=path,
            inductor_configs={**options, "cpp.threads": threads, "cpp.cxx": (cxx,)},
        )
        return Package(written, Path(path).read_bytes())


def _example(spec: TensorSpec, device: str) -> torch.Tensor:
    shape = [EXAMPLE_ROWS if size is None else size for size in spec.shape]
    strides = spec.strides
    if strides is None:
        return torch.empty(shape, dtype=spec.dtype, device=device)
    return torch.empty_strided(shape, strides, dtype=spec.dtype, device=device)


def _written(graph: fx.Graph) -> list[int]:
    """Return the indices of the arguments that the operations of an exported graph write."""
    storages: set[int] = set()
    for node in graph.nodes:
        if isinstance(node.target, OpOverload):
            for declared, value in zip(node.target._schema.arguments, node.args, strict=False):
                written = declared.alias_info is not None and declared.alias_info.is_write
                if written and isinstance(value, fx.Node):
                    storages.add(_storage(value))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return [index for index, node in enumerate(inputs) if _storage(node) in storages]


def _storage(node: fx.Node) -> int:
    return int(node.meta["val"].untyped_storage()._cdata)
