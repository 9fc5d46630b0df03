"""Splits a traced forward at its attention ops, into pieces and a schedule that calls them.

A piece reads and writes tensors only: the number of rows is read off one of them. It returns
nothing. What a later piece needs is written to a buffer, so that a graph of the calls finds it at a
fixed address. Pieces are compared by content, in which neither the names of their values nor the
weights that they are called with take part, so that all layers alike are one piece.

Knows: the nodes of a graph. Knows nothing of what they compute, of compilers or of files.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import _get_qualified_name

from minisrv.compile.inside import kernels_inside
from minisrv.compile.nodes import example, origin, shape, sizes, storage
from minisrv.compile.trace import Trace
from minisrv.compile.values import (
    AddNormCall,
    AttentionCall,
    Call,
    Intermediate,
    PieceCall,
    PieceKernels,
    ProductCall,
    Source,
    Static,
    Value,
    Weight,
)
from minisrv.compile.writes import written_by
from minisrv.errors import CompilationError
from minisrv.graph.attention import attention_op
from minisrv.kernels.elementwise import add_rms_norm_op
from minisrv.kernels.linear_op import linear_op

STATIC = ("qkv", "attn_out")
"""The static buffers of a model, of which a step uses the first rows."""

PREPARATION = "preparation"
"""The key of the `Preparation` in the `meta` of a node of the attention op that has one."""

_KERNELS = (linear_op, add_rms_norm_op)
"""The ops of the server's own kernels that passes put into a graph, besides attention."""

_WITHOUT_EFFECT = (torch._C._log_api_usage_once, torch.ops.aten._assert_scalar.default)


@dataclass(frozen=True)
class TensorSpec:
    """What a piece knows of an argument.

    shape: its sizes; None is the number of rows.
    strides: its strides; None if it is contiguous.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None


@dataclass
class Piece:
    """A part of a forward without attention.

    graph: the operations on the arguments, without a result.
    arguments: the specs of the arguments, in their order.
    kernels: the calls of the server's own kernels among the operations, which follow from these.
    """

    graph: fx.GraphModule
    arguments: list[TensorSpec]
    kernels: PieceKernels | None

    def content(self) -> str:
        """Return a text that is the same for pieces that do the same."""
        numbers: dict[fx.Node, str] = {}
        lines = [repr(spec) for spec in self.arguments]
        for node in self.graph.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), numbers.__getitem__)
            numbers[node] = f"%{len(numbers)}"
            if node.op == "placeholder":
                continue
            target = node.target
            name = target if isinstance(target, str) else _qualified_name(target)
            lines.append(f"{node.op} {name} {args} {kwargs}")
        return "\n".join(lines)

    def digest(self, *environment: str) -> str:
        """Return the key of the piece, for the environment that it is compiled in."""
        text = "\0".join((self.content(), *environment))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass
class Schedule:
    """The calls of a forward in their order.

    pieces: the distinct pieces.
    calls: the calls; `PieceCall.piece` is the index of the piece.
    """

    pieces: list[Piece] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


def split(traced: Trace) -> Schedule:
    """Split a trace at its attention ops. Raises CompilationError for a graph that cannot be
    split."""
    return _Splitter(traced).run()


class _Splitter:
    def __init__(self, traced: Trace) -> None:
        self.graph = traced.graph.graph
        self.rows = traced.rows
        self.values: dict[fx.Node, Value] = {}
        """Where each tensor is found that is not made in the piece that uses it."""
        self.buffers = _Buffers()
        self._static: set[int | None] = set()
        self._last_writes: dict[int | None, int] = {}
        """The number of the last segment that writes each memory."""
        self._outliving: dict[int | None, fx.Node] = {}
        """The nodes that are kept in buffers, by the memory that they had in the trace."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name in traced.sources:
                source = traced.sources[node.name]
                self.values[node] = source
                if _static_name(source) is not None:
                    self._static.add(storage(node))

    def run(self) -> Schedule:
        schedule, known = Schedule(), dict[str, int]()
        segments = list(self._segments())
        last_uses = self._last_uses(segments)
        for number, segment in enumerate(segments):
            for node in _nodes(segment):
                self._last_writes |= {storage(one): number for one in written_by(node)}
        for number, segment in enumerate(segments):
            if isinstance(segment, fx.Node):
                qkv, positions, out = (self.values[node] for node in segment.all_input_nodes)
                layer: Any = segment.args[3]
                preparation = segment.meta.get(PREPARATION)
                schedule.calls.append(AttentionCall(qkv, positions, out, layer, preparation))
            elif self._has_only_kernels(segment):
                schedule.calls += self._kernels(segment, number, last_uses)
            else:
                piece, nodes = self._piece(segment, number, last_uses)
                index = known.setdefault(piece.content(), len(schedule.pieces))
                if index == len(schedule.pieces):
                    schedule.pieces.append(piece)
                arguments = [self.values[node] for node in nodes]
                schedule.calls.append(PieceCall(index, arguments))
            self.buffers.release(number)
        return schedule

    def _segments(self) -> Iterator[list[fx.Node] | fx.Node]:
        """Yield the nodes between attention ops, and these, in their order. The slices of static
        buffers that all layers use are in none of them."""
        segment: list[fx.Node] = []
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output") or node.target in _WITHOUT_EFFECT:
                continue
            if node.target == attention_op:
                if segment:
                    yield segment
                yield node
                segment = []
            elif (static := self._sliced(node)) is not None:
                self.values[node] = static
            else:
                segment.append(node)
        yield segment

    def _sliced(self, node: fx.Node) -> Static | None:
        """Return the static buffer of which a node takes the rows of the step; None if it does
        something else."""
        if node.target is not operator.getitem:
            return None
        source, index = node.args
        name = _static_name(self.values.get(source))  # type: ignore[arg-type]
        whole = isinstance(index, slice) and index.start is None and index.step is None
        if name is None or not whole or not self._is_rows(index.stop):  # type: ignore[union-attr]
            return None
        return Static(name)

    def _last_uses(self, segments: list[list[fx.Node] | fx.Node]) -> dict[fx.Node, int]:
        """Return for each node the number of the last segment that uses it."""
        uses: dict[fx.Node, int] = {}
        for number, segment in enumerate(segments):
            for node in _nodes(segment):
                uses |= dict.fromkeys(map(self._whole, node.all_input_nodes), number)
        return uses

    def _has_only_kernels(self, segment: list[fx.Node]) -> bool:
        """Whether nothing in a segment is for a compiler: it consists of ops of this server's own
        kernels, of tensors for their results, and of other shapes of these."""
        made = {node for node in segment if node.target == "new_empty"}

        def is_found(node: Any) -> bool:
            whole = origin(node)
            value = self.values.get(whole)
            resized = isinstance(value, Intermediate) or whole in made
            return resized or (value is not None and sizes(whole) == sizes(node))

        return all(
            all(map(is_found, node.all_input_nodes))
            if node.target in _KERNELS
            else node in made or origin(node) is not node or isinstance(example(node), torch.SymInt)
            for node in segment
        )

    def _kernels(
        self, segment: list[fx.Node], number: int, last_uses: dict[fx.Node, int]
    ) -> list[Call]:
        """Return the calls of a segment that consists of the server's own kernels only."""

        def value(node: Any) -> Any:
            if node is None:
                return None
            found = self.values[origin(node)]
            if not isinstance(found, Intermediate):
                return found
            return Intermediate(found.buffer, self._spec(node, kept=True).shape, found.dtype)

        calls: list[Call] = []
        for node in segment:
            settings: dict[str, Any] = node.kwargs
            if node.target == "new_empty":
                spec = self._spec(node, kept=True)
                self.values[node] = self.buffers.take(spec, number, last_uses.get(node, number))
            elif node.target == linear_op:
                x, tensors, norm, out = node.args
                given: Any = tensors
                stored = [value(tensor) for tensor in given]
                calls.append(ProductCall(value(x), stored, value(norm), value(out), **settings))
            elif node.target == add_rms_norm_op:
                calls.append(AddNormCall(*map(value, node.args), **settings))
        return calls

    def _piece(
        self, segment: list[fx.Node], number: int, last_uses: dict[fx.Node, int]
    ) -> tuple[Piece, list[fx.Node]]:
        """Return the piece of a segment, and the nodes whose values are its arguments."""
        made = set(segment)
        used = (n for node in segment for n in node.all_input_nodes if n not in made)
        given = [n for n in dict.fromkeys(map(self._whole, used)) if n not in made]
        given = [node for node in given if isinstance(example(node), Tensor)]
        kept = [
            node
            for node in segment
            if last_uses.get(node, -1) > number and isinstance(example(node), Tensor)
        ]
        for node in kept:
            if storage(node) in self._static:
                raise CompilationError(
                    f"{node} is a view of a static buffer that outlives a piece."
                )
            other = self._outliving.setdefault(storage(node), node)
            if other is not node and self._last_writes.get(storage(node), -1) > number:
                raise CompilationError(
                    f"{other} and {node} are views of one memory that a later piece writes."
                )
            spec = self._spec(node, kept=True)
            self.values[node] = self.buffers.take(spec, number, last_uses[node])
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in given:
            copies[node] = graph.placeholder(f"a{len(copies)}")
        outputs = [graph.placeholder(f"b{index}") for index in range(len(kept))]
        specs = [self._spec(node, kept=node not in self._inputs()) for node in given]
        specs += [self._spec(node, kept=True) for node in kept]

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:
                whole = self._whole(node)
                if whole is node:
                    copies[node] = self._size(graph, node, copied, given, copies)
                else:
                    dims = (-1 if self._equals_rows(size) else size for size in shape(node))
                    copies[node] = graph.call_method("view", (copied(whole), *dims))
            return copies[node]

        for node in segment:
            copies[node] = graph.node_copy(node, copied)
        for output, node in zip(outputs, kept, strict=True):
            graph.call_method("copy_", (output, copies[node]))
        graph.output(())
        kernels = kernels_inside(segment, given, self.rows)
        return Piece(fx.GraphModule({}, graph), specs, kernels), [*given, *kept]

    def _whole(self, node: fx.Node) -> fx.Node:
        """Return the tensor of which a node is another shape, if it is made by the graph. A piece
        is given that one, so that no two of its arguments are the same memory."""
        whole: fx.Node = origin(node)
        return node if isinstance(self.values.get(whole), Source | Static) else whole

    def _inputs(self) -> dict[fx.Node, Value]:
        return {n: v for n, v in self.values.items() if isinstance(v, Source)}

    def _size(
        self, graph: fx.Graph, node: fx.Node, copied: Any, given: list[fx.Node], copies: Any
    ) -> fx.Node:
        """Return a node of `graph` for a size that is computed outside of the piece."""
        if not self._is_rows(node):
            return graph.node_copy(node, copied)
        for tensor in given:
            for dim, size in enumerate(example(tensor).shape):
                if self._equals_rows(size):
                    return graph.call_function(torch.ops.aten.sym_size.int, (copies[tensor], dim))
        raise CompilationError("a piece has no argument that has the rows of the step.")

    def _is_rows(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and self._equals_rows(example(node))

    def _equals_rows(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and bool(size.node.expr == self.rows.node.expr)

    def _spec(self, node: fx.Node, *, kept: bool) -> TensorSpec:
        """Return the spec of a node's value; a value that is kept in a buffer is contiguous."""
        value: Tensor = example(node)
        known = tuple(None if self._equals_rows(size) else size for size in value.shape)
        if any(isinstance(size, torch.SymInt) for size in known):
            raise CompilationError(
                f"{node} has the shape {tuple(value.shape)}; sizes are constants, or the number "
                "of rows."
            )
        dense = kept or value.is_contiguous()
        return TensorSpec(known, value.dtype, None if dense else tuple(value.stride()))


class _Buffers:
    """The buffers of the values that outlive a piece. One is used again when its value is not
    needed any more."""

    def __init__(self) -> None:
        self._free: list[Intermediate] = []
        self._taken: list[tuple[int, Intermediate]] = []
        self._count = 0

    def take(self, spec: TensorSpec, number: int, last_use: int) -> Intermediate:
        """Return a buffer for a value that is made in the segment `number`."""
        dtype = str(spec.dtype).removeprefix("torch.")
        for free in self._free:
            if (free.shape, free.dtype) == (spec.shape, dtype):
                self._free.remove(free)
                break
        else:
            free = Intermediate(self._count, spec.shape, dtype)
            self._count += 1
        self._taken.append((last_use, free))
        return free

    def release(self, number: int) -> None:
        """Say that the segment `number` has run."""
        self._free += [buffer for last, buffer in self._taken if last <= number]
        self._taken = [(last, buffer) for last, buffer in self._taken if last > number]


def _nodes(segment: list[fx.Node] | fx.Node) -> list[fx.Node]:
    return [segment] if isinstance(segment, fx.Node) else segment


def _static_name(value: Value | None) -> str | None:
    if isinstance(value, Weight) and len(value.path) == 1 and value.path[0] in STATIC:
        return value.path[0]
    return None


def _qualified_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else _get_qualified_name(target)
