"""Parquet row by row: bytes of pictures stay in the file until they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tgq_fast.data.values import RowError
from tgq_fast.errors import CatalogError
from tgq_fast.io.places import Place, open_place

__all__ = ["EmbeddedPicture", "looks_like_picture", "open_parquet", "parquet_rows", "picture_columns"]
__all__ += ["cell_pictures", "names_pictures", "python_rows"]

_BATCH = 1024
_BUFFER = 1 << 20  # bytes of a column that are read at a time: without it, a whole column chunk
_PERIODS = "a pandas period, which is stored as a number; write such a column as text: frame[column].astype(str)"
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"P5", b"P6")


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture in a table: `address` is "<table>#<1-based row of the file>", `path` what the row calls it."""

    address: str
    path: str | None = None


def looks_like_picture(data: object) -> bool:
    """Whether bytes begin like a picture file."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        return False
    head = bytes(data[:16])
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypavif"


def picture_columns(file: Any) -> list[str]:
    """Columns of a ParquetFile that hold picture files, by their content: binary, a struct with binary `bytes`, or a
    list of either.

    The one called image comes first.
    """
    binary = [field.name for field in file.schema_arrow if _holds_bytes(_listed(field.type))]
    found = [name for name in binary if looks_like_picture(_first_bytes(file, name))]
    return sorted(found, key=lambda name: name.casefold() != "image")


def names_pictures(kind: pa.DataType) -> bool:
    """Whether a column of this type can name or hold pictures."""
    kind = _listed(kind)
    if pa.types.is_struct(kind):
        return any(child.name in ("bytes", "path") for child in kind)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_binary(kind) or str(kind) in ("string", "large_string", "string_view", "null")


def cell_pictures(value: Any) -> tuple[list[bytes], str | None]:
    """The pictures that a cell of a picture column holds, and the first path that it names."""
    cells = [cell for cell in (value if isinstance(value, list) else [value]) if cell is not None]
    held = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
    paths = [cell.get("path") for cell in cells if isinstance(cell, dict)]
    return [data for data in held if data is not None], next(filter(None, paths), None)


def _first_bytes(file: Any, column: str) -> object:
    """What the first cell of a column holds that is no gap; groups of gaps are passed over unread."""
    for group in range(file.metadata.num_row_groups):
        facts = file.metadata.row_group(group)
        chunks = column_chunks(facts, column)
        if all(c.statistics is not None and c.statistics.null_count == c.num_values for c in chunks):
            continue
        with suppress(OSError, pa.ArrowException):  # a damaged group
            for batch in file.iter_batches(batch_size=16, row_groups=[group], columns=[column], use_threads=False):
                for cell in batch.column(0):
                    if held := cell_pictures(cell.as_py())[0]:
                        return held[0]
    return None


def _period_columns(schema: Any) -> list[str]:
    """Columns that pandas wrote as counts of months, days, …: what they mean stands in metadata alone."""
    name = b"ARROW:extension:name"  # of a type that nobody has registered
    names = [(f, (f.metadata or {}).get(name, getattr(f.type, "extension_name", ""))) for f in schema]
    return [field.name for field, extension in names if extension in (b"pandas.period", "pandas.period")]


def column_chunks(facts: Any, column: str) -> list[Any]:
    """Metadata of the leaves of one column in a row group."""
    leaves = map(facts.column, range(facts.num_columns))
    return [leaf for leaf in leaves if leaf.path_in_schema.split(".")[0] == column]


@contextmanager
def open_parquet(path: Place) -> Iterator[Any]:
    """A ParquetFile that reads a column piece by piece."""
    with open_place(path) as raw, pq.ParquetFile(raw, buffer_size=_BUFFER) as file:
        yield file


def parquet_rows(
    path: Place, name: str, check: Callable[[pa.Schema], None]
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Rows of one file; pictures come as :class:`EmbeddedPicture` with addresses "<name>#<row>".

    A row group that is damaged is one RowError, at its first unread row; the others are read.

    Args:
        path: the file.
        name: of the table, as addresses have it: relative to the catalogue folder.
        check: called with the schema.

    Raises:
        CatalogError: not a readable Parquet file.
    """
    try:
        with open_parquet(path) as file:
            schema = file.schema_arrow
            check(schema)
            found = picture_columns(file)
            pictures = _PictureColumn(file, found[0], name) if found else None
            plain = [column for column in schema.names if column not in found]
            narrow = {field.name for field in schema if field.name in plain and _has_narrow_float(field.type)}
            periods = dict.fromkeys(_period_columns(schema), RowError([_PERIODS]))
            end = 0
            for group in range(file.metadata.num_row_groups):
                number = first = end
                end += file.metadata.row_group(group).num_rows
                try:
                    for rows in _plain_rows(file, group, plain if found else None, narrow):
                        addresses = pictures.rows(group, first, number, len(rows)) if pictures is not None else []
                        for offset, row in enumerate(rows):
                            number += 1
                            row.update(periods)
                            if pictures is not None:
                                row.update(dict.fromkeys(found[1:]))
                                row[pictures.column] = addresses[offset]
                            yield number, row
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    told = f"row group {group} of {name} is damaged, rows {number + 1} to {end} of the file are lost"
                    yield number + 1, RowError([f"{told}: {str(error)[:200]}"])
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CatalogError(path, [f"not a readable Parquet file: {str(error)[:200]}"]) from error


def _plain_rows(file: Any, group: int, columns: list[str] | None, narrow: set[str]) -> Iterator[list[dict[str, Any]]]:
    if columns == []:  # pictures and nothing else: a batch without columns has no rows
        count = file.metadata.row_group(group).num_rows
        for start in range(0, count, _BATCH):
            yield [{} for _ in range(min(_BATCH, count - start))]
        return
    for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns, use_threads=False):
        yield python_rows(batch, narrow)


def python_rows(batch: pa.RecordBatch, narrow: set[str] | None = None) -> list[dict[str, Any]]:
    """Rows of an Arrow table or batch as Python values.

    Args:
        narrow: columns that hold float32 or float16; None looks.
    """
    columns: list[list[Any]] = []
    names = batch.schema.names
    if narrow is None:
        narrow = {field.name for field in batch.schema if _has_narrow_float(field.type)}
    for name, column in zip(names, batch.columns, strict=True):
        try:
            values = column.to_pylist()
        except (ValueError, OverflowError, ArithmeticError):
            values = [_cell(cell) for cell in column]  # dates beyond the year 9999 and the like
        if name in narrow:
            kind = column.type
            values = [_shortest(value, kind) for value in values]
        columns.append(values)
    # pandas writes missing values of float columns as NaN
    return [
        {n: None if isinstance(v, float) and math.isnan(v) else v for n, v in zip(names, cells)}
        for cells in zip(*columns)
    ]


def _cell(cell: Any) -> Any:
    """Value of a cell, or the reason why Python cannot hold it, which is an error only where the cell is used."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError, ArithmeticError) as error:
        return RowError([f"a {cell.type} that Python cannot hold: {str(error)[:80]}"])


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in _LISTS)


def _listed(kind: pa.DataType) -> pa.DataType:
    """The type of a list's entries; any other type itself."""
    return kind.value_type if _is_list(kind) else kind


def _is_binary(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(kind) == "binary_view" or any(test(kind) for test in _BINARY)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(child.name == "bytes" and _is_binary(child.type) for child in kind)
    return _is_binary(kind)


def _has_narrow_float(kind: pa.DataType) -> bool:
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return True
    return any(_has_narrow_float(kind.field(i).type) for i in range(kind.num_fields))


def _shortest(value: Any, kind: pa.DataType) -> Any:
    """Values of float32 and float16 by their own shortest text: 0.1, not 0.10000000149011612."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return value
        width = np.float32 if pa.types.is_float32(kind) else np.float16 if pa.types.is_float16(kind) else np.float64
        return float(str(width(value)))
    if isinstance(value, dict):
        return {n: _shortest(v, kind.field(n).type) for n, v in value.items()}
    if isinstance(value, list) and kind.num_fields == 1:
        inner = kind.field(0).type
        if pa.types.is_map(kind):
            return [(key, _shortest(entry, kind.item_type)) for key, entry in value]
        return [_shortest(entry, inner) for entry in value]
    return value


class _PictureColumn:
    """Which rows hold a picture, told without reading one where the file's statistics allow."""

    def __init__(self, file: Any, column: str, name: str) -> None:
        self.file, self.column, self.name = file, column, name
        self._group = -1
        self._counts: list[int] = []
        self._paths: list[str | None] = []

    def rows(self, group: int, first: int, start: int, count: int) -> list[Any]:
        """What rows `start` … of a group that begins at `first` say: address of a picture, else a path, else None. A
        cell of several has its address as often."""
        if group != self._group:
            self._read(group)
        found: list[Any] = []
        for row in range(start, start + count):
            path, held = self._paths[row - first], self._counts[row - first]
            picture = EmbeddedPicture(f"{self.name}#{row + 1}", path) if held else path
            found.append([picture] * held if held > 1 else picture)
        return found

    def _read(self, group: int) -> None:
        import pyarrow.compute as pc

        facts = self.file.metadata.row_group(group)
        kind = self.file.schema_arrow.field(self.column).type
        if _is_list(kind):
            read = self.file.iter_batches(batch_size=32, row_groups=[group], columns=[self.column], use_threads=False)
            cells = [cell_pictures(cell.as_py()) for batch in read for cell in batch.column(0)]
            self._counts, self._paths = [len(held) for held, _ in cells], [path for _, path in cells]
            self._group = group
            return
        struct = pa.types.is_struct(kind)
        holder = f"{self.column}.bytes" if struct else self.column
        chunk = next(leaf for leaf in column_chunks(facts, self.column) if leaf.path_in_schema == holder)
        whole = chunk.statistics is not None and chunk.statistics.has_null_count and chunk.statistics.null_count == 0
        self._paths = [None] * facts.num_rows
        if struct and any(child.name == "path" for child in kind):
            data = self.file.read_row_group(group, columns=[f"{self.column}.path"], use_threads=False).column(0)
            self._paths = pc.struct_field(data, "path").to_pylist()
        if whole:
            self._counts = [1] * facts.num_rows
        else:
            data = self.file.read_row_group(group, columns=[holder], use_threads=False).column(0)
            present = pc.is_valid(pc.struct_field(data, "bytes") if struct else data)
            self._counts = [int(held) for held in present.to_pylist()]
        self._group = group
