"""The CPU's graph backend: a tape of ATen operations, replayed without the model's Python code.

It keeps the two promises of a CUDA graph, fixed shapes and fixed addresses, so that whatever would
go wrong with one goes wrong here too. Capture runs the code once and records each operation with
the tensors that it used. Of these tensors
- those that existed before (weights, caches, static buffers) keep their address;
- those that share storage with an argument are views: they cost nothing and are not replayed.
  Operations that only reserve memory are not replayed either, nor are those that turn a tensor into
  another view of its memory (`t_`, `squeeze_`): a call is recorded with its tensors as they are at
  that time;
- all others are intermediates. They are laid out by liveness in one arena which all graphs of the
  backend share, and each operation writes to the place that it was given there.
Code that reads memory without an operation (`tolist`, `numpy`) is not seen here; certification
finds values that were frozen in this way. An ATen operation costs about 1 us on a CPU, so the
purpose of the tape is exactness more than speed. Knows nothing of models, batches or modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from minisrv.errors import GraphCaptureError
from minisrv.graph.backend import Replay
from minisrv.kernels import DIRECT

ALIGNMENT = 64
"""Alignment of intermediates in bytes. It is the same as that of torch's allocator, so kernels take
the same paths as in eager runs."""

ARENA_BYTES = 256 << 20
"""Minimum size of the arena in bytes. This is address space: a page takes memory only when it is
first written."""

_RESERVES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_BRANCHES = (tuple, list)
_SETTLED_BY_OUT = {"dtype", "layout", "device", "pin_memory", "memory_format"}
_INDEXING = (
    torch.ops.aten.index,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
    torch.ops.aten._index_put_impl_,
)
_NEVER = {
    torch.Tag.data_dependent_output: "reads a value back to the host",
    torch.Tag.dynamic_output_shape: "has a result whose shape depends on the data",
    torch.Tag.nondeterministic_seeded: "draws random numbers that a replay would repeat",
}


_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(slots=True)
class _Node:
    """One recorded call.

    number: its number, counted through the whole capture.
    outputs: the new tensors that it made, in order.

    All its tensors are views of its own, which keep the geometry that the tensors had at the call.
    """

    number: int
    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]


@dataclass(slots=True)
class _Storage:
    """The lifetime of an intermediate, in node numbers counted through the whole capture."""

    nbytes: int
    born: int
    last_used: int
    offset: int = -1


@dataclass(slots=True)
class _Capture:
    """Everything recorded since the last `finish`.

    internal: the storages made during the capture, by identity. The nodes and `reserved` hold views
        of them, so no identity is used twice.
    """

    segments: list[tuple[_Segment, list[_Node]]] = field(default_factory=list)
    reserved: list[Tensor] = field(default_factory=list)
    internal: dict[int, _Storage] = field(default_factory=dict)
    num_nodes: int = 0


class _Segment:
    """A recorded segment. Its calls are bound to addresses when the capture is finished.

    It replays with the values that context variables had when it was recorded: a CUDA graph keeps
    the numbers with which its kernels were launched.
    """

    def __init__(self, backend: CPUTapeBackend) -> None:
        self.calls: list[_Call] = []
        self._context = copy_context()
        self._backend = backend

    def __call__(self) -> None:
        self._context.run(self._run)

    def _run(self) -> None:
        between = self._backend.between
        if between is None:
            for function, args, kwargs in self.calls:
                function(*args, **kwargs)
            return
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)
            between()


class CPUTapeBackend:
    """A `GraphBackend` for the CPU; the docstring of the module describes it.

    between: is called between the operations of a capture or a replay, if it is set.
    """

    def __init__(self) -> None:
        self.between: Callable[[], None] | None = None
        self.arena = torch.empty(0, dtype=torch.uint8)
        self._extent = 0
        self._capture = _Capture()
        self._recorder: _Recorder | None = None

    def begin(self) -> None:
        """See `GraphBackend`. The recorder is entered for the whole capture, because a segment may
        end and the next begin within an operation, while torch has set the recorder aside."""
        if self._recorder is None:
            self._recorder = _Recorder(self._capture, self)
            self._recorder.__enter__()  # type: ignore[no-untyped-call]
        self._recorder.begin_segment()

    def end(self) -> Replay:
        """See `GraphBackend`."""
        assert self._recorder is not None, "no segment is being recorded"
        segment = _Segment(self)
        self._capture.segments.append((segment, self._recorder.end_segment()))
        return segment

    def finish(self) -> None:
        """Give every intermediate its place in the arena and bind the recorded calls to it.

        An arena that is too small is replaced by a larger one for this graph and later ones;
        earlier graphs keep theirs.
        """
        self._stop()
        capture, self._capture = self._capture, _Capture()
        size = _lay_out(capture.internal.values())
        self._extent = max(self._extent, size)
        if size > self.arena.numel():
            self.arena = torch.empty(max(size, ARENA_BYTES), dtype=torch.uint8)
        place = _Placer(capture.internal, self.arena)
        for segment, nodes in capture.segments:
            segment.calls = _bind_all(nodes, place)

    def abandon(self) -> None:
        """See `GraphBackend`."""
        self._stop()
        self._capture = _Capture()

    @contextmanager
    def interrupted(self, between: Callable[[], None]) -> Iterator[None]:
        """See `GraphBackend`. Graphs of this backend share its arena."""
        self.between = between
        try:
            yield
        finally:
            self.between = None

    def memory_used(self) -> int:
        """Return the number of bytes of the arena that some graph uses."""
        return self._extent

    def intermediates(self) -> Tensor:
        """See `GraphBackend`."""
        return self.arena[: self._extent]

    def _stop(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Recorder(TorchDispatchMode):
    """Runs every operation of a capture, and records those of its segments.

    An operation that ends a segment runs between two segments, and is in neither.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch would import its compiler, which takes a second, to exclude this class
        # from compilation; nothing here is ever compiled.
        return False

    def __init__(self, capture: _Capture, backend: CPUTapeBackend) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capture = capture
        self._backend = backend
        self._nodes: list[_Node] | None = None

    def begin_segment(self) -> None:
        """Record the operations from here on."""
        assert self._nodes is None, "segments do not nest"
        self._nodes = []

    def end_segment(self) -> list[_Node]:
        """Stop recording, and return what the segment has recorded."""
        nodes, self._nodes = self._nodes, None
        assert nodes is not None, "no segment is being recorded"
        return nodes

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = self._record(func, args, kwargs or {})
        if self._backend.between is not None:
            self._backend.between()
        return result

    def _record(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, record it if a segment is being recorded, and return its result."""
        nodes = self._nodes
        if nodes is None:
            return func(*args, **kwargs)
        _refuse(func, args)
        inputs = _tensors((args, kwargs))
        storages = [tensor.untyped_storage() for tensor in inputs]
        before = [storage.nbytes() for storage in storages]
        result = func(*args, **kwargs)
        if self._nodes is not nodes:
            self._refuse_intermediates(func, inputs)
            return result
        if [storage.nbytes() for storage in storages] != before:
            raise GraphCaptureError(
                f"{func} changed the size of its argument's memory: a graph, whose addresses are "
                "fixed, cannot hold it."
            )
        if any(tensor.is_mkldnn for tensor in _all_tensors(result)):
            raise GraphCaptureError(
                f"{func} gives a tensor in a library's own layout, which has no address that a "
                "graph could fix; make it before the capture."
            )
        fresh, capture = _fresh_tensors(inputs, result), self.capture
        number = capture.num_nodes
        for tensor in fresh:
            nbytes = tensor.untyped_storage().nbytes()
            capture.internal[_identity(tensor)] = _Storage(nbytes, number, number)
        if not is_launch(func, inputs, result):
            capture.reserved += _as_they_are(fresh)
            return result
        capture.num_nodes += 1
        for tensor in inputs:
            if storage := capture.internal.get(_identity(tensor)):
                storage.last_used = number
        held = _as_they_are((args, kwargs, fresh))
        nodes.append(_Node(number, func, *held))
        return result

    def _refuse_intermediates(self, func: OpOverload, inputs: list[Tensor]) -> None:
        """Raise GraphCaptureError if an operation that runs between two segments, on the tensors
        that it has got now, has got one that the capture will place elsewhere."""
        if any(_identity(tensor) in self.capture.internal for tensor in inputs):
            raise GraphCaptureError(
                f"{func} runs between the pieces of a graph, and one of its arguments is an "
                "intermediate result, whose address is not fixed there; pass it in a static buffer."
            )


def is_launch(func: OpOverload, arguments: Any, result: Any) -> bool:
    """Whether a call hands work to the device. Calls do not that only reserve memory, which a graph
    has done at capture, or only make views, including those that turn a tensor into another view of
    its own memory."""
    whatever = _launches_whatever(func)
    return bool(_fresh_tensors(arguments, result)) if whatever is None else whatever


@cache
def _launches_whatever(op: OpOverload) -> bool | None:
    """Return whether an operation hands work to the device whatever its arguments are; None if that
    depends on them."""
    if op in _RESERVES or torch.Tag.inplace_view in op.tags:
        return False
    return True if op._schema.is_mutable else None


def _fresh_tensors(arguments: Any, result: Any) -> list[Tensor]:
    """Return the tensors of a call's `result` that share storage with none of its `arguments`."""
    known = {_identity(tensor) for tensor in _tensors(arguments)}
    return [tensor for tensor in _tensors(result) if _identity(tensor) not in known]


def _refuse(func: OpOverload, args: tuple[Any, ...]) -> None:
    if func.overloadpacket in _INDEXING:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                raise GraphCaptureError(
                    f"{func} takes a boolean index, so its shape depends on the data: a graph "
                    "cannot hold it. Use torch.where, or masked_fill."
                )
        return
    if (what := _fault(func)) is not None:
        raise GraphCaptureError(f"{func} {what}: a graph cannot hold it.")


@cache
def _fault(op: OpOverload) -> str | None:
    """Return what an operation does that a graph cannot hold, whatever its arguments are."""
    return next((what for tag, what in _NEVER.items() if tag in op.tags), None)


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors that have an address. A tensor in a library's own layout is opaque and is
    treated as a constant, like a number."""
    return [tensor for tensor in _all_tensors(tree) if not tensor.is_mkldnn]


def _all_tensors(tree: Any) -> list[Tensor]:
    """Return the tensors among an operation's arguments or results. torch's pytree does more, and
    would take a third of the time of a capture."""
    found: list[Tensor] = []
    _add_tensors(tree, found)
    return found


def _add_tensors(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, _BRANCHES):
        for branch in tree:
            _add_tensors(branch, found)
    elif isinstance(tree, dict):
        for branch in tree.values():
            _add_tensors(branch, found)


def _replace(tree: Any, stand_in: Callable[[Tensor], Tensor]) -> Any:
    """Return an operation's arguments or results with each tensor that has an address replaced by
    `stand_in` of it."""
    if isinstance(tree, Tensor):
        return tree if tree.is_mkldnn else stand_in(tree)
    if isinstance(tree, _BRANCHES):
        return type(tree)([_replace(branch, stand_in) for branch in tree])
    if isinstance(tree, dict):
        return {key: _replace(branch, stand_in) for key, branch in tree.items()}
    return tree


def _as_they_are(tree: Any) -> Any:
    """Return `tree` with a view in place of each tensor. The views stay as they are when a tensor
    becomes another view or moves to other memory: `t_`, `squeeze_`, `set_`, `data = ...`."""
    return _replace(tree, Tensor.detach)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _geometry(tensor: Tensor) -> tuple[object, ...]:
    """Return which part of its memory a tensor covers, and in which layout and dtype."""
    place = (_identity(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
    return (*place, tensor.dtype)


def _lay_out(storages: Iterable[_Storage]) -> int:
    """Give each storage the first gap that is free during its lifetime, and return the number of
    bytes needed.

    A result never shares bytes with an argument of the call that makes it, because its lifetime
    begins before theirs ends.
    """
    top = 0
    live: list[_Storage] = []  # sorted by offset
    for storage in sorted(storages, key=lambda s: s.born):
        live = [other for other in live if other.last_used >= storage.born]
        size = -(-storage.nbytes // ALIGNMENT) * ALIGNMENT
        start, position = 0, len(live)
        for index, other in enumerate(live):
            if other.offset - start >= size:
                position = index
                break
            start = other.offset + -(-other.nbytes // ALIGNMENT) * ALIGNMENT
        storage.offset = start
        live.insert(position, storage)
        top = max(top, start + size)
    return top


class _Placer:
    """Maps a tensor of the capture to the tensor that the replay uses in its place."""

    def __init__(self, internal: dict[int, _Storage], arena: Tensor) -> None:
        self.internal = internal
        self.arena = arena.untyped_storage()

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = self.internal.get(_identity(tensor))
        if storage is None:
            return tensor
        offset = storage.offset // tensor.element_size() + tensor.storage_offset()
        placed = torch.empty(0, dtype=tensor.dtype)
        return placed.set_(self.arena, offset, tensor.size(), tensor.stride())


def _bind_all(nodes: list[_Node], place: _Placer) -> list[_Call]:
    """Return the calls of a segment. If an operation cannot write its result to a given place, and
    the result is only copied somewhere else afterwards, it is copied there directly."""
    calls: list[_Call] = []
    merged: _Node | None = None
    for node, follower in pairwise((*nodes, None)):
        assert node is not None
        if node is merged:
            continue
        if follower is not None and _only_feeds(node, follower, place):
            merged = follower
            calls.append(_bind(node, place, [place(follower.args[0])]))
        else:
            calls.append(_bind(node, place, [place(tensor) for tensor in node.outputs]))
    return calls


def _only_feeds(node: _Node, follower: _Node, place: _Placer) -> bool:
    """Whether `follower` copies the only result of `node`, `node` has no out variant, and nothing
    reads the result later."""
    return (
        follower.op is torch.ops.aten.copy_.default
        and len(node.outputs) == 1
        and _geometry(follower.args[1]) == _geometry(node.outputs[0])
        and place.internal[_identity(node.outputs[0])].last_used == follower.number
        and _out_variant(node.op) is None
    )


def _bind(node: _Node, place: _Placer, outputs: list[Tensor]) -> _Call:
    args, kwargs = _replace((node.args, node.kwargs), place)
    if not outputs:
        return DIRECT.get(node.op, node.op), args, kwargs
    found = _out_variant(node.op)
    if found is None:
        return _compute_and_copy, (node.op, outputs, args, kwargs), {}
    variant, names = found
    # Factories are given the dtype and the place that `out` already has.
    kwargs = {key: value for key, value in kwargs.items() if key in _argument_names(variant)}
    return variant, args, {**kwargs, **dict(zip(names, outputs, strict=True))}


def _compute_and_copy(
    op: OpOverload, outputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    for output, value in zip(outputs, _tensors(op(*args, **kwargs)), strict=True):
        output.copy_(value)


@cache
def _out_variant(op: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    """Return the overload of `op` that writes to given tensors, and the names of those arguments;
    None if there is none.

    It must compute the same: it has the same positional arguments, accepts every option that `op`
    has (except those that `out` determines), and requires none that `op` lacks.
    """
    schema = op._schema
    if any(str(result.type) != "Tensor" for result in schema.returns):
        return None
    wanted = [(a.name, str(a.type)) for a in schema.arguments if not a.kwarg_only]
    options = {a.name for a in schema.arguments if a.kwarg_only}
    for name in op.overloadpacket.overloads():
        variant: OpOverload = getattr(op.overloadpacket, name)
        given = [(a.name, str(a.type)) for a in variant._schema.arguments if not a.kwarg_only]
        keywords = [a for a in variant._schema.arguments if a.kwarg_only]
        out = [a for a in keywords if a.alias_info is not None and a.alias_info.is_write]
        others = [a for a in keywords if a.alias_info is None]
        if (
            given == wanted
            and len(out) == len(schema.returns)
            and options - _SETTLED_BY_OUT <= {a.name for a in others}
            and all(a.name in options or a.has_default_value() for a in others)
        ):
            return variant, tuple(a.name for a in out)
    return None


@cache
def _argument_names(op: OpOverload) -> frozenset[str]:
    return frozenset(argument.name for argument in op._schema.arguments)
