"""Tables as shops export them: delimiter and encoding told from the file; Excel, Parquet and JSON lines too."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tgq_fast.data.csv_rows import csv_header, csv_rows
from tgq_fast.data.parquet_pictures import ParquetPictures
from tgq_fast.data.parquet_rows import EmbeddedPicture
from tgq_fast.data.rows import read_rows, suffix_of
from tgq_fast.data.values import RowError
from tgq_fast.errors import CatalogError, DependencyError
from tgq_fast.io.files import open_regular

__all__ = ["TEXT", "detect", "read_table"]

TEXT = (".csv", ".tsv", ".txt", ".tab")
_DELIMITERS = ",;\t|"
_HEAD = 1 << 16

Rows = Iterator[tuple[int, "dict[str, Any] | RowError"]]


def read_table(path: Path, *, delimiter: str | None = None, encoding: str | None = None) -> tuple[Rows, str]:
    """Rows of a table by its suffix (.csv, .tsv, .txt, .xlsx, .parquet, .jsonl, .gz) and how it is read, in words.

    Raises:
        CatalogError: unreadable, or of another suffix.
        DependencyError: .xlsx without openpyxl.
    """
    suffix = suffix_of(path)
    if path.is_dir() or suffix.startswith(".jsonl") or suffix.endswith(".gz"):
        return read_rows(path), "rows of " + (suffix or "the parts")
    if suffix == ".parquet":
        return _with_bytes(path), "Parquet"
    if suffix in (".xlsx", ".xlsm"):
        return _read_excel(path), "the first sheet"
    if suffix not in TEXT:
        expected = ", ".join((*TEXT, ".xlsx", ".parquet", ".jsonl"))
        raise CatalogError(path, [f"suffix {path.suffix!r} is not one of {expected}"])
    try:
        with open_regular(path) as file:
            found_encoding, found_delimiter = detect(file, delimiter=delimiter, encoding=encoding)
    except OSError as error:
        raise CatalogError(path, [f"cannot be read: {error}"]) from error
    except (LookupError, UnicodeError) as error:
        raise CatalogError(path, [f"encoding {encoding!r} does not fit: {error}"]) from error
    name = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}.get(found_delimiter, repr(found_delimiter))
    return _read_text(path, found_encoding, found_delimiter), f"{found_encoding} text parted by {name}"


def detect(file: BinaryIO, *, delimiter: str | None = None, encoding: str | None = None) -> tuple[str, str]:
    """(encoding, delimiter) of a text table: a byte-order mark, else UTF-8 if all of it is, else Windows-1252.

    The delimiter is the one that parts the header into most columns and the rows below it into as many.
    """
    head = file.read(_HEAD)
    if encoding is None:
        encoding = _encoding(head, file)
    text = io.TextIOWrapper(io.BytesIO(head), encoding=encoding, errors="replace", newline="").read()
    if delimiter is None:
        delimiter = max(_DELIMITERS, key=lambda mark: _fit(text, mark))
    return encoding, delimiter


def _encoding(head: bytes, file: BinaryIO) -> str:
    if head.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    file.seek(0)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        while text.read(1 << 20):
            pass
    except UnicodeDecodeError:
        return "cp1252"
    finally:
        text.detach()
    return "utf-8"


def _fit(text: str, mark: str) -> tuple[float, int]:
    """(how many rows have the header's number of fields, if there is more than one; that number)."""
    rows = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=mark):
            if row:
                rows.append(len(row))
            if len(rows) == 30:
                break
    except csv.Error:
        pass
    if not rows or rows[0] < 2:
        return 0.0, 0
    return round(sum(width == rows[0] for width in rows) / len(rows), 1), rows[0]


def _read_text(path: Path, encoding: str, delimiter: str) -> Rows:
    with (
        open_regular(path) as raw,
        io.TextIOWrapper(raw, encoding=encoding, errors="surrogateescape", newline="") as text,
    ):
        columns = csv_header(text, delimiter)
        if columns is None:
            return
        seen: dict[str, int] = {}
        for place, name in enumerate(columns):  # spreadsheets may name two columns alike
            seen[name] = seen.get(name, 0) + 1
            if name and seen[name] > 1:
                columns[place] = f"{name} {seen[name]}"
        try:
            yield from csv_rows(text, columns, delimiter=delimiter)
        except UnicodeError as error:
            raise CatalogError(path, [f"not {encoding} text: {error}"]) from error


def _read_excel(path: Path) -> Rows:
    try:
        import openpyxl
    except ImportError:
        raise DependencyError("reading .xlsx needs openpyxl: pip install tgq-fast[excel], or save as CSV") from None
    try:
        with open_regular(path) as raw:
            book = openpyxl.load_workbook(raw, read_only=True, data_only=True)
            rows = book.worksheets[0].iter_rows(values_only=True)
            header = [str(cell).strip() if cell is not None else "" for cell in next(rows, ())]
            for number, cells in enumerate(rows, 1):
                if any(cell is not None for cell in cells):
                    yield number, {name: cell for name, cell in zip(header, cells) if name}
    except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError, EOFError) as error:
        raise CatalogError(path, [f"not a readable Excel file: {type(error).__name__}: {str(error)[:120]}"]) from error
    except Exception as error:  # zipfile and XML errors of several kinds
        raise CatalogError(path, [f"not a readable Excel file: {str(error)[:120]}"]) from error


def _with_bytes(path: Path) -> Rows:
    """Rows of Parquet with pictures as bytes: an import copies them out."""
    source = ParquetPictures({path.name: path})
    for number, row in read_rows(path):
        if isinstance(row, dict):
            for name, value in row.items():
                if isinstance(value, EmbeddedPicture):
                    row[name] = source.read(value.address)
        yield number, row
