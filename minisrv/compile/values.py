"""A program as data: the calls of a forward, and where the arguments of each are found.

Knows: what is kept of a program in the cache. Knows nothing of how it is made or run.
"""

from __future__ import annotations

import msgspec

Path = tuple[str, ...]
"""The names of attributes that lead from a model to a tensor, or numbers where a list is."""


class Weight(msgspec.Struct, frozen=True, tag=True):
    """A tensor of the model that all steps use whole."""

    path: Path


class Static(msgspec.Struct, frozen=True, tag=True):
    """The first rows of a static buffer of the model, as many as the step has."""

    name: str


class Argument(msgspec.Struct, frozen=True, tag=True):
    """An argument of the forward."""

    name: str


class Merged(msgspec.Struct, frozen=True, tag=True):
    """A tensor of the linear method whose weight is those of several side by side.

    methods: the paths of the linear methods.
    index: which of its tensors.
    """

    methods: tuple[Path, ...]
    index: int


class Shifted(msgspec.Struct, frozen=True, tag=True):
    """A tensor of the model to which a number is added, in its own dtype."""

    path: Path
    by: float


class Rotation(msgspec.Struct, frozen=True, tag=True):
    """The table of cosines and sines (`nn.rope`) of all positions that the model serves.

    frequencies: the path of the radians per position of each rotated pair.
    scale: the factor of cosines and sines.
    """

    frequencies: Path
    scale: float


class Intermediate(msgspec.Struct, frozen=True, tag=True):
    """A value that outlives the piece that makes it, in a buffer of the program.

    buffer: the number of the buffer.
    shape: its sizes; None is the number of rows.
    dtype: torch's name of its dtype.
    """

    buffer: int
    shape: tuple[int | None, ...]
    dtype: str


Source = Weight | Merged | Shifted | Rotation | Argument
"""Where an input of a whole forward is found."""

Value = Source | Static | Intermediate
"""Where an argument of a call is found."""


class PieceCall(msgspec.Struct, frozen=True, tag=True):
    """The call of a piece.

    piece: its index among the pieces of the program.
    arguments: all its arguments, in the order that the piece has them.
    """

    piece: int
    arguments: list[Value]


class Preparation(msgspec.Struct, frozen=True):
    """What the attention op does to queries and keys of a layer in a program, where the model's own
    forward does it before the op: see `AttentionLayer`."""

    q_norm: Source | None
    k_norm: Source | None
    eps: float
    rotation: Rotation | None


class AttentionCall(msgspec.Struct, frozen=True, tag=True):
    """The call of the attention op for a layer.

    preparation: None if the layer is described as for the model's own forward.
    """

    qkv: Value
    positions: Value
    out: Value
    layer: int
    preparation: Preparation | None = None


class ProductCall(msgspec.Struct, frozen=True, tag=True):
    """The call of a product between pieces: see `kernels.linear_op`."""

    x: Value
    tensors: list[Value]
    norm: Value | None
    out: Value
    method: str
    eps: float = 0.0
    gate: str | None = None
    add: bool = False


class AddNormCall(msgspec.Struct, frozen=True, tag=True):
    """The call of a norm between pieces whose result is added to a residual: see
    `kernels.elementwise.add_rms_norm`."""

    x: Value
    weight: Value
    residual: Value
    after: Value | None
    out: Value | None
    eps: float


Call = PieceCall | AttentionCall | ProductCall | AddNormCall


Size = tuple[int, int]
"""A size, a stride or an offset by the rows of a step: what it is without rows, and what each row
adds."""


class Operand(msgspec.Struct, frozen=True):
    """A tensor that a kernel is given inside of a piece.

    argument: the index of the argument of the piece whose memory it is; None if the piece makes it.
    offset: its first element, behind the first one of the argument, or of what the piece makes.
    dtype: torch's name of its dtype.
    """

    argument: int | None
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size
    dtype: str


class KernelCall(msgspec.Struct, frozen=True):
    """The call of an op of the server's own kernels inside of a piece, as far as the launches
    depend on it.

    op: the name of the op, without the namespace.
    operands: its tensors, in the order of its schema; None and lists stand where the op takes them.
    settings: its other arguments.
    """

    op: str
    operands: list[Operand | list[Operand] | None]
    settings: dict[str, str | float | bool | None]


class PieceKernels(msgspec.Struct, frozen=True):
    """The calls of the server's own kernels inside of a piece, in their order.

    rows: an argument of the piece, and the dimension of it that is the number of rows.
    """

    rows: tuple[int, int]
    calls: list[KernelCall]


class PieceFile(msgspec.Struct, frozen=True):
    """The package of a piece: its key in the cache, and the digest of its content.

    kernels: None if it calls none of the server's own.
    """

    key: str
    digest: str
    kernels: PieceKernels | None = None


class Description(msgspec.Struct, frozen=True):
    """All that is kept of a program.

    max_rows: the most rows that its pieces were compiled for.
    matches: how often each pass has found its pattern.
    """

    max_rows: int
    matches: dict[str, int]
    pieces: list[PieceFile]
    calls: list[Call]
