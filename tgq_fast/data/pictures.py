"""Where the pictures of a catalogue lie: files below its folder, rows of its Parquet files, or memory."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tgq_fast.io.files import open_regular
from tgq_fast.io.places import RemotePath, place, read_place

__all__ = ["MemoryPictures", "OutsideError", "Picture", "PictureSource", "picture_of"]

MAX_BYTES = 128 << 20
"""Size of a picture file above which it is refused unread."""
FOLLOW_LINKS = "TGQ_FOLLOW_LINKS"
"""Environment variable; 1 allows links that lead out of a catalogue's folder."""


class PictureSource(Protocol):
    """Pictures by address, as `Item.file_name` has it."""

    def __contains__(self, address: object) -> bool: ...

    def read(self, address: str) -> bytes:
        """Bytes of the picture file; OSError if they cannot be had."""
        ...


class OutsideError(OSError):
    """A picture's path leads out of its catalogue's folder by way of a link."""


@dataclass(frozen=True)
class Picture:
    """One picture of a catalogue.

    Attributes:
        path: where it lies, for messages; of a picture in a table "<table>#<row>".
        root: folder that it must not lead out of.
        read: gives the bytes of a picture that is not a file of its own.
    """

    path: Path
    root: Path | None = None
    read: Callable[[], bytes] | None = None

    def open(self) -> BinaryIO:
        """The picture file, opened.

        Raises:
            OutsideError: a link leads out of `root`.
            OSError: missing, no plain file, no permission, or the table cannot be read.
        """
        if self.read is not None:
            return io.BytesIO(self.read())
        if self.root is not None and os.environ.get(FOLLOW_LINKS) != "1":
            real, root = os.path.realpath(self.path), os.path.realpath(self.root)
            if os.path.commonpath((real, root)) != root:
                raise OutsideError(
                    errno.EPERM, f"a link leads out of the catalogue to {real}; copy it there, or set {FOLLOW_LINKS}=1"
                )
        return open_regular(self.path)

    def loaded(self) -> Picture:
        """The same picture with its bytes in memory, so that all that reads it sees the same; it is read here.

        One that cannot be read, or is larger than any picture may be, is returned as it is.
        """
        try:
            with self.open() as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError):
            return self
        return self if len(data) > MAX_BYTES else replace(self, read=partial(bytes, data))


class MemoryPictures:
    """Encoded pictures in memory, by address."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def add(self, row: int, data: bytes) -> str:
        """Keep the picture of a row; its address."""
        address = f"memory#{row}"
        self._data[address] = data
        return address

    def __contains__(self, address: object) -> bool:
        return address in self._data

    def read(self, address: str) -> bytes:
        return self._data[address]

    def part(self, addresses: Iterable[str | None]) -> MemoryPictures:
        """Those of some addresses; others, and None, are passed over."""
        some = MemoryPictures()
        some._data = {name: self._data[name] for name in addresses if name is not None and name in self._data}
        return some


def picture_of(root: Path, file_name: str, source: PictureSource | None) -> Picture:
    """The picture that an item's `file_name` means in a catalogue."""
    path = root / file_name
    if source is not None and file_name in source:
        return Picture(path, read=_Reader(source, file_name))
    there = place(file_name)  # an address of its own, else below the catalogue's
    there = there if isinstance(there, RemotePath) else place(root) / file_name
    if isinstance(there, RemotePath):
        return Picture(Path(there), read=partial(read_place, there, MAX_BYTES + 1))
    return Picture(path, root=root)


@dataclass(frozen=True)
class _Reader:
    """Not a lambda, so that pictures can be sent to worker processes."""

    source: Any
    address: str

    def __call__(self) -> bytes:
        data: bytes = self.source.read(self.address)
        return data
