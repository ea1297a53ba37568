"""The reading half of an item pool: checks, memory-mapped shards and id look-up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.retrieval._identity import sha256_file
from tgq_fast.retrieval.manifest import FileRecord, Manifest
from tgq_fast.retrieval.shadow_files import SUFFIX, read_shadow
from tgq_fast.retrieval.topk_native import Shadow

logger = logging.getLogger(__name__)

REJECTS_NAME = "rejects.jsonl"
KEPT_ID_BYTES = 128 << 20  # of ids, kept in memory once read


class PoolReader:
    """Everything of a pool that only reads; use it through :class:`tgq_fast.retrieval.pool.ItemPool`.

    Args:
        path: the folder.
        manifest: its manifest.
        verify: check the SHA-256 of each shard when it is first read.
    """

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool) -> None:
        self.path = path
        self.manifest = manifest
        self._verify = verify
        self._tensors: dict[int, Tensor] = {}
        self._shadows: dict[int, tuple[Shadow, int]] = {}  # with the size of the file
        self._refused: set[int] = set()  # shards with a shadow that does not fit
        self._ids: dict[int, pa.Array] = {}
        self._checked: set[str] = set()  # files whose checksum has been confirmed

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def dims(self) -> int:
        """D."""
        return self.manifest.dims

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the embeddings."""
        return _torch_dtype(self.manifest.dtype)

    def _file_records(self) -> list[FileRecord]:
        records = [record for shard in self.manifest.shards for record in (shard.embeddings, shard.ids)]
        return records + ([] if self.manifest.rejects is None else [self.manifest.rejects])

    def _check_files(self) -> None:
        for record in self._file_records():
            self._check_size(record)

    def _check_size(self, record: FileRecord) -> None:
        path = self.path / record.name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise PoolError(f"{path}: missing, the manifest names it; the pool is incomplete")
        # A killed writer may leave the append-only reject log longer than committed.
        if size < record.bytes or (size > record.bytes and record.name != REJECTS_NAME):
            raise PoolError(f"{path}: {size} bytes, the manifest says {record.bytes}; truncated or replaced")

    def _check_hash(self, record: FileRecord, stop: threading.Event | None = None) -> None:
        path = self.path / record.name
        if sha256_file(path, stop) != record.sha256:
            raise PoolError(f"{path}: SHA-256 differs from the manifest; corrupt or replaced, embed again")
        self._checked.add(record.name)

    def verify(self) -> None:
        """Check every byte: sizes, SHA-256 of all files, shapes, dtypes, finiteness and distinct ids.

        Raises:
            PoolError: with the file and the reason.
        """
        self._check_files()
        seen: list[np.ndarray] = []
        for number, shard in enumerate(self.manifest.shards):
            self._check_hash(shard.embeddings)
            self._check_hash(shard.ids)
            if not torch.isfinite(self._shard(number)).all():
                raise PoolError(f"{self.path / shard.embeddings.name}: holds NaN or infinity")
            seen.append(np.fromiter(map(hash, self._shard_ids(number).to_pylist()), dtype=np.int64))
        total = np.sort(np.concatenate([np.empty(0, np.int64), *seen]))
        if (total[1:] == total[:-1]).any():
            every = [item_id for _, part in self._id_shards() for item_id in part.to_pylist()]
            if len(set(every)) != len(every):
                raise PoolError(f"{self.path}: an id occurs more than once")
        rejects = self.manifest.rejects
        if rejects is not None and (self.path / rejects.name).stat().st_size == rejects.bytes:
            self._check_hash(rejects)

    def _shard(self, number: int, stop: threading.Event | None = None) -> Tensor:
        """Memory-mapped [n, D] embeddings of one shard."""
        record = self.manifest.shards[number]
        self._check_size(record.embeddings)  # reading the map of a file that was cut off would end the process
        if number not in self._tensors:
            path = self.path / record.embeddings.name
            if self._verify and record.embeddings.name not in self._checked:
                self._check_hash(record.embeddings, stop)
            try:
                with safe_open(path, framework="pt") as handle:
                    tensor = handle.get_tensor("embeddings")
            except (SafetensorError, OSError) as error:
                raise PoolError(f"{path}: not a readable safetensors shard ({error})") from None
            if tuple(tensor.shape) != (record.rows, self.dims) or tensor.dtype != self.dtype:
                raise PoolError(
                    f"{path}: holds {tuple(tensor.shape)} {tensor.dtype}, "
                    f"the manifest says ({record.rows}, {self.dims}) {self.manifest.dtype}"
                )
            self._tensors[number] = tensor
        return self._tensors[number]

    def _shadow_path(self, number: int) -> Path:
        return self.path / self.manifest.shards[number].embeddings.name.replace(".safetensors", SUFFIX)

    def _shadow(self, number: int, stop: threading.Event | None = None) -> Shadow | None:
        """Memory-mapped shadow of one shard, if it has one that fits; one that does not is said once and left alone."""
        path = self._shadow_path(number)
        if number in self._refused or not path.is_file() or not _native.available():
            return None
        size = path.stat().st_size
        if number in self._shadows and self._shadows[number][1] == size:
            return self._shadows[number][0]
        try:
            source = self.manifest.shards[number].embeddings.sha256
            shadow = read_shadow(path, self._shard(number, stop), source, verify=self._verify, stop=stop)
        except PoolError as error:
            logger.warning("%s; searching without it, build_shadow makes it again", error)
            self._refused.add(number)
            return None
        self._shadows[number] = shadow, size
        return shadow

    def _shard_ids(self, number: int) -> pa.Array:
        if number in self._ids:
            return self._ids[number]
        record = self.manifest.shards[number]
        path = self.path / record.ids.name
        if self._verify and record.ids.name not in self._checked:
            self._check_hash(record.ids)
        try:
            column = pq.read_table(path, columns=["id"]).column("id").combine_chunks()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise PoolError(f"{path}: not a readable id file ({error})") from None
        if len(column) != record.rows or column.null_count:
            raise PoolError(f"{path}: {len(column)} ids, {record.rows} expected; corrupt")
        if sum(kept.nbytes for kept in self._ids.values()) + column.nbytes <= KEPT_ID_BYTES:
            self._ids[number] = column
        return column

    def _id_shards(self) -> Iterator[tuple[int, pa.Array]]:
        start = 0
        for number, record in enumerate(self.manifest.shards):
            yield start, self._shard_ids(number)
            start += record.rows

    def shards(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, [n, D] memory-mapped embeddings) of each shard, in order. Do not write to them."""
        start = 0
        for number, record in enumerate(self.manifest.shards):
            yield start, self._shard(number)
            start += record.rows

    def ids(self) -> list[str]:
        """All ids in pool order."""
        return [item_id for _, part in self._id_shards() for item_id in part.to_pylist()]

    def embeddings(self) -> Tensor:
        """[len(pool), D]; memory-mapped for a single shard, copied into memory for several."""
        parts = [tensor for _, tensor in self.shards()]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, self.dims, dtype=self.dtype)

    def rows(self, ids: Sequence[str], *, missing: Literal["raise", "mark"] = "raise") -> np.ndarray:
        """[n] int64 pool rows of ids; unknown ids raise ArgumentError, or give -1 with missing="mark"."""
        wanted = pa.array(list(ids), type=pa.string())
        found = np.full(len(wanted), -1, dtype=np.int64)
        for start, part in self._id_shards():
            hit = pc.index_in(wanted, value_set=part)
            mask = hit.is_valid().to_numpy(zero_copy_only=False)
            found[mask] = start + hit.drop_null().to_numpy(zero_copy_only=False)
        if missing == "raise" and (found < 0).any():
            raise ArgumentError(
                "ids", repr(ids[int((found < 0).argmax())]), f"ids of the {len(self)} items in {self.path}"
            )
        return found

    def get(self, ids: Sequence[str]) -> Tensor:
        """[n, D] embeddings of ids, copied."""
        rows = self.rows(ids)
        out = torch.empty(len(rows), self.dims, dtype=self.dtype)
        for start, tensor in self.shards():
            here = np.flatnonzero((rows >= start) & (rows < start + tensor.shape[0]))
            out[here] = tensor[rows[here] - start]
        return out

    def ids_at(self, indices: Tensor) -> list[list[str | None]]:
        """Ids of [Q, k] pool rows; None for negative rows. Reads the id files of the shards that are hit only."""
        flat = indices.cpu().numpy().reshape(-1)
        out: list[str | None] = [None] * flat.size
        start = 0
        for number, record in enumerate(self.manifest.shards):
            here = np.flatnonzero((flat >= start) & (flat < start + record.rows))
            if here.size:
                names = self._shard_ids(number).take(pa.array(flat[here] - start)).to_pylist()
                for position, name in zip(here.tolist(), names, strict=True):
                    out[position] = name
            start += record.rows
        width = indices.shape[1]
        return [out[row * width : (row + 1) * width] for row in range(indices.shape[0])]


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
