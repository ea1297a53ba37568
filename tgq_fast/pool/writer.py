"""The writing half of a pool: every change is files that appear whole, then one commit that names them.

A file is part of the pool once a commit names it, and commits are replaced atomically after their files are safely on
disk. A writer killed at any point therefore leaves the last committed state; what it left beyond that is written again
or swept. Files of committed shards never change, so readers keep what they have open.

Source: ours.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, NonFiniteError, PoolError
from tgq_fast.io.files import fsync_folder, storage_errors
from tgq_fast.io.identity import package_identity
from tgq_fast.pool.code_files import codes_source, write_codes
from tgq_fast.pool.files import REJECTS_NAME, PoolFiles
from tgq_fast.pool.folder import LEFTOVER
from tgq_fast.pool.ids import HashLevels, build_index, check_ids, hash_ids, index_bytes
from tgq_fast.pool.log import MANIFEST_NAME, PoolLog
from tgq_fast.pool.manifest import Change, FileRecord, Manifest, ShardRecord
from tgq_fast.pool.pins import unpinned
from tgq_fast.pool.reader import PoolReader
from tgq_fast.search.codes import FIT_ROWS, WIDEST, Basis, Codes, encode_rows, fit_basis, fits
from tgq_fast.search.topk_arguments import floating_rows

logger = logging.getLogger(__name__)

COMPACT_SHARDS = 8  # shards that compacting writes per commit, so that little of it is done twice and on disk twice


class PoolWriter:
    """Changes a pool; use it through :class:`tgq_fast.pool.item_pool.ItemPool`. One per folder: it has the lock.

    Args:
        files: of the pool's folder.
        log: of the same.
        manifest: the newest state.
    """

    def __init__(self, files: PoolFiles, log: PoolLog, manifest: Manifest) -> None:
        self.files, self.log = files, log
        self.reader = PoolReader(files, manifest)
        self.reader.check_sizes()
        self._lock, self._process = threading.RLock(), os.getpid()
        self._known: HashLevels | None = None  # of all ids that ever were in the pool; built by the first append
        self.sweep(at_open=True)
        self._basis: Basis | None = None  # of the codes; read or fitted when first needed
        self._coded = any(self._has_codes(shard) for shard in manifest.shards)
        log.fold(manifest)

    @property
    def manifest(self) -> Manifest:
        """The newest state."""
        return self.reader.manifest

    @property
    def folder(self) -> Path:
        """The pool."""
        return self.files.folder

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around every change: one thread at a time, in the process that has the folder's lock."""
        if os.getpid() != self._process:
            raise PoolError(f"{self.folder}: opened for writing by the process that this is a fork of; open it here")
        with self._lock, storage_errors(self.folder):
            yield

    def _commit(self, change: Change) -> None:
        facts = dict(change.facts)
        if change.add and package_identity() not in self.manifest.writers:
            facts["writers"] = (*self.manifest.writers, package_identity())
        if change.add:
            fsync_folder(self.folder)  # the names of the new files, before that of the commit
        manifest = self.log.commit(self.manifest, replace(change, facts=facts))
        self.reader = PoolReader(self.files, manifest)  # only now: a failed commit leaves this object as it was
        self.log.fold(manifest)
        if self._coded:
            try:
                for shard in change.add:
                    self._write_codes(shard)
            except OSError as error:  # the commit stands; codes are only for speed
                logger.warning("%s: no codes of the new shards (%s); build_codes makes them", self.folder, error)

    # ----------------------------------------------------------------- write

    def put(
        self,
        ids: Sequence[str],
        embeddings: Tensor | np.ndarray,
        *,
        update: bool,
        content: Sequence[bytes | None] | None = None,
        delete: Sequence[str] = (),
        reject_lines: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """One commit: new shards of these items, what they replace and `delete` deleted, and new facts.

        Args:
            ids: n distinct non-empty strings; with `update` they may be in the pool.
            embeddings: [n, D] floating.
            content: n keys of 16 bytes of what was embedded, or None.
            delete: ids that leave the pool.
            reject_lines: JSON lines to add to the reject log.
            facts: see :class:`Change`.
        """
        with self._changing():
            names = check_ids(ids)
            rows = self._check_rows(ids, embeddings)
            keys = _check_content(content, len(ids))
            hashes = hash_ids(names)
            if update:
                dead = self._dead(pa.concat_arrays([names, check_ids(delete, "delete")]))
            else:
                self._refuse_known(names, hashes)
                dead = {}
            new = self._write_shards(names, rows, keys)
            settled = dict(facts or {})
            if reject_lines:
                settled["rejects"] = self._append_rejects(reject_lines)
                settled["rejected"] = self.manifest.rejected + reject_lines.count("\n")
            if new or dead or settled:
                self._commit(Change(tuple(new), dead, facts=settled))
            if self._known is not None:
                self._known.add(hashes)

    def delete(self, ids: Sequence[str], *, missing: str) -> int:
        """One commit that deletes items; returns how many there were."""
        with self._changing():
            dead = self._dead(check_ids(ids), missing)
            if dead:
                self._commit(Change(dead=dead))
            return sum(map(len, dead.values()))

    def settle(self, **facts: Any) -> None:
        """One commit of facts."""
        with self._changing():
            self._commit(Change(facts=facts))

    def _check_rows(self, ids: Sequence[str], embeddings: Any) -> Tensor:
        rows = floating_rows("embeddings", embeddings, self.files.dims)
        if len(ids) != rows.shape[0]:
            raise ArgumentError("ids", f"{len(ids)} ids", f"{rows.shape[0]}, one per row of embeddings")
        rows = rows.to(self.files.dtype)
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise NonFiniteError("embeddings", [ids[i] for i in bad[:20]], len(bad))
        return rows

    def _refuse_known(self, names: pa.StringArray, hashes: np.ndarray) -> None:
        if self._known is None:
            self._known = HashLevels()
            for shard in self.manifest.shards:
                self._known.add(self.files.index(shard).hash)
        suspects = np.flatnonzero(self._known.contains(hashes))  # a hash in common is not yet an id in common
        if len(suspects):
            shard_of, _ = self.reader.find(names.take(pa.array(suspects)))
            if (shard_of >= 0).any():
                twice = names[int(suspects[int((shard_of >= 0).argmax())])].as_py()
                raise ArgumentError("ids", repr(twice), "ids that are not yet in the pool; upsert replaces items")

    def _dead(self, names: pa.StringArray, missing: str = "ignore") -> dict[str, np.ndarray]:
        """Positions of these items, ascending, by shard name."""
        shard_of, position = self.reader.find(names)
        if missing == "raise" and (shard_of < 0).any():
            first = names[int((shard_of < 0).argmax())].as_py()
            raise ArgumentError("ids", repr(first), f"ids of the {len(self.reader)} items in {self.folder}")
        shards = self.manifest.shards
        numbers = np.unique(shard_of[shard_of >= 0]).tolist()
        return {shards[number].name: np.unique(position[shard_of == number]) for number in numbers}

    def _write_shards(self, names: pa.StringArray, rows: Tensor, keys: pa.Array | None) -> list[ShardRecord]:
        size = self.manifest.shard_size
        return [
            self._write_shard(
                self.manifest.next_shard + number,
                names[start : start + size],
                rows[start : start + size],
                None if keys is None else keys[start : start + size],
            )
            for number, start in enumerate(range(0, len(names), size))
        ]

    def _write_shard(self, number: int, names: pa.StringArray, rows: Tensor, keys: pa.Array | None) -> ShardRecord:
        stem = self.folder / f"shard-{number:06d}"
        columns = {"id": names} if keys is None or keys.null_count == len(keys) else {"id": names, "content": keys}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        files = {
            ".safetensors": save({"embeddings": rows.contiguous()}),
            ".ids.parquet": sink.getvalue(),
            ".index.safetensors": index_bytes(build_index(names)),
        }
        for suffix, data in files.items():
            with open(stem.with_suffix(suffix), "wb") as file:  # nobody knows of this name before the commit
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        return ShardRecord(len(names), *(FileRecord.of(stem.with_suffix(suffix)) for suffix in files))

    def _append_rejects(self, lines: str) -> FileRecord:
        path = self.folder / REJECTS_NAME
        committed = 0 if self.manifest.rejects is None else self.manifest.rejects.bytes
        with open(path, "ab") as handle:
            handle.truncate(committed)  # an append that failed may have left lines behind
            handle.write(lines.encode("utf-8"))
            handle.flush()
            os.fsync(handle.fileno())
        return FileRecord.of(path)

    # --------------------------------------------------------------- compact

    def compact(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Write shards with deleted rows, and small ones, anew without them; returns how many it replaced."""
        with self._changing():
            runs = list(self._runs())
            done, total = 0, sum(map(len, runs))
            for run in runs:
                part = PoolReader(self.files, replace(self.manifest, shards=tuple(run)))
                count, size = len(part), self.manifest.shard_size
                pieces = -(-count // size)
                cuts = [count * piece // pieces for piece in range(pieces + 1)] if pieces else [0]
                new = []
                for number, (first, stop) in enumerate(pairwise(cuts)):
                    rows = np.arange(first, stop)
                    names = pa.array(part.names(rows), type=pa.string())
                    keys = pa.array(part.content(rows), type=pa.binary(16))
                    new.append(self._write_shard(self.manifest.next_shard + number, names, part.take(rows), keys))
                self._commit(Change(tuple(new), remove=tuple(shard.name for shard in run)))
                for shard in run:
                    self.files.forget(shard)
                done += len(run)
                if progress is not None:
                    progress(done, total)
            return total

    def _runs(self) -> Iterator[list[ShardRecord]]:
        """Stretches of adjacent shards that are worth writing anew, each of a few full shards' rows."""
        size = self.manifest.shard_size
        run: list[ShardRecord] = []
        rows = 0
        for shard in (*self.manifest.shards, None):
            live = 0 if shard is None else self.manifest.live_rows(shard)
            worth = shard is not None and (live < shard.rows or live * 2 < size)
            if run and (not worth or rows + live > COMPACT_SHARDS * size):
                if len(run) > 1 or self.manifest.live_rows(run[0]) < run[0].rows or not run[0].rows:
                    yield run
                run, rows = [], 0
            if worth and shard is not None:
                run, rows = [*run, shard], rows + live

    def sweep(self, *, at_open: bool) -> None:
        """Remove what no commit names: leavings of a killed writer, replaced files, codes of what is not there.

        What a reader of an older version may still open stays until a later sweep.
        """
        manifest = self.manifest
        if not unpinned(self.folder, manifest.version, unknown=at_open):
            return
        named = {record.name for record in manifest.files} | {MANIFEST_NAME}
        named |= {self.files.codes_path(shard).name for shard in manifest.shards if self._has_codes(shard)}
        for name in os.listdir(self.folder):
            kept = name in named or (name.startswith("commit-") and not self.log.stale(name, manifest))
            if LEFTOVER.fullmatch(name) and not kept:
                (self.folder / name).unlink()
        rejects = manifest.rejects
        if rejects is not None and (self.folder / rejects.name).stat().st_size > rejects.bytes:
            os.truncate(self.folder / rejects.name, rejects.bytes)

    # ---------------------------------------------------------------- codes

    def build_codes(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Write the codes of every shard that has none, or stale or damaged ones; returns how many were written.

        All of a pool share one mean and rotation. They are fitted again, and all shards encoded again, once rows that
        came later lie too far from them.
        """
        with self._changing():
            written, shards = 0, self.manifest.shards
            known = [codes for shard in shards if (codes := self._codes_of(shard)) is not None]
            rows = sum(codes.rows for codes in known)
            explained = sum(codes.explained * codes.rows for codes in known) / max(1, rows)
            self._basis = known[0].basis if known and fits(known[0].basis, explained) else None
            again = self._basis is None
            del known
            for number, shard in enumerate(shards):
                written += self._write_codes(shard, again=again)
                if progress is not None:
                    progress(number + 1, len(shards))
            self._coded = True
            return written

    def _codes_of(self, shard: ShardRecord) -> Codes | None:
        return self.files.codes(shard) if _native.available() and self._has_codes(shard) else None

    def _fit(self) -> Basis:
        """A basis for rows of all shards."""
        total = sum(shard.rows for shard in self.manifest.shards)
        step = max(1, total // FIT_ROWS)
        return fit_basis(torch.cat([self.files.tensor(shard)[::step] for shard in self.manifest.shards]), total)

    def _write_codes(self, shard: ShardRecord, *, again: bool = False) -> bool:
        if not _native.available() or not shard.rows or self.files.dims > WIDEST:
            return False
        self.files.forget(shard)
        if self._basis is None and not again:
            stored = (codes.basis for other in self.manifest.shards if (codes := self._codes_of(other)) is not None)
            self._basis = next(stored, None)
        self._basis = self._basis or self._fit()
        before = self._codes_of(shard)
        # Narrow rows have codes as long as themselves, which nobody would gain by.
        narrow = self._basis.first >= self.files.dims * self.files.dtype.itemsize
        wanted = not narrow and (before is None or not self._basis.same(before.basis))
        if wanted:
            codes = encode_rows(self.files.tensor(shard), self._basis)
            write_codes(self.files.codes_path(shard), codes, shard.embeddings.sha256)
        self.files.forget(shard)  # one shard in memory at a time
        return wanted

    def _has_codes(self, shard: ShardRecord) -> bool:
        """Whether there is a file that claims to be this shard's codes."""
        path = self.files.codes_path(shard)
        return path.is_file() and codes_source(path) == shard.embeddings.sha256


def _check_content(content: Sequence[bytes | None] | None, count: int) -> pa.Array | None:
    if content is None:
        return None
    if len(content) != count or not all(key is None or (isinstance(key, bytes) and len(key) == 16) for key in content):
        raise ArgumentError("content", f"{len(content)} values", f"{count} keys of 16 bytes, or None")
    return pa.array(content, type=pa.binary(16))
