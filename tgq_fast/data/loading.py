"""Reads a catalogue's metadata and pairs files into typed rows; what it refuses goes to the report with its row."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tgq_fast.data.columns import PICTURE_COLUMNS, Columns
from tgq_fast.data.id_hash import hash_ids
from tgq_fast.data.item_table import ItemTable, ItemTableBuilder
from tgq_fast.data.items import Item, RowError, parse_item, read_identifier
from tgq_fast.data.pairs import Pairs, make_pairs, named_ids, read_pairs
from tgq_fast.data.parquet_pictures import ParquetPictures
from tgq_fast.data.pictures import PictureSource
from tgq_fast.data.row_blocks import read_block
from tgq_fast.data.rows import SUFFIXES, named_parts, read_rows, suffix_of, table_parts
from tgq_fast.data.tar_rows import TarPictures
from tgq_fast.data.validation import ValidationReport
from tgq_fast.errors import ArgumentError, CatalogError
from tgq_fast.io.places import Place, place

__all__ = ["catalog_root", "embedded_pictures", "find_table", "load_items", "load_pairs", "metadata_file"]
__all__ += ["read_metadata", "repeated", "stream_items"]


Row = tuple[int, "Mapping[Any, Any] | RowError"]
_BLOCK = 256  # rows that are Python objects at a time
_HASHED = 1 << 16  # ids at a time
_REQUIRED = ("id", *PICTURE_COLUMNS)


def find_table(folder: Place, stem: str) -> Place | None:
    """`<folder>/<stem>.jsonl|csv|parquet` (or .gz), or a folder `<stem>` of parts; None if there is none.

    Raises:
        CatalogError: there are several.
    """
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").exists()]
    if (parts := folder / stem).is_dir() and table_parts(parts):
        found.append(parts)
    if len(found) > 1:
        raise CatalogError(folder, [f"several {stem} files: {', '.join(p.name for p in found)}"], "Keep one of them.")
    return found[0] if found else None


def metadata_file(path: str | Place) -> Place:
    """The metadata that `path` means: a catalogue folder, its metadata file, or a folder of Parquet or tar parts.

    Raises:
        CatalogError: there is none, or its store does not answer.
    """
    there = place(path)
    try:
        return _metadata_file(there)
    except OSError as error:
        raise CatalogError(there, [f"cannot be read: {error}"]) from error


def _metadata_file(path: Place) -> Place:
    if path.is_dir():
        found = find_table(path, "metadata")
        for folder in (path, path / "data"):  # parts as `datasets` and the hub write them
            if found is None and folder.is_dir():
                kinds = {suffix_of(part) for part in table_parts(folder)}
                found = folder if kinds & {".parquet", ".tar"} else None
        if found is None:
            names = ", ".join(f"metadata{suffix}" for suffix in SUFFIXES)
            hint = "`tgq-fast import` converts a shop's export, a table, a folder of pictures or a public data set."
            raise CatalogError(path, [f"no {names} in the folder"], hint)
        return found
    if not path.exists():
        raise CatalogError(path, ["no such file or folder"])
    return path


def catalog_root(metadata: Place, given: Place) -> Place:
    """The folder that file names are relative to."""
    if metadata.is_dir() and metadata == given:
        return metadata
    return metadata.parent


def listed_parts(paths: Sequence[str | Path]) -> tuple[Place, dict[str, Place]]:
    """The folder that a list of table files has in common, and each by its path below that.

    Raises:
        ArgumentError: no file, or one twice, or files of different stores.
    """
    parts = [place(path) for path in paths]
    try:
        root = os.path.commonpath([str(part.parent) for part in parts])
    except ValueError:
        root = ""
    below = {str(part)[len(root) :].lstrip("/\\"): part for part in parts}
    if not root or len(below) < len(parts):
        raise ArgumentError("path", [str(part) for part in parts], "files of one folder or its subfolders, each once")
    return place(root), below


def stream_items(path: str | Place) -> Iterator[Item]:
    """The usable rows of a metadata file, one by one; an id that is used again is not left out.

    Raises:
        CatalogError: the file is unreadable.
    """
    columns = Columns()
    for number, raw in read_rows(place(path), required=_REQUIRED):
        if not isinstance(raw, RowError):
            with suppress(RowError):
                yield parse_item(columns.read(raw), number)[0]


def read_metadata(table: Place | Mapping[str, Place], report: ValidationReport) -> ItemTable:
    """:func:`load_items` of a metadata file, or of parts by name; CatalogError also where it is unreadable."""
    return load_items(read_rows(table, required=_REQUIRED), report.path, report)


def load_items(rows: Iterable[Row], path: str | Path, report: ValidationReport) -> ItemTable:
    """The usable rows; refused rows and warnings go to `report`, in order of the rows.

    Raises:
        CatalogError: pictures lie in a column of which no item's picture is read.
    """
    columns, builder = Columns(), ItemTableBuilder()
    altered: list[tuple[int, str]] = []

    def refuse(number: int, row: Mapping[str, Any], error: RowError) -> None:
        report.reject("metadata", number, read_identifier("id", row.get("id"), []), error.messages)

    for block in _blocks(rows):
        read, numbers = [], []
        for number, raw in block:
            if isinstance(raw, RowError):
                report.reject("metadata", number, None, raw.messages)
            else:
                read.append(columns.read(raw))
                numbers.append(number)
        report.rows += len(block)
        builder.extend(read_block(read, numbers, refuse, lambda number, note: altered.append((number, note))))
    items = builder.build()
    again, first = repeated(items.text("id"))
    pa.default_memory_pool().release_unused()
    if len(again):
        places, ids = items.numbers, items.text("id").take(pa.array(again)).to_pylist()
        for number, item_id, seen in zip(places[again].tolist(), ids, places[first].tolist()):
            report.reject("metadata", number, item_id, [f"id {item_id!r} was already used in row {seen}"])
        gone = set(places[again].tolist())
        altered = [(number, note) for number, note in altered if number not in gone]
        items = items.take(np.delete(np.arange(len(items)), again))
    report.sort_rows()
    for number, note in altered:
        report.warn(f"row {number}: {note}")
    report.items += len(items)
    _report_columns(columns, items.text("file_name").null_count < len(items), path, report)
    return items


def _blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while block := list(islice(rows, _BLOCK)):
        yield block


def repeated(ids: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Places [r] of ids that stand further up already, ascending, and the places where those stand first."""
    parts = [hash_ids(ids[start : start + _HASHED]) for start in range(0, len(ids), _HASHED)]
    hashes = np.concatenate([np.empty(0, np.uint64), *parts])
    del parts
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any():  # a quarter of the memory of a dictionary
        return np.empty(0, np.int64), np.empty(0, np.int64)
    coded = ids.dictionary_encode()
    codes = coded.indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    again = np.delete(np.arange(len(ids)), first)
    return again, first[codes[again]]


def _report_columns(columns: Columns, pictures: bool, path: str | Path, report: ValidationReport) -> None:
    held = ", ".join(sorted(columns.pictures)[:20])
    if held and not pictures and report.items:
        hint = "Call the column file_name, or `tgq-fast import table --map file_name=<column>`."
        raise CatalogError(path, [f"column(s) {held} hold pictures, but no item has a file_name"], hint)
    extra = sorted(columns.unknown)
    if extra:
        names = ", ".join(extra[:20]) + (f" and {len(extra) - 20} more" if len(extra) > 20 else "")
        report.warn(f"column(s) {names} are not part of the schema and are ignored; name one attributes.… to keep it")
    if held and pictures:
        report.warn(f"column(s) {held} hold pictures that are not used: an item has one picture, its file_name")
    if columns.more:
        report.warn(f"{columns.more} row(s) name several pictures: the first is used")


def embedded_pictures(metadata: Place | Mapping[str, Place]) -> PictureSource | None:
    """Pictures that lie in the metadata's own Parquet or tar files."""
    parts = dict(named_parts(metadata))
    kinds = {suffix_of(part) for part in parts.values()}
    return ParquetPictures(parts) if kinds == {".parquet"} else TarPictures(parts) if kinds == {".tar"} else None


def load_pairs(path: Place, ids: pa.LargeStringArray, report: ValidationReport) -> Pairs:
    """The pairs file. It is read twice: ids are looked up for the items that pairs name, not for the catalogue's all.

    Args:
        ids: [n] of the catalogue.
        report: of the catalogue so far; gets what is wrong with pairs.
    """
    named = pa.array(named_ids(path), pa.large_string())
    found = pc.index_in(ids, value_set=named)
    rows_of = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
    index = dict(zip(ids.take(pa.array(rows_of)).to_pylist(), rows_of.tolist()))
    rejected = frozenset(r.id for r in report.rejected if r.id is not None and r.id not in index)
    rows: dict[tuple[int, int, int], tuple[int, int, float, int]] = {}
    repeated = dropped = 0
    for number, row in read_pairs(path, index, rejected):
        if isinstance(row, RowError):
            report.reject("pairs", number, None, row.messages)
        elif row is None:
            dropped += 1
        else:
            key = (row[0], row[1], row[3])
            repeated += key in rows
            rows.setdefault(key, row)
    if repeated:
        report.warn(f"{repeated} pair(s) repeat an earlier one and were left out")
    if dropped:
        report.warn(f"{dropped} pair(s) name an item whose row was refused and were left out")
    return make_pairs(list(rows.values()))
