"""A cache entry is used only if it is whole and nobody else could have written it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minisrv import cache
from minisrv.cache import cache_directory, read_cached, write_cached

BODY = bytes(range(256)) * 64


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_directory()


def rewrite(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(edit(path.read_bytes())) and None


def by_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "more").touch()


def by_size(path: Path) -> None:
    """Damage an entry so that it has an enormous size, as on a damaged file system; what is read
    must fit into memory."""
    os.truncate(path, 1 << 40)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (rewrite(lambda body: b""), "damaged"),
    "cut off": (rewrite(lambda body: body[: len(body) // 2]), "damaged"),
    "its digest missing": (rewrite(lambda body: body[: -cache.DIGEST_SIZE]), "damaged"),
    "its digest garbage": (rewrite(lambda body: body[: -cache.DIGEST_SIZE] + b"x" * 32), "damaged"),
    "longer": (rewrite(lambda body: body + b"\0"), "damaged"),
    "a page of zeros": (rewrite(lambda body: body[:4096] + bytes(4096) + body[8192:]), "damaged"),
    "all zeros": (rewrite(lambda body: bytes(len(body))), "damaged"),
    "a link": (by_link, "it is a link"),
    "a link to nothing": (lambda path: path.unlink() or path.symlink_to("nothing"), "it is a link"),
    "a pipe": (by_pipe, "no regular file"),
    "a terabyte": (by_size, "it has 1099511627776 bytes"),
    "a directory": (by_directory, "no regular file"),
    "mode 666": (lambda path: path.chmod(0o666), "others may write to it (its mode is 666)"),
    "mode 660": (lambda path: path.chmod(0o660), "others may write to it (its mode is 660)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_trusted_is_made_again_in_its_place(
    damage: str, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged or untrusted entry is not used, the log says why, and a new one takes its place."""
    path = directory / "entry"
    write_cached(path, BODY)
    assert read_cached(path) == BODY
    spoil, reason = DAMAGE[damage]
    spoil(path)
    assert read_cached(path) is None
    [record] = caplog.records
    assert str(path) in record.getMessage()
    assert reason in record.getMessage()
    write_cached(path, BODY)
    assert read_cached(path) == BODY
    assert len(caplog.records) == 1
    assert (path.stat().st_mode & 0o777, path.is_symlink()) == (0o600, False)


def test_what_belongs_to_another_user(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = directory / "entry"
    write_cached(path, BODY)
    found = os.stat_result((0o100600, 0, 0, 1, 12345, 0, 0, 0, 0, 0))
    monkeypatch.setattr(cache.os, "fstat", lambda descriptor: found)
    assert read_cached(path) is None
    assert "another user (12345)" in caplog.text


def test_what_is_not_there_is_not_told(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_cached(directory / "entry") is None
    assert not caplog.records


@pytest.mark.parametrize("failing", ["NamedTemporaryFile", "replace"])
def test_a_full_disk_keeps_nothing_and_stops_nobody(
    failing: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = cache.tempfile if failing == "NamedTemporaryFile" else Path
    monkeypatch.setattr(owner, failing, full)
    write_cached(directory / "entry", BODY)
    assert "could not be kept" in caplog.text
    assert "No space left" in caplog.text
    assert not list(directory.iterdir()), "nothing half made stays"


def test_a_file_system_that_fills_up_while_it_is_written(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that fills up during a write leaves no entry. A process of its own does the
    write, with a limit of 1000 bytes for its files."""
    import resource
    import signal

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        write_cached(directory / "entry", BODY)
        os._exit(len(list(directory.iterdir())))
    assert os.waitpid(child, 0)[1] == 0
    assert read_cached(directory / "entry") is None


@pytest.mark.parametrize("part", ["minisrv", "minisrv/checkpoints"])
@pytest.mark.parametrize("link", [False, True])
def test_a_directory_that_others_may_write_to(
    part: str, link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache_directory("checkpoints")
    directory = tmp_path / "cache" / part
    if link:
        directory.rename(tmp_path / "elsewhere")
        directory.symlink_to(tmp_path / "elsewhere")
    cache_directory("checkpoints")
    directory.chmod(0o777)
    with pytest.raises(OSError, match="others may write to"):
        cache_directory("checkpoints")


def test_a_directory_that_others_may_move_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is refused in a directory to which all may write, unless its sticky bit is set."""
    place = tmp_path / "place"
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    cache_directory()
    place.chmod(0o777)
    with pytest.raises(OSError, match=f"all may write to {place}"):
        cache_directory()
    # With the sticky bit, as /tmp has it, only the owner of a file may move it.
    place.chmod(0o1777)
    assert cache_directory() == place / "minisrv"


def test_the_working_directory_is_no_place_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is never used, as it would be below the working directory; the XDG
    specification says to ignore one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_directory() == tmp_path / "home" / ".cache" / "minisrv"
    monkeypatch.setenv("HOME", "home")
    with pytest.raises(RuntimeError, match="no absolute path"):
        cache_directory()
