"""Parquet row by row: bytes of pictures stay in the file until they are asked for."""

from __future__ import annotations

import errno
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tgq_fast.data.values import RowError
from tgq_fast.errors import CatalogError
from tgq_fast.io.files import open_regular

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["EmbeddedPicture", "ParquetPictures", "looks_like_picture", "parquet_rows", "picture_columns"]
__all__ += ["python_rows"]

_BATCH = 1024
_SNIFFED = 256  # rows in which a picture column must show its first picture
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
    """Columns of a ParquetFile that hold picture files: binary, or a struct with binary `bytes`, by their content.

    The one called image comes first.
    """
    import pyarrow as pa

    found = []
    for field in file.schema_arrow:
        binary = _is_binary(field.type)
        if pa.types.is_struct(field.type):
            binary = any(child.name == "bytes" and _is_binary(child.type) for child in field.type)
        if not binary:
            continue
        for batch in islice(file.iter_batches(batch_size=1, columns=[field.name], use_threads=False), _SNIFFED):
            value = batch.column(0)[0].as_py()
            data = value.get("bytes") if isinstance(value, dict) else value
            if data is not None:
                if looks_like_picture(data):
                    found.append(field.name)
                break
    return sorted(found, key=lambda name: name.casefold() != "image")


def parquet_rows(
    path: Path, name: str, check: Callable[[list[str]], None]
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Rows of one file; pictures come as :class:`EmbeddedPicture` with addresses "<name>#<row>".

    Args:
        path: the file.
        name: of the table, as addresses have it: relative to the catalogue folder.
        check: called with the column names.

    Raises:
        CatalogError: not a readable Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(path) as raw, pq.ParquetFile(raw) as file:
            schema = file.schema_arrow
            check(list(schema.names))
            found = picture_columns(file)
            pictures = _PictureColumn(file, found[0], name) if found else None
            plain = [column for column in schema.names if column not in found]
            narrow = {field.name for field in schema if field.name in plain and _has_narrow_float(field.type)}
            number = 0
            for rows in _plain_rows(file, plain if found else None, narrow):
                addresses = pictures.rows(number, len(rows)) if pictures is not None else []
                for offset, row in enumerate(rows):
                    number += 1
                    if pictures is not None:
                        row.update(dict.fromkeys(found[1:]))
                        row[pictures.column] = addresses[offset]
                    yield number, row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CatalogError(path, [f"not a readable Parquet file: {str(error)[:200]}"]) from error


def _plain_rows(file: Any, columns: list[str] | None, narrow: set[str]) -> Iterator[list[dict[str, Any]]]:
    if columns == []:  # pictures and nothing else: a batch without columns has no rows
        for start in range(0, file.metadata.num_rows, _BATCH):
            yield [{} for _ in range(min(_BATCH, file.metadata.num_rows - start))]
        return
    for batch in file.iter_batches(batch_size=_BATCH, columns=columns, use_threads=False):
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


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _has_narrow_float(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return True
    return any(_has_narrow_float(kind.field(i).type) for i in range(kind.num_fields))


def _shortest(value: Any, kind: pa.DataType) -> Any:
    """Values of float32 and float16 by their own shortest text: 0.1, not 0.10000000149011612."""
    import pyarrow as pa

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
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._group = -1
        self._present: list[bool] = []
        self._paths: list[str | None] = []

    def rows(self, start: int, count: int) -> list[EmbeddedPicture | str | None]:
        """What rows `start` … say about their picture: its address, else its path, else None."""
        found: list[EmbeddedPicture | str | None] = []
        for row in range(start, start + count):
            group = int(np.searchsorted(self._ends, row, side="right"))
            if group != self._group:
                self._read(group)
            offset = row - (int(self._ends[group - 1]) if group else 0)
            path = self._paths[offset]
            found.append(EmbeddedPicture(f"{self.name}#{row + 1}", path) if self._present[offset] else path)
        return found

    def _read(self, group: int) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        facts = self.file.metadata.row_group(group)
        kind = self.file.schema_arrow.field(self.column).type
        struct = pa.types.is_struct(kind)
        holder = f"{self.column}.bytes" if struct else self.column
        chunk = next(c for c in map(facts.column, range(facts.num_columns)) if c.path_in_schema == holder)
        whole = chunk.statistics is not None and chunk.statistics.has_null_count and chunk.statistics.null_count == 0
        self._paths = [None] * facts.num_rows
        if struct and any(child.name == "path" for child in kind):
            data = self.file.read_row_group(group, columns=[f"{self.column}.path"], use_threads=False).column(0)
            self._paths = pc.struct_field(data, "path").to_pylist()
        if whole:
            self._present = [True] * facts.num_rows
        else:
            data = self.file.read_row_group(group, columns=[holder], use_threads=False).column(0)
            self._present = pc.is_valid(pc.struct_field(data, "bytes") if struct else data).to_pylist()
        self._group = group


class ParquetPictures:
    """Bytes of pictures that lie in Parquet files, read by row group. Safe to use from several threads.

    Args:
        files: table name, as addresses have it → file.
    """

    _KEPT = 2  # row groups in memory

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], tuple[int, Any]] = OrderedDict()
        self._layout: dict[str, tuple[str, list[int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["files"])  # type: ignore[misc]

    def __contains__(self, address: object) -> bool:
        table, mark, row = str(address).rpartition("#")
        return bool(mark) and row.isdecimal() and table in self._files

    def read(self, address: str) -> bytes:
        """Bytes of one picture.

        Raises:
            OSError: the file cannot be read, has changed, or the row has no bytes.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        table, _, row = address.rpartition("#")
        number = int(row) - 1
        try:
            with self._lock:
                column, ends = self._layout_of(table)
                group = next((g for g, end in enumerate(ends) if number < end), None)
                if group is None:
                    raise OSError(errno.EIO, f"{self._files[table]}: has no row {row}; the file has changed")
                first = ends[group - 1] if group else 0
                if (table, group) not in self._groups:
                    with open_regular(self._files[table]) as raw, pq.ParquetFile(raw) as file:
                        data = file.read_row_group(group, columns=[column], use_threads=False).column(0)
                    self._groups[table, group] = (first, data)
                    while len(self._groups) > self._KEPT:
                        self._groups.popitem(last=False)
                self._groups.move_to_end((table, group))
                value = self._groups[table, group][1][number - first].as_py()
        except pa.ArrowException as error:
            raise OSError(errno.EIO, f"{self._files[table]}: {str(error)[:200]}") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError(errno.EIO, f"{self._files[table]}: row {row} holds no picture; the file has changed")
        return data

    def _layout_of(self, table: str) -> tuple[str, list[int]]:
        import pyarrow.parquet as pq

        if table not in self._layout:
            with open_regular(self._files[table]) as raw, pq.ParquetFile(raw) as file:
                column = picture_columns(file)[0]
                rows = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            self._layout[table] = (column, np.cumsum(rows).tolist())
        return self._layout[table]
