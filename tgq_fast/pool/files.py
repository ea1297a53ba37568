"""The files of a pool: checked, mapped into memory and kept, for any number of threads.

A file is checked when it is first read: size, SHA-256, content. Whenever it is used again its size, time and inode are
compared with those it had then; if one differs it is checked and mapped anew, so that what was changed is refused.

Source: ours.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tgq_fast import _native
from tgq_fast.errors import PoolError
from tgq_fast.io.identity import sha256_file
from tgq_fast.pool.code_files import SUFFIX, read_codes
from tgq_fast.pool.ids import IdIndex, build_index
from tgq_fast.pool.manifest import FileRecord, ShardRecord
from tgq_fast.search.codes import Codes

logger = logging.getLogger(__name__)

REJECTS_NAME = "rejects.jsonl"
KEPT_ID_BYTES = 128 << 20  # of ids, kept in memory once read
MAPPED_BYTES = 256 << 20  # of embeddings that stay mapped: what is mapped counts as memory of the process

Stamp = tuple[int, int, int]
T = TypeVar("T")


class ShardIds(NamedTuple):
    """Ids of a shard, and the keys of what was embedded where they are known.

    Attributes:
        ids: [n] strings.
        content: [n] binary, with gaps.
    """

    ids: pa.StringArray
    content: pa.BinaryArray


class PoolFiles:
    """Reads the files of one pool folder.

    Args:
        folder: the pool.
        dims: D.
        dtype: storage type of the embeddings.
        verify: check the SHA-256 of a file when it is first read, and when it has changed since.
    """

    def __init__(self, folder: Path, dims: int, dtype: torch.dtype, *, verify: bool) -> None:
        self.folder, self.dims, self.dtype, self.verify = folder, dims, dtype, verify
        self._root = os.fspath(folder)
        self._lock = threading.Lock()  # of the dictionaries
        self._busy: dict[str, threading.Lock] = {}  # held while a file is read
        self._kept: dict[str, tuple[Stamp, Any]] = {}
        self._verified: dict[str, Stamp] = {}  # files whose SHA-256 was right, and when
        self._mapped: dict[str, int] = {}  # bytes of the embeddings that are kept, oldest first
        self._id_bytes = 0
        self._refused: set[str] = set()  # shards with codes that do not fit

    def clear(self) -> None:
        """Drop all memory maps."""
        with self._lock:
            self._kept.clear()
            self._verified.clear()
            self._mapped.clear()
            self._refused.clear()
            self._id_bytes = 0

    def forget(self, shard: ShardRecord) -> None:
        """Drop the maps of one shard."""
        with self._lock:
            for name in (shard.embeddings.name, self.codes_path(shard).name):
                self._kept.pop(name, None)
                self._mapped.pop(name, None)
            self._refused.discard(shard.name)

    def check(self, record: FileRecord) -> Stamp:
        """Size, time and inode of a file that is there in its full size; PoolError otherwise."""
        path = f"{self._root}/{record.name}"  # often called: no Path
        try:
            found = os.stat(path)
        except OSError:
            raise PoolError(f"{path}: missing, the manifest names it; the pool is incomplete") from None
        # A killed writer may leave the append-only reject log longer than committed.
        if found.st_size < record.bytes or (found.st_size > record.bytes and record.name != REJECTS_NAME):
            raise PoolError(f"{path}: {found.st_size} bytes, the manifest says {record.bytes}; truncated or replaced")
        return found.st_size, found.st_mtime_ns, found.st_ino

    def check_hash(self, record: FileRecord, stop: threading.Event | None = None) -> None:
        """PoolError unless the file's SHA-256 is that of the manifest."""
        path = self.folder / record.name
        try:
            digest = sha256_file(path, stop)
        except OSError as error:
            raise PoolError(f"{path}: not readable ({error})") from None
        if digest != record.sha256:
            raise PoolError(f"{path}: SHA-256 differs from the manifest; corrupt or replaced, embed again")

    def _read(
        self,
        record: FileRecord,
        read: Callable[[], T],
        stop: threading.Event | None = None,
        *,
        key: str | None = None,
        keep: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """What `read` makes of a file, kept (as `key`, else by the file's name) until the file changes."""
        key = key or record.name
        stamp = self.check(record)
        kept: tuple[Stamp, T] | None = self._kept.get(key)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        with self._lock:
            busy = self._busy.setdefault(key, threading.Lock())
        with busy:
            stamp = self.check(record)
            kept = self._kept.get(key)
            if kept is not None and kept[0] == stamp:
                return kept[1]
            if self.verify and self._verified.get(record.name) != stamp:
                self.check_hash(record, stop)
            if not self.verify and self._verified.get(record.name, stamp) != stamp:
                raise PoolError(f"{self.folder / record.name}: changed since it was first read; open the pool again")
            value = read()
            if self.check(record) != stamp:
                raise PoolError(f"{self.folder / record.name}: changed while it was read")
            with self._lock:
                self._verified[record.name] = stamp
                if keep(value):
                    self._kept[key] = stamp, value
            return value

    def tensor(self, shard: ShardRecord, stop: threading.Event | None = None) -> Tensor:
        """Memory-mapped [n, D] embeddings of one shard, deleted rows among them."""

        def read() -> Tensor:
            tensor = self._tensors(shard.embeddings, "embeddings")[0]
            if tuple(tensor.shape) != (shard.rows, self.dims) or tensor.dtype != self.dtype:
                raise PoolError(
                    f"{self.folder / shard.embeddings.name}: holds {tuple(tensor.shape)} {tensor.dtype}, "
                    f"the manifest says ({shard.rows}, {self.dims}) {self.dtype}"
                )
            return tensor

        def keep(tensor: Tensor) -> bool:
            self._mapped.pop(shard.embeddings.name, None)
            self._mapped[shard.embeddings.name] = tensor.nbytes
            while sum(self._mapped.values()) > MAPPED_BYTES and len(self._mapped) > 1:
                oldest = next(iter(self._mapped))
                del self._mapped[oldest]
                self._kept.pop(oldest, None)  # whoever uses it has it still
            return True

        return self._read(shard.embeddings, read, stop, keep=keep)

    def index(self, shard: ShardRecord) -> IdIndex:
        """Where the ids of one shard are; made anew for a shard that was written without one."""
        if shard.index is None:
            return self._read(shard.ids, lambda: build_index(self.ids(shard).ids), key=f"{shard.name} index")

        def read() -> IdIndex:
            assert shard.index is not None
            index = IdIndex(*(tensor.numpy() for tensor in self._tensors(shard.index, "hash", "row")))
            shapes = [(array.shape, array.dtype) for array in index]
            if shapes != [((shard.rows,), np.dtype(np.uint64)), ((shard.rows,), np.dtype(np.uint32))]:
                raise PoolError(f"{self.folder / shard.index.name}: not the index of {shard.rows} ids; corrupt")
            return index

        return self._read(shard.index, read)

    def ids(self, shard: ShardRecord) -> ShardIds:
        """Ids and content keys of one shard; kept in memory while all of them are small."""

        def read() -> ShardIds:
            path = self.folder / shard.ids.name
            try:
                with pq.ParquetFile(path) as file:  # read_table imports pyarrow.dataset, which takes long
                    table = file.read()
                ids = table.column("id").combine_chunks().cast(pa.string())
                known = "content" in table.column_names
                content = table.column("content").combine_chunks() if known else pa.nulls(len(ids), pa.binary(16))
            except (pa.ArrowException, OSError, KeyError) as error:
                raise PoolError(f"{path}: not a readable id file ({error})") from None
            if len(ids) != shard.rows or ids.null_count:
                raise PoolError(f"{path}: {len(ids)} ids, {shard.rows} expected; corrupt")
            return ShardIds(ids, content)

        def keep(value: ShardIds) -> bool:
            size = value.ids.nbytes + value.content.nbytes
            if self._id_bytes + size > KEPT_ID_BYTES:
                return False
            self._id_bytes += size
            return True

        return self._read(shard.ids, read, keep=keep)

    def _tensors(self, record: FileRecord, *names: str) -> list[Tensor]:
        path = self.folder / record.name
        try:
            with safe_open(path, framework="pt") as handle:
                return [handle.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            raise PoolError(f"{path}: not a readable safetensors file ({error})") from None

    def codes_path(self, shard: ShardRecord) -> Path:
        """Where a shard's codes lie, if it has any."""
        return self.folder / f"{shard.name}{SUFFIX}"

    def codes(self, shard: ShardRecord, stop: threading.Event | None = None) -> Codes | None:
        """Memory-mapped codes of one shard, if it has some that fit; those that do not are said once and left alone."""
        path = self.codes_path(shard)
        if shard.name in self._refused or not _native.available():
            return None
        try:
            found = os.stat(path)
        except OSError:
            return None
        stamp = found.st_size, found.st_mtime_ns, found.st_ino
        kept = self._kept.get(path.name)
        if kept is not None and kept[0] == stamp:
            codes: Codes = kept[1]
            return codes
        try:
            source = shard.embeddings.sha256
            codes = read_codes(path, self.tensor(shard, stop), source, verify=self.verify, stop=stop)
        except PoolError as error:
            with self._lock:
                said = shard.name in self._refused
                self._refused.add(shard.name)
            if not said:
                logger.warning("%s; searching without them, build_codes makes them again", error)
            return None
        with self._lock:
            self._kept[path.name] = stamp, codes
        return codes
