"""Places that outputs are written to and that do not take them: a full or a read-only disk, something in the way."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Full:
    """A file of a disk without room: what is flushed is refused, when it is closed, too; it may take a part."""

    def __init__(self, file: Any, part: int = 0) -> None:
        self._file, self._part = file, part

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: Any) -> int:
        self._file.write(data[: self._part])
        return len(data)

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()
        self.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())


@contextmanager
def full_from(name: str, nth: int = 1) -> Iterator[None]:
    """A disk that is full when the file whose path ends so is written for the nth time, and from then on."""
    real, seen = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal seen
        seen += str(target).endswith(name)
        if seen >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        yield
    assert seen >= nth, f"{name} was not written"


@contextmanager
def read_only() -> Iterator[None]:
    """Nothing can be opened for writing and no folder made, as on a disk that is mounted so."""
    real = os.open

    def refuse(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def low(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return int(refuse(path) if writes else real(path, flags, *rest, **named))

    def high(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        return refuse(path) if set(mode) & set("wax+") else builtins.open(path, mode, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", low)
        patch.setattr(os, "mkdir", refuse)
        patch.setattr(io, "open", high)
        yield


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The operating system itself refuses to let a file grow beyond so many bytes, whoever writes it."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def put(path: Path, kind: str) -> None:
    """Put a pipe, an empty folder, a file of the user or a link to one in a place, instead of what is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path if kind == "file" else path.with_name(f"{path.name}.mine")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        mine.write_bytes(b"mine")
    if kind == "link":
        path.symlink_to(mine)


def untouched(path: Path, kind: str) -> bool:
    """Whether what :func:`put` put there is still there."""
    if kind == "pipe":
        return path.is_fifo()
    if kind == "folder":
        return path.is_dir() and not list(path.iterdir())
    return path.read_bytes() == b"mine" and path.is_symlink() == (kind == "link")


def temporaries(folder: Path) -> list[str]:
    """What writers left behind."""
    return [str(path) for path in folder.rglob("*.tmp")]
