"""Files and folders that are written beside their place: what is left of a killed writer, and what its errors say."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketzo.formats import staging
from pocketzo.formats.files import append, copy_file, sync_folder, write_file
from pocketzo.formats.staging import (
    foreign,
    is_staged,
    remove_folder,
    scratch_folder,
    staged_file,
    staged_folder,
    sweep,
)

OWN = ("a", "b")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def writer(folder: Path, what: str) -> subprocess.Popen[str]:
    """A process that writes until it is killed."""
    code = f"""
import time
from pathlib import Path
from pocketzo.formats.staging import scratch_folder, staged_file, staged_folder
folder = Path({os.fspath(folder)!r})
what = {{
    "file": lambda: staged_file(folder / "target"),
    "folder": lambda: staged_folder(folder / "target", ("a",), replace=False),
    "scratch": lambda: scratch_folder(folder),
}}[{what!r}]
with what() as got:
    got.write(b"half") if {what!r} == "file" else (got / "a").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("what", ["file", "folder", "scratch"])
def test_what_a_killed_process_leaves_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path, what: str) -> None:
    with writer(tmp_path, what) as process:
        before = sorted(tmp_path.rglob("*"))
        assert [is_staged(name) for name in names(tmp_path)] == [True]
        sweep(tmp_path)
        with staged_file(tmp_path / "other") as file:  # begins with a sweep
            file.write(b"all")
        (tmp_path / "other").unlink()
        assert sorted(tmp_path.rglob("*")) == before
        process.kill()
        process.wait()
        assert sorted(tmp_path.rglob("*")) == before
        with staged_file(tmp_path / "other") as file:
            file.write(b"all")
        assert names(tmp_path) == ["other"]


def test_only_what_is_named_like_a_staged_file_is_swept(tmp_path: Path) -> None:
    kept = [
        ".pocketzo-0123456789abcde",
        ".pocketzo-0123456789abcdef0",
        ".pocketzo-0123456789ABCDEF",
        "pocketzo-0123456789abcdef",
        ".pocketzo-0123456789abcdef.txt",
    ]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis").touch()
    (tmp_path / ".pocketzo-0000000000000000").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / ".pocketzo-1111111111111111")
    (tmp_path / ".pocketzo-2222222222222222").touch()
    (tmp_path / ".pocketzo-3333333333333333" / "new" / "deep").mkdir(parents=True)
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*kept, "elsewhere", ".pocketzo-0000000000000000", ".pocketzo-1111111111111111"])
    assert names(tmp_path / "elsewhere") == ["thesis"]
    sweep(tmp_path / "nowhere")


def test_another_users_file_in_a_shared_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    path = tmp_path / ".pocketzo-0123456789abcdef"
    path.touch()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    tmp_path.chmod(0o1777)
    sweep(tmp_path)
    assert path.exists()
    tmp_path.chmod(0o777)  # as on the memory card of a phone, where all files belong to one user
    sweep(tmp_path)
    assert not path.exists()


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".pocketzo-0123456789abcdef").touch()
    monkeypatch.setattr("fcntl.flock", refuse)
    with staged_file(tmp_path / "target") as file:
        file.write(b"all")
    monkeypatch.setattr(staging, "_CAN_LOCK", False)
    with staged_folder(tmp_path / "folder", OWN, replace=False) as folder:
        (folder / "a").touch()
    assert names(tmp_path) == [".pocketzo-0123456789abcdef", "folder", "target"]


@pytest.mark.parametrize("own", [OWN, ()])
@pytest.mark.parametrize("interrupted", ["before the old one is moved", "before the new one is moved", "after both"])
def test_an_interrupted_replacement_is_undone_or_ended(tmp_path: Path, interrupted: str, own: tuple[str, ...]) -> None:
    container, target = tmp_path / ".pocketzo-0123456789abcdef", tmp_path / "target"
    new, swap = container / "new", container / "swap" / "target"
    for folder, text in (swap.parent, ""), (new, "new"), (target, "old"):
        folder.mkdir(parents=True)
        if text:
            (folder / "a").write_text(text)
    if interrupted != "before the old one is moved":
        target.rename(swap)
        (swap / "b").write_text("old")
    if interrupted == "after both":
        new.rename(target)
        (swap / "note").write_text("mine")
    sweep(tmp_path, own)
    if not own:  # by a writer of another kind of folder
        assert names(tmp_path) == sorted([container.name, *(["target"] if target.exists() else [])])
        return
    assert names(tmp_path) == ["target"]
    assert (target / "a").read_text() == ("new" if interrupted == "after both" else "old")
    assert (
        names(target)
        == {
            "before the old one is moved": ["a"],
            "before the new one is moved": ["a", "b"],
            "after both": ["a", "note"],
        }[interrupted]
    )


def test_many_writers_at_once_disturb_nobody(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from pocketzo.formats.staging import staged_file, staged_folder
me = sys.argv[1]
for i in range(60):
    with staged_file(Path({os.fspath(tmp_path)!r}) / f"{{me}}-{{i}}") as file:
        file.write(me.encode())
    with staged_folder(Path({os.fspath(tmp_path)!r}) / f"folder-{{me}}", ("a",), replace=True) as folder:
        (folder / "a").write_text(me)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(me)]) for me in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert names(tmp_path) == sorted(
        [f"{me}-{i}" for me in range(4) for i in range(60)] + [f"folder-{me}" for me in range(4)]
    )


def test_scratch_is_in_the_folder_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", os.fspath(tmp_path))
    with scratch_folder() as folder:
        assert folder.parent.parent == tmp_path
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
    assert not names(tmp_path)


def test_foreign_names_and_removal(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "c", ".pocketzo-0123456789abcdef"):
        (folder / name).touch()
    (folder / "b").mkdir()
    assert foreign(folder, OWN) == ["b", "c"]
    remove_folder(folder, OWN)
    assert names(folder) == ["b", "c"]
    (folder / "b").rmdir()
    (folder / "c").rename(folder / "b")
    remove_folder(folder, OWN)
    assert not names(tmp_path)
    remove_folder(folder, OWN)


# ---- errors ----------------------------------------------------------------------------------------------------------


def write_staged_file(path: Path) -> None:
    with staged_file(path) as file:
        file.write(bytes(1 << 20))


def write_staged_folder(path: Path) -> None:
    with staged_folder(path.parent, OWN, replace=False) as folder:
        write_file(folder / path.name, bytes(1 << 20))


def write_staged_file_in_folder(path: Path) -> None:
    with staged_folder(path.parent, OWN, replace=False) as folder, staged_file(folder / path.name) as file:
        for _ in range(1024):
            file.write(bytes(1 << 10))


def copy(path: Path) -> None:
    path.parent.mkdir()
    copy_file(Path(__file__), path)


def append_to(path: Path) -> None:
    path.parent.mkdir()
    with path.open("wb", buffering=0) as file:
        append(file, b"12", 0, path)
        try:
            append(file, bytes(1 << 20), 2, path)
        finally:
            assert path.read_bytes() == b"12"
            path.unlink()


@pytest.mark.parametrize(
    "write", [write_staged_file, write_staged_folder, write_staged_file_in_folder, copy, append_to]
)
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "folder" / "a"
    if write is write_staged_file:
        path.parent.mkdir()
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.filename == os.fspath(path)
    if write not in (copy, append_to):
        assert not [name for name in names(tmp_path) if name != "folder"]
        assert not path.exists()


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_name_as_long_as_the_system_allows_is_written(tmp_path: Path, name: str) -> None:
    write_staged_file(tmp_path / name)
    with pytest.raises(OSError, match="File name too long") as caught:
        write_staged_file(tmp_path / (name + "x" * 2))
    assert caught.value.filename == os.fspath(tmp_path / (name + "x" * 2))
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("write", [write_staged_file, write_staged_folder])
def test_a_folder_that_may_not_be_written_is_named_by_the_target(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *_: object, **__: object) -> int:  # root may write anywhere
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))  # type: ignore[call-overload]

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        write(tmp_path / "folder" / "a")
    expected = tmp_path / "folder" / "a" if write is write_staged_file else tmp_path / "folder"
    assert caught.value.filename == os.fspath(expected)


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_copy(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        copy_file(tmp_path, tmp_path / "copy")
    assert caught.value.filename == os.fspath(tmp_path)


def test_folders_that_cannot_be_flushed_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> Callable[[int], None]:
        def fsync(_: int) -> None:
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error") as caught:
        sync_folder(tmp_path)
    assert caught.value.filename == os.fspath(tmp_path)
