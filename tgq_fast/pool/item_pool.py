"""The item pool on disk: embeddings and ids in checksummed shards that are memory-mapped for search.

A pool is a folder::

    manifest.json                 sizes, dtype, model digest, package version and commit, SHA-256 of every file
    commit-00000001.json          what each later commit changed; folded into the manifest now and then
    shard-000000.safetensors      tensor "embeddings" [n, D]
    shard-000000.ids.parquet      string column "id" [n], and "content": a key of what was embedded, where known
    shard-000000.index.safetensors   finds ids without reading them all
    shard-000000.codes.safetensors  what makes searching faster; derived, so not in the manifest (see code_files)
    rejects.jsonl                 items that could not be embedded (only when there are any)

Every change is one commit: seen whole or not at all, by readers and after a crash. New rows go to new shards; replaced
and deleted ones are marked and left out by everything that reads, until :meth:`ItemPool.compact` writes their shards
anew. A pool object keeps the version it was opened with (a writer: its own latest) until :meth:`ItemPool.refresh`.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tgq_fast.arguments import checked
from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.io.files import Hold
from tgq_fast.pool import columns, exports, faiss_index
from tgq_fast.pool.files import PoolFiles
from tgq_fast.pool.folder import acquire, start
from tgq_fast.pool.log import PoolLog
from tgq_fast.pool.manifest import Manifest
from tgq_fast.pool.pins import Pin
from tgq_fast.pool.reader import PoolReader
from tgq_fast.pool.search import PoolHits, PoolSearch, pool_count_before
from tgq_fast.pool.writer import PoolWriter

__all__ = ["DEFAULT_SHARD_SIZE", "ItemPool", "PoolHits"]

DEFAULT_SHARD_SIZE = 65_536


class ItemPool:
    """Embeddings and ids of a catalogue on disk. Use :meth:`create` or :meth:`open`, best in a `with` block.

    Any number of threads may read and search one object. One process at a time may write to a pool.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, *, lock: Hold | None, verify: bool) -> None:
        self.path, self._lock, self._log = path, lock, PoolLog(path)
        manifest = self._log.read()
        self._files = PoolFiles(path, manifest.dims, getattr(torch, manifest.dtype), verify=verify)
        self._writer: PoolWriter | None = None
        if lock is None:
            self._read(manifest)
            return
        if not manifest.version:
            self._log.start(manifest)  # brings a pool of release 1 to this format
        self._writer = PoolWriter(self._files, self._log, manifest)
        self._show(manifest)

    def _read(self, manifest: Manifest) -> None:
        """Hold a version for reading; one whose files were replaced in this moment is read anew."""
        while True:
            self._show(manifest)
            try:
                self._reader.check_sizes()
                return
            except PoolError:
                newer = self._log.read()
                if newer.chain == manifest.chain:
                    raise
                manifest = newer

    def _show(self, manifest: Manifest) -> None:
        reader = PoolReader(self._files, manifest, Pin(self.path, manifest.version))
        # One assignment: other threads see both or neither, and keep what they began with.
        self._state = reader, PoolSearch(reader)

    @property
    def _reader(self) -> PoolReader:
        return self._state[0]

    @property
    def manifest(self) -> Manifest:
        """The version of the pool that this object shows."""
        return self._reader.manifest

    # ------------------------------------------------------------------ life

    @classmethod
    @checked
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
            model, source: digests of the model that makes the embeddings, and of the catalogue.
            resume: accept an existing pool if all of the above agree with it.

        Raises:
            ArgumentError: a bad value.
            PoolError: the folder holds something else, a different pool, or another process writes to it.
        """
        path = Path(path)
        lock = start(path, Manifest(dims, dtype, shard_size, model, source), resume=resume)
        return cls._locked(path, lock, verify=True)

    @classmethod
    @checked
    def open(cls, path: str | Path, *, mode: Literal["r", "a"] = "r", verify: bool = True) -> ItemPool:
        """Open a pool for reading ("r") or changing ("a").

        Args:
            verify: check the SHA-256 of each file when it is first read. False checks names and sizes only.

        Raises:
            PoolError: missing, foreign, corrupt, truncated, or locked by another writer ("a").
        """
        path = Path(path)
        if mode not in ("r", "a"):
            raise ArgumentError("mode", repr(mode), "'r' or 'a'")
        if not path.is_dir():
            raise PoolError(f"{path} is not an item pool: no such folder")
        if mode == "r":
            return cls(path, lock=None, verify=verify)
        PoolLog(path).read()  # say what is wrong before a lock file is made in a foreign folder
        return cls._locked(path, acquire(path), verify=verify)

    @classmethod
    def _locked(cls, path: Path, lock: Hold, *, verify: bool) -> ItemPool:
        try:
            return cls(path, lock=lock, verify=verify)
        except BaseException:
            lock.release()
            raise

    def moved(self) -> bool:
        """Whether the pool on disk has changed since this object was opened or refreshed. Costs two looks at files."""
        return self._writer is None and self._log.moved(self.manifest)

    def refresh(self) -> bool:
        """Show the newest version of a pool that others write to; returns whether there was a newer one.

        What runs in other threads goes on with the version it began with.
        """
        if not self.moved():
            return False
        before, manifest = self.manifest.chain, self._log.read()
        if manifest.dims != self.dims or manifest.dtype != self.manifest.dtype:
            raise PoolError(f"{self.path}: holds another pool now; open it again")
        self._read(manifest)
        return self.manifest.chain != before

    def close(self) -> None:
        """Drop the memory maps and the writer's lock."""
        self._files.clear()
        self._writer = None
        reader = PoolReader(self._files, self.manifest)  # without a pin
        self._state = reader, PoolSearch(reader)
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> ItemPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ read

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def dims(self) -> int:
        """D."""
        return self._files.dims

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the embeddings."""
        return self._files.dtype

    def verify(self) -> None:
        """Check every byte: sizes, SHA-256, shapes, dtypes, finiteness, indexes, distinct ids; PoolError says what."""
        self._reader.verify()

    def shards(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, [n, D] embeddings) of each shard: memory maps where nothing is deleted, not to be written to."""
        return self._reader.shards()

    def batches(self, rows: int = 4096) -> Iterator[tuple[int, Tensor]]:
        """(first row, [at most `rows`, D] embeddings) over the whole pool in order, for pools larger than memory."""
        return self._reader.batches(rows)

    def ids(self) -> list[str]:
        """All ids in pool order."""
        return self._reader.ids()

    def embeddings(self) -> Tensor:
        """[len(pool), D]; memory-mapped for a single shard, copied into memory for several."""
        parts = [tensor for _, tensor in self.shards()]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, self.dims, dtype=self.dtype, device="cpu")

    def rows(self, ids: Sequence[str], *, missing: Literal["raise", "mark"] = "raise") -> np.ndarray:
        """[n] int64 pool rows of ids; unknown ids raise ArgumentError, or give -1 with missing="mark"."""
        return self._reader.rows(ids, missing=missing)

    def get(self, ids: Sequence[str]) -> Tensor:
        """[n, D] embeddings of ids, copied."""
        return self._reader.get(ids)

    def take(self, rows: np.ndarray) -> Tensor:
        """[n, D] embeddings of pool rows, copied."""
        return self._reader.take(rows)

    def names(self, rows: np.ndarray) -> list[str | None]:
        """Ids of pool rows; None for negative rows."""
        return self._reader.names(rows)

    def ids_at(self, indices: Tensor) -> list[list[str | None]]:
        """Ids of [Q, k] pool rows; None for negative rows. Reads the id files of the shards that are hit only."""
        return self._reader.ids_at(indices)

    def content(self, ids: Sequence[str]) -> list[bytes | None]:
        """Keys of what was embedded, as given to :meth:`upsert`; None for ids without one or not in the pool."""
        reader = self._reader
        return reader.content(reader.rows(ids, missing="mark"))

    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        *,
        exclude_ids: Sequence[str | None] | Sequence[Sequence[str]] | None = None,
        where: np.ndarray | None = None,
        progress: Callable[[int, int], None] | None = None,
        group: dist.ProcessGroup | None = None,
        keep: bool = True,
    ) -> PoolHits:
        """Exact maximum inner product search from the memory map, block by block; the next block is read and checked
        meanwhile, so a pool may be larger than memory. One version of the pool is searched, whatever writers do.

        Args:
            queries: [Q, D] floating.
            k: hits per query, 1 … 2048.
            exclude_ids: per query an id, None or a list of ids that it must not return; unknown ones exclude nothing.
            where: [len(pool)] bool, the items that may be returned, in pool order (:meth:`select` makes one).
            progress: called now and then with (rows searched, rows in the pool); what it raises ends the search.
            group: a `torch.distributed` group (`torch.distributed.group.WORLD` for all processes) whose ranks share
                the work: each calls with the same arguments, reads its share of the shards and gets the whole answer.
            keep: hold copies of small shards, of 512 MiB at most, for the next search.

        Returns:
            :class:`PoolHits`; ties go to the lower pool row, whatever the sharding.

        Raises:
            ArgumentError, NonFiniteError: a wrong shape, k or number of exclusions; a query with NaN or infinity.
            PoolError: a shard is damaged, or was changed or cut off since the pool was opened.
        """
        return self._state[1].search(queries, k, exclude_ids, where, progress, group, keep)

    count_before = pool_count_before
    select = columns.select
    search_like = columns.search_like

    # ----------------------------------------------------------------- write

    def _writing(self, what: str) -> PoolWriter:
        if self._writer is None:
            raise PoolError(f"{self.path}: opened for reading; open it with mode='a' to {what}")
        return self._writer

    def append(
        self,
        ids: Sequence[str],
        embeddings: Tensor | np.ndarray,
        *,
        content: Sequence[bytes | None] | None = None,
        reject_lines: str = "",
    ) -> None:
        """Add items as new shards; all of them become visible at once, or none.

        Args:
            ids: n distinct non-empty strings, none of them in the pool.
            embeddings: [n, D] floating; stored in the pool's dtype.
            content: n keys of 16 bytes that say what was embedded, or None.
            reject_lines: JSON lines of items left out since the last call, committed together with the shards.

        Raises:
            PoolError: opened for reading.
            ArgumentError: wrong shape, or a duplicate, empty or unencodable id.
            NonFiniteError: NaN or infinity, also after the cast to the pool's dtype.
        """
        writer = self._writing("append")
        writer.put(ids, embeddings, update=False, content=content, reject_lines=reject_lines)
        self._show(writer.manifest)

    def upsert(
        self,
        ids: Sequence[str],
        embeddings: Tensor | np.ndarray,
        *,
        content: Sequence[bytes | None] | None = None,
        delete: Sequence[str] = (),
        reject_lines: str = "",
        **facts: Any,
    ) -> None:
        """Add items, in place of those of the same ids; all of it becomes visible at once, or nothing.

        New rows go to the end of the pool, also those that replace others. Arguments and errors are those of
        :meth:`append`, but ids may be in the pool.

        Args:
            delete: ids that leave the pool in the same moment, where they are in it.
            facts: new values of `source`, `complete`, `rejects` and `rejected` of the manifest.
        """
        writer = self._writing("upsert")
        writer.put(ids, embeddings, update=True, content=content, delete=delete, reject_lines=reject_lines, facts=facts)
        self._show(writer.manifest)

    def delete(self, ids: Sequence[str], *, missing: Literal["raise", "ignore"] = "raise") -> int:
        """Delete items, all at once; returns how many. They never come back; their bytes go with :meth:`compact`.

        Raises:
            PoolError: opened for reading.
            ArgumentError: an id is not in the pool, unless `missing` is "ignore".
        """
        writer = self._writing("delete")
        if missing not in ("raise", "ignore"):
            raise ArgumentError("missing", repr(missing), "'raise' or 'ignore'")
        count = writer.delete(ids, missing=missing)
        self._show(writer.manifest)
        return count

    def compact(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Write shards with deleted rows, and stretches of small ones, anew; returns how many shards were replaced.

        Nothing that reads sees a difference: ids, rows and their order stay. Files that a reader of an older version
        holds stay until a later call, or until the pool is opened for writing again.

        Raises:
            PoolError: opened for reading, or a shard is damaged.
        """
        writer = self._writing("compact")
        try:
            return writer.compact(progress)
        finally:
            self._show(writer.manifest)
            writer.sweep(at_open=False)

    def build_codes(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Write the codes of every shard that has none, or a stale or damaged one; returns how many were written.

        Searches on the CPU use it without being asked and read a quarter of an fp32 pool; answers are the same bit for
        bit. Rows so narrow that it would be no smaller get none. A killed call leaves whole files only; call it again.
        Shards that are written later get theirs at once.

        Raises:
            PoolError: opened for reading, or a shard is damaged.
        """
        writer = self._writing("build its codes")
        written = writer.build_codes(progress)
        self._show(writer.manifest)  # what was joined without codes is forgotten
        return written

    # ---------------------------------------------------------------- export

    to_faiss = faiss_index.to_faiss
    to_numpy = exports.to_numpy
    to_parquet = exports.to_parquet
    to_lance = exports.to_lance
    to_qdrant = exports.to_qdrant
    to_pgvector = exports.to_pgvector
    from_faiss = classmethod(faiss_index.from_faiss)  # type: ignore[arg-type]
