"""Programs: the compiled forward of a model, run with the model's own weights.

A program is a schedule of calls, of compiled pieces, of products, of norms that are added to the
residual, and of the attention op. A call of a piece is one op for a recorder, whose arguments say
which tensors it writes; they are the model's weights, its static buffers, the arguments of the
forward, and buffers of the program. All are at the same addresses in every step, so that a graph
may hold the calls.

Knows: schedules, and how a package of machine code is loaded and called. Knows nothing of how they
were made: neither Dynamo nor Inductor is imported here.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path as FilePath
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import msgspec
import torch
from torch import Tensor

from minisrv.compile import artifacts
from minisrv.compile.decorator import Compiled
from minisrv.compile.values import (
    AddNormCall,
    Argument,
    AttentionCall,
    Description,
    Intermediate,
    Merged,
    Operand,
    Path,
    PieceCall,
    PieceKernels,
    Preparation,
    ProductCall,
    Rotation,
    Shifted,
    Size,
    Static,
    Value,
    Weight,
)
from minisrv.errors import CompilationError, CrashError
from minisrv.graph.attention import attention_op
from minisrv.kernels import AttentionLayer
from minisrv.kernels.elementwise import add_rms_norm_op
from minisrv.kernels.linear import LinearMethod
from minisrv.kernels.linear_op import linear
from minisrv.kernels.registration import register_op
from minisrv.model_config import ModelConfig
from minisrv.nn.rope import rotation_table

logger = logging.getLogger(__name__)

_TEMPORARY = "TMPDIR"


class Model(Protocol):
    """What a program needs of a model besides its weights."""

    config: ModelConfig
    qkv: Tensor
    attn_out: Tensor
    dtype: torch.dtype


class Piece(ABC):
    """A piece that is called.

    number: by which the op finds it, as long as it is referred to.
    read, written: the indices of the arguments that it only reads, and of those that it writes.
    """

    def __init__(self, package: artifacts.Package, num_arguments: int) -> None:
        self.written = package.written
        self.read = [i for i in range(num_arguments) if i not in package.written]
        self.number = next(_numbers)
        pieces_by_number[self.number] = self
        places = {index: place for place, index in enumerate([*self.read, *self.written])}
        self._order = [places[index] for index in range(num_arguments)]

    def run(self, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Run the piece on the arguments that it only reads and on those that it writes."""
        given = [*read, *written]
        self._run([given[place] for place in self._order])

    @abstractmethod
    def _run(self, arguments: list[Tensor]) -> None:
        """Run the piece on its arguments."""


class RehearsedPiece(Piece):
    """Stands for a piece where a program is launched on tensors without memory, to find out which
    kernels it launches. What the compiler has made is not run; it is in the package."""

    def __init__(
        self, package: artifacts.Package, num_arguments: int, kernels: PieceKernels | None
    ) -> None:
        super().__init__(package, num_arguments)
        self._kernels = kernels

    def _run(self, arguments: list[Tensor]) -> None:
        if self._kernels is None:
            return
        index, dim = self._kernels.rows
        rows = arguments[index].shape[dim]

        def size(of: Size) -> int:
            return of[0] + rows * of[1]

        def tensor(operand: Operand | None) -> Tensor | None:
            if operand is None:
                return None
            shape, strides = (list(map(size, each)) for each in (operand.shape, operand.strides))
            offset, dtype = size(operand.offset), getattr(torch, operand.dtype)
            if operand.argument is not None:
                memory = arguments[operand.argument]
                return memory.as_strided(shape, strides, memory.storage_offset() + offset)
            last = sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
            memory = torch.empty(offset + last + 1, dtype=dtype, device=arguments[index].device)
            return memory.as_strided(shape, strides, offset)

        for call in self._kernels.calls:
            operands = [
                list(map(tensor, one)) if isinstance(one, list) else tensor(one)
                for one in call.operands
            ]
            getattr(torch.ops.minisrv, call.op)(*operands, **call.settings)


class LoadedPiece(Piece):
    """A piece whose package is loaded."""

    def __init__(
        self, package: artifacts.Package, num_arguments: int, noted: str | None = None
    ) -> None:
        """Load a package. Raises RuntimeError, and OSError if there is no room to unpack it.

        noted: the key of the piece, if the cache is to know that its code is tried
            (`artifacts.tried`): when it is loaded, and when it runs for the first time.
        """
        super().__init__(package, num_arguments)
        self._noted = noted
        with self._tried(), _scratch_directory() as scratch:
            # What was checked is what is loaded. The loader takes a file, and unpacks it.
            file = scratch / "piece.pt2"
            make = torch._C._aoti.AOTIModelPackageLoader
            try:
                file.write_bytes(package.body)
                # One thread runs it: no events are recorded between runs, which a capture would
                # refuse.
                self._package = make(str(file), "model", True, 1, -1)
            except (OSError, RuntimeError) as error:  # the loader's errors have no types
                if shutil.disk_usage(scratch).free < len(package.body):
                    reason = os.strerror(errno.ENOSPC)
                    raise OSError(errno.ENOSPC, reason, str(scratch.parent)) from error
                raise

    def _tried(self) -> AbstractContextManager[None]:
        return nullcontext() if self._noted is None else artifacts.tried(self._noted)

    def _run(self, arguments: list[Tensor]) -> None:
        if self._noted is None:
            self._package.boxed_run(arguments)
            return
        with self._tried():
            self._package.boxed_run(arguments)
        artifacts.passed(self._noted)
        self._noted = None


@contextmanager
def _scratch_directory() -> Iterator[FilePath]:
    """Make a directory in which the loader unpacks within this context, and remove it at the end:
    what is loaded stays mapped, and a process that is killed leaves no files. Sets the
    environment."""
    before = os.environ.get(_TEMPORARY)
    with tempfile.TemporaryDirectory(prefix="minisrv-") as scratch:
        os.environ[_TEMPORARY] = scratch
        try:
            yield FilePath(scratch)
        finally:
            if before is None:
                del os.environ[_TEMPORARY]
            else:
                os.environ[_TEMPORARY] = before


pieces_by_number: WeakValueDictionary[int, Piece] = WeakValueDictionary()
"""The pieces that can be called."""

_numbers = count()


def run_piece(read: list[Tensor], written: list[Tensor], *, piece: int) -> None:
    """Run the piece of this number."""
    pieces_by_number[piece].run(read, written)


piece_op = register_op(
    "piece",
    "(Tensor[] read, Tensor(a!)[] written, *, int piece) -> ()",
    every_device=run_piece,
)
"""The op of a call of a piece."""


class Program(Compiled):
    """The compiled forward of a model: `program(input_ids, positions, out)` does what the model's
    own forward does, within a forward context.

    max_rows: the most tokens of a step.
    summary: a line about its size, and how often each pass has found its pattern.
    """

    def __init__(
        self,
        description: Description,
        pieces: Sequence[Piece],
        model: Model,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Bind a program to a model that is ready to run; its static buffers must be those with
        which it will be run.

        between: see `load`.
        """
        self.max_rows = min(description.max_rows, len(model.qkv))
        matches = ", ".join(f"{name} {count}" for name, count in description.matches.items())
        self.summary = (
            f"a compiled program of {len(description.calls)} calls, {len(pieces)} distinct pieces; "
            f"matches of passes: {matches}"
        )
        self._pieces = pieces
        self._model = model
        self._weights: dict[Value, Tensor] = {}
        self._merged: dict[tuple[Path, ...], LinearMethod] = {}
        self._buffers: dict[int, Tensor] = {}
        self._preparations: dict[int, Preparation] = {}
        """What the attention op does besides for each layer, by index."""
        self._layers: tuple[Sequence[AttentionLayer], Sequence[AttentionLayer]] = ([], [])
        """The model's own layers, and what was made of them."""
        self._calls: list[tuple[_Call, tuple[Value, ...], tuple[Value, ...]]] = []
        for call in description.calls:
            if isinstance(call, AttentionCall):
                read: tuple[Value, ...] = (call.qkv, call.positions)
                self._calls.append((_attention(call.layer), read, (call.out,)))
                if call.preparation is not None:
                    self._preparations[call.layer] = call.preparation
                continue
            if isinstance(call, ProductCall):
                norm = [] if call.norm is None else [call.norm]
                self._calls.append((_multiply(call), (call.x, *call.tensors, *norm), (call.out,)))
                continue
            if isinstance(call, AddNormCall):
                read = tuple(one for one in (call.x, call.weight, call.after) if one is not None)
                written = tuple(one for one in (call.residual, call.out) if one is not None)
                self._calls.append((_add_normed(call.eps), read, written))
                continue
            piece = pieces[call.piece]
            read = tuple(call.arguments[index] for index in piece.read)
            written = tuple(call.arguments[index] for index in piece.written)
            self._calls.append((_piece(piece), read, written))
        for _, read, written in self._calls:
            for value in (*read, *written):
                between()
                self._bind(value)
        for done in self._preparations.values():
            for source in (done.q_norm, done.k_norm, done.rotation):
                if source is not None:
                    between()
                    self._bind(source)

    @classmethod
    def load(
        cls, directory: FilePath, model: Model, between: Callable[[], None] = lambda: None
    ) -> Program | None:
        """Return the program that is kept in a directory of the cache, bound to a model whose
        buffers are allocated. None, with the reason in the log, if anything of it is not there, not
        trusted, or damaged; no compiler is imported.

        between: is called before each package, and before each weight, where the caller may do
            something else that does not use them.

        Raises CrashError if engines have ended while they tried a package of the program, and
        OSError if there is no room to unpack it, which says nothing about the program.
        """
        try:
            return cls._load(directory, model, between)
        except CrashError:
            raise
        except _UNREADABLE as error:
            logger.warning("the program in %s is not used: %s", directory, error)
            return None

    @classmethod
    def _load(cls, directory: FilePath, model: Model, between: Callable[[], None]) -> Program:
        description, packages = _read(directory)
        # Nothing is loaded before all of it has been checked.
        pieces = []
        for index, (package, size) in enumerate(zip(packages, _sizes(description), strict=True)):
            between()
            pieces.append(LoadedPiece(package, size, description.pieces[index].key))
        program = cls(description, pieces, model, between)
        logger.info("loaded %s", program.summary)
        return program

    @classmethod
    def rehearsed(cls, directory: FilePath, model: Model) -> Program:
        """Return a program of the cache for a model on the meta device, whose pieces launch the
        kernels of this server that they call, and do nothing else. Raises CompilationError,
        RuntimeError or msgspec.MsgspecError if it cannot be used."""
        description, packages = _read(directory)
        kernels = [file.kernels for file in description.pieces]
        pieces = [
            RehearsedPiece(*each)
            for each in zip(packages, _sizes(description), kernels, strict=True)
        ]
        return cls(description, pieces, model)

    @staticmethod
    def is_whole(directory: FilePath) -> bool:
        """Whether everything of a program in the cache is there, and trusted. Nothing is loaded.
        Raises CrashError as `load` does."""
        try:
            _read(directory)
        except CrashError:
            raise
        except _UNREADABLE:
            return False
        return True

    @property
    def buffers(self) -> Sequence[Tensor]:
        """See `Compiled`: the buffers of the values that outlive a piece."""
        return list(self._buffers.values())

    def attention_layers(self, own: Sequence[AttentionLayer]) -> Sequence[AttentionLayer]:
        """See `Compiled`."""
        if self._layers[0] is not own:
            layers = [self._prepared(index, layer) for index, layer in enumerate(own)]
            self._layers = own, layers
        return self._layers[1]

    def _prepared(self, index: int, layer: AttentionLayer) -> AttentionLayer:
        done = self._preparations.get(index)
        if done is None:
            return layer

        def of(source: Value | None) -> Tensor | None:
            return None if source is None else self._weights[source]

        return replace(
            layer,
            q_norm=of(done.q_norm),
            k_norm=of(done.k_norm),
            eps=done.eps,
            cos_sin=of(done.rotation),
        )

    def __call__(self, input_ids: Tensor, positions: Tensor, out: Tensor) -> None:
        """Run the forward: input_ids [T] int64 and positions [T] int64 give out [T, hidden]."""
        rows = len(input_ids)
        assert rows <= self.max_rows, f"{rows} rows, and the program is for {self.max_rows}"
        arguments = {"input_ids": input_ids, "positions": positions, "out": out}
        values: dict[Value, Tensor] = {}

        def of(value: Value) -> Tensor:
            if value not in values:
                values[value] = self._tensor(value, rows, arguments)
            return values[value]

        for call, read, written in self._calls:
            call([of(value) for value in read], [of(value) for value in written])

    def _tensor(self, value: Value, rows: int, arguments: dict[str, Tensor]) -> Tensor:
        match value:
            case Weight() | Merged() | Shifted() | Rotation():
                return self._weights[value]
            case Static():
                buffer: Tensor = getattr(self._model, value.name)
                return buffer[:rows]
            case Argument():
                return arguments[value.name]
            case Intermediate():
                sizes = [rows if size is None else size for size in value.shape]
                # A step of fewer rows uses the beginning of the buffer, whatever dimension they
                # are.
                return self._buffers[value.buffer][: _product(sizes)].view(sizes)

    def _bind(self, value: Value) -> None:
        """Find a weight, compute one that the model does not have, or make a buffer."""
        if value in self._weights:
            return
        match value:
            case Weight():
                self._weights[value] = _find(self._model, value.path, Tensor).detach()
            case Shifted():
                weight = _find(self._model, value.path, Tensor).detach()
                self._weights[value] = (weight.float() + value.by).to(weight.dtype)
            case Rotation():
                frequencies = _find(self._model, value.frequencies, Tensor)
                positions = self._model.config.max_position_embeddings
                self._weights[value] = rotation_table(
                    frequencies, value.scale, positions, self._model.dtype
                )
            case Merged():
                if value.methods not in self._merged:
                    found = [_find(self._model, path, LinearMethod) for path in value.methods]  # type: ignore[type-abstract]
                    self._merged[value.methods] = type(found[0]).merged(found)
                self._weights[value] = self._merged[value.methods].tensors[value.index]
            case Intermediate() if value.buffer not in self._buffers:
                most = [self.max_rows if size is None else size for size in value.shape]
                dtype = getattr(torch, value.dtype)
                if not isinstance(dtype, torch.dtype):
                    raise CompilationError(f"{value.dtype} is no dtype.")
                made = torch.zeros(_product(most), dtype=dtype, device=self._model.qkv.device)
                self._buffers[value.buffer] = made


_UNREADABLE = (CompilationError, RuntimeError, msgspec.MsgspecError)
"""What is raised for a program that cannot be used."""


def _read(directory: FilePath) -> tuple[Description, list[artifacts.Package]]:
    """Return the description of a program in the cache, and the packages of its pieces. All of them
    have been checked. Raises one of `_UNREADABLE`."""
    try:
        body = artifacts.read_description(directory)
        description = msgspec.msgpack.decode(body, type=Description)
        packages = [artifacts.read_package(file.key, file.digest) for file in description.pieces]
    except OSError as error:  # a directory that cannot be read, or is not trusted
        raise CompilationError(str(error)) from error
    return description, packages


def _sizes(description: Description) -> list[int]:
    """Return the number of arguments of each piece."""
    calls = [call for call in description.calls if isinstance(call, PieceCall)]
    sizes = {call.piece: len(call.arguments) for call in calls}
    return [sizes[index] for index in range(len(description.pieces))]


_T = TypeVar("_T")
_Call = Callable[[list[Tensor], list[Tensor]], None]


def _attention(layer: int) -> _Call:
    def call(read: list[Tensor], written: list[Tensor]) -> None:
        attention_op(*read, *written, layer)

    return call


def _multiply(product: ProductCall) -> _Call:
    settings: dict[str, Any] = {
        "method": product.method,
        "eps": product.eps,
        "gate": product.gate,
        "add": product.add,
    }
    count = len(product.tensors)

    def call(read: list[Tensor], written: list[Tensor]) -> None:
        # The function and not the op: a graph holds the operations of the method, as it does for
        # the model's own forward.
        x, tensors, norm = read[0], read[1 : 1 + count], read[1 + count :]
        linear(x, tensors, norm[0] if norm else None, *written, **settings)

    return call


def _add_normed(eps: float) -> _Call:
    def call(read: list[Tensor], written: list[Tensor]) -> None:
        x, weight, *after = read
        residual, *out = written
        add_rms_norm_op(
            x, weight, residual, after[0] if after else None, out[0] if out else None, eps=eps
        )

    return call


def _piece(piece: Piece) -> _Call:
    def call(read: list[Tensor], written: list[Tensor]) -> None:
        piece_op(read, written, piece=piece.number)

    return call


def _find(model: Any, path: Path, kind: type[_T]) -> _T:
    """Return what is found at a path. Raises CompilationError if there is no such thing."""
    found = model
    for name in path:
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            found = getattr(found, name, None)
    if not isinstance(found, kind):
        raise CompilationError(f"the model has no {kind.__name__} {'.'.join(path)}.")
    return found


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
