"""Readers say which version of a pool they hold, so that a writer removes no file that one of them still needs.

A reader of version v holds a shared lock on byte v of the file `.readers`; a writer that wants to remove what older
versions need tries to lock all bytes before its own. The system drops the locks of a process that ends. Where there are
no such locks (not Linux; some network file systems) nobody is heard, and writers remove files only when they open the
pool, not while they work.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

from tgq_fast.io.files import Hold

try:
    import fcntl

    # Of the open file, not of the process: several pools of one process are told apart.
    _SET: int | None = fcntl.F_OFD_SETLK
except (ImportError, AttributeError):  # not Linux
    _SET = None

PINS_NAME = ".readers"


class Pin(Hold):
    """A reader's hold on one version.

    Args:
        folder: the pool.
        version: what the reader has open.
    """

    def __init__(self, folder: Path, version: int) -> None:
        super().__init__(None)
        if _SET is None:
            return
        try:
            self._handle = os.open(folder / PINS_NAME, os.O_RDONLY | os.O_CLOEXEC)
            _lock(self._handle, fcntl.F_RDLCK, version, 1)
        except OSError:  # no writer of this release has been here, or no locks
            self.release()


def unpinned(folder: Path, version: int, *, unknown: bool) -> bool:
    """Whether no reader holds a version before this one; `unknown` where there are no locks. For the writer."""
    if _SET is None:
        return unknown
    try:
        handle = os.open(folder / PINS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return unknown
    try:
        if version:
            _lock(handle, fcntl.F_WRLCK, 0, version)
        return True
    except OSError as error:
        return unknown if error.errno not in (errno.EAGAIN, errno.EACCES) else False
    finally:
        os.close(handle)  # and the lock with it


def _lock(handle: int, kind: int, first: int, count: int) -> None:
    assert _SET is not None
    fcntl.fcntl(handle, _SET, struct.pack("hhqqi4x", kind, os.SEEK_SET, first, count, 0))
