"""How files are written: whole, in place of what they replace, with typed errors."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from tgq_fast.data import RejectLog
from tgq_fast.errors import StorageError
from tgq_fast.io import files
from tgq_fast.io.files import (
    append_line,
    atomic_writer,
    check_target,
    hold,
    locked,
    open_regular,
    storage_errors,
    sweep,
    write_atomic,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes of POSIX")


def test_links_stay_links_and_modes_stay_modes(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    os.chmod(tmp_path / "real.json", 0o600)
    (tmp_path / "link.json").symlink_to("real.json")
    write_atomic(tmp_path / "link.json", b"new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "real.json").stat().st_mode) == 0o600
    (tmp_path / "later").symlink_to("absent.json")
    write_atomic(tmp_path / "later", b"x")
    assert (tmp_path / "later").is_symlink() and (tmp_path / "absent.json").read_bytes() == b"x"
    mask = os.umask(0o027)
    try:
        write_atomic(tmp_path / "fresh", b"x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["absent.json", "fresh", "later", "link.json", "real.json"]


def test_pipes_and_devices_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_atomic(tmp_path / "pipe", b"x" * 300_000)  # more than a pipe holds
    reader.join()
    assert got == [b"x" * 300_000] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    before = os.stat("/dev/null")
    write_atomic("/dev/null", b"x")
    append_line("/dev/null", b"x\n")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.stat("/dev/null").st_ino == before.st_ino


@pytest.mark.parametrize("into", ["pipe", "file"])
def test_dev_stdout_is_the_stream_that_the_shell_gave(tmp_path: Path, into: str) -> None:
    script = "from tgq_fast.io.files import write_atomic; write_atomic('/dev/stdout', b'one\\n'); print('two')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if into == "pipe":
        out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout
    else:
        with (tmp_path / "out").open("ab") as file:
            subprocess.run([sys.executable, "-c", script], env=environment, stdout=file, check=True)
        out = (tmp_path / "out").read_bytes()
    assert out == b"one\ntwo\n"


def test_temporary_names_cannot_be_foreseen_or_taken(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        with atomic_writer(tmp_path / "x") as file:
            names |= {name for name in os.listdir(tmp_path) if name.endswith(".tmp")}
            file.write(b"x")
    assert len(names) == 2 and not any(str(os.getpid()) in name for name in names)


def test_what_a_killed_writer_left_is_swept_and_a_live_writers_file_is_not(tmp_path: Path) -> None:
    script = f"""
import os, signal
from tgq_fast.io.files import atomic_writer
with atomic_writer({str(tmp_path / "x")!r}) as file:
    file.write(b"half"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert sweep(tmp_path) == 0  # too young: it may belong to a writer that has not locked it yet
    os.utime(left, (time.time() - 3600,) * 2)
    with atomic_writer(tmp_path / "y") as file:  # sweeps on its way
        assert not left.exists()
        (mine,) = tmp_path.iterdir()
        os.utime(mine, (time.time() - 3600,) * 2)
        assert sweep(tmp_path) == 0 and mine.exists()
        file.write(b"whole")
    assert os.listdir(tmp_path) == ["y"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_disk_that_takes_nothing_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    write_atomic(tmp_path / "old", b"old")
    monkeypatch.setattr(files.os, "fsync", refuse)
    for write in (
        lambda: write_atomic(tmp_path / "old", b"new"),
        lambda: append_line(tmp_path / "log", b"x\n"),
        lambda: RejectLog(tmp_path / "rejects.jsonl").add("a", 1, "x", "missing"),
    ):
        with pytest.raises(StorageError, match=os.strerror(code)) as caught:
            write()
        assert caught.value.errno == code and isinstance(caught.value, OSError)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert (tmp_path / "old").read_bytes() == b"old"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="name a file"):
        write_atomic(tmp_path, b"")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a part of the path is a file"):
        write_atomic(tmp_path / "file" / "below", b"")


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as first, locked(tmp_path / "lock", wait=False) as second:
        assert first and not second
    with locked(tmp_path / "lock", wait=False) as third:
        assert third


def test_a_lock_whose_file_was_removed_is_nobodys(tmp_path: Path) -> None:
    first = hold(tmp_path / "lock")
    assert first is not None and hold(tmp_path / "lock") is None
    (tmp_path / "lock").unlink()
    second = hold(tmp_path / "lock")  # of another file: it must be the one that is there
    assert second is not None and hold(tmp_path / "lock") is None
    first.release()
    first.release()
    assert hold(tmp_path / "lock") is None
    second.release()
    assert hold(tmp_path / "lock") is not None


def test_what_cannot_be_written_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("absent")
    for name in ("new", "file", "pipe", "link", "a/b/c", "/dev/null"):
        check_target(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "pipe"]
    for name, why in (("", "name a file"), ("file/x", "a part of the path"), ("file/x/y", "a part of the path")):
        with pytest.raises(StorageError, match=why):
            check_target(tmp_path / name)
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(StorageError, match="may write"):
        check_target(tmp_path / "new")


def test_only_storage_is_told_as_storage(tmp_path: Path) -> None:
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("[enforce fail at inline_container.cc:672]"), full):
        with pytest.raises(StorageError), storage_errors(tmp_path):
            raise error
    others = (OSError(errno.ENOENT, "missing"), RuntimeError("other"), StorageError("x", OSError(5, "y")))
    for other in (*others, SafetensorError("Error while deserializing header: HeaderTooLarge")):
        with pytest.raises(type(other)) as caught, storage_errors(tmp_path):
            raise other
        assert caught.value is other


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no shared memory folder")
def test_a_folder_in_shared_memory_is_a_folder_as_any_other() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for data in (b"first, which is longer", b"second"):
            write_atomic(Path(folder, "a.json"), data)
        assert Path(folder, "a.json").read_bytes() == b"second" and os.listdir(folder) == ["a.json"]


def test_a_line_of_which_the_disk_takes_a_part_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def part(handle: int, data: bytes) -> int:
        if len(data) < 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[:5])

    monkeypatch.setattr(files.os, "write", part)
    with pytest.raises(StorageError, match="No space"):
        append_line(tmp_path / "log", b"0123456789\n")
