"""One state of a pool as readers see it: rows, ids and embeddings, without what is deleted.

A pool row is the number of an item among those that are not deleted, in pool order. `position` is used here for the row
of a shard on disk, deleted ones counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from tgq_fast.arguments import checked
from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.pool.files import PoolFiles
from tgq_fast.pool.ids import hash_ids, match
from tgq_fast.pool.manifest import Manifest, ShardRecord
from tgq_fast.pool.pins import Pin
from tgq_fast.search.topk_arguments import as_tensor

_LOOKED_UP = 1 << 21  # ids at a time


class PoolReader:
    """Reads one state of a pool; use it through :class:`tgq_fast.pool.item_pool.ItemPool`.

    Args:
        files: of the pool's folder.
        manifest: the state.
        pin: keeps the files of this state from being removed while this object is in use.
    """

    def __init__(self, files: PoolFiles, manifest: Manifest, pin: Pin | None = None) -> None:
        self.files, self.manifest, self.pin = files, manifest, pin
        live = [manifest.live_rows(shard) for shard in manifest.shards]
        self.starts: np.ndarray = np.cumsum([0, *live], dtype=np.int64)  # [shards + 1] first pool row of each
        self._alive: dict[str, np.ndarray] = {}

    @property
    def path(self) -> Path:
        """The folder."""
        return self.files.folder

    def __len__(self) -> int:
        return int(self.starts[-1])

    def alive(self, shard: ShardRecord) -> np.ndarray | None:
        """[live] ascending positions of a shard's items; None where none is deleted."""
        dead = self.manifest.dead.get(shard.name)
        if dead is None or not len(dead):
            return None
        found = self._alive.get(shard.name)
        if found is None:
            found = np.delete(np.arange(shard.rows, dtype=np.int64), dead)
            self._alive[shard.name] = found
        return found

    def check_sizes(self) -> None:
        """PoolError unless every file is there in its full size."""
        for record in self.manifest.files:
            self.files.check(record)

    def verify(self) -> None:
        """Check every byte: sizes, SHA-256 of all files, shapes, dtypes, finiteness, indexes and distinct ids."""
        self.check_sizes()
        seen: list[np.ndarray] = []
        for shard in self.manifest.shards:
            for record in shard.files:
                self.files.check_hash(record)
            if not torch.isfinite(self.files.tensor(shard)).all():
                raise PoolError(f"{self.path / shard.embeddings.name}: holds NaN or infinity")
            hashes = hash_ids(self.files.ids(shard).ids)
            index = self.files.index(shard)
            if not np.array_equal(hashes[index.row], index.hash) or (index.hash[1:] < index.hash[:-1]).any():
                raise PoolError(f"{self.path / shard.name}: its index is not that of its ids")
            alive = self.alive(shard)
            seen.append(hashes if alive is None else hashes[alive])
        total = np.sort(np.concatenate([np.empty(0, np.uint64), *seen]))
        if (total[1:] == total[:-1]).any():
            every = self.ids()
            if len(set(every)) != len(every):
                raise PoolError(f"{self.path}: an id occurs more than once")
        rejects = self.manifest.rejects
        if rejects is not None and (self.path / rejects.name).stat().st_size == rejects.bytes:
            self.files.check_hash(rejects)

    def shards(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, [n, D] embeddings) of each shard, in order; memory-mapped where nothing is deleted."""
        for start, shard in zip(self.starts.tolist(), self.manifest.shards):
            tensor, alive = self.files.tensor(shard), self.alive(shard)
            yield start, tensor if alive is None else tensor[alive]

    @checked
    def batches(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, [at most `rows`, D] embeddings) over the whole pool, in order."""
        for start, shard in zip(self.starts.tolist(), self.manifest.shards):
            tensor, alive = self.files.tensor(shard), self.alive(shard)
            count = self.manifest.live_rows(shard)
            for first in range(0, count, rows):
                part = slice(first, first + rows)
                yield start + first, tensor[part] if alive is None else tensor[alive[part]]

    def ids(self) -> list[str]:
        """All ids in pool order."""
        return [item_id for part in self.id_parts() for item_id in part.to_pylist()]

    def id_parts(self) -> Iterator[pa.StringArray]:
        """Ids of each shard, in order."""
        for shard in self.manifest.shards:
            ids, alive = self.files.ids(shard).ids, self.alive(shard)
            yield ids if alive is None else ids.take(pa.array(alive))

    def find(self, ids: pa.StringArray | pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the shard, position in it) of each id, [n] each; (-1, -1) for those that are not in the pool."""
        shard_of, position = (np.full(len(ids), -1, dtype=np.int64) for _ in range(2))
        hashes = hash_ids(ids)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        for number, shard in enumerate(self.manifest.shards):
            wanted, row = match(self.files.index(shard), ordered)
            dead = self.manifest.dead.get(shard.name)
            if len(wanted) and dead is not None and len(dead):
                live = ~_among(dead, row)
                wanted, row = wanted[live], row[live]
            if len(wanted):
                wanted = order[wanted]
                asked = ids.take(pa.array(wanted)).cast(pa.string())
                same = pc.equal(self.files.ids(shard).ids.take(pa.array(row)), asked).to_numpy(zero_copy_only=False)
                shard_of[wanted[same]], position[wanted[same]] = number, row[same]
        return shard_of, position

    def rows(
        self, ids: Sequence[str] | pa.StringArray | pa.LargeStringArray, *, missing: Literal["raise", "mark"] = "raise"
    ) -> np.ndarray:
        """[n] int64 pool rows of ids; unknown ids raise ArgumentError, or give -1 with missing="mark"."""
        try:
            given = ids if isinstance(ids, list | pa.Array) else list(ids)
            wanted = (
                given.cast(pa.large_string()) if isinstance(given, pa.Array) else pa.array(given, pa.large_string())
            )
        except (pa.ArrowException, TypeError, UnicodeError, OverflowError) as error:
            raise ArgumentError("ids", type(ids).__name__, f"a list of strings ({error})") from None
        if isinstance(ids, str | bytes) or wanted.null_count:
            raise ArgumentError("ids", type(ids).__name__ if not wanted.null_count else "None", "a list of strings")
        parts = (wanted[start : start + _LOOKED_UP] for start in range(0, len(wanted), _LOOKED_UP))
        rows = np.concatenate([np.empty(0, np.int64), *(self.to_rows(*self.find(part)) for part in parts)])
        if missing == "raise" and (rows < 0).any():
            unknown = wanted[int((rows < 0).argmax())].as_py()
            raise ArgumentError("ids", repr(unknown), f"ids of the {len(self)} items in {self.path}")
        return rows

    def to_rows(self, shard_of: np.ndarray, position: np.ndarray) -> np.ndarray:
        """[n] pool rows of items that are not deleted; -1 stays."""
        rows = np.where(shard_of < 0, -1, self.starts[shard_of] + position)
        if not self.manifest.dead:
            return rows
        for number, here in self._by_shard(shard_of):
            alive = self.alive(self.manifest.shards[number])
            if alive is not None:
                rows[here] = self.starts[number] + np.searchsorted(alive, position[here])
        return rows

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the shard, position in it) of pool rows, [n] each; -1 stays."""
        if not isinstance(rows, np.ndarray) or rows.ndim != 1 or rows.dtype.kind not in "iu":
            given = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise ArgumentError("rows", given, "a numpy array [n] of whole numbers")
        if rows.size and int(rows.max()) >= len(self):
            raise ArgumentError("rows", int(rows.max()), f"pool rows below {len(self)}")
        rows = rows.astype(np.int64, copy=False)
        shard_of = np.where(rows < 0, -1, np.searchsorted(self.starts, rows, side="right") - 1)
        position = np.where(rows < 0, -1, rows - self.starts[shard_of])
        if not self.manifest.dead:
            return shard_of, position
        for number, here in self._by_shard(shard_of):
            alive = self.alive(self.manifest.shards[number])
            if alive is not None:
                position[here] = alive[position[here]]
        return shard_of, position

    def _by_shard(self, shard_of: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(number of a shard, where it is named) for each shard that is named; -1 names none."""
        order = np.argsort(shard_of, kind="stable")
        ordered = shard_of[order]
        bounds = np.flatnonzero(np.diff(ordered, prepend=-2, append=-2)).tolist()
        for first, stop in pairwise(bounds):
            if ordered[first] >= 0:
                yield int(ordered[first]), order[first:stop]

    def get(self, ids: Sequence[str]) -> Tensor:
        """[n, D] embeddings of ids, copied."""
        return self.take(self.rows(ids))

    def take(self, rows: np.ndarray) -> Tensor:
        """[n, D] embeddings of pool rows, copied. Reads the shards that are named only."""
        shard_of, position = self.locate(rows)
        if (shard_of < 0).any():
            raise ArgumentError("rows", int(np.min(rows)), "pool rows from 0 on")
        out = torch.empty(len(shard_of), self.files.dims, dtype=self.files.dtype, device="cpu")
        for number, here in self._by_shard(shard_of):
            out[here] = self.files.tensor(self.manifest.shards[number])[position[here]]
        return out

    def names(self, rows: np.ndarray) -> list[str | None]:
        """Ids of pool rows; None for negative rows. Reads the id files of the shards that are named only."""
        out: list[str | None] = [None] * len(rows)
        shard_of, position = self.locate(rows)
        for number, here in self._by_shard(shard_of):
            names = self.files.ids(self.manifest.shards[number]).ids.take(pa.array(position[here])).to_pylist()
            for place, name in zip(here.tolist(), names, strict=True):
                out[place] = name
        return out

    def content(self, rows: np.ndarray) -> list[bytes | None]:
        """Content keys of pool rows; None where unknown, and for negative rows."""
        out: list[bytes | None] = [None] * len(rows)
        shard_of, position = self.locate(rows)
        for number, here in self._by_shard(shard_of):
            keys = self.files.ids(self.manifest.shards[number]).content.take(pa.array(position[here])).to_pylist()
            for place, key in zip(here.tolist(), keys, strict=True):
                out[place] = key
        return out

    def ids_at(self, indices: Tensor) -> list[list[str | None]]:
        """Ids of [Q, k] pool rows; None for negative rows."""
        indices = as_tensor("indices", indices)
        if indices.ndim != 2 or indices.is_meta:
            raise ArgumentError("indices", f"{tuple(indices.shape)} on {indices.device}", "pool rows [Q, k]")
        flat = self.names(indices.cpu().numpy().reshape(-1))
        width = indices.shape[1]
        return [flat[row * width : (row + 1) * width] for row in range(indices.shape[0])]


def _among(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[n] bool: which values occur in a sorted array that is not empty."""
    found: np.ndarray = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return found
