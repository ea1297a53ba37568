"""Frozen features that another cache of the same tower holds already, by the content of the picture.

A cache of a catalogue is keyed by all its pictures together. Beside it lies `contents.bin`, [n, 32] the sha256 of each
picture: when a catalogue with other pictures is cached, those that any complete cache knows are copied, and only the
new ones go through the tower. A tower's features do not depend on what else is in a batch, so the bytes are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tgq_fast.data.ahead import in_order
from tgq_fast.data.catalog import Catalog
from tgq_fast.data.items import Item
from tgq_fast.errors import StorageError
from tgq_fast.io.files import read_regular, write_atomic
from tgq_fast.io.json_text import read_json
from tgq_fast.models.feature_files import ChunkedArray

__all__ = ["EarlierPictures", "PictureDigests", "digest_pictures", "image_digest", "is_of", "keep_contents"]

CONTENTS_NAME = "contents.bin"


class PictureDigests(NamedTuple):
    """What a catalogue's pictures are.

    Attributes:
        total: sha256 over all of them in row order; one that cannot be read counts as missing.
        unread: rows whose picture could not be read.
        each: [n, 32] uint8 sha256 of each picture; zeros where there is none.
    """

    total: str
    unread: frozenset[int]
    each: NDArray[np.uint8]


def image_digest(catalog: Catalog, *, workers: int = 2) -> str:
    """sha256 over the contents of the catalogue's pictures in row order; one that cannot be read counts as missing."""
    return digest_pictures(catalog, workers).total


def digest_pictures(catalog: Catalog, workers: int) -> PictureDigests:
    """Reads every picture once."""

    def one(item: Item) -> bytes:
        if item.file_name is None:
            return b"none"
        try:
            with catalog.picture(item).open() as handle:
                digest = hashlib.sha256()
                while block := handle.read(1 << 20):
                    digest.update(block)
                return digest.digest()
        except (OSError, ValueError):
            return b"missing"

    total, unread = hashlib.sha256(), []
    each = np.zeros((len(catalog), 32), np.uint8)
    with ThreadPoolExecutor(workers) as pool:
        for row, digest in enumerate(in_order(pool, one, catalog.items, 64)):
            total.update(digest + b"|")
            if digest == b"missing":
                unread.append(row)
            elif digest != b"none":
                each[row] = np.frombuffer(digest, np.uint8)
    return PictureDigests(total.hexdigest(), frozenset(unread), each)


def keep_contents(array: ChunkedArray, contents: NDArray[np.uint8]) -> None:
    """Say beside a cache which pictures it is of; where that cannot be written it only is not found by others."""
    path = array.folder / CONTENTS_NAME
    with contextlib.suppress(StorageError, OSError):
        if not path.is_file() or path.stat().st_size != contents.nbytes:
            write_atomic(path, contents.tobytes())


class EarlierPictures:
    """Finds features of pictures in other complete caches of the same tower.

    Args:
        array: the cache that is being made; those beside its folder are looked through.
        contents: [n, 32] of its pictures.
    """

    def __init__(self, array: ChunkedArray, contents: NDArray[np.uint8]) -> None:
        self._arrays: list[ChunkedArray] = []
        self._good: dict[tuple[int, int], bool] = {}  # (array, chunk) → whether its bytes are those that were written
        self._array = np.full(len(contents), -1, np.int64)
        self._row = np.zeros(len(contents), np.int64)
        for path in sorted(array.folder.parent.glob(f"*/{CONTENTS_NAME}")):
            wanted = np.flatnonzero((self._array < 0) & contents.any(axis=1))
            if path.parent == array.folder or not len(wanted):
                continue
            other = _open(path.parent, array)
            if other is None:
                continue
            theirs = np.fromfile(path, np.uint8)
            if theirs.size != other.rows * 32:
                continue
            theirs = theirs.reshape(-1, 32)
            usable: NDArray[np.bool_] = theirs.max(axis=1) > 0
            usable[[int(row) for row, *_ in other.notes]] = False
            rows = np.flatnonzero(usable)
            if not len(rows):
                continue
            # sorted by the first eight bytes; all of them decide
            keys = np.ascontiguousarray(theirs[rows, :8]).view("<u8")[:, 0]
            order = np.argsort(keys)
            own = np.ascontiguousarray(contents[wanted, :8]).view("<u8")[:, 0]
            at = rows[order[np.minimum(np.searchsorted(keys[order], own), len(rows) - 1)]]
            same = (theirs[at] == contents[wanted]).all(axis=1)
            self._array[wanted[same]], self._row[wanted[same]] = len(self._arrays), at[same]
            self._arrays.append(other)

    def get(self, row: int) -> dict[str, NDArray[Any]] | None:
        """Array name → features of the picture of a row; None if no cache has them, or what it has is damaged."""
        number, place = int(self._array[row]), int(self._row[row])
        if number < 0:
            return None
        array = self._arrays[number]
        chunk = number, place // array.chunk
        if chunk not in self._good:
            self._good[chunk] = array.intact(chunk[1])
        return {name: array[name][place] for name in array.layout} if self._good[chunk] else None


def is_of(manifest: Path, tower: str, rows: int) -> bool:
    """Whether a cache is of this tower and as many items."""
    try:
        facts = read_json(read_regular(manifest))["facts"]
        return bool(facts["tower"] == tower and facts["rows"] == rows)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open(folder: Path, like: ChunkedArray) -> ChunkedArray | None:
    """A complete cache of the same tower and layout."""
    try:
        facts = read_json(read_regular(folder / "manifest.json"))["facts"]
        rows, images = int(facts["rows"]), str(facts["images"])
        if facts["tower"] != like.facts["tower"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    told = {"tower": like.facts["tower"], "images": images}
    array = ChunkedArray(folder, like.layout, rows=rows, chunk=like.chunk, facts=told)
    return array if array.open_complete(verify=False) else None
