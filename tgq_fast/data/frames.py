"""Catalogues from what Python programs hold: records, pandas data frames, `datasets.Dataset`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tgq_fast.data.catalog import Catalog, Policy
from tgq_fast.data.columns import PICTURE_COLUMNS, canonical_name, listed_pictures
from tgq_fast.data.images import load_image
from tgq_fast.data.importers.folders import label_names
from tgq_fast.data.importers.table import is_attribute
from tgq_fast.data.items import KNOWN_KEYS
from tgq_fast.data.loading import load_items
from tgq_fast.data.parquet_rows import EmbeddedPicture, looks_like_picture, python_rows
from tgq_fast.data.pictures import MemoryPictures
from tgq_fast.data.validation import ValidationReport
from tgq_fast.data.values import RowError
from tgq_fast.errors import ArgumentError, CatalogError, ImageError

__all__ = ["from_dataset", "from_pandas", "from_records"]


def from_records(
    records: Iterable[Mapping[Any, Any]],
    *,
    root: str | Path = ".",
    columns: Mapping[str, str] | None = None,
    policy: Policy = "raise",
    labels: Mapping[str, list[str]] | None = None,
) -> Catalog:
    """See :meth:`Catalog.from_records`; `labels` names the classes of columns of integers."""
    if policy not in ("raise", "skip"):
        raise ArgumentError("policy", repr(policy), "'raise' or 'skip'")
    pictures = MemoryPictures()
    names = {canonical_name(column): target for target, column in (columns or {}).items()}

    def rows() -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        for number, record in enumerate(records, 1):
            if not isinstance(record, Mapping):
                yield number, RowError([f"a {type(record).__name__}, expected a mapping of column to value"])
                continue
            try:
                yield number, _row(number, record, pictures, names, labels or {})
            except RowError as error:
                yield number, error

    report = ValidationReport("<memory>")
    items = load_items(rows(), "<memory>", report)
    if report.problem_count and policy == "raise":
        raise CatalogError("<memory>", report.problems, "Mend the rows, or use policy 'skip' to leave them out.")
    if not items:
        raise CatalogError("<memory>", report.problems or ["no rows"])
    return Catalog.from_items(items, root=root, source=pictures, report=report)


def from_pandas(frame: Any, **options: Any) -> Catalog:
    """See :meth:`Catalog.from_pandas`."""
    if not hasattr(frame, "itertuples"):
        raise ArgumentError("frame", f"a {type(frame).__name__}", "a pandas data frame")
    if frame.index.name is not None and frame.index.name not in frame.columns:
        frame = frame.reset_index()
    names = list(frame.columns)
    columns = [_column(frame.iloc[:, place]) for place in range(len(names))]
    rows = zip(*columns) if columns else iter(())
    return from_records((dict(zip(names, row)) for row in rows), **options)


def _column(series: Any) -> Iterable[Any]:
    """Values of one column; those of float16 and float32, which pandas hands out as Python's floats, as numpy's, whose
    shortest text is what a Parquet file of the frame would give."""
    kind = str(series.dtype).lower()
    width = np.float32 if kind in ("float32", "float[pyarrow]") else np.float16
    if kind not in ("float32", "float16", "float[pyarrow]", "halffloat[pyarrow]"):
        return list(series)
    return [None if gap else width(value) for value, gap in zip(series, series.isna())]


def from_dataset(dataset: Any, **options: Any) -> Catalog:
    """See :meth:`Catalog.from_dataset`."""
    parts = dict(dataset) if isinstance(dataset, Mapping) else {None: dataset}
    labels: dict[str, list[str]] = {}
    for part in parts.values():
        if not hasattr(part, "with_format") or not hasattr(part, "features"):
            raise ArgumentError("dataset", f"a {type(part).__name__}", "a datasets.Dataset, or a DatasetDict of them")
        described = part.features.to_dict()
        labels |= label_names({"info": {"features": described}})

    def records() -> Iterator[dict[str, Any]]:
        for name, part in parts.items():
            # Arrow tables hold pictures as they are stored; the default format would decode each of them.
            for table in part.with_format("arrow").iter(batch_size=256):
                for row in python_rows(table):
                    yield row if name is None else {"attributes.split": name, **row}

    return from_records(records(), labels=labels, **options)


def _row(
    number: int,
    record: Mapping[Any, Any],
    pictures: MemoryPictures,
    names: Mapping[str, str],
    labels: Mapping[str, list[str]],
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    picture: Any = None
    for name, value in record.items():
        column = str(name)
        if column in labels and isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            value = labels[column][value] if 0 <= value < len(labels[column]) else None
        target = names.get(canonical_name(column), canonical_name(column))
        if target in PICTURE_COLUMNS or _is_picture(value):
            picture = _picture(number, value, pictures) if picture is None else picture
        elif target in KNOWN_KEYS:
            row[target] = value
        elif target.startswith("attributes."):  # of `columns`, else the column's own spelling
            row[names.get(canonical_name(column), column)] = value
        elif is_attribute(value):
            row[f"attributes.{column}"] = value
    row["file_name"] = picture
    if row.get("id") is None and isinstance(picture, EmbeddedPicture):
        row["id"] = str(number)
    return row


def _is_picture(value: object) -> bool:
    if isinstance(value, Image.Image):
        return True
    data = value.get("bytes") if isinstance(value, Mapping) else value
    return looks_like_picture(data)


def _picture(number: int, value: object, pictures: MemoryPictures) -> EmbeddedPicture | str | None:
    """The first picture of a cell: kept in memory if it is one, else its path."""
    if isinstance(value, np.ndarray) and value.ndim > 1:
        found: list[object] = [value]
    else:
        found = listed_pictures(value.tolist() if isinstance(value, np.ndarray) else value)
    if not found:
        return None
    first = found[0]
    if isinstance(first, (str, Path)):
        return str(first)
    if isinstance(first, bytes):
        return EmbeddedPicture(pictures.add(number, first))
    if not isinstance(first, (Image.Image, np.ndarray)):
        raise RowError([f"picture is a {type(first).__name__}, expected a path, bytes, a Pillow picture or an array"])
    try:
        image = load_image(first, f"row {number}")
    except ImageError as error:
        raise RowError([f"picture: {error.reason} {error.detail}".rstrip()]) from error
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # lossless: the same pixels as the picture given
    return EmbeddedPicture(pictures.add(number, buffer.getvalue()))
