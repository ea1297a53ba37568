"""WooCommerce product CSV: products, variable products and their variations, told by `Type` and `Parent`.

Specification: woocommerce.com/document/product-csv-importer-exporter (columns and their forms).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tgq_fast.data.columns import canonical_name
from tgq_fast.data.importers.common import CatalogWriter
from tgq_fast.data.importers.shop import TARGETS, Product, ShopOptions, category_of, mapped, text_of, write_products
from tgq_fast.data.importers.tables import read_table
from tgq_fast.data.values import RowError
from tgq_fast.errors import CatalogError

__all__ = ["import_woocommerce"]

_ATTRIBUTE = re.compile(r"attribute_(\d+)_name")

Numbered = tuple[int, dict[str, Any], Mapping[Any, Any]]


def import_woocommerce(path: Path, writer: CatalogWriter, options: ShopOptions) -> None:
    """Import an export; variations inherit what they lack from their parent and are its group."""
    rows, how = read_table(path, delimiter=options.delimiter, encoding=options.encoding)
    writer.report.notes.append(f"read as {how}")
    entries: list[Numbered] = []
    for number, read in rows:
        if isinstance(read, RowError):
            writer.skip(number, "broken row", str(read))
            continue
        raw: Mapping[Any, Any] = read
        row = {canonical_name(name): value for name, value in raw.items()}
        if "type" not in row or not {"sku", "id"} & set(row):
            hint = "Export products in WooCommerce with all columns."
            raise CatalogError(path, [f"header {list(raw)[:12]} has no Type, or neither ID nor SKU"], hint)
        entries.append((number, row, raw))
    parents: dict[str, dict[str, Any]] = {}
    for _, row, _ in entries:
        if _kind(row) != "variation":
            for key in (text_of(row.get("sku")), f"id:{text_of(row.get('id'))}"):
                if key:
                    parents.setdefault(key, row)
    varied = {_key(parent) for _, row, _ in entries if (parent := _parent(row, parents)) is not None}
    products = []
    for number, row, written in entries:
        kind = _kind(row)
        if kind == "grouped":
            writer.skip(number, "a grouped product is no item of its own", text_of(row.get("name")) or "")
        elif kind == "variation" and _parent(row, parents) is None:
            writer.skip(number, "its parent is not in the export", text_of(row.get("parent")) or "")
        elif kind == "variation" or _key(row) not in varied:
            products.append(_product(number, row, written, _parent(row, parents), options))
    write_products(products, writer, options, path.parent)


def _kind(row: Mapping[str, Any]) -> str:
    """The first word of Type that says what it is: "simple, downloadable, virtual" is simple."""
    words = [word.strip() for word in (text_of(row.get("type")) or "simple").lower().split(",")]
    return next((word for word in words if word in ("variation", "variable", "grouped", "external")), "simple")


def _key(row: Mapping[str, Any]) -> str:
    return text_of(row.get("sku")) or text_of(row.get("id")) or ""


def _parent(row: Mapping[str, Any], parents: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    if _kind(row) != "variation":
        return None
    return parents.get(text_of(row.get("parent")) or "")


def _product(
    number: int, row: dict[str, Any], raw: Mapping[Any, Any], parent: dict[str, Any] | None, options: ShopOptions
) -> Product:
    def one(*names: str) -> Any:
        for source in (row, parent or {}):
            for name in names:
                if text_of(source.get(name)) is not None:
                    return source[name]
        return None

    paths = _list(one("categories"))
    category, top = category_of(max(paths, key=lambda path: path.count(">"), default=None))
    attributes: dict[str, Any] = {} if top is None else {"department": top}
    for source in (parent or {}, row):
        for column in source:
            if (found := _ATTRIBUTE.fullmatch(column)) and (name := text_of(source[column])) is not None:
                value = text_of(source.get(f"attribute_{found[1]}_value(s)"))
                if value is not None:
                    attributes[canonical_name(name.removeprefix("pa_"))] = ", ".join(_list(value))
    if text_of(one("tags")) is not None:
        attributes["tags"] = one("tags")
    columns: dict[str, Any] = {
        "id": _key(row),
        "title": one("name"),
        "brand": one("brands", "brand"),
        "category": category,
        "price": one("sale_price", "regular_price"),
        "group_id": None if parent is None else _key(parent),
        "attributes": attributes,
    }
    for target, value in mapped(raw, options).items():
        if target.startswith("attributes."):
            attributes[target[11:]] = value
        elif target in TARGETS and target != "file_name":
            columns[target] = value
    return Product(number, columns, list(_list(one("images"))))


def _list(value: object) -> list[str]:
    """Entries between commas; a comma within one is written "\\,"."""
    parts = re.split(r"(?<!\\),", text_of(value) or "")
    return [part.replace("\\,", ",").strip() for part in parts if part.strip()]
