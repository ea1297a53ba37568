"""WebDataset shards: tar files whose members of one name, up to its first dot, are one item; pictures stay in the file.

A member of JSON holds the columns, .txt (or .caption) the title, .cls the category, and the picture is the first member
with the suffix of one.
"""

from __future__ import annotations

import errno
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from tgq_fast.data.columns import PICTURE_SUFFIXES
from tgq_fast.data.csv_rows import MAX_ROW_BYTES
from tgq_fast.data.parquet_rows import EmbeddedPicture
from tgq_fast.data.values import RowError
from tgq_fast.errors import CatalogError
from tgq_fast.io.json_text import read_json
from tgq_fast.io.places import Place, open_place

__all__ = ["Member", "TarPictures", "pictures_of", "sample_row", "tar_groups", "tar_rows"]

_TITLES, _CLASSES, _IDS = (".txt", ".caption"), (".cls",), "__key__"
_ADDRESS = re.compile(r"(\d{1,18})\+(\d{1,18})")


class Member(NamedTuple):
    """A file in a tar file: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """Folder and name up to the first dot, which members of one item share."""
        path = PurePosixPath(self.name)
        return str(path.with_name(path.name.split(".", 1)[0] or path.name))

    @property
    def kind(self) -> str:
        """What follows the first dot, in lower case, with the dot."""
        return "." + PurePosixPath(self.name).name.partition(".")[2].lower()


def tar_rows(path: Place, name: str) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Items of one shard; pictures come as :class:`EmbeddedPicture` with addresses "<name>#<offset>+<size>".

    Where the file is damaged a last RowError says from which byte on.

    Raises:
        CatalogError: not a tar file.
        OSError: it cannot be read.
    """
    number = 0
    with open_place(path) as file:
        for sample in _samples(path, file):
            number += 1
            if isinstance(sample, RowError):
                yield number, sample
                continue
            pictures = pictures_of(sample)
            addresses = [EmbeddedPicture(f"{name}#{m.offset}+{m.size}", m.name) for m in pictures]
            yield number, sample_row(sample, lambda m: _bytes(file, m), addresses)


def _samples(path: Place, file: BinaryIO) -> Iterator[list[Member] | RowError]:
    """Members of each item, in the order of the file; a RowError where it is damaged, after which nothing comes.

    Raises:
        CatalogError: not a tar file.
    """
    damage: list[RowError] = []
    yield from tar_groups(_members(path, file, damage))
    yield from damage


def _members(path: Place, file: BinaryIO, damage: list[RowError]) -> Iterator[Member]:
    end = file.seek(0, 2)
    file.seek(0)
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  closing it leaves the file to its owner
    except (tarfile.TarError, EOFError, UnicodeError, ValueError, OverflowError) as error:
        hint = "Unpack .tar.gz first, or `tgq-fast import webdataset` reads it."
        raise CatalogError(path, [f"not a readable tar file: {error}"], hint) from error
    try:
        while (found := archive.next()) is not None:
            vars(archive)["members"].clear()  # it would keep them all
            if found.offset_data + found.size > end:
                damage.append(RowError([f"the tar file ends within {found.name!r}; what follows is lost"]))
                return
            if found.isreg() and not PurePosixPath(found.name).name.startswith("."):
                yield Member(found.name, found.offset_data, found.size)
    except (tarfile.TarError, EOFError, UnicodeError, ValueError, OverflowError) as error:
        damage.append(RowError([f"the tar file is damaged from byte {archive.offset} on: {error}"]))
        return
    # A broken header in the middle ends the iteration without a word; a whole file ends in a block of zeros.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        damage.append(RowError([f"the tar file is damaged or cut off at byte {archive.offset}; what follows is lost"]))


def tar_groups(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Members of each item."""
    for _, group in groupby(members, key=lambda member: member.key):
        yield list(group)


def pictures_of(members: list[Member]) -> list[Member]:
    """Those members of an item that are pictures."""
    return [member for member in members if _suffix(member) in PICTURE_SUFFIXES]


def sample_row(members: list[Member], read: Any, pictures: list[Any]) -> dict[str, Any] | RowError:
    """The columns of one item, with `pictures` as its file_name; `read` gives the bytes of a member."""
    told: dict[str, Any] = {}  # by JSON, which goes before .txt and .cls
    row: dict[str, Any] = {}
    key = members[0].key
    try:
        for member in members:
            suffix = _suffix(member)
            if suffix not in (".json", *_TITLES, *_CLASSES):
                continue
            if member.size > MAX_ROW_BYTES:
                return RowError([f"{member.name} is larger than {MAX_ROW_BYTES} bytes"])
            text = read(member).decode("utf-8")
            if suffix == ".json":
                given = read_json(text)
                if not isinstance(given, dict):
                    return RowError([f"{member.name} is a JSON {type(given).__name__}, expected an object"])
                if twice := sorted(name for name in given if name in told and told[name] != given[name]):
                    return RowError([f"item {key!r}: its JSON members disagree about {', '.join(twice)}"])
                told |= given
            else:
                row.setdefault("title" if suffix in _TITLES else "category", text.strip())
    except UnicodeDecodeError:
        return RowError([f"item {key!r}: not valid UTF-8"])
    except ValueError as error:
        return RowError([f"item {key!r}: not valid JSON: {str(error)[:120]}"])
    row |= told
    if row.get("id") is None:
        row["id"] = str(row.get(_IDS) or key)
    row.pop(_IDS, None)
    row["file_name"] = pictures if len(pictures) > 1 else pictures[0] if pictures else row.get("file_name")
    return row


def _suffix(member: Member) -> str:
    return "." + member.kind.rpartition(".")[2]


def _bytes(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


class TarPictures:
    """Bytes of pictures that lie in tar files, at any position. Safe to use from several threads.

    Args:
        files: table name, as addresses have it → file.
    """

    def __init__(self, files: dict[str, Place]) -> None:
        self._files = files

    def __contains__(self, address: object) -> bool:
        table, _, where = str(address).rpartition("#")
        return table in self._files and _ADDRESS.fullmatch(where) is not None

    def read(self, address: str) -> bytes:
        """Bytes of one picture. OSError: the file cannot be read, or has changed and is too short."""
        table, _, where = address.rpartition("#")
        offset, size = map(int, where.split("+"))
        with open_place(self._files[table]) as file:
            if offset + size > file.seek(0, 2):
                raise OSError(errno.EIO, f"{self._files[table]}: has no byte {offset + size}; the file has changed")
            file.seek(offset)
            return file.read(size)
