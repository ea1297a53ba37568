"""How files are read and written: whole or not at all, only where a plain file is meant, with typed errors.

A written file gets a temporary name that nobody can predict, is synced and renamed. What is no plain file (a device, a
pipe) is written to in place; a link is followed and stays a link; an existing file keeps its mode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tgq_fast.errors import StorageError

__all__ = [
    "append_line",
    "atomic_writer",
    "fsync_folder",
    "locked",
    "make_folder",
    "open_regular",
    "sweep",
    "write_atomic",
    "writing",
]

_STALE = 60.0  # seconds: a younger temporary file may belong to a writer that has not locked it yet
_swept: set[str] = set()


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the operating system says about writing to `path` into a :class:`StorageError`."""
    try:
        yield
    except (StorageError, InterruptedError, BrokenPipeError):
        raise
    except OSError as error:
        raise StorageError(path, error) from error


def make_folder(path: str | Path) -> Path:
    """A folder with all its parents; StorageError where it cannot be made."""
    path = Path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def open_regular(path: str | Path) -> BinaryIO:
    """Open a plain file for reading; OSError (EINVAL) for a folder, device, socket or pipe, which could hang."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable where the platform can (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Binary file that replaces `path` when the block ends without an error; on an error nothing is left behind.

    Raises:
        StorageError: the disk is full or read-only, the folder cannot be made, or permission is missing.
    """
    path = Path(path)
    with writing(path):
        try:
            status: os.stat_result | None = os.stat(path)
        except FileNotFoundError:
            status = None
        if status is not None and stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        named_stream = os.path.abspath(path).startswith(("/dev/", "/proc/"))  # /dev/stdout may be a plain file
        if status is not None and (named_stream or not stat.S_ISREG(status.st_mode)):
            with open(path, "ab", buffering=0) as stream:
                yield stream  # type: ignore[misc]
            return
        target = Path(os.path.realpath(path))  # a link stays a link to the file that is replaced
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(target.parent)
        temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(8)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(temporary, flags, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                _lock(file.fileno())  # a killed writer's lock is gone, which is how `sweep` knows
                if status is not None:
                    _keep_mode(file.fileno(), status)
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(target.parent)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_writer(path) as file:
        view = memoryview(data)
        while view:  # a raw stream may take a part
            view = view[file.write(view) :]


def append_line(path: str | Path, line: bytes, *, close_off: bool = False) -> None:
    """Append one line in one write and sync it; with `close_off` a torn last line is ended first."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            status = os.fstat(handle)
            regular = stat.S_ISREG(status.st_mode)
            if close_off and regular and status.st_size and os.pread(handle, 1, status.st_size - 1) != b"\n":
                line = b"\n" + line
            os.write(handle, line)
            if regular:
                os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(path: str | Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock that the kernel releases when the process dies; yields whether it was got.

    Without `wait`, False means that another process or thread holds it.
    """
    path = Path(path)
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        yield _lock(handle, wait=wait)
    finally:
        os.close(handle)


def sweep(folder: Path, *, older_than: float = _STALE) -> int:
    """Remove temporary files that killed writers left in a folder; the number removed."""
    removed = 0
    try:
        names = [e.name for e in os.scandir(folder) if e.name.startswith(".") and e.name.endswith(".tmp")]
    except OSError:
        return 0
    for name in names:
        path = folder / name
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime < older_than:
                continue
            handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                if stat.S_ISREG(os.fstat(handle).st_mode) and _lock(handle, wait=False):
                    path.unlink()
                    removed += 1
            finally:
                os.close(handle)
    return removed


def _sweep_once(folder: Path) -> None:
    """`sweep`, once per folder and process: a folder of many shards is not listed for each of them."""
    if str(folder) not in _swept:
        _swept.add(str(folder))
        sweep(folder)


def _lock(handle: int, *, wait: bool = True) -> bool:
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


def _keep_mode(handle: int, status: os.stat_result) -> None:
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # only the owner may give a file away
        os.fchown(handle, status.st_uid, status.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(handle, stat.S_IMODE(status.st_mode))
