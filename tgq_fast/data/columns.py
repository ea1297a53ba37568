"""Which column is what: names whatever their case, the column that holds the pictures, columns that are not used."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple, cast

from tgq_fast.data.items import KNOWN_KEYS
from tgq_fast.data.parquet_rows import EmbeddedPicture, looks_like_picture, names_pictures
from tgq_fast.data.values import RowError, is_gap, plain_value
from tgq_fast.errors import CatalogError

__all__ = [
    "PICTURE_COLUMNS",
    "PICTURE_SUFFIXES",
    "Columns",
    "canonical_name",
    "check_pictures",
    "first_picture",
    "listed_pictures",
]

PICTURE_COLUMNS = ("file_name", "file_names", "image", "images", "image_path", "picture", "photo", "filename")
"""Columns that are read as an item's picture, the first that has one."""

PICTURE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")
)
_ENDS = re.compile(r"\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif)(?:[?#].*)?$", re.IGNORECASE)


def canonical_name(name: object) -> str:
    """A column's name in one spelling: lower case, words joined by underscores."""
    return re.sub(r"[\s\-]+", "_", str(name).strip().casefold())


def listed_pictures(value: object) -> list[object]:
    """The pictures that one cell names: a path, bytes, a struct {bytes, path}, or a list of them."""
    if isinstance(value, (list, tuple)):
        return [picture for entry in value for picture in listed_pictures(entry)]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return [] if (isinstance(value, str) and not value) or is_gap(value) else [value]


def first_picture(value: object) -> tuple[object, int]:
    """The first picture of a cell (None when it is empty) and how many more it names."""
    found = listed_pictures(value)
    return (found[0], len(found) - 1) if found else (None, 0)


def check_pictures(path: PurePath, schema: Any) -> None:
    """CatalogError for an Arrow schema that has columns of pictures, but none of a type that is read."""
    named = [field for field in schema if canonical_name(field.name) in PICTURE_COLUMNS]
    if named and not any(names_pictures(field.type) for field in named):
        told = [f"column {field.name} is {str(field.type)[:80]}, which is not read as pictures" for field in named]
        hint = "Pictures are text (a path, an address), binary (a file), a struct {bytes, path}, or a list of these."
        raise CatalogError(path, told, hint)


class Columns:
    """Brings the rows of one table to the schema's names and remembers what is left over.

    Attributes:
        unknown: column → rows in which it stands unused.
        pictures: unused column → rows in which it looks like a picture.
        more: rows that name further pictures, of which none is used.
    """

    def __init__(self) -> None:
        self.unknown: Counter[str] = Counter()
        self.pictures: Counter[str] = Counter()
        self.more = 0
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def read(self, raw: Mapping[Any, Any]) -> dict[str, Any]:
        """A row with canonical names, whose `file_name` is its first picture: a new one, or `raw` where that is one."""
        names = tuple(raw)
        plan = self._plans.get(names)
        if plan is None:
            plan = self._plans[names] = _plan(names)
            if len(self._plans) > 1000:  # JSON lines may have as many shapes as rows
                self._plans = {names: plan}
        if plan.plain and type(raw["file_name"]) is str and raw["file_name"]:
            return cast("dict[str, Any]", raw)
        row = {target: raw[name] for name, target in plan.names.items()}
        used = None
        for column in plan.pictures:
            value = row[column]
            picture, more = (value, 0) if type(value) is str and value else first_picture(value)
            if picture is not None:
                used = column
                row["file_name"] = picture.address if isinstance(picture, EmbeddedPicture) else picture
                self.more += more > 0
                break
        if used is None and "file_name" in row:
            row["file_name"] = None
        for name, column in plan.spare:
            if column == used:
                continue
            self.unknown[str(name)] += 1
            if self.unknown[str(name)] <= 100 and _is_picture(raw[name]):
                self.pictures[str(name)] += 1
        return row


class _Plan(NamedTuple):
    """How rows with the same names are read.

    Attributes:
        names: raw name → name in the schema.
        plain: whether these are names of the schema alone, `file_name` among them: a row that has one stays as it is.
        pictures: those of `PICTURE_COLUMNS` that are there, in their order.
        spare: (raw name, name in the schema) of columns that are unused unless the picture is read from them.
    """

    names: dict[Any, str]
    plain: bool
    pictures: tuple[str, ...]
    spare: tuple[tuple[Any, str], ...]


def _plan(names: tuple[Any, ...]) -> _Plan:
    """A spelling that is exact goes before one that differs in case."""
    plan: dict[Any, str] = {name: name for name in names if isinstance(name, str) and name in KNOWN_KEYS}
    for name in names:
        if name in plan:
            continue
        canonical = canonical_name(name)
        if canonical.startswith("attributes."):
            plan[name] = "attributes." + str(name).strip()[len("attributes.") :]
        elif canonical in KNOWN_KEYS or canonical in PICTURE_COLUMNS:
            if canonical not in plan.values():
                plan[name] = canonical
        else:
            plan[name] = str(name)
    spare = []
    for name in names:
        column = plan.get(name, str(name))
        if not ((column in KNOWN_KEYS and name in plan) or column.startswith("attributes.")):
            spare.append((name, column))
    pictures = tuple(column for column in PICTURE_COLUMNS if column in plan.values())
    plain = "file_name" in names and KNOWN_KEYS.issuperset(names)
    ordered = {name: plan[name] for name in names if name in plan}  # as they stand in the row
    return _Plan(ordered, plain, pictures, tuple(spare))


def _is_picture(value: object) -> bool:
    found, _ = first_picture(value)
    if isinstance(found, (EmbeddedPicture, bytes)):
        return isinstance(found, EmbeddedPicture) or looks_like_picture(found)
    if isinstance(value, Mapping) and found is None:
        return any(looks_like_picture(entry) for entry in value.values())
    try:
        text = plain_value(found)
    except RowError:
        return False
    return isinstance(text, str) and len(text) < 2048 and _ENDS.search(text) is not None
