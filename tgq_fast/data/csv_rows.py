"""Comma-separated text row by row: a quote that never closes costs its own row, not the rows below it."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from tgq_fast.data.values import RowError

__all__ = ["MAX_ROW_BYTES", "csv_header", "csv_rows"]

MAX_ROW_BYTES = 32 << 20
MAX_QUOTED = 4 << 20
"""Characters a quoted field may run over line ends; a quote that is open longer was never meant to be one."""


class _Lines:
    """Physical lines with their numbers, and a way to give lines back."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._number = file, 0
        self._again: deque[tuple[int, str]] = deque()

    def next(self) -> tuple[int, str] | None:
        if self._again:
            return self._again.popleft()
        line = self._file.readline(MAX_ROW_BYTES)
        if not line:
            return None
        self._number += 1
        return self._number, line

    def give_back(self, lines: Sequence[tuple[int, str]]) -> None:
        self._again.extendleft(reversed(lines))


class _Record:
    """Feeds csv.reader the lines of one record and keeps them."""

    def __init__(self, lines: _Lines) -> None:
        self._lines, self._size = lines, 0
        self.taken: list[tuple[int, str]] = []

    def __iter__(self) -> _Record:
        return self

    def __next__(self) -> str:
        if self._size > MAX_QUOTED and self.taken[1:]:
            raise StopIteration  # read as the end of the file within a quote
        entry = self._lines.next()
        if entry is None:
            raise StopIteration
        self.taken.append(entry)
        self._size += len(entry[1])
        return entry[1]


def csv_header(file: TextIO, delimiter: str = ",") -> list[str] | None:
    """Column names of the first line, stripped, without the nameless columns at the end; None for an empty file."""
    # The limit is global to the process; it is only ever raised, so that a 1 MB title is cut by us, not refused by csv.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    header = next(csv.reader(file, delimiter=delimiter), None)
    if header is None:
        return None
    columns = [name.strip() for name in header]
    while columns and not columns[-1]:
        columns.pop()
    return columns


def csv_rows(
    file: TextIO, columns: Sequence[str], *, delimiter: str = ",", identifying: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Rows below the header.

    Args:
        file: text opened with newline="" and errors="surrogateescape", standing behind the header.
        columns: from :func:`csv_header`; a column without a name must be empty in every row.
        delimiter: one character.
        identifying: columns that hold ids or file names; they tell rows that a stray quote has swallowed from the lines
            of a long description.

    Yields:
        (1-based record number, columns with None for empty fields) or (number, RowError).
    """
    lines, number = _Lines(file), 0
    keys = [columns.index(name) for name in identifying if name in columns]

    def looks_like_row(line: str) -> bool:
        try:
            fields = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            return False
        if not fields or len(fields) != len(columns):
            return False
        names = [fields[key].strip() for key in keys] or [fields[0].strip()]
        return any(names) and not any(" " in name or '"' in name for name in names)

    while (first := lines.next()) is not None:
        lines.give_back([first])
        number += 1
        record = _Record(lines)
        try:
            fields = next(csv.reader(record, delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            lines.give_back(record.taken[1:])
            reason = f"line {first[0] + 1}: not valid CSV: {error}"
            if len(record.taken) > 1:
                reason = f"line {first[0] + 1}: a quote is opened and not closed in this row; the rows below are read"
            yield number, RowError([reason])
            continue
        below = record.taken[1:]
        if below and _swallowed([looks_like_row(line) for _, line in below], len(columns)):
            lines.give_back(below)
            yield (
                number,
                RowError([f"line {first[0] + 1}: a quote is not closed in this row: the lines below it are rows"]),
            )
            continue
        if not fields:
            continue
        yield number, _row(fields, columns)


def _swallowed(like_rows: Sequence[bool], width: int) -> bool:
    """Whether the further lines of a record are rows of their own.

    In a table of two columns a line of a text with one comma looks like a row, so that all lines between the quotes
    must; in a wider table most must. The last line holds the closing quote and counts only where there is no other.
    """
    between = like_rows[:-1]
    if not between:
        return width > 2 and like_rows[-1]
    return all(between) or (width > 2 and 2 * sum(between) > len(between))


def _row(fields: list[str], columns: Sequence[str]) -> dict[str, Any] | RowError:
    while len(fields) > len(columns) and not fields[-1].strip():
        fields.pop()  # what a spreadsheet leaves to the right of its columns
    if len(fields) != len(columns):
        return RowError([f"{len(fields)} fields, the header has {len(columns)}; quote commas and quotes"])
    if any(not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text) for text in fields):
        return RowError(["not valid UTF-8"])
    row: dict[str, Any] = {}
    for name, text in zip(columns, fields, strict=True):
        if name:
            row[name] = text if text else None
        elif text.strip():
            return RowError([f"{text[:40]!r} stands in a column without a name"])
    return row
