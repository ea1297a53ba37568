"""Any table with a row per item: CSV, TSV, Excel, Parquet, JSON lines; columns as named, else by their usual names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tgq_fast.data.columns import canonical_name, listed_pictures
from tgq_fast.data.importers.common import CatalogWriter
from tgq_fast.data.importers.shop import (
    LONG,
    TARGETS,
    Product,
    ShopOptions,
    category_of,
    text_of,
    write_products,
)
from tgq_fast.data.importers.tables import read_table
from tgq_fast.data.values import RowError, plain_value
from tgq_fast.errors import ArgumentError, CatalogError

__all__ = ["import_table"]

ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("id", "item_id", "product_id", "sku", "article_number", "article_no", "articlenumber", "asin",
           "variant_sku"),
    "file_name": (
        "file_name", "file_names", "image", "images", "image_path", "image_link", "image_url", "image_src",
        "main_image", "picture", "pictures", "photo", "filename", "image_urls",
    ),
    "title": ("title", "name", "product_name", "product_title", "productdisplayname"),
    "brand": ("brand", "vendor", "manufacturer", "brand_name"),
    "category": ("category", "product_type", "categories", "product_category", "type"),
    "price": ("price", "regular_price", "sale_price", "unit_price"),
    "group_id": ("group_id", "item_group_id", "parent_id", "parent_sku", "style_id", "model_id", "handle"),
}  # fmt: skip
"""The catalogue's name → usual names of the column, the likeliest first."""


def import_table(path: Path, writer: CatalogWriter, options: ShopOptions) -> None:
    """Import one table; columns that are no column of the catalogue become attributes.

    Raises:
        CatalogError: no column holds ids or pictures.
        ArgumentError: `options.columns` names a column that is not there.
    """
    rows, how = read_table(path, delimiter=options.delimiter, encoding=options.encoding)
    writer.report.notes.append(f"read as {how}")
    write_products(_products(path, rows, writer, options), writer, options, path if path.is_dir() else path.parent)


def _products(path: Path, rows: Any, writer: CatalogWriter, options: ShopOptions) -> Iterator[Product]:
    plan: dict[str, Any] | None = None
    names: tuple[Any, ...] = ()
    for number, raw in rows:
        if isinstance(raw, RowError):
            writer.skip(number, "broken row", str(raw))
            continue
        if plan is None or not set(raw) <= set(names):
            first, names = plan is None, tuple(raw)
            plan = _plan(path, raw, options, strict=first)
            if first:
                told = ", ".join(f"{target}={column}" for target, column in plan.items())
                writer.report.notes.append(f"columns: {told}")
        yield _product(number, raw, plan)


def _plan(path: Path, raw: Mapping[Any, Any], options: ShopOptions, *, strict: bool) -> dict[str, Any]:
    """Target → column of the table."""
    by_name = {canonical_name(column): column for column in raw}
    plan: dict[str, Any] = {}
    for target, column in options.columns.items():
        if target not in TARGETS and not target.startswith("attributes."):
            expected = ", ".join(TARGETS) + " or attributes.<name>"
            raise ArgumentError("columns", f"{target}={column}", f"{expected} on the left")
        found = column if column in raw else by_name.get(canonical_name(column))
        if found is not None:
            plan[target] = found
        elif strict:
            raise ArgumentError("columns", f"{target}={column}", "a column of the table: " + ", ".join(map(str, raw)))
    for target, usual in ALIASES.items():
        likely = [by_name[name] for name in usual if name in by_name and by_name[name] not in plan.values()]
        if target not in plan and likely:
            plan[target] = likely[0]
    if strict and not {"id", "file_name"} & set(plan):
        hint = "Say which it is: `tgq-fast import table … --map id=<column>,file_name=<column>`."
        raise CatalogError(
            path, [f"no column of {', '.join(map(str, raw))[:300]} is known to hold ids or pictures"], hint
        )
    return plan


def _product(number: int, raw: Mapping[Any, Any], plan: Mapping[str, Any]) -> Product:
    taken = set(plan.values())
    columns: dict[str, Any] = {target: raw.get(column) for target, column in plan.items() if target in TARGETS}
    pictures = split_pictures(columns.pop("file_name", None))
    category, top = category_of(columns.get("category"))
    columns["category"] = category
    attributes = {target[11:]: raw.get(column) for target, column in plan.items() if target.startswith("attributes.")}
    if top is not None:
        attributes["department"] = top
    nested = raw.get("attributes")
    if isinstance(nested, Mapping):
        attributes.update(nested)
    for column, value in raw.items():
        if column not in taken and column != "attributes" and is_attribute(value):
            name = str(column).strip()
            attributes.setdefault(name[11:] if name.startswith("attributes.") else name, value)
    if "id" not in plan and pictures and not isinstance(pictures[0], bytes):
        columns["id"] = Path(str(pictures[0]).split("?")[0]).stem
    return Product(number, {"group_id": None, **columns, "attributes": attributes}, pictures)


def split_pictures(value: object) -> list[Any]:
    """Pictures of a cell: a list, or a text with "|" (or commas before further addresses) between."""
    found: list[Any] = []
    for entry in listed_pictures(value):
        if isinstance(entry, bytes):
            found.append(entry)
        elif (text := text_of(entry)) is not None:
            parts = re.split(r"\s*\|\s*|\s*[,;\n]\s*(?=https?://)", text)
            found.extend(part for part in parts if part)
    return found


def is_attribute(value: object) -> bool:
    """Whether a cell may describe an item: short, and no web address."""
    try:
        value = plain_value(value)
    except RowError:
        return False
    if isinstance(value, str):
        return 0 < len(value.strip()) <= LONG and "://" not in value
    if isinstance(value, list):
        return bool(value) and all(not isinstance(entry, (list, dict)) for entry in value)
    return value is not None and not isinstance(value, dict)
