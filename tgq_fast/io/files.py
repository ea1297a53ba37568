"""How files are read and written: whole or not at all, only where a plain file is meant, with typed errors.

A written file gets a temporary name that nobody can predict, is synced and renamed. What is no plain file (a device, a
pipe) is written to in place; a link is followed and stays a link; an existing file keeps its mode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tgq_fast.errors import StorageError

__all__ = [
    "Hold",
    "append_line",
    "atomic_writer",
    "check_own",
    "check_target",
    "fsync_folder",
    "hold",
    "locked",
    "make_folder",
    "open_regular",
    "read_regular",
    "storage_errors",
    "storage_failure",
    "sweep",
    "write_atomic",
    "writing",
]

_STALE = 60.0  # seconds: a younger temporary file may belong to a writer that has not locked it yet
_swept: set[str] = set()
_FULL_OR_CLOSED = frozenset(
    (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EFBIG)
)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the operating system says about writing to `path` into a :class:`StorageError`."""
    try:
        yield
    except (StorageError, InterruptedError, BrokenPipeError):
        raise
    except OSError as error:
        raise StorageError(path, error) from error


def storage_failure(error: BaseException, path: str | Path) -> StorageError | None:
    """What an error says about storage (disk full or read-only, no permission); None if it is about something else.

    Args:
        path: what was being written, for an error that does not name it.
    """
    if isinstance(error, StorageError):
        return error
    if isinstance(error, OSError) and error.errno in _FULL_OR_CLOSED:
        return StorageError(error.filename or path, error)
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter failed|inline_container", str(error)):
        # torch.save keeps no errno.
        return StorageError(path, OSError(errno.EIO, "torch.save could not write; the disk may be full"))
    if type(error).__name__ == "SafetensorError" and (told := re.search(r"\(os error (\d+)\)", str(error))):
        return StorageError(path, OSError(int(told[1]), os.strerror(int(told[1]))))
    return None


@contextlib.contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Around a longer piece of work that writes to `path`: what :func:`storage_failure` knows leaves as such.

    :func:`writing` is for the writing alone, where every error of the operating system is about it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError) or (failure := storage_failure(error, path)) is None:
            raise
        raise failure from error


def check_target(path: str | Path) -> None:
    """StorageError if a file could not be written to `path`: to be asked before the work whose result it is to hold."""
    target = Path(os.path.realpath(path))
    with writing(path):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        above = next(folder for folder in target.parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(above if not target.exists() or target.is_file() else target, os.W_OK):
            code = errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(code, os.strerror(code))


def check_own(folder: Path, files: Iterable[str], folders: Iterable[str] = ()) -> None:
    """StorageError where something else stands in the place of a folder's own files (a pipe, which would hang, a device
    or a folder) or of the folders in it. Links to what is expected are that.
    """
    for name in files:
        with writing(folder / name), contextlib.suppress(FileNotFoundError):
            mode = os.stat(folder / name).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, "no plain file is in its place")
    for name in folders:
        with writing(folder / name):
            if os.path.lexists(folder / name) and not (folder / name).is_dir():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


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


def read_regular(path: str | Path) -> bytes:
    """All of a plain file. Errors as for :func:`open_regular`."""
    with open_regular(path) as file:
        return file.read()


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
        name = os.path.abspath(path)
        # /dev/stdout may be a plain file; so is what lies in /dev/shm, but that is a folder as any other.
        named_stream = name in ("/dev/stdout", "/dev/stderr") or name.startswith(("/dev/fd/", "/proc/"))
        if status is not None and (named_stream or not stat.S_ISREG(status.st_mode)):
            with open(path, "ab") as stream:
                yield stream
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
        file.write(data)


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
            while line:  # a disk that fills up takes a part first
                line = line[os.write(handle, line) :]
            if regular:
                os.fsync(handle)
        finally:
            os.close(handle)


class Hold:
    """A lock on an open file, until :meth:`release`; without a file it holds nothing. It ends with the process.

    A forked child has a copy of it, which ends with the child and releases nothing.
    """

    def __init__(self, handle: int | None) -> None:
        self._handle = handle

    def release(self) -> None:
        """Let go; more than once does no harm."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.release()


def hold(path: str | Path, *, wait: bool = False) -> Hold | None:
    """Lock a file, which is made where it is missing; without `wait`, None when another process or thread holds it.

    Raises:
        StorageError: the file cannot be made.
    """
    while True:
        with writing(path):
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            handle = os.open(path, flags, 0o666)
        lock = Hold(handle)
        if not _lock(handle, wait=wait):
            lock.release()
            return None
        with contextlib.suppress(OSError):
            if os.name != "posix" or os.path.samestat(os.fstat(handle), os.stat(path)):
                return lock
        lock.release()  # who held it has removed the file: that lock is nobody's


@contextlib.contextmanager
def locked(path: str | Path, *, wait: bool = True) -> Iterator[bool]:
    """:func:`hold` around a block; yields whether the lock was got."""
    lock = hold(path, wait=wait)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


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
