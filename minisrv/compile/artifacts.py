"""The artifacts of compilation in the cache: packages of pieces, descriptions of programs, and the
results of measuring those that are too slow to serve.

A package is found by the key of its piece, and shared by all programs that have the piece. A
program names the digest of each of its packages, which is compared before anything is loaded. Each
file begins with its key, so that it is not taken for another one.

A package is machine code, which may end the process that tries it. Where a process that compiles
does, its parent sets the package aside. An engine has nobody to do that, and would end at each
start; so it leaves a note in the cache as long as it tries a package (`tried`). Who finds the notes
of two processes that have ended sets the package aside. One may have been killed by somebody, as
each engine is whose server is stopped while it loads.

Knows: where artifacts lie, and when one is trusted. Knows nothing of what a program does, nor of
compilers.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from minisrv.cache import cache_directory, code_digest, read_cached, write_cached
from minisrv.errors import CompilationError, CrashError
from minisrv.kernels.linear import onednn_takes
from minisrv.kernels.native import processor

logger = logging.getLogger(__name__)

PROGRAM, SLOWNESS = "program.msgpack", "slowness.msgpack"
_CODE = ("compile", "kernels", "nn", "graph", "checkpoint/transformers_decoder.py")
"""The parts of the package on which the content of artifacts depends."""

_SETTINGS = ("TORCHINDUCTOR_", "AOT_INDUCTOR_", "AOTINDUCTOR_", "AOTI_", "ATEN_CPU_CAPABILITY")
"""How the names of environment variables begin by which torch's compiler is set."""

_TRITON_SETTINGS = "TRITON_"
"""The same for Triton."""

_PLACES = {"TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TRITON_CACHE_DIR"}
"""Those of them on which no code depends; processes of this server set them."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights for which oneDNN may have a layout."""

_LOCK = "pieces.lock"
"""The file that a process locks to be alone."""

MOST_DEATHS = 2
"""The number of engines that have ended while they tried a package after which it is set aside."""

_NOTE = ".tried"
"""Suffix of the name of a note that a process tries a package."""


class Package(msgspec.Struct, frozen=True):
    """A compiled piece.

    written: the indices of the arguments that it writes.
    body: the content of a .pt2 file.
    """

    written: list[int]
    body: bytes


class PackageAside(msgspec.Struct, frozen=True):
    """A package that has crashed a process that tried it.

    times: how often packages of this piece have done that.
    engine: whether these processes were engines. An engine tries only what a process that
        compiles could load, so that one would not find out about another package either.
    """

    package: Package
    times: int
    engine: bool = False


class Slowness(msgspec.Struct, frozen=True):
    """The measurement after which a program did not serve.

    steps: the steps that were measured, in words.
    speedup: how many times as fast they were as those of the model's own code.
    """

    steps: str
    speedup: float


def environment(device: str) -> tuple[str, ...]:
    """Return what every artifact depends on besides its content: the device and the instructions
    that it may use, the versions of torch and Python, this package's code, and the environment
    variables that change what compilers make; for "cpu" also the layouts of weights that oneDNN
    offers, which settings of its own restrict; for "cuda" the current GPU and Triton, which
    compiles for it."""
    instructions = hashlib.sha256(processor()).hexdigest()
    python = ".".join(map(str, sys.version_info[:2]))
    own: tuple[str, ...]
    if device == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        own = torch.cuda.get_device_name(), capability, version("triton")
    else:
        own = tuple(str(dtype) for dtype in _DTYPES if onednn_takes(dtype))
    code = torch.__version__, python, code_digest(_CODE)
    return device, *own, instructions, *code, *compiler_settings(device)


def compiler_settings(device: str) -> list[str]:
    """Return the environment variables that change what a compiler makes for a device, with their
    values."""
    begin = (*_SETTINGS, _TRITON_SETTINGS) if device == "cuda" else _SETTINGS
    names = sorted(name for name in os.environ if name.startswith(begin))
    return [f"{name}={os.environ[name]}" for name in names if name not in _PLACES]


def program_directory(key: str) -> Path:
    """Return the directory for the program of that key, and make it if it is missing. Raises
    OSError and RuntimeError as `cache_directory` does."""
    return cache_directory("compiled", "programs", key)


def read_description(directory: Path) -> bytes:
    """Return the description of the program that is kept in a directory. Raises CompilationError if
    there is none that is trusted."""
    return _read_of_program(directory, PROGRAM)


def write_description(directory: Path, body: bytes) -> None:
    """Keep the description of a program. Raises CompilationError if it cannot be kept."""
    _write_of_program(directory, PROGRAM, body)


def forget(directory: Path, name: str) -> None:
    """Remove what is kept of a program under a name, `PROGRAM` or `SLOWNESS`. If the cache cannot
    be written, nothing happens."""
    _remove(directory / name)


def read_slowness(directory: Path) -> Slowness | None:
    """Return the measurement that is kept beside a program; None if there is none that is
    trusted."""
    try:
        body = _read_of_program(directory, SLOWNESS)
        return msgspec.msgpack.decode(body, type=Slowness)
    except (CompilationError, msgspec.MsgspecError):
        return None


def write_slowness(directory: Path, slowness: Slowness) -> None:
    """Keep a measurement beside a program. Raises CompilationError if it cannot be kept."""
    _write_of_program(directory, SLOWNESS, msgspec.msgpack.encode(slowness))


def read_package(key: str, digest: str | None = None) -> Package:
    """Return the package of a piece.

    digest: the digest that its content must have; None for any.
    Raises CompilationError if there is none, or none that is trusted, or another one, and
    CrashError if engines have ended while they tried a package of this piece. Raises OSError and
    RuntimeError as `cache_directory` does.
    """
    check_aside(key)
    path = _package_path(key)
    body = read_cached(path)
    if body is None:
        raise CompilationError(f"{path} is no package that is trusted.")
    if digest is not None and package_digest(body) != digest:
        raise CompilationError(f"{path} is another package than the program was made with.")
    named = key.encode()
    if not body.startswith(named):
        raise CompilationError(f"{path} holds the package of another piece.")
    try:
        package = msgspec.msgpack.decode(memoryview(body)[len(named) :], type=Package)
    except msgspec.MsgspecError as error:
        raise CompilationError(f"{path} is no package: {error}") from error
    if len(_notes_left(key)) >= MOST_DEATHS:
        set_aside(key, package, engine=True)
        passed(key)
        check_aside(key)
    return package


def write_package(key: str, package: Package) -> str:
    """Keep the package of a piece, and return the digest of its content. Raises CompilationError if
    it cannot be kept."""
    body = _body(key, package)
    _write(_package_path(key), body)
    return package_digest(body)


def digest_of(key: str, package: Package) -> str:
    """Return the digest of the content of a package, as `write_package` does."""
    return package_digest(_body(key, package))


@contextmanager
def alone() -> Iterator[None]:
    """Keep other processes that want to be alone from the packages for the block. Raises OSError
    and RuntimeError as `cache_directory` does."""
    with (cache_directory("compiled") / _LOCK).open("wb") as file:
        with suppress(OSError):  # raised by a file system that has no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def tried(key: str) -> Iterator[None]:
    """Note in the cache, for the block, that this engine tries the package of a piece. The note is
    left if the process ends in the block. That should not take long: to be killed there looks like
    a crash, until `passed`. If the cache cannot be written, there is no note."""
    with ExitStack() as left:
        with suppress(OSError, RuntimeError):
            directory = _package_path(key).parent
            file = left.enter_context(tempfile.NamedTemporaryFile(dir=directory, delete=False))
            note = Path(file.name)
            left.callback(lambda: _remove(note))
            # The lock tells others that this process lives, so it comes before the name that they
            # look for.
            fcntl.flock(file, fcntl.LOCK_EX)
            note = note.rename(directory / f"{key}.{note.name}{_NOTE}")
        yield


def passed(key: str) -> None:
    """Remove the notes of processes that have ended while they tried a package of a piece, because
    it has been tried to the end since, or is set aside."""
    with suppress(OSError, RuntimeError):
        for note in _notes_left(key):
            _remove(note)


def _notes_left(key: str) -> list[Path]:
    """Return the notes of processes that have ended while they tried a package of a piece."""
    found = []
    for note in _package_path(key).parent.glob(f"{key}.*{_NOTE}"):
        with suppress(OSError), note.open("rb") as file:
            # A process that lives has locked it exclusively. Others may look at the same time.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # it has not been removed meanwhile
                found.append(note)
    return found


def check_aside(key: str) -> None:
    """Raise CrashError if engines have ended while they tried a package of a piece."""
    aside = read_aside(key)
    if aside is not None and aside.engine:
        raise CrashError(
            f"{MOST_DEATHS} engines have ended while they tried the package of the piece {key}, "
            f"which is set aside as {_path_aside(key)}. It is tried again when that file has been "
            "removed."
        )


def set_aside(key: str, package: Package, *, engine: bool = False) -> Path:
    """Keep the package of a piece where nobody loads it, because it has crashed a process that
    tried it, and return the path. Raises what `write_package` does.

    engine: whether that process was an engine.
    """
    path, before = _path_aside(key), read_aside(key)
    aside = PackageAside(package, 1, engine)
    if before is not None:
        aside = PackageAside(package, before.times + 1, engine or before.engine)
    _write(path, key.encode() + msgspec.msgpack.encode(aside))
    _remove(_package_path(key))
    return path


def read_aside(key: str) -> PackageAside | None:
    """Return the package of a piece that was set aside last; None if none was, or it is not
    trusted."""
    body = read_cached(_path_aside(key))
    if body is None or not body.startswith(key.encode()):
        return None
    try:
        return msgspec.msgpack.decode(memoryview(body)[len(key) :], type=PackageAside)
    except msgspec.MsgspecError:
        return None


def forget_aside(key: str) -> None:
    """Remove the package of a piece that was set aside, if there is one. If the cache cannot be
    written, nothing happens."""
    _remove(_path_aside(key))


def package_digest(body: bytes) -> str:
    """Return the digest of a package as it is kept."""
    return hashlib.sha256(body).hexdigest()


def _read_of_program(directory: Path, name: str) -> bytes:
    body = read_cached(directory / name)
    if body is None:
        raise CompilationError(f"{directory} holds no {name} that is trusted.")
    key = directory.name.encode()
    if not body.startswith(key):
        raise CompilationError(f"{directory} holds the {name} of another key.")
    return body[len(key) :]


def _write_of_program(directory: Path, name: str, body: bytes) -> None:
    _write(directory / name, directory.name.encode() + body)


def _body(key: str, package: Package) -> bytes:
    return key.encode() + msgspec.msgpack.encode(package)


def _package_path(key: str) -> Path:
    return cache_directory("compiled", "pieces") / f"{key}.pt2"


def _path_aside(key: str) -> Path:
    return _package_path(key).with_suffix(".crashed")


def _remove(path: Path) -> None:
    """Remove a file, if it is there and the cache can be written."""
    with suppress(OSError):
        path.unlink()


def _write(path: Path, body: bytes) -> None:
    write_cached(path, body)
    if read_cached(path) != body:
        raise CompilationError(
            f"{path} cannot be kept; may this user write there, and is the disk full?"
        )
