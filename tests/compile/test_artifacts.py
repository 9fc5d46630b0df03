"""A program is loaded only if all of it is what was kept; whatever is wrong is a warning."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import msgspec
import pytest

from minisrv.cache import write_cached
from minisrv.compile import artifacts
from minisrv.compile.pieces import PieceCompiler
from minisrv.compile.program import LoadedPiece, Program
from minisrv.compile.values import Description, PieceFile
from minisrv.compile.worker import keep_piece
from minisrv.errors import CompilationError
from tests.compile.compiled import Compiled
from tests.nn.driver import Driver

pytestmark = pytest.mark.compiler


@pytest.fixture
def copy(one_program: Compiled, own_cache: Path) -> tuple[Path, Path]:
    """Return the files of the program's description and of its last package in a cache of their
    own."""
    description = own_cache / "programs" / one_program.directory.name / artifacts.PROGRAM
    body = artifacts.read_description(description.parent)
    key = msgspec.msgpack.decode(body, type=Description).pieces[-1].key
    return description, own_cache / "pieces" / f"{key}.pt2"


def load(one_program: Compiled, description: Path) -> Program | None:
    Driver(one_program.model)
    return Program.load(description.parent, one_program.model)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def open_to_others(path: Path) -> None:
    path.chmod(0o666)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def other_content(path: Path) -> None:
    """Put something else in the place that is whole and ours."""
    write_cached(path, msgspec.msgpack.encode(artifacts.Package([], b"no package")))


def missing(path: Path) -> None:
    path.unlink()


DAMAGES = [cut, flip, empty, open_to_others, link, other_content, missing]


@pytest.mark.parametrize("which", [0, 1], ids=["description", "package"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_not_ours_is_not_loaded(
    damage: Callable[[Path], None],
    which: int,
    copy: tuple[Path, Path],
    one_program: Compiled,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    assert load(one_program, copy[0]) is not None
    damage(copy[which])
    made: list[object] = []
    monkeypatch.setattr(LoadedPiece, "__init__", lambda *_: made.append(1))
    caplog.clear()
    assert load(one_program, copy[0]) is None
    assert not made, "nothing is loaded before all of it is checked"
    assert "is not used" in caplog.text


def test_a_package_that_no_loader_takes_is_a_warning(
    copy: tuple[Path, Path], one_program: Compiled, caplog: pytest.LogCaptureFixture
):
    body = artifacts.read_description(copy[0].parent)
    found = msgspec.msgpack.decode(body, type=Description)
    key = found.pieces[0].key
    digest = artifacts.write_package(key, artifacts.Package([], b"no package"))
    pieces = [msgspec.structs.replace(found.pieces[0], digest=digest), *found.pieces[1:]]
    changed = msgspec.structs.replace(found, pieces=pieces)
    artifacts.write_description(copy[0].parent, msgspec.msgpack.encode(changed))
    assert load(one_program, copy[0]) is None
    assert "is not used" in caplog.text


def test_a_package_in_the_place_of_another_piece_is_made_again(
    copy: tuple[Path, Path], one_program: Compiled, tmp_path: Path
):
    """It is whole and ours, and would compute something else."""
    body = artifacts.read_description(copy[0].parent)
    file = msgspec.msgpack.decode(body, type=Description).pieces[-1]
    good = artifacts.read_package(file.key)
    path, other = copy[1], copy[1].with_name(f"{'0' * len(file.key)}.pt2")
    path.rename(other)
    with pytest.raises(CompilationError, match="of another piece"):
        artifacts.read_package("0" * len(file.key))
    other.rename(path)
    artifacts.write_package(file.key, artifacts.Package([], b"no package"))
    kept = keep_piece(file.key, 99, lambda: good, tmp_path)
    assert (kept.key, kept.digest) == (file.key, file.digest)
    assert load(one_program, copy[0]) is not None


def test_a_program_in_the_place_of_another_is_not_loaded(
    copy: tuple[Path, Path], one_program: Compiled, caplog: pytest.LogCaptureFixture
):
    """That of another dtype would read the weights as what they are not."""
    other = copy[0].parent.with_name("0" * 32)
    copy[0].parent.rename(other)
    assert load(one_program, other / artifacts.PROGRAM) is None
    assert "of another key" in caplog.text


def test_a_piece_that_another_server_has_made_meanwhile_is_taken(
    copy: tuple[Path, Path], one_program: Compiled, tmp_path: Path
):
    """The programs of both name the digest of the package that is kept."""
    body = artifacts.read_description(copy[0].parent)
    file = msgspec.msgpack.decode(body, type=Description).pieces[-1]
    good = artifacts.read_package(file.key)
    copy[1].unlink()

    def make() -> artifacts.Package:
        assert artifacts.write_package(file.key, good) == file.digest  # the other server's
        return artifacts.Package([*good.written, 0], good.body)

    kept = keep_piece(file.key, 99, make, tmp_path)
    assert (kept.key, kept.digest) == (file.key, file.digest)
    assert load(one_program, copy[0]) is not None


def test_two_servers_that_end_a_piece_at_the_same_time_keep_one_package(
    copy: tuple[Path, Path], one_program: Compiled, tmp_path: Path
):
    """Each looked whether there was one, and then wrote its own: the program of the one that wrote
    first named a package that was gone, and did not serve."""
    body = artifacts.read_description(copy[0].parent)
    file = msgspec.msgpack.decode(body, type=Description).pieces[-1]
    good = artifacts.read_package(file.key)
    copy[1].unlink()
    mine = artifacts.Package([*good.written, 0], good.body)
    kept: list[PieceFile] = []
    other = Thread(target=lambda: kept.append(keep_piece(file.key, 99, lambda: mine, tmp_path)))
    with artifacts.alone():
        other.start()
        other.join(timeout=1)
        assert not kept
        assert artifacts.write_package(file.key, good) == file.digest
    other.join()
    assert [one.digest for one in kept] == [file.digest]
    assert load(one_program, copy[0]) is not None


def test_a_program_of_another_model_is_not_bound(
    copy: tuple[Path, Path], one_program: Compiled, caplog: pytest.LogCaptureFixture
):
    Driver(one_program.model)
    layers = one_program.model.layers
    one_program.model.layers = layers[:2]
    try:
        assert Program.load(copy[0].parent, one_program.model) is None
    finally:
        one_program.model.layers = layers
    assert "has no Tensor layers.2" in caplog.text


def test_a_full_disk_is_an_answer(copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(artifacts, "write_cached", lambda path, body: None)
    with pytest.raises(CompilationError, match="cannot be kept"):
        artifacts.write_package("0" * 32, artifacts.Package([], b""))


def test_a_program_that_there_is_no_room_to_unpack_stays(
    copy: tuple[Path, Path], one_program: Compiled
):
    """A start with a full temporary directory once threw a good program away, which the next one
    compiled again."""
    Driver(one_program.model)
    compiler = PieceCompiler(one_program.job, one_program.model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
    try:
        with pytest.raises(CompilationError, match=r"now \(.*File too large.*\); the next start"):
            compiler.find()
        with pytest.raises(CompilationError, match="cannot be loaded now"):
            compiler.load(copy[0].parent, lambda: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert compiler.find() == copy[0].parent


def test_a_loader_that_fails_on_a_full_disk_says_nothing_about_the_package(
    monkeypatch: pytest.MonkeyPatch,
):
    """The loader raises the same error for a damaged package and for a full disk."""
    package = artifacts.Package([], b"no package")
    with pytest.raises(RuntimeError):
        LoadedPiece(package, 0)
    free = shutil.disk_usage("/")._replace(free=len(package.body) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match="No space left on device"):
        LoadedPiece(package, 0)


def test_a_cache_that_others_may_write_to_holds_no_programs(
    copy: tuple[Path, Path], one_program: Compiled, caplog: pytest.LogCaptureFixture
):
    assert one_program.job.kept_program() == copy[0].parent
    copy[0].parent.parent.chmod(0o777)
    assert one_program.job.kept_program() is None
    assert "others may write" in caplog.text
    caplog.clear()
    copy[1].parent.chmod(0o777)
    assert load(one_program, copy[0]) is None
    assert "others may write" in caplog.text
