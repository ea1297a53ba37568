"""Amazon Berkeley Objects: listings/metadata/listings_*.json.gz and images/metadata/images.csv.gz.

A listing is one JSON line: `item_id`, `domain_name`, `main_image_id`, `other_image_id` [..], and texts as lists of
{language_tag, value} (`item_name`, `brand`, `color` with `standardized_values`, `material`, `style` …),
`product_type` [{value}], `model_name`, `model_number`, `node` [{node_id, node_name | path}]. images.csv.gz is
`image_id,height,width,path`; pictures lie in images/small/<path> or images/original/<path>.
"""

from __future__ import annotations

import csv
import re
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from tgq_fast.data.importers.amazon2023 import read_json_lines
from tgq_fast.data.importers.common import CatalogWriter, open_text
from tgq_fast.data.items import RowError
from tgq_fast.errors import CatalogError

__all__ = ["import_abo", "pick_value"]

LANGUAGES = ("en_US", "en_GB", "en_CA", "en_AU", "en_IN", "en_SG", "en_AE")
_ATTRIBUTES = ("color", "material", "fabric_type", "finish_type", "style", "pattern", "item_shape")


def import_abo(path: Path, writer: CatalogWriter) -> None:
    """Import the folder that holds listings/ and images/.

    A product listed in several countries is one item (the first listing counts). Variants share a group: same brand,
    product type and model name; else the same model number; else the same name once its colour is taken out.
    """
    listings = sorted(path.glob("listings/metadata/listings_*.json*")) or sorted(path.glob("listings_*.json*"))
    if not listings:
        raise CatalogError(path, ["no listings/metadata/listings_*.json.gz"], "Unpack abo-listings.tar there.")
    paths = _image_paths(path)
    foreign = 0
    for file in listings:
        for row, raw in read_json_lines(file):
            if isinstance(raw, RowError):
                writer.skip(row, "broken row", f"{file.name}: {raw}")
                continue
            image_id = raw.get("main_image_id")
            if not isinstance(image_id, str):
                writer.skip(row, "no main image", str(raw.get("item_id")))
                continue
            if image_id not in paths:
                writer.skip(row, "image id not in images.csv", image_id)
                continue
            columns, english = _columns(raw)
            foreign += writer.add(row, columns, paths[image_id]) and not english
    if foreign:
        writer.report.notes.append(f"{foreign} item(s) have no English name; another language's was taken")
    writer.report.notes.append("groups come from model names and titles: never guide with title")


def _image_paths(root: Path) -> dict[str, Path]:
    table = next(
        (p for p in (root / "images/metadata/images.csv.gz", root / "images/metadata/images.csv") if p.is_file()), None
    )
    if table is None:
        raise CatalogError(root, ["no images/metadata/images.csv.gz"], "Unpack abo-images-small.tar there.")
    folder = next((p for p in (root / "images/small", root / "images/original") if p.is_dir()), root / "images/small")
    paths: dict[str, Path] = {}
    try:
        with open_text(table) as file:
            reader = csv.DictReader(file)
            if not {"image_id", "path"} <= set(reader.fieldnames or ()):
                raise CatalogError(table, [f"header is {reader.fieldnames}, expected image_id,height,width,path"])
            for row in reader:
                relative = PurePosixPath(row["path"] or "")
                if row["image_id"] and relative.name and not relative.is_absolute() and ".." not in relative.parts:
                    paths[row["image_id"]] = folder / relative
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise CatalogError(table, [f"cannot be read: {error}"]) from error
    return paths


def pick_value(entries: object, key: str = "value") -> tuple[str | None, bool]:
    """Text of a multi-language field and whether it is English (or has no language): English first, else the first."""
    if isinstance(entries, str):
        return entries, True
    if not isinstance(entries, list):
        return None, True
    found: list[tuple[int, str, bool]] = []
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        value = entry.get(key)
        if isinstance(value, list):
            value = next((v for v in value if isinstance(v, str)), None)
        if isinstance(value, str) and value.strip():
            tag = entry.get("language_tag")
            english = not isinstance(tag, str) or tag.startswith("en")
            rank = LANGUAGES.index(tag) if tag in LANGUAGES else len(LANGUAGES) + (not english)
            found.append((rank, value, english))
    if not found:
        return None, True
    _, value, english = min(found, key=lambda entry: entry[0])
    return value, english


def _columns(raw: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    title, english = pick_value(raw.get("item_name"))
    brand, _ = pick_value(raw.get("brand"))
    kind, _ = pick_value(raw.get("product_type"))
    attributes: dict[str, str] = {}
    for name in _ATTRIBUTES:
        value = None
        if name == "color":  # one of some twenty plain colours, where the seller's own word may be anything
            value, _ = pick_value(raw.get(name), "standardized_values")
        value = value or pick_value(raw.get(name))[0]
        if value is not None:
            attributes[name] = value
    columns = {
        "id": raw.get("item_id"),
        "title": title,
        "brand": brand,
        "category": kind.replace("_", " ").lower() if kind else None,
        "attributes": attributes,
        "group_id": _group(raw, title, brand, kind),
    }
    return columns, english


def _group(raw: dict[str, Any], title: str | None, brand: str | None, kind: str | None) -> str | None:
    """Key of the variant group; long keys are cut, so that they stay valid ids."""
    prefix = f"{brand or ''}|{kind or ''}"
    name, _ = pick_value(raw.get("model_name"))
    if name:
        return _key(f"{prefix}|name|{name}")
    number, _ = pick_value(raw.get("model_number"))
    if number:
        return _key(f"{prefix}|number|{number}")
    if title is None:
        return None
    for key in ("value", "standardized_values"):
        color, _ = pick_value(raw.get("color"), key)
        if color:
            title = re.sub(re.escape(color), " ", title, flags=re.IGNORECASE)
    return _key(f"{prefix}|title|{title}")


def _key(text: str) -> str | None:
    text = " ".join(re.sub(r"[^\w|]+", " ", text.lower()).split())
    return f"abo-{text[:200]}" if text.strip("| ") else None
