"""The neighbours of every item of a pool as a table, written part by part, so that a killed run goes on where it was.

Source: ours.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tgq_fast.arguments import checked
from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.io.files import atomic_writer, check_target, locked, make_folder, storage_errors, write_atomic
from tgq_fast.io.identity import canonical_json
from tgq_fast.pool import columns
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.pool.reader import PoolReader
from tgq_fast.pool.search import PoolHits

__all__ = ["FORMATS", "NeighbourReport", "neighbours"]

FORMATS = (".parquet", ".csv", ".jsonl")
PART_ROWS = 16_384  # items per part: what a kill can cost
SCHEMA = pa.schema({"item": pa.string(), "rank": pa.int32(), "neighbour": pa.string(), "score": pa.float32()})


@dataclass(frozen=True)
class NeighbourReport:
    """What :func:`neighbours` did.

    Attributes:
        path: the table.
        items: items of the pool.
        rows: rows of the table.
        short: items with fewer than k neighbours, since no more met the conditions.
        resumed: items that an earlier call had done.
    """

    path: str
    items: int
    rows: int
    short: int
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@checked
def neighbours(
    pool: ItemPool,
    out: str | Path,
    *,
    k: int = 20,
    where: str | None = None,
    per_group: int | None = None,
    table: pa.Table | None = None,
    skip: int = 0,
    exclude: Mapping[str, Collection[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NeighbourReport:
    """Write the k best neighbours of every item: columns item, rank (from 1), neighbour, score.

    Rows follow in pool order. Parts are kept in a folder beside `out` until all are there; a call after a kill goes on
    with them if pool, conditions and columns are the same.

    Args:
        pool: the version it shows is searched, whole.
        out: .parquet, .csv or .jsonl; replaced when the table is complete.
        k: 1 … 2048.
        where: conditions, see :meth:`ItemPool.select`. An item gets fewer than k neighbours only where no more meet
            them.
        per_group: at most so many neighbours of one `group_id`.
        table: columns for `where` and `per_group`; None: those beside the pool.
        skip: leave so many of the best out; ranks then begin with skip + 1.
        exclude: ids that an item must not get, by id.
        progress: called with (items done, items).

    Raises:
        ArgumentError: another suffix, or a condition that cannot be read.
        PoolError: a shard is damaged, there is no table of columns, or another call is writing to `out`.
        StorageError: `out` cannot be written.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise ArgumentError("out", str(out), "a file that ends in " + ", ".join(FORMATS))
    if str(out) != str(out).encode(errors="replace").decode():
        raise ArgumentError("out", ascii(str(out)), "a path that is text: Arrow cannot open others")
    check_target(out)
    reader, search = pool._state
    select = None if where is None else columns.select(pool, where, table)
    groups = None if per_group is None else columns.groups_of(reader, per_group, table)
    banned = _rows_of(reader, exclude or {})
    facts = {"pool": reader.manifest.to_dict(), "k": k, "where": where, "per_group": per_group, "rows": PART_ROWS}
    facts |= {"skip": skip, "exclude": {str(row): others.tolist() for row, others in banned.items()}}
    if select is not None:
        facts["columns"] = select.digest()
    if groups is not None:
        facts["groups"] = hashlib.sha256(groups.codes.tobytes()).hexdigest()
    parts = out.with_name(f".{out.name}.parts")
    total, resumed = len(reader), 0
    with storage_errors(out), _begun(parts, hashlib.sha256(canonical_json(facts).encode()).hexdigest()):
        starts = range(0, total, PART_ROWS)
        for number, start in enumerate(starts):
            own = np.arange(start, min(start + PART_ROWS, total))
            path = parts / f"part-{number:06d}.parquet"
            if path.exists():
                resumed += len(own)
            else:
                excluded = _excluded(own, banned)
                found = columns.rows_like(reader, search, own, skip + k, select, groups, excluded)
                _write_part(path, reader.names(own), found, skip)
            if progress is not None:
                progress(start + len(own), total)
        written, full = 0, 0
        with atomic_writer(out) as file:
            for rows in _write_table(file, out.suffix, [parts / f"part-{n:06d}.parquet" for n in range(len(starts))]):
                written += len(rows)
                full += int((rows.column("rank").to_numpy() == skip + k).sum())
        shutil.rmtree(parts)
    return NeighbourReport(str(out), total, written, total - full, resumed)


@contextmanager
def _begun(parts: Path, identity: str) -> Iterator[None]:
    """A folder of parts for nobody else meanwhile: empty, or that of an earlier call of the same identity."""
    note, lock = parts / "identity", make_folder(parts) / ".lock"
    with locked(lock, wait=False) as mine:
        if not mine:
            raise PoolError(f"{parts}: another process is writing this table; wait for it to end, or choose another")
        if not (note.is_file() and note.read_text() == identity):
            own = ("part-", ".part-", "identity", ".identity", lock.name)
            old = list(parts.iterdir())
            if foreign := [path.name for path in old if not path.name.startswith(own)]:
                raise PoolError(f"{parts}: holds {foreign[0]}, which is no part of a table; remove it")
            for path in old:
                if path != lock:
                    path.unlink()
            write_atomic(note, identity.encode())
        yield


def _rows_of(reader: PoolReader, ids: Mapping[str, Collection[str]]) -> dict[int, np.ndarray]:
    """Pool rows by pool row; ids that are not in the pool are left out."""
    names = list({name: None for item, others in ids.items() for name in (item, *others)})
    row_of = dict(zip(names, reader.rows(names, missing="mark").tolist()))
    found = {row_of[item]: np.array(sorted({row_of[name] for name in others})) for item, others in ids.items()}
    return {row: others[others >= 0] for row, others in sorted(found.items()) if row >= 0}


def _excluded(own: np.ndarray, banned: Mapping[int, np.ndarray]) -> torch.Tensor:
    """[n, X] pool rows that each of the items must not get, itself among them; -1 for none."""
    lists = [banned.get(row, own[:0]) for row in own.tolist()]
    table = np.full((len(own), 1 + max(map(len, lists), default=0)), -1, dtype=np.int64)
    table[:, 0] = own
    for number, others in enumerate(lists):
        table[number, 1 : 1 + len(others)] = others
    return torch.from_numpy(table)


def _write_part(path: Path, names: list[str | None], found: PoolHits, skip: int) -> None:
    rows, k = found.indices.shape
    shown = found.indices >= 0
    shown[:, :skip] = False
    there = shown.numpy().reshape(-1)
    flat = [name for line in found.ids for name in line[skip:] if name is not None]
    columns = [
        pa.array(names, type=pa.string()).take(pa.array(np.repeat(np.arange(rows), k)[there])),
        pa.array(np.tile(np.arange(1, k + 1, dtype=np.int32), rows)[there]),
        pa.array(flat, type=pa.string()),
        pa.array(found.scores.numpy().reshape(-1)[there]),
    ]
    with atomic_writer(path) as file:
        pq.write_table(pa.table(columns, schema=SCHEMA), file, compression="zstd")


def _write_table(file: Any, suffix: str, parts: list[Path]) -> Iterator[pa.Table]:
    """Writes the parts one after another; yields each once it is written."""
    if suffix == ".parquet":
        with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for path in parts:
                table = pq.read_table(path)
                writer.write_table(table)
                yield table
        return
    if suffix == ".csv":
        file.write((",".join(SCHEMA.names) + "\r\n").encode())
    for path in parts:
        table = pq.read_table(path)
        text = io.StringIO()
        if suffix == ".csv":
            csv.writer(text).writerows(zip(*(column.to_pylist() for column in table.columns)))
        else:
            text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
        file.write(text.getvalue().encode("utf-8"))
        yield table
