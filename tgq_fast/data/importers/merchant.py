"""Google Merchant product feeds: RSS 2.0 and Atom 1.0 with the g: namespace, and tab-separated text.

Specification: support.google.com/merchants/answer/7052112 (attributes), 14987622 (RSS), 160593 (Atom), 160567 (text).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.parsers import expat

from tgq_fast.data.columns import canonical_name
from tgq_fast.data.importers.common import CatalogWriter
from tgq_fast.data.importers.shop import (
    LONG,
    TARGETS,
    Product,
    ShopOptions,
    category_of,
    mapped,
    text_of,
    write_products,
)
from tgq_fast.data.importers.table import split_pictures
from tgq_fast.data.importers.tables import TEXT, read_table
from tgq_fast.data.values import RowError
from tgq_fast.errors import CatalogError
from tgq_fast.io.files import open_regular

__all__ = ["import_merchant"]

_GOOGLE = "http://base.google.com/ns/1.0"
_PIECE = 1 << 16
MAX_ITEM = 4 << 20
_ATTRIBUTES = (
    "color", "size", "gender", "age_group", "material", "pattern", "condition", "availability", "size_type",
    "size_system",
    *(f"custom_label_{n}" for n in range(5)),
)  # fmt: skip

Entry = dict[str, list[Any]]


def import_merchant(path: Path, writer: CatalogWriter, options: ShopOptions) -> None:
    """Import a feed; variants share `item_group_id`. Product details become attributes by their own names."""
    if path.suffix.lower() in TEXT:
        rows, how = read_table(path, delimiter=options.delimiter, encoding=options.encoding)
        writer.report.notes.append(f"read as {how}")
        entries = _text_entries(rows, writer)
    else:
        entries = _xml_entries(path, writer)
    products = (_product(row, entry, options) for row, entry in entries)
    write_products(products, writer, options, path.parent)


def _text_entries(rows: Any, writer: CatalogWriter) -> Iterator[tuple[int, Entry]]:
    for number, raw in rows:
        if isinstance(raw, RowError):
            writer.skip(number, "broken row", str(raw))
            continue
        names = ((canonical_name(name).removeprefix("g:"), value) for name, value in raw.items())
        entry: Entry = {name: [value] for name, value in names if text_of(value) is not None}
        images = entry.get("additional_image_link", [])
        entry["additional_image_link"] = [
            part for text in images for part in split_pictures(str(text).replace(",", "|"))
        ]
        details = [_detail(part) for text in entry.get("product_detail", []) for part in _split(str(text))]
        entry["product_detail"] = [detail for detail in details if detail is not None]
        entry["product_type"] = [part for text in entry.get("product_type", []) for part in _split(str(text))]
        yield number, entry


def _split(text: str) -> list[str]:
    """Parts between commas, as in text feeds; a part in quotes may hold commas."""
    import csv

    return [part.strip() for part in next(csv.reader([text], skipinitialspace=True), []) if part.strip()]


def _detail(text: str) -> tuple[str, str] | None:
    """section:name:value of a text feed; a colon within is written as "\\:"."""
    parts = [part.replace("\0", ":") for part in text.replace("\\:", "\0").split(":", 2)]
    return (parts[1].strip(), parts[2].strip()) if len(parts) == 3 and parts[1].strip() and parts[2].strip() else None


class _Feed:
    """Collects the items of a feed as they end; knows nothing of what stands around them."""

    def __init__(self) -> None:
        self.done: list[Entry] = []
        self._entry: Entry | None = None
        self._path: list[str] = []
        self._text: list[str] = []
        self._size = 0
        self._detail: dict[str, str] = {}

    def start(self, name: str, _attributes: Mapping[str, str]) -> None:
        space, _, local = name.rpartition(" ")
        local = local if space in ("", _GOOGLE, "http://www.w3.org/2005/Atom") else f"{space} {local}"
        if self._entry is None:
            if local in ("item", "entry"):
                self._entry, self._path, self._size = {}, [], 0
            return
        self._path.append(local)
        self._text = []

    def data(self, text: str) -> None:
        if self._entry is not None and self._path:
            self._size += len(text)
            if self._size > MAX_ITEM:
                raise RowError([f"an item is longer than {MAX_ITEM} characters"])
            self._text.append(text)

    def end(self, name: str) -> None:
        if self._entry is None:
            return
        if not self._path:
            self.done.append(self._entry)
            self._entry = None
            return
        local, text = self._path.pop(), "".join(self._text).strip()
        if self._path[:1] == ["product_detail"]:
            self._detail[local] = text
        elif local == "product_detail":
            named, value = self._detail.get("attribute_name"), self._detail.get("attribute_value")
            if named and value:
                self._entry.setdefault(local, []).append((named, value))
            self._detail = {}
        elif text and not self._path:
            self._entry.setdefault(local, []).append(text)
        self._text = []

    def doctype(self, *_: Any) -> None:
        raise RowError(["the feed declares a document type, which feeds do not have; it is not read"])


def _xml_entries(path: Path, writer: CatalogWriter) -> Iterator[tuple[int, Entry]]:
    feed, row = _Feed(), 0
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler, parser.EndElementHandler = feed.start, feed.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = feed.data, feed.doctype
    parser.buffer_text = True
    problem = ""
    try:
        with open_regular(path) as file:
            while not problem:
                piece = file.read(_PIECE)
                try:
                    parser.Parse(piece, not piece)
                except (expat.ExpatError, RowError, ValueError, LookupError) as error:
                    problem = f"not valid XML: {error}" if not isinstance(error, RowError) else str(error)
                ready, feed.done = feed.done, []
                for entry in ready:
                    row += 1
                    yield row, entry
                if not piece:
                    break
    except OSError as error:
        raise CatalogError(path, [f"cannot be read: {error}"]) from error
    if problem and not row:
        raise CatalogError(path, [problem], "A feed is RSS or Atom XML, or tab-separated text (.tsv, .txt).")
    if problem:
        writer.skip(row + 1, "the feed breaks off", problem)
    if not row:
        raise CatalogError(path, ["no <item> or <entry> in the feed"])


def _product(row: int, entry: Entry, options: ShopOptions) -> Product:
    def one(*names: str) -> Any:
        return next((entry[name][0] for name in names if entry.get(name)), None)

    category, top = category_of(one("product_type", "google_product_category"))
    attributes: dict[str, Any] = {name: one(name) for name in _ATTRIBUTES if entry.get(name)}
    if top is not None:
        attributes["department"] = top
    for name, value in entry.get("product_detail", []):
        if len(value) <= LONG:
            attributes.setdefault(name, value)
    columns = {
        "id": one("id"),
        "title": one("title"),
        "brand": one("brand"),
        "category": category,
        "price": one("price"),
        "group_id": one("item_group_id"),
        "attributes": attributes,
    }
    for target, value in mapped({name: one(name) for name in entry}, options).items():
        if target.startswith("attributes."):
            attributes[target[11:]] = value
        elif target in TARGETS:
            columns[target] = value
    pictures = [*entry.get("image_link", [])[:1], *entry.get("additional_image_link", [])]
    if columns.get("file_name"):
        pictures = split_pictures(columns["file_name"])
    columns.pop("file_name", None)
    return Product(row, columns, pictures)
