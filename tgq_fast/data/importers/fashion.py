"""Kaggle fashion-product-images and fashion-product-images-small.

Form: styles.csv (`id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName`)
and images/<id>.jpg; the full set also has styles/<id>.json with the brand and the price. Two dozen rows have unquoted
commas in the product name, and some copies carry trailing commas in the header: names are put together again from the
surplus fields.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tgq_fast.data.importers.common import CatalogWriter
from tgq_fast.errors import CatalogError
from tgq_fast.io.json_text import read_json

__all__ = ["import_fashion"]

COLUMNS = (
    "id",
    "gender",
    "masterCategory",
    "subCategory",
    "articleType",
    "baseColour",
    "season",
    "year",
    "usage",
    "productDisplayName",
)
_ATTRIBUTES = ("gender", "masterCategory", "subCategory", "baseColour", "season", "year", "usage")
_MISSING = frozenset(("", "na", "nan", "null", "none"))
_GENDER_WORD = re.compile(r"\b(?:men|women|boys?|girls?|kids?|unisex|mens|womens)\b", re.IGNORECASE)
MAX_GROUP = 24
"""A name shared by more items than this ("Puma Men T-shirt") is generic and says nothing about one style."""


def import_fashion(path: Path, writer: CatalogWriter) -> None:
    """Import the folder with styles.csv. Groups are colourways: same brand, gender, type and name without colour."""
    nested = path / "fashion-dataset"
    root = nested if (nested / "styles.csv").is_file() else path
    if not (root / "styles.csv").is_file():
        raise CatalogError(path, ["no styles.csv"], "Give the folder that the Kaggle archive unpacks to.")
    rows: list[tuple[int, dict[str, str | None], str | None, float | None, str]] = []
    for number, fields in _rows(root / "styles.csv", writer):
        brand, price = _details(root / "styles" / f"{fields['id']}.json")
        brand = brand or _brand_of(fields["productDisplayName"])
        rows.append((number, fields, brand, price, _style_key(fields, brand)))
    sizes = Counter(key for *_, key in rows)
    generic = sum(size > MAX_GROUP for size in sizes.values())
    if generic:
        writer.report.notes.append(f"{generic} product name(s) are shared by more than {MAX_GROUP} items: not grouped")
    writer.report.notes.append("groups come from titles: never guide with title, and prefer not to guide with brand")
    numbers = {key: i for i, key in enumerate(sizes)}
    for number, fields, brand, price, key in rows:
        raw: dict[str, Any] = {
            "id": f"fp-{fields['id']}",
            "title": fields["productDisplayName"],
            "brand": brand,
            "category": fields["articleType"],
            "attributes": {name: fields[name] for name in _ATTRIBUTES if fields[name] is not None},
            "price": price,
            "group_id": f"fp-style-{numbers[key]:05d}" if 1 < sizes[key] <= MAX_GROUP else None,
        }
        writer.add(number, raw, root / "images" / f"{fields['id']}.jpg")


def _rows(path: Path, writer: CatalogWriter) -> Iterator[tuple[int, dict[str, str | None]]]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        header = [name.strip() for name in next(csv.reader(file), [])]
        while header and not header[-1]:
            header.pop()
        if tuple(header) != COLUMNS:
            raise CatalogError(path, [f"header is {','.join(header)[:200]}, expected {','.join(COLUMNS)}"])
        # Quotes are not used consistently either: split by line, so that a stray quote cannot swallow the rows below.
        for number, line in enumerate(file, 1):
            text = line.rstrip("\r\n")
            if not text.strip():
                continue
            fields = _split(text)
            if len(fields) < len(COLUMNS):
                writer.skip(number, "too few fields", text)
                continue
            head, name = fields[: len(COLUMNS) - 1], ",".join(fields[len(COLUMNS) - 1 :]).rstrip(", ")
            values = [None if value.strip().lower() in _MISSING else value.strip() for value in (*head, name)]
            row = dict(zip(COLUMNS, values, strict=True))
            if row["id"] is None or not row["id"].isdigit():
                writer.skip(number, "id is not a number", text)
                continue
            if row["year"] is not None:
                row["year"] = row["year"].removesuffix(".0")
            yield number, row


def _split(text: str) -> list[str]:
    if '"' in text:
        try:
            fields = next(csv.reader([text], strict=True))
            if len(fields) >= len(COLUMNS):
                return fields
        except csv.Error:
            pass
    return text.split(",")


def _details(path: Path) -> tuple[str | None, float | None]:
    """Brand and price of styles/<id>.json (full set only); a missing or broken file is no reason to lose the item."""
    try:
        data = read_json(path.read_bytes())["data"]
        brand, price = data.get("brandName"), data.get("price")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None
    usable = isinstance(price, (int, float)) and not isinstance(price, bool) and price >= 0
    return brand if isinstance(brand, str) and brand.strip() else None, float(price) if usable else None


def _brand_of(title: str | None) -> str | None:
    """What stands before the gender word, as in "Palm Tree Girls Sp Jace Sko White Skirts"; at most four words."""
    match = _GENDER_WORD.search(title or "")
    if title is None or match is None:
        return None
    head = title[: match.start()].strip(" -,")
    return head if head and len(head.split()) <= 4 else None


def _style_key(fields: dict[str, str | None], brand: str | None) -> str:
    title = (fields["productDisplayName"] or f"#{fields['id']}").lower()
    for word in (fields["baseColour"] or "").lower().split():
        title = re.sub(rf"\b{re.escape(word)}\b", " ", title)
    parts = (brand, fields["gender"], fields["articleType"], " ".join(title.split()))
    return "|".join((part or "").lower() for part in parts)
