"""The item pool on disk: embeddings and ids in checksummed shards that are memory-mapped for search.

A pool is a folder::

    manifest.json                 sizes, dtype, model digest, package version and commit, SHA-256 of every file
    shard-000000.safetensors      tensor "embeddings" [n, D]
    shard-000000.ids.parquet      string column "id" [n]
    shard-000000.shadow.safetensors   what makes searching faster; derived, so not in the manifest (see shadow_files)
    rejects.jsonl                 items that could not be embedded (only when there are any)

A file is part of the pool once the manifest names it, and the manifest is replaced atomically after its files are
safely on disk. A writer killed at any point therefore leaves the last committed state; what it left beyond that is
written again. Every append starts a new shard, so the bytes of earlier shards never change.

Source: ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from tgq_fast.data.files import atomic_writer
from tgq_fast.errors import ArgumentError, DependencyError, NonFiniteError, PoolError
from tgq_fast.retrieval._identity import package_identity, sha256_file
from tgq_fast.retrieval.manifest import DTYPES, MANIFEST_NAME, FileRecord, Manifest, ShardRecord
from tgq_fast.retrieval.pool_reader import REJECTS_NAME
from tgq_fast.retrieval.pool_search import PoolHits, PoolSearch
from tgq_fast.retrieval.shadow_files import shadow_source, write_shadow
from tgq_fast.retrieval.topk_native import build_shadow, shadow_width

__all__ = ["DEFAULT_SHARD_SIZE", "ItemPool", "PoolHits"]

DEFAULT_SHARD_SIZE = 65_536
LOCK_NAME = ".lock"
_FILE = r"(shard-\d{6,}\.(safetensors|ids\.parquet|shadow\.safetensors)|rejects\.jsonl|manifest\.json)"
_LEFTOVER = re.compile(rf"{_FILE}|\.{_FILE}\.\d+\.tmp")  # a file of a pool, or one that a killed writer left half done


class ItemPool(PoolSearch):
    """Embeddings and ids of a catalogue on disk. Use :meth:`create` or :meth:`open`, best in a `with` block.

    Attributes:
        path: the folder.
        manifest: :class:`~tgq_fast.retrieval.manifest.Manifest`.
    """

    def __init__(self, path: Path, manifest: Manifest, *, lock: FileLock | None, verify: bool) -> None:
        super().__init__(path, manifest, verify=verify)
        self._lock = lock
        self._known: np.ndarray | None = None  # sorted hashes of all ids, built by the first append

    # ------------------------------------------------------------------ life

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        dims: int,
        dtype: str = "float32",
        shard_size: int = DEFAULT_SHARD_SIZE,
        model: str = "",
        source: str = "",
        resume: bool = False,
    ) -> ItemPool:
        """Start a pool, or with `resume` go on with one that was made with the same arguments.

        Args:
            path: folder; made when missing, and empty otherwise.
            dims: D.
            dtype: "float32", "float16" or "bfloat16".
            shard_size: most rows per shard.
            model: digest of the model that makes the embeddings.
            source: digest of the catalogue.
            resume: accept an existing pool if all of the above agree with it.

        Raises:
            ArgumentError: a bad value.
            PoolError: the folder holds something else, a different pool, or another process writes to it.
        """
        path = Path(path)
        if dims < 1:
            raise ArgumentError("dims", dims, "a width of at least 1")
        if dtype not in DTYPES:
            raise ArgumentError("dtype", repr(dtype), "one of " + ", ".join(map(repr, DTYPES)))
        if shard_size < 1:
            raise ArgumentError("shard_size", shard_size, "at least 1 row per shard")
        wanted = Manifest(dims, dtype, shard_size, model, source)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / MANIFEST_NAME).exists():
            foreign = sorted(n for n in os.listdir(path) if n != LOCK_NAME and not _LEFTOVER.fullmatch(n))
            if foreign:
                listed = ", ".join(foreign[:3])
                raise PoolError(f"{path}: holds files that are no pool's ({listed}); choose an empty folder")
        lock = _acquire(path)
        try:
            if (path / MANIFEST_NAME).exists():
                manifest = Manifest.load(path)
                if not resume:
                    raise PoolError(
                        f"{path} already holds a pool of {manifest.rows} items; resume, append, or choose another"
                    )
                for name in ("dims", "dtype", "shard_size", "model", "source"):
                    old, new = getattr(manifest, name), getattr(wanted, name)
                    if old != new:
                        raise PoolError(f"{path}: cannot resume, its {name} is {old!r} and this run's is {new!r}")
            else:
                manifest = wanted
                manifest.save(path)
            pool = cls(path, manifest, lock=lock, verify=True)
            pool._check_files()
            pool._sweep()
        except BaseException:
            lock.release()
            raise
        return pool

    @classmethod
    def open(cls, path: str | Path, *, mode: Literal["r", "a"] = "r", verify: bool = True) -> ItemPool:
        """Open a pool for reading ("r") or appending ("a").

        Args:
            verify: check the SHA-256 of each shard when it is first read. False checks names and sizes only.

        Raises:
            PoolError: missing, foreign, corrupt, truncated, or locked by another writer ("a").
        """
        path = Path(path)
        if mode not in ("r", "a"):
            raise ArgumentError("mode", repr(mode), "'r' or 'a'")
        if not path.is_dir():
            raise PoolError(f"{path} is not an item pool: no such folder")
        Manifest.load(path)  # say what is wrong before a lock file is made in a foreign folder
        lock = _acquire(path) if mode == "a" else None
        try:
            pool = cls(path, Manifest.load(path), lock=lock, verify=verify)
            pool._check_files()
            if lock is not None:
                pool._sweep()
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return pool

    def close(self) -> None:
        """Drop the memory maps and the writer's lock."""
        self._tensors.clear()
        self._joined.clear()
        self._shadows.clear()
        self._ids.clear()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> ItemPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ----------------------------------------------------------------- write

    def append(
        self,
        ids: Sequence[str],
        embeddings: Tensor | np.ndarray,
        *,
        source_stop: int | None = None,
        reject_lines: str = "",
    ) -> None:
        """Add items as new shards; all of them become visible at once, or none.

        Args:
            ids: n distinct non-empty strings, none of them in the pool.
            embeddings: [n, D] floating; stored in the pool's dtype.
            source_stop: catalogue rows done after this call, for resumable embedding.
            reject_lines: JSON lines of items left out since the last call, committed together with the shards.

        Raises:
            PoolError: opened for reading.
            ArgumentError: wrong shape, or a duplicate, empty or unencodable id.
            NonFiniteError: NaN or infinity, also after the cast to the pool's dtype; names the ids.
        """
        self._check_writable("append")
        rows = torch.as_tensor(embeddings).detach().cpu()
        if rows.ndim != 2 or rows.shape[1] != self.dims or not rows.is_floating_point():
            raise ArgumentError("embeddings", f"{tuple(rows.shape)} {rows.dtype}", f"floating [n, {self.dims}]")
        if len(ids) != rows.shape[0]:
            raise ArgumentError("ids", f"{len(ids)} ids", f"{rows.shape[0]}, one per row of embeddings")
        rows = rows.to(self.dtype)
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise NonFiniteError("embeddings", [ids[i] for i in bad[:20]], len(bad))
        hashes = self._check_ids(ids)

        shards: list[ShardRecord] = []
        size = self.manifest.shard_size
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            last = start + size >= len(ids)
            number = len(self.manifest.shards) + len(shards)
            shards.append(self._write_shard(number, ids[part], rows[part], source_stop if last else None))
        if not shards and source_stop is not None:  # every item of this stretch was rejected
            shards.append(self._write_shard(len(self.manifest.shards), [], rows, source_stop))
        manifest = replace(self.manifest, shards=[*self.manifest.shards, *shards], writers=[*self.manifest.writers])
        if reject_lines:
            manifest.rejects = self._append_rejects(reject_lines)
            manifest.rejected += reject_lines.count("\n")
        if shards and package_identity() not in manifest.writers:
            manifest.writers.append(package_identity())
        manifest.save(self.path)
        self.manifest = manifest  # only now: a failed append leaves this object as it was
        assert self._known is not None
        self._known = np.sort(np.concatenate((self._known, hashes)), kind="stable")

    def _check_ids(self, ids: Sequence[str]) -> np.ndarray:
        """Refuse bad and duplicate ids; the hashes of `ids` otherwise. Eight bytes of memory per item in the pool."""
        for item_id in ids:
            if not isinstance(item_id, str) or not item_id:
                raise ArgumentError("ids", repr(item_id), "non-empty strings")
            try:
                item_id.encode("utf-8")
            except UnicodeEncodeError:
                raise ArgumentError("ids", ascii(item_id), "valid Unicode (no lone surrogates)") from None
        if len(set(ids)) != len(ids):
            seen: set[str] = set()
            twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            raise ArgumentError("ids", f"{twice!r} twice", "distinct ids")
        hashes = np.fromiter(map(hash, ids), dtype=np.int64, count=len(ids))
        if self._known is None:
            stored = [np.fromiter(map(hash, part.to_pylist()), dtype=np.int64) for _, part in self._id_shards()]
            self._known = np.sort(np.concatenate([np.empty(0, np.int64), *stored]))
        suspects = [ids[i] for i in np.flatnonzero(_contains(self._known, hashes)).tolist()]
        if suspects:  # a hash in common is not yet an id in common
            present = self.rows(suspects, missing="mark") >= 0
            if present.any():
                raise ArgumentError("ids", repr(suspects[int(present.argmax())]), "ids that are not yet in the pool")
        return hashes

    def _write_shard(self, number: int, ids: Sequence[str], rows: Tensor, source_stop: int | None) -> ShardRecord:
        stem = f"shard-{number:06d}"
        tensor_path, ids_path = self.path / f"{stem}.safetensors", self.path / f"{stem}.ids.parquet"
        with atomic_writer(tensor_path) as file:
            file.write(save({"embeddings": rows.contiguous()}))
        with atomic_writer(ids_path) as file:
            pq.write_table(pa.table({"id": pa.array(ids, type=pa.string())}), file, compression="zstd")
        return ShardRecord(len(ids), _record(tensor_path), _record(ids_path), source_stop)

    def _append_rejects(self, lines: str) -> FileRecord:
        path = self.path / REJECTS_NAME
        committed = 0 if self.manifest.rejects is None else self.manifest.rejects.bytes
        with open(path, "ab") as handle:
            handle.truncate(committed)  # an append that failed may have left lines behind
            handle.write(lines.encode("utf-8"))
            handle.flush()
            os.fsync(handle.fileno())
        return _record(path)

    def _sweep(self) -> None:
        """Remove what a killed writer left beyond the last commit, and shadows of what is not there."""
        named = {record.name for record in self._file_records()} | {MANIFEST_NAME}
        named |= {self._shadow_path(n).name for n in range(len(self.manifest.shards)) if self._has_shadow(n)}
        for name in os.listdir(self.path):
            if _LEFTOVER.fullmatch(name) and name not in named:
                (self.path / name).unlink()
        rejects = self.manifest.rejects
        if rejects is not None and (self.path / rejects.name).stat().st_size > rejects.bytes:
            os.truncate(self.path / rejects.name, rejects.bytes)

    # ---------------------------------------------------------------- shadow

    def build_shadow(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Write the shadow of every shard that has none, or a stale or damaged one; returns how many were written.

        Searches on the CPU use it without being asked: they then read a quarter of an fp32 pool, and the rows
        themselves only where they may be an answer. Answers are the same bit for bit. Shards of very narrow rows, whose
        shadow would be no smaller, get none. A killed call leaves whole files only; call it again.

        Args:
            progress: called with (shards done, shards).

        Raises:
            PoolError: opened for reading, or a shard is damaged.
            BackendError: the compiled core is missing.
        """
        self._check_writable("build its shadow")
        written, count = 0, len(self.manifest.shards)
        for number, record in enumerate(self.manifest.shards):
            self._refused.discard(number)
            small = shadow_width(self.dims) < self.dims * self.dtype.itemsize
            if record.rows and small and (not self._has_shadow(number) or self._shadow(number) is None):
                self._refused.discard(number)
                shadow = build_shadow(self._shard(number))
                write_shadow(self._shadow_path(number), shadow, record.embeddings.sha256)
                written += 1
            self._tensors.pop(number, None)  # one shard in memory at a time
            self._shadows.pop(number, None)
            if progress is not None:
                progress(number + 1, count)
        self._joined.clear()  # joined without a shadow
        return written

    def _has_shadow(self, number: int) -> bool:
        """Whether there is a file that claims to be this shard's shadow."""
        path = self._shadow_path(number)
        return path.is_file() and shadow_source(path) == self.manifest.shards[number].embeddings.sha256

    def _check_writable(self, what: str) -> None:
        if self._lock is None:
            raise PoolError(f"{self.path}: opened for reading; open it with mode='a' to {what}")

    # ----------------------------------------------------------------- faiss

    def to_faiss(self) -> Any:
        """A `faiss.IndexFlatIP` with the pool's rows in order (its labels are pool rows, see :meth:`ids_at`)."""
        index = _faiss().IndexFlatIP(self.dims)
        for _, tensor in self.shards():
            index.add(tensor.float().numpy())
        return index

    @classmethod
    def from_faiss(cls, index: Any, ids: Sequence[str], path: str | Path, **options: Any) -> ItemPool:
        """Write a pool from a faiss index that can reconstruct its vectors; returns it opened for reading.

        Args:
            index: inner-product index; row i belongs to ids[i].
            options: passed to :meth:`create`.
        """
        faiss = _faiss()
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ArgumentError("index", f"metric {index.metric_type}", "an inner-product index (METRIC_INNER_PRODUCT)")
        if len(ids) != index.ntotal:
            raise ArgumentError("ids", f"{len(ids)} ids", f"{index.ntotal}, one per vector of the index")
        with cls.create(path, dims=index.d, **options) as pool:
            step = pool.manifest.shard_size
            for start in range(0, index.ntotal, step):
                count = min(step, index.ntotal - start)
                pool.append(ids[start : start + count], index.reconstruct_n(start, count))
        return cls.open(path)


def _acquire(path: Path) -> FileLock:
    lock = FileLock(str(path / LOCK_NAME), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise PoolError(f"{path}: another process is writing to this pool; wait for it to end") from None
    return lock


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise DependencyError("faiss is not installed; pip install 'tgq-fast[faiss]'") from None
    return faiss


def _record(path: Path) -> FileRecord:
    return FileRecord(path.name, path.stat().st_size, sha256_file(path))


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[n] bool: which values occur in a sorted array."""
    if not ordered.size:
        return np.zeros(values.shape, dtype=bool)
    at = np.minimum(np.searchsorted(ordered, values), ordered.size - 1)
    return ordered[at] == values
