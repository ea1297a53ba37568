"""One catalogue row: the typed `Item`, its schema and the cleaning of its text."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from tgq_fast.data.values import RowError, amount, kind_of, plain_value, price_text, scalar_text
from tgq_fast.io.json_text import read_json
from tgq_fast.io.places import is_remote

__all__ = ["COLUMNS", "MAX_ID", "MAX_TEXT", "MAX_TITLE", "Item", "RowError", "clean_text", "parse_fields", "parse_item"]
__all__ += ["read_identifier"]

COLUMNS = ("title", "brand", "category", "price")
"""Columns that may serve as metadata fields, beside the attributes."""

KNOWN_KEYS = frozenset(("id", "file_name", "title", "brand", "category", "attributes", "price", "group_id"))

# Longer text is cut at a defined length: no text tower reads more, and one hostile row must not fill the memory.
MAX_TITLE = 2_000
MAX_TEXT = 500
MAX_ID = 256
MAX_PATH = 1024
MAX_ATTRIBUTES = 200
_LARGE = 2**53  # integers below it are floats exactly

# Bidirectional overrides, byte-order mark and zero-width characters that only hide or reorder text. The zero-width
# joiner and non-joiner stay: scripts and emoji need them.
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"\s+")
_DOUBTFUL_PATH = re.compile(r"[:\\]|\.\.|^/")  # what every path that leaves its folder has, and every web address


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
            return None if self.price is None else price_text(self.price)
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
    if text.isprintable() and "  " not in text:  # nothing in it to take out: no space but " ", no format character
        return (text if text.isascii() else unicodedata.normalize("NFC", text)).strip(" ")
    if not text.isascii():
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
    if not isinstance(raw, Mapping):
        raise RowError([f"a {type(raw).__name__}, expected a mapping of column to value"])
    problems: list[str] = []
    notes: list[str] = []
    file_name = read_file_name(raw.get("file_name"), problems)
    # The imagefolder convention knows only file_name: it then names the item.
    identifier = read_identifier("id", raw.get("id"), problems)
    if identifier is None and not problems:
        identifier = file_name
    if identifier is None and not problems:
        problems.append("id and file_name are both missing; give at least one")
    title = read_text("title", raw.get("title"), problems, notes, MAX_TITLE)
    brand = read_text("brand", raw.get("brand"), problems, notes)
    category = read_text("category", raw.get("category"), problems, notes)
    attributes = _attributes(raw, problems, notes)
    price = read_price(raw.get("price"), problems)
    group_id = read_identifier("group_id", raw.get("group_id"), problems)
    if problems or identifier is None:
        raise RowError(problems)
    return Item(identifier, file_name, title, brand, category, attributes, price, group_id, row), notes


def parse_fields(raw: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Texts of some metadata fields of a mapping (a query's metadata, or a row), as a catalogue row would have them.

    Args:
        raw: field name → value; attributes may also stand under "attributes" or as "attributes.<name>".
        names: the fields to read; others are ignored.

    Raises:
        RowError: with every reason why a value cannot be used.
    """
    if not isinstance(raw, Mapping):
        raise RowError([f"a {type(raw).__name__}, expected a mapping of field to value"])
    problems: list[str] = []
    notes: list[str] = []
    found: dict[str, str] = {}
    attributes = {k: v for k, v in raw.items() if k == "attributes" or str(k).startswith("attributes.")}
    nested = _attributes(attributes, problems, notes) if attributes else {}
    keys = {str(key): value for key, value in raw.items()}
    for name in names:
        value = keys.get(name)
        if name == "price":
            price = read_price(value, problems)
            text = None if price is None else price_text(price)
        elif name in COLUMNS:
            text = read_text(name, value, problems, notes, MAX_TITLE if name == "title" else MAX_TEXT)
        else:
            text = read_attribute(name, value, problems, notes) or nested.get(name)
        if text is not None:
            found[name] = text
    if problems:
        raise RowError(problems)
    return found


def _plain(name: str, value: object, problems: list[str]) -> Any:
    """`plain_value` whose error is listed with the name of the column."""
    if value is None or type(value) is str:
        return value
    try:
        return plain_value(value)
    except RowError as error:
        problems.append(f"{name} is {error}")
        return None


def read_identifier(name: str, value: object, problems: list[str]) -> str | None:
    """An id as text: a string or an integer (also as an integral float); None for a gap. Problems are appended."""
    if type(value) is str and len(value) <= MAX_ID and value.isascii() and value.isprintable():
        return value.strip(" ") or None
    value = _plain(name, value, problems)
    if value is None:
        return None
    if isinstance(value, (float, Decimal)) and -_LARGE < value < _LARGE and value == int(value):
        value = int(value)  # a column of integers with gaps
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            value = str(value)
        except ValueError:  # Python refuses to print integers of thousands of digits
            problems.append(f"{name} is an integer of more than {MAX_ID} digits")
            return None
    if not isinstance(value, str):
        problems.append(f"{name} is {kind_of(value)}, expected a string or an integer")
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


def read_file_name(value: object, problems: list[str]) -> str | None:
    if type(value) is str and len(value) <= MAX_PATH and value.isprintable() and not _DOUBTFUL_PATH.search(value):
        return value if value.strip(" ") else None
    value = _plain("file_name", value, problems)
    if value is None:
        return None
    if not isinstance(value, str):
        problems.append(f"file_name is {kind_of(value)}, expected a string")
        return None
    if not value.strip():
        return None
    if _CONTROL.search(value) or _SURROGATE.search(value) or len(value) > MAX_PATH:
        problems.append(
            f"file_name {value[:40]!r} holds control characters or broken Unicode, or is longer than {MAX_PATH}"
        )
        return None
    if is_remote(value) and ".." not in value.split("/"):
        return value
    if "://" in value:
        problems.append(f"file_name {value[:80]!r} is a web address; `tgq-fast import table` fetches pictures")
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


def read_text(name: str, value: object, problems: list[str], notes: list[str], limit: int = MAX_TEXT) -> str | None:
    if value is None:
        return None
    try:
        text = value if type(value) is str else scalar_text(_plain(name, value, problems))
    except RowError as error:
        problems.append(f"{name} is {error}")
        return None
    if text is None:
        return None
    text = clean_text(text)
    return (text if len(text) <= limit else _cut(name, text, limit, notes)) or None


def read_price(value: object, problems: list[str]) -> float | None:
    if type(value) is float and 0 <= value < math.inf:
        return value
    try:
        return amount(value)
    except RowError as error:
        problems.append(f"price is {error}")
        return None


def read_attribute(name: str, value: object, problems: list[str], notes: list[str]) -> str | None:
    """Text of one attribute; the entries of a list are joined by commas."""
    if type(value) is str and len(text := clean_text(value)) <= MAX_TEXT:
        return text or None
    value = _plain(f"attribute {name!r}", value, problems)
    texts: list[str] = []
    for part in value if isinstance(value, list) else [value]:
        try:
            entry = scalar_text(part)
        except RowError as error:
            problems.append(f"attribute {name!r} is {error}, or a list of them")
        else:
            texts.append("" if entry is None else clean_text(entry))
    return _cut(f"attribute {name!r}", ", ".join(filter(None, texts)), MAX_TEXT, notes) or None


@lru_cache(maxsize=4096)
def attribute_name(key: str) -> str:
    return clean_text(key)[:100]


@lru_cache(maxsize=256)
def attribute_columns(names: tuple[Any, ...]) -> tuple[tuple[Any, str], ...]:
    """(column, attribute) of the columns that are called attributes.<name>."""
    return tuple((name, str(name)[11:]) for name in names if str(name).startswith("attributes."))


def given_attributes(given: Any, problems: list[str]) -> Mapping[Any, Any] | None:
    """The column `attributes` as a mapping; None with a problem."""
    if given is None:
        return {}
    if not isinstance(given, (str, list, dict, Mapping)):
        given = _plain("attributes", given, problems)
    if isinstance(given, str):  # CSV carries them as a JSON object
        if not given.strip():
            given = None
        else:
            try:
                given = read_json(given)
            except ValueError as error:
                problems.append(f"attributes {given[:40]!r} is not a JSON object ({str(error)[:120]})")
                return None
    if isinstance(given, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in given):
        pairs, given = given, {str(key): value for key, value in given}  # a Parquet map column
        if len(given) != len(pairs):
            problems.append("attributes has a key twice")
            return None
    if given is not None and not isinstance(given, Mapping):
        problems.append(f"attributes is {kind_of(given)}, expected an object")
        return None
    return given or {}


def _attributes(raw: Mapping[str, Any], problems: list[str], notes: list[str]) -> dict[str, str]:
    given = given_attributes(raw.get("attributes"), problems)
    if given is None:
        return {}
    named = [*given.items(), *((name, raw[column]) for column, name in attribute_columns(tuple(raw)))]
    if len(named) > MAX_ATTRIBUTES:
        problems.append(f"{len(named)} attributes, at most {MAX_ATTRIBUTES} are allowed")
        return {}
    attributes: dict[str, str] = {}
    for key, value in named:
        name = attribute_name(str(key))
        if not name:
            problems.append("an attribute has a blank name")
            continue
        text = read_attribute(name, value, problems, notes)
        if text is None:
            continue
        if name in attributes:
            problems.append(f"attribute {name!r} is given twice")
            continue
        if name in COLUMNS:
            notes.append(f"attribute {name!r} has the name of a column and is ignored as a field")
        attributes[name] = text
    return attributes
