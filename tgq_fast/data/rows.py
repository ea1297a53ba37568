"""Streaming readers of .jsonl, .csv and .parquet: (row number, columns or the reason why the row is unreadable)."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tgq_fast.data.items import RowError
from tgq_fast.errors import CatalogError

__all__ = ["MAX_ROW_BYTES", "SUFFIXES", "read_rows"]

SUFFIXES = (".jsonl", ".csv", ".parquet")
MAX_ROW_BYTES = 32 << 20


def read_rows(path: Path, *, required: tuple[str, ...] = ()) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Stream a table.

    Args:
        path: file whose suffix is one of `SUFFIXES`.
        required: columns of which at least one must exist (checked where the format has a header).

    Yields:
        (1-based row number, columns) or (row number, RowError) for a row that cannot be parsed. Only one row, or one
        Parquet row group slice, is in memory at a time.

    Raises:
        CatalogError: the file as a whole is unreadable or lacks the required columns.
    """
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}.get(path.suffix.lower())
    if reader is None:
        raise CatalogError(path, [f"suffix {path.suffix!r} is not one of {', '.join(SUFFIXES)}"])
    try:
        yield from reader(path, required)
    except OSError as error:
        raise CatalogError(path, [f"cannot be read: {error}"]) from error


def _check_header(path: Path, columns: list[str], required: tuple[str, ...]) -> None:
    if len(set(columns)) != len(columns):
        twice = sorted({name for name in columns if columns.count(name) > 1})
        raise CatalogError(path, [f"column(s) {', '.join(twice)} appear twice in the header"])
    if required and not set(required) & set(columns):
        raise CatalogError(path, [f"header {columns[:20]} has none of the columns {', '.join(required)}"])


def _read_jsonl(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES):
            number += 1
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield number, RowError([f"line is longer than {MAX_ROW_BYTES} bytes"])
                continue
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield number, RowError(["not valid UTF-8"])
            except (ValueError, RecursionError) as error:
                yield number, RowError([f"not valid JSON: {str(error)[:120]}"])
            else:
                if not isinstance(value, dict):
                    value = RowError([f"a JSON {type(value).__name__}, expected an object"])
                yield number, value


def _read_csv(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    # The limit is global to the process; it is only ever raised, so that a 1 MB title is cut by us, not refused by csv.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header is None:
            return
        columns = [name.strip() for name in header]
        _check_header(path, columns, required)
        number = 0
        while True:
            number += 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, RowError([f"not valid CSV: {error}"])
                continue
            if not fields:
                continue
            if len(fields) != len(columns):
                yield (
                    number,
                    RowError([f"{len(fields)} fields, the header has {len(columns)}; quote commas and quotes"]),
                )
            elif any(not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text) for text in fields):
                yield number, RowError(["not valid UTF-8"])
            else:
                yield number, {name: text if text else None for name, text in zip(columns, fields, strict=True)}


def _read_parquet(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_header(path, list(file.schema_arrow.names), required)
            number = 0
            for batch in file.iter_batches(batch_size=1024, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    # pandas writes missing values of float columns as NaN
                    yield number, {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CatalogError(path, [f"not a readable Parquet file: {str(error)[:200]}"]) from error
