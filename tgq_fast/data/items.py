"""One catalogue row: the typed `Item`, its schema and the cleaning of its text."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["COLUMNS", "MAX_ID", "MAX_TEXT", "MAX_TITLE", "Item", "RowError", "clean_text", "parse_item"]

COLUMNS = ("title", "brand", "category", "price")
"""Columns that may serve as metadata fields, beside the attributes."""

KNOWN_KEYS = frozenset(("id", "file_name", "title", "brand", "category", "attributes", "price", "group_id"))

# Longer text is cut at a defined length: no text tower reads more, and one hostile row must not fill the memory.
MAX_TITLE = 2_000
MAX_TEXT = 500
MAX_ID = 256
MAX_ATTRIBUTES = 200

# Bidirectional overrides, byte-order mark and zero-width characters that only hide or reorder text. The zero-width
# joiner and non-joiner stay: scripts and emoji need them.
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"\s+")


class RowError(ValueError):
    """One row breaks the schema; `messages` says how. Collected into the validation report with the row number."""

    def __init__(self, messages: Iterable[str]) -> None:
        self.messages = tuple(messages)
        super().__init__("; ".join(self.messages))


@dataclass(frozen=True, slots=True)
class Item:
    """One product.

    Attributes:
        id: unique in the catalogue.
        file_name: picture, relative to the catalogue folder with forward slashes; None for a text-only item.
        title, brand, category: cleaned text, None when missing or blank.
        attributes: further named metadata, cleaned; never holds blank values.
        price: finite and not negative, in the catalogue's own currency.
        group_id: items that share it are the same product (variants, other photos).
        row: 1-based row of the metadata file: the line of a .jsonl, the record below the header of a .csv or .parquet.
    """

    id: str
    file_name: str | None = None
    title: str | None = None
    brand: str | None = None
    category: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    price: float | None = None
    group_id: str | None = None
    row: int = 0

    def field(self, name: str) -> str | None:
        """Text of a metadata field: a column of `COLUMNS` or an attribute; None when missing."""
        if name == "price":
            return None if self.price is None else f"{self.price:g}" if self.price >= 1e6 else f"{self.price:.2f}"
        if name in COLUMNS:
            value: str | None = getattr(self, name)
            return value
        return self.attributes.get(name)

    def to_dict(self) -> dict[str, Any]:
        """Row in the form of the metadata file (no row number, no missing columns)."""
        row: dict[str, Any] = {"id": self.id}
        for name in ("file_name", "title", "brand", "category"):
            if (value := getattr(self, name)) is not None:
                row[name] = value
        if self.attributes:
            row["attributes"] = dict(self.attributes)
        if self.price is not None:
            row["price"] = self.price
        if self.group_id is not None:
            row["group_id"] = self.group_id
        return row


def clean_text(text: str) -> str:
    """NFC, one line, no control or invisible characters, single spaces; lone surrogates become U+FFFD."""
    if text.isascii():
        if text.isprintable() and "  " not in text:
            return text.strip(" ")
    else:
        text = _SURROGATE.sub("\ufffd", text)
        text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return _SPACE.sub(" ", _CONTROL.sub(" ", text)).strip()


def parse_item(raw: Mapping[str, Any], row: int = 0) -> tuple[Item, list[str]]:
    """Check one raw row against the schema.

    Args:
        raw: column → value, as read from the metadata file or given by a caller.
        row: 1-based row number to keep in the item.

    Returns:
        the item, and notes on what was changed (truncated text, shadowed attributes).

    Raises:
        RowError: with every reason why the row cannot be used.
    """
    problems: list[str] = []
    notes: list[str] = []
    file_name = _file_name(raw.get("file_name"), problems)
    # The imagefolder convention knows only file_name: it then names the item.
    identifier = _identifier("id", raw.get("id"), problems)
    if identifier is None and not problems:
        identifier = file_name
    if identifier is None and not problems:
        problems.append("id and file_name are both missing; give at least one")
    texts = {name: _text(name, raw.get(name), problems, notes) for name in ("title", "brand", "category")}
    attributes = _attributes(raw, problems, notes)
    price = _price(raw.get("price"), problems)
    group_id = _identifier("group_id", raw.get("group_id"), problems)
    if problems or identifier is None:
        raise RowError(problems)
    item = Item(
        identifier, file_name, texts["title"], texts["brand"], texts["category"], attributes, price, group_id, row
    )
    return item, notes


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _identifier(name: str, value: object, problems: list[str]) -> str | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            value = str(value)
        except ValueError:  # Python refuses to print integers of thousands of digits
            problems.append(f"{name} is an integer of more than {MAX_ID} digits")
            return None
    if not isinstance(value, str):
        problems.append(f"{name} is {_kind(value)}, expected a string or an integer")
        return None
    if not value.strip():
        return None
    if _CONTROL.search(value) or _SURROGATE.search(value):
        problems.append(f"{name} {value[:40]!r} holds control characters or broken Unicode")
        return None
    value = unicodedata.normalize("NFC", value.strip())
    if len(value) > MAX_ID:
        problems.append(f"{name} has {len(value)} characters, at most {MAX_ID} are allowed")
        return None
    return value


def _file_name(value: object, problems: list[str]) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        problems.append(f"file_name is {_kind(value)}, expected a string")
        return None
    if not value.strip():
        return None
    if _CONTROL.search(value) or _SURROGATE.search(value) or len(value) > 1024:
        problems.append(f"file_name {value[:40]!r} holds control characters or broken Unicode, or is longer than 1024")
        return None
    posix, windows = PurePosixPath(value), PureWindowsPath(value)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        problems.append(f"file_name {value[:80]!r} leaves the catalogue folder; give a relative path without '..'")
        return None
    return value


def _cut(name: str, text: str, limit: int, notes: list[str]) -> str:
    if len(text) <= limit:
        return text
    notes.append(f"{name} has {len(text)} characters, cut to {limit}")
    return text[:limit].rstrip()


def _text(name: str, value: object, problems: list[str], notes: list[str]) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        problems.append(f"{name} is {_kind(value)}, expected a string")
        return None
    return _cut(name, clean_text(value), MAX_TITLE if name == "title" else MAX_TEXT, notes) or None


def _price(value: object, problems: list[str]) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        price = float(value)
    except (TypeError, ValueError, OverflowError):
        problems.append(f"price is {_kind(value)}, expected a number")
        return None
    if not math.isfinite(price) or price < 0:
        problems.append(f"price is {price}, expected a finite number of at least 0")
        return None
    return price


def _scalar(name: str, value: object, problems: list[str]) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"attribute {name!r} is {value}, expected finite numbers or text")
        return None
    if isinstance(value, (int, float)):
        try:
            return f"{value:g}" if isinstance(value, float) else str(value)
        except ValueError:
            problems.append(f"attribute {name!r} is an integer of thousands of digits")
            return None
    problems.append(f"attribute {name!r} is {_kind(value)}, expected text, a number or a list of them")
    return None


def _attributes(raw: Mapping[str, Any], problems: list[str], notes: list[str]) -> dict[str, str]:
    given = raw.get("attributes")
    if isinstance(given, str):  # CSV carries them as a JSON object
        if not given.strip():
            given = None
        else:
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                problems.append(f"attributes {given[:40]!r} is not a JSON object")
                return {}
    if isinstance(given, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in given):
        given = dict(given)  # a Parquet map column
    if given is not None and not isinstance(given, Mapping):
        problems.append(f"attributes is {_kind(given)}, expected an object")
        return {}
    named = {str(key): value for key, value in (given or {}).items()}
    named.update({key[11:]: value for key, value in raw.items() if key.startswith("attributes.")})
    if len(named) > MAX_ATTRIBUTES:
        problems.append(f"{len(named)} attributes, at most {MAX_ATTRIBUTES} are allowed")
        return {}
    attributes: dict[str, str] = {}
    for key, value in named.items():
        name = clean_text(key)[:100]
        if not name:
            problems.append("an attribute has a blank name")
            continue
        parts = value if isinstance(value, (list, tuple)) else [value]
        texts = [clean_text(text) for part in parts if (text := _scalar(name, part, problems)) is not None]
        text = _cut(f"attribute {name!r}", ", ".join(filter(None, texts)), MAX_TEXT, notes)
        if not text:
            continue
        if name in COLUMNS:
            notes.append(f"attribute {name!r} has the name of a column and is ignored as a field")
        attributes[name] = text
    return attributes
