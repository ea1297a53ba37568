"""Streaming readers of .jsonl, .csv (both also .gz), .parquet and WebDataset .tar, or of several such parts.

Each yields (row number, columns or the reason why the row is unreadable).
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, BinaryIO, cast

from tgq_fast.data.columns import PICTURE_COLUMNS, check_pictures
from tgq_fast.data.csv_rows import MAX_ROW_BYTES, csv_header, csv_rows
from tgq_fast.data.json_lines import read_json_objects
from tgq_fast.data.parquet_rows import parquet_rows
from tgq_fast.data.tar_rows import tar_rows
from tgq_fast.data.values import RowError
from tgq_fast.errors import CatalogError
from tgq_fast.io.json_text import read_json
from tgq_fast.io.places import Place, open_place

__all__ = [
    "MAX_ROW_BYTES",
    "SUFFIXES",
    "check_header",
    "named_parts",
    "read_json_lines",
    "read_rows",
    "suffix_of",
    "table_parts",
]

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".tar")

Row = tuple[int, "dict[str, Any] | RowError"]
_LINES, _LINES_BYTES = 256, 1 << 20  # of JSON that are parsed at a time
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def suffix_of(path: PurePath) -> str:
    """The suffix in lower case, with .gz kept together with what it packs."""
    suffix = path.suffix.lower()
    return PurePath(path.stem).suffix.lower() + suffix if suffix == ".gz" else suffix


def table_parts(folder: Place) -> list[Place]:
    """Files of a table that lies in parts, by name: all .parquet of a folder, else all .jsonl, .csv, or .tar."""
    names = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")) and path.is_file())
    for kind in (".parquet", ".jsonl", ".csv", ".tar"):
        if parts := [path for path in names if suffix_of(path).removesuffix(".gz") == kind]:
            return parts
    return []


def named_parts(table: Place | Mapping[str, Place]) -> Mapping[str, Place]:
    """The files of a table by the names that addresses of pictures have: of a file its own, of a folder's parts theirs
    below it."""
    if isinstance(table, Mapping):
        return table
    if table.is_dir():
        return {f"{table.name}/{part.name}": part for part in table_parts(table)}
    return {table.name: table}


def read_rows(path: Place | Mapping[str, Place], *, required: tuple[str, ...] = ()) -> Iterator[Row]:
    """Stream a table.

    Args:
        path: file whose suffix is one of `SUFFIXES`, or a folder of such files, which are read in the order of their
            names with rows numbered through, or the parts themselves, by the names that addresses of pictures have.
        required: columns of which at least one must exist (checked where the format has a header).

    Yields:
        (1-based row number, columns) or (row number, RowError) for a row that cannot be parsed. Only one row, or one
        Parquet row group slice, is in memory at a time.

        Of several parts, one that cannot be read at all is a RowError, too.

    Raises:
        CatalogError: the file as a whole, or every part, is unreadable or lacks the required columns.
    """
    if isinstance(path, Mapping):
        yield from _read_parts(path, required)
        return
    try:
        parts = named_parts(path)
        if not parts:
            raise CatalogError(path, [f"no {', '.join(SUFFIXES)} in the folder"])
        if path in parts.values():  # a file, not a folder
            yield from _read_file(path, required, path.name)
        else:
            yield from _read_parts(parts, required)
    except OSError as error:
        raise CatalogError(path, [f"cannot be read: {error}"]) from error


def _read_parts(parts: Mapping[str, Place], required: tuple[str, ...]) -> Iterator[Row]:
    before = last = 0
    lost: CatalogError | None = None
    read = False
    for name, part in parts.items():
        try:
            for number, row in _read_file(part, required, name):
                last = before + number
                read = True
                yield last, row
        except (CatalogError, OSError) as error:
            lost = error if isinstance(error, CatalogError) else CatalogError(part, [f"cannot be read: {error}"])
            last += 1
            yield last, RowError([f"a part is lost from here on: {error}"])
        before = last
    if lost is not None and not read:
        raise lost


def _read_file(path: Place, required: tuple[str, ...], name: str) -> Iterator[Row]:
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise CatalogError(path, [f"suffix {path.suffix!r} is not one of {', '.join(SUFFIXES)}"])
    if suffix == ".parquet":

        def check(schema: Any) -> None:
            check_header(path, list(schema.names), required)
            if set(required) & set(PICTURE_COLUMNS):
                check_pictures(path, schema)

        yield from parquet_rows(path, name, check)
        return
    if suffix == ".tar":
        yield from tar_rows(path, name)
        return
    with open_place(path) as raw:
        file = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if suffix.endswith(".gz") else raw
        if suffix.startswith(".jsonl"):
            yield from read_json_lines(file)
        else:
            yield from _read_csv(path, file, required)


def check_header(path: Place, columns: list[str], required: tuple[str, ...]) -> None:
    """CatalogError for columns that appear twice, or when none of the required ones is there (whatever its case)."""
    named = [name for name in columns if name]
    if len(set(named)) != len(named):
        twice = sorted({name for name in named if named.count(name) > 1})
        raise CatalogError(path, [f"column(s) {', '.join(twice)} appear twice in the header"])
    if required and not set(required) & {name.casefold() for name in named}:
        hint = "`tgq-fast import table` reads tables with other column names (--map id=sku)."
        raise CatalogError(path, [f"header {columns[:20]} has none of the columns {', '.join(required)}"], hint)


def read_json_lines(file: BinaryIO) -> Iterator[Row]:
    """Stream the objects of JSON lines; a damaged gzip stream ends with a last RowError."""
    number = 0
    try:
        for lines in _line_blocks(file):
            objects = None if None in lines else read_json_objects(cast("list[bytes]", lines))
            if objects is not None:
                yield from enumerate(objects, number + 1)
            else:
                for at, line in enumerate(lines, number + 1):
                    value = _object(line.removeprefix(b"\xef\xbb\xbf") if line and at == 1 else line)
                    if value is not None:
                        yield at, value
            number += len(lines)
    except _DAMAGED as error:
        yield number + 1, RowError([f"the gzip stream is damaged from here on: {error}"])


def _line_blocks(file: BinaryIO) -> Iterator[list[bytes | None]]:
    """Some lines at a time, None for one that is too long. What the file raises comes behind the lines before it."""
    lines: list[bytes | None] = []
    size = 0
    try:
        while line := file.readline(MAX_ROW_BYTES):
            size += len(line)
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                    pass
                lines.append(None)
            else:
                lines.append(line)
            if len(lines) == _LINES or size >= _LINES_BYTES:
                yield lines
                lines, size = [], 0
    except Exception:
        yield lines
        raise
    yield lines


def _object(line: bytes | None) -> dict[str, Any] | RowError | None:
    """The object of one line; None for a blank line."""
    if line is None:
        return RowError([f"line is longer than {MAX_ROW_BYTES} bytes"])
    if not line.strip():
        return None
    try:
        value = read_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        return RowError(["not valid UTF-8"])
    except ValueError as error:
        return RowError([f"not valid JSON: {str(error)[:120]}"])
    return value if isinstance(value, dict) else RowError([f"a JSON {type(value).__name__}, expected an object"])


def _read_csv(path: Place, file: BinaryIO, required: tuple[str, ...]) -> Iterator[Row]:
    number = 0
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        try:
            columns = csv_header(text)
            if columns is None:
                return
            check_header(path, columns, required)
            for number, row in csv_rows(text, columns, identifying=required):
                yield number, row
        except _DAMAGED as error:
            yield number + 1, RowError([f"the gzip stream is damaged from here on: {error}"])
