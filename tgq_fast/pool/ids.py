"""Finds ids in a pool without reading them all: each shard keeps the sorted 64-bit hashes of its ids beside them.

`shard-000000.index.safetensors` holds "hash" [n] uint64, ascending, and "row" [n] uint32, the row of the shard with
that hash. Looking ids up is a search in sorted arrays that are memory-mapped; what it finds is compared with the id
itself, so hashes that collide cost time and never an answer.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save

from tgq_fast.data.id_hash import hash_ids
from tgq_fast.errors import ArgumentError

__all__ = ["HashLevels", "IdIndex", "build_index", "check_ids", "hash_ids", "index_bytes", "match"]


class IdIndex(NamedTuple):
    """Where the ids of a shard are.

    Attributes:
        hash: [n] uint64, ascending.
        row: [n] uint32, the row with that hash.
    """

    hash: np.ndarray
    row: np.ndarray


def check_ids(ids: Sequence[str], name: str = "ids") -> pa.StringArray:
    """Distinct non-empty strings as an Arrow array; ArgumentError for anything else."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise ArgumentError(name, type(ids).__name__, "a list of strings")
    for item_id in ids:
        if not isinstance(item_id, str) or not item_id:
            raise ArgumentError(name, repr(item_id), "non-empty strings")
        if not item_id.isascii():
            try:
                item_id.encode("utf-8")
            except UnicodeEncodeError:
                raise ArgumentError(name, ascii(item_id), "valid Unicode (no lone surrogates)") from None
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise ArgumentError(name, f"{twice!r} twice", "distinct ids")
    return pa.array(ids, type=pa.string())


def build_index(ids: pa.StringArray) -> IdIndex:
    """The index of a shard's ids."""
    hashes = hash_ids(ids)
    order = np.argsort(hashes, kind="stable").astype(np.uint32)
    return IdIndex(hashes[order], order)


def index_bytes(index: IdIndex) -> bytes:
    """The index as the content of a safetensors file."""
    return save({"hash": torch.from_numpy(index.hash), "row": torch.from_numpy(index.row)})


def match(index: IdIndex, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in `hashes` [w] (ascending) and rows of the shard that share a hash: all such pairs, [m] each.

    The shorter side is looked up in the longer one, so a few ids cost little in a large shard, and many ids cost one
    pass over it.
    """
    swap = len(hashes) >= len(index.hash)
    few, many = (index.hash, hashes) if swap else (hashes, index.hash)
    number, at = np.arange(len(few)), np.searchsorted(many, few)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    while len(at):  # once, but for hashes that collide
        same = many[np.minimum(at, len(many) - 1)] == few[number]
        same &= at < len(many)
        number, at = number[same], at[same]
        found.append((number, at))
        at = at + 1
    entry, wanted = (np.concatenate([pair[side] for pair in found]) if found else number for side in (0, 1))
    if not swap:
        entry, wanted = wanted, entry
    return wanted, index.row[entry].astype(np.int64)


class HashLevels:
    """A growing set of hashes: sorted arrays, each more than twice as long as the next. For writers that append."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes, in any order."""
        new = np.sort(hashes)
        while self._levels and len(self._levels[-1]) <= 2 * len(new):
            new = np.sort(np.concatenate((self._levels.pop(), new)), kind="stable")  # merges the two runs
        if len(new):
            self._levels.append(new)

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """[n] bool: which hashes were added."""
        found = np.zeros(len(hashes), dtype=bool)
        for level in self._levels:
            at = np.minimum(np.searchsorted(level, hashes), len(level) - 1)
            found |= level[at] == hashes
        return found
