"""Shopify product CSV: one row per variant and per picture, products told by `Handle`.

Specification: help.shopify.com/en/manual/products/import-export/using-csv. The first row of a handle describes the
product; further rows name variants (options, SKU, price, Variant Image) and further pictures (Image Src).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tgq_fast.data.columns import canonical_name
from tgq_fast.data.importers.common import CatalogWriter
from tgq_fast.data.importers.shop import TARGETS, Product, ShopOptions, category_of, mapped, text_of, write_products
from tgq_fast.data.importers.table import is_attribute
from tgq_fast.data.importers.tables import read_table
from tgq_fast.data.values import RowError
from tgq_fast.errors import CatalogError

__all__ = ["import_shopify"]

_METAFIELD = re.compile(r"\((?:product|variant)\.metafields\.[^.()]+\.([^()]+)\)$", re.IGNORECASE)

Numbered = tuple[int, dict[str, Any], Mapping[Any, Any]]  # row, columns by canonical name, columns as written


def import_shopify(path: Path, writer: CatalogWriter, options: ShopOptions) -> None:
    """Import an export; an item is a variant with a picture of its own, and the variants of a handle are a group.

    Variants that share a picture (sizes) are one item, the first of them; their number is noted.
    """
    rows, how = read_table(path, delimiter=options.delimiter or ",", encoding=options.encoding)
    writer.report.notes.append(f"read as {how}")
    write_products(_products(path, rows, writer, options), writer, options, path.parent)


def _products(path: Path, rows: Any, writer: CatalogWriter, options: ShopOptions) -> Iterator[Product]:
    group: list[Numbered] = []
    handle: str | None = None
    done: set[str] = set()
    merged = 0
    for number, raw in rows:
        if isinstance(raw, RowError):
            writer.skip(number, "broken row", str(raw))
            continue
        row = {canonical_name(name): value for name, value in raw.items()}
        if "handle" not in row and "url_handle" not in row:
            raise CatalogError(path, [f"header {list(raw)[:12]} has no Handle"], "Export products as CSV in Shopify.")
        found = text_of(row.get("handle", row.get("url_handle")))
        if found is None:
            writer.skip(number, "no Handle")
            continue
        if found != handle:
            products, shared = _variants(handle, group, options)
            merged += shared
            yield from products
            if found in done:
                writer.skip(number, "the Handle was used further above", found)
            done.add(found)
            handle, group = found, []
        group.append((number, row, raw))
    products, shared = _variants(handle, group, options)
    yield from products
    if merged + shared:
        writer.report.notes.append(f"{merged + shared} variant(s) share a picture with an earlier one of their product")


def _variants(handle: str | None, rows: list[Numbered], options: ShopOptions) -> tuple[list[Product], int]:
    """Items of one handle, and how many variants went with an item that has their picture."""
    if handle is None or not rows:
        return [], 0
    first = rows[0][1]
    gallery = [text for _, row, _ in rows if (text := _picture(row, "image_src", "product_image_url")) is not None]
    variants = [entry for entry in rows if _is_variant(entry[1])] or rows[:1]
    names = [text_of(first.get(f"option{n}_name")) for n in (1, 2, 3)]
    products: list[Product] = []
    seen: set[str] = set()
    for number, row, raw in variants:
        own = _picture(row, "variant_image", "variant_image_url")
        pictures = ([own] if own else []) + [picture for picture in gallery if picture != own]
        key = pictures[0] if pictures else ""
        if key in seen:
            continue
        seen.add(key)
        product = _product(number, handle, first, row, raw, rows[0][2], names, options)
        product.pictures = pictures if not own else pictures[:1]  # the gallery shows the other variants too
        if options.pictures == "all" and len(variants) == 1:
            product.pictures = pictures
        products.append(product)
    if len(products) == 1 and products[0].columns["group_id"] == products[0].columns["id"]:
        products[0].columns["group_id"] = None
    return products, len(variants) - len(products)


def _picture(row: Mapping[str, Any], *names: str) -> str | None:
    return next((text for name in names if (text := text_of(row.get(name))) is not None), None)


def _is_variant(row: Mapping[str, Any]) -> bool:
    return any(text_of(row.get(name)) for name in ("option1_value", "variant_sku", "variant_price", "sku"))


def _product(
    number: int,
    handle: str,
    first: Mapping[str, Any],
    row: Mapping[str, Any],
    raw: Mapping[Any, Any],
    raw_first: Mapping[Any, Any],
    names: list[str | None],
    options: ShopOptions,
) -> Product:
    values = {f"option{n}": text_of(row.get(f"option{n}_value")) for n in (1, 2, 3)}
    sku = text_of(row.get("variant_sku", row.get("sku")))
    suffix = "-".join(re.sub(r"\W+", "-", value).strip("-").lower() for value in values.values() if value)
    plain = not suffix or values["option1"] == "Default Title"
    category, top = category_of(first.get("product_category"))
    kind = text_of(first.get("type"))
    attributes: dict[str, Any] = {}
    used = {canonical_name(column) for column in options.columns.values()}
    for name, value in zip(names, values.values()):
        if name and value and value != "Default Title":
            attributes[canonical_name(name)] = value
    for label, value in [*raw_first.items(), *raw.items()]:
        found = _METAFIELD.search(str(label))
        if found and canonical_name(label) not in used and is_attribute(value) and text_of(value) is not None:
            attributes[found[1]] = value
    for name, value in (("department", top), ("tags", first.get("tags")), ("status", first.get("status"))):
        if text_of(value) is not None:
            attributes.setdefault(name, value)
    columns: dict[str, Any] = {
        "id": sku or (handle if plain else f"{handle}-{suffix}"),
        "title": first.get("title"),
        "brand": first.get("vendor"),
        "category": kind or category,
        "price": row.get("variant_price", row.get("price")),
        "group_id": handle,
        "attributes": attributes,
    }
    for target, value in mapped({**raw_first, **{k: v for k, v in raw.items() if v is not None}}, options).items():
        if target.startswith("attributes."):
            attributes[target[11:]] = value
        elif target in TARGETS and target != "file_name":
            columns[target] = value
    return Product(number, columns)
