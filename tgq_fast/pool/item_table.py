"""What is known of the items beside their embeddings: a table of columns, for filters and for titles of results.

`items.parquet` beside a pool is written by `tgq-fast embed`: one row per item of the catalogue, with "id", "file",
"title", "brand", "category", "price", "group_id" and one column "attributes.NAME" per attribute. It is no part of the
pool: a shop whose prices change by the hour gives its own table instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tgq_fast.data import Catalog
from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.io.files import atomic_writer, write_atomic
from tgq_fast.io.json_text import read_json
from tgq_fast.io.places import absolute, is_remote
from tgq_fast.io.sealed import seal, unseal

__all__ = ["ITEMS_NAME", "NOTE_NAME", "ItemColumns", "facts_of", "read_items", "read_note", "table_of", "write_items"]

ITEMS_NAME = "items.parquet"
NOTE_NAME = "catalog.json"  # where the catalogue lay, for its pictures and titles
MAX_ATTRIBUTES = 500  # columns; of more attributes the most frequent are kept
_ATTRIBUTE = "attributes."
_NARROW = 1 << 19  # rows of at most 2,000 characters of 4 bytes


def table_of(catalog: Catalog) -> pa.Table:
    """The table of a catalogue."""
    items, root = catalog.items, absolute(catalog.root)
    names = items.text("file_name").to_pylist()
    files = [None if name is None else _file(root, name) for name in names]
    columns: dict[str, Any] = {"id": _narrow(items.text("id")), "file": pa.array(files, type=pa.string())}
    for name in ("title", "brand", "category", "group_id"):
        columns[name] = _narrow(items.text(name))
    columns["price"] = items.prices()
    for name, _ in items.attribute_counts().most_common(MAX_ATTRIBUTES):
        columns[_ATTRIBUTE + name] = _narrow(items.attribute(name))
    return pa.table(columns)


def _file(root: str, name: str) -> str:
    if is_remote(name):
        return name
    return f"{root}/{name}" if is_remote(root) else os.path.normpath(os.path.join(root, name))


def _narrow(texts: pa.LargeStringArray) -> pa.ChunkedArray:
    """The same as strings of 32-bit offsets, in chunks that these can hold."""
    parts = [texts[start : start + _NARROW].cast(pa.string()) for start in range(0, len(texts), _NARROW)]
    return pa.chunked_array(parts, pa.string())


def write_items(catalog: Catalog, folder: Path) -> None:
    """Write the table of a catalogue beside a pool, and a note of where the catalogue lay."""
    with atomic_writer(folder / ITEMS_NAME) as file:
        pq.write_table(table_of(catalog), file, compression="zstd", row_group_size=65_536, write_page_checksum=True)
    at = catalog.report.path
    note = {
        "catalog": os.path.realpath(at) if not is_remote(at) else absolute(at),
        "digest": catalog.digest(),
        "items_footer": _footer(folder / ITEMS_NAME),
    }
    write_atomic(folder / NOTE_NAME, json.dumps(seal(note), indent=1).encode())


def read_note(folder: Path) -> dict[str, Any]:
    """What the note beside a pool says: "catalog", a path, and its "digest"; empty if there is none.

    Raises:
        PoolError: it cannot be read, or was changed since it was written.
    """
    path = folder / NOTE_NAME
    try:
        note = unseal(read_json(path.read_bytes()))
        return {name: str(note[name]) for name in ("catalog", "digest", "items_footer") if name in note}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise PoolError(f"{path}: not readable ({error}); tgq-fast embed writes it again") from None


def _footer(path: Path) -> str:
    """sha256 of a Parquet file's metadata; its pages carry checksums of their own."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(8)[:4], "little") + 8
        file.seek(max(0, size - length))
        return hashlib.sha256(file.read()).hexdigest()


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[pq.ParquetFile]:
    """The table beside a pool, checked; PoolError for whatever is wrong with it."""
    path = folder / ITEMS_NAME
    known = read_note(folder).get("items_footer")
    try:
        if known is not None and _footer(path) != known:
            raise PoolError(f"{path}: changed since it was written; tgq-fast embed writes it again")
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, KeyError) as error:
        raise PoolError(f"{path}: not a readable table ({error}); tgq-fast embed writes it again") from None


def read_items(folder: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The table beside a pool, or some of its columns where it has them; None if there is none.

    Raises:
        PoolError: it cannot be read.
    """
    if not (folder / ITEMS_NAME).is_file():
        return None
    with _opened(folder) as file:
        known = file.schema_arrow.names
        return file.read(None if columns is None else [name for name in known if name in columns])


def facts_of(folder: Path, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Title, brand, category and file of a few items, by id; reads the ids, and what else only of these items."""
    shown = ["id", "title", "brand", "category", "file"]
    found: dict[str, dict[str, Any]] = {}
    if not (folder / ITEMS_NAME).is_file():
        return found
    wanted = pa.array(list(ids), type=pa.string())
    with _opened(folder) as file:
        for group in range(file.num_row_groups):
            names = file.read_row_group(group, columns=["id"]).column("id")
            rows = np.flatnonzero(pc.is_in(names, value_set=wanted).to_numpy())
            if len(rows):
                for row in file.read_row_group(group, columns=shown).take(pa.array(rows)).to_pylist():
                    found[row.pop("id")] = row
    return found


def folded(texts: pa.Array) -> pa.Array:
    """Texts as conditions compare them: in Arrow's lower case, which is not Python's for every letter."""
    return pc.utf8_lower(pc.utf8_trim_whitespace(texts))


class ItemColumns:
    """Columns of a table, in the order of a pool's rows.

    Args:
        table: has a column "id".
        row_of: [len(table)] pool row of each row of the table; -1 for items that the pool does not have.
        count: rows of the pool.
    """

    def __init__(self, table: pa.Table, row_of: np.ndarray, count: int) -> None:
        self.table, self.count = table, count
        self._place = np.full(count, -1, dtype=np.int64)  # row of the table
        self._place[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)

    def _values(self, name: str) -> pa.Array:
        for column in (name, _ATTRIBUTE + name):
            if column in self.table.column_names:
                values = self.table.column(column).combine_chunks()
                values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
                return values.take(pa.array(self._place, mask=self._place < 0))
        known = ", ".join(n.removeprefix(_ATTRIBUTE) for n in self.table.column_names if n not in ("id", "file"))
        raise ArgumentError("where", repr(name), f"one of the columns {known}")

    def coded(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column as lower-case text: [count] int64 numbers of texts, -1 where missing; and the texts."""
        values = self._values(name)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if not pa.types.is_string(values.type):
            values = values.cast(pa.string())
        coded = folded(values).dictionary_encode()
        codes = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return codes, coded.dictionary.to_pylist()

    def codes(self, name: str) -> np.ndarray:
        """[count] int64: equal for items with equal text; -1 where missing."""
        return self.coded(name)[0]

    def numbers(self, name: str) -> np.ndarray:
        """[count] float64: a column of numbers; NaN where missing. ArgumentError where text is not a number."""
        values = self._values(name)
        try:
            numbers = pc.cast(values, pa.float64(), safe=False)
        except pa.ArrowException as error:
            raise ArgumentError("where", repr(name), f"a column of numbers ({error})") from None
        return np.array(pc.fill_null(numbers, float("nan")))
