"""Amazon Reviews 2023, item metadata: meta_<Category>.jsonl or .jsonl.gz.

Each line is one product: `parent_asin`, `title`, `store`, `main_category`, `categories` [..], `price` (number, text
or null), `details` {..} (or that object as a JSON string), and `images` [{thumb, large, variant, hi_res}] (or one
object of lists, as the data set's own loader gives). Pictures are addresses on the web; we never fetch them. Those
that lie in an images/ folder, named by parent_asin or by the file name of the address, are imported, the rest is
counted. `bought_together` is null in this release, and every row is already one product with all its variants: there
are neither pairs nor groups in it.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from tgq_fast.data.importers.common import CatalogWriter, image_index
from tgq_fast.data.items import RowError
from tgq_fast.errors import CatalogError
from tgq_fast.io.json_text import read_json

__all__ = ["import_amazon2023", "read_json_lines"]

MAX_LINE = 32 << 20
_DETAILS = (
    "Color",
    "Material",
    "Style",
    "Pattern",
    "Size",
    "Shape",
    "Finish Type",
    "Department",
    "Age Range (Description)",
    "Item Form",
    "Scent",
    "Flavor",
    "Hair Type",
    "Skin Type",
    "Fabric Type",
    "Closure Type",
    "Room Type",
    "Special Feature",
    "Recommended Uses For Product",
    "Theme",
)
"""Details that describe a product; the rest (ranks, dates, codes, package sizes) identifies or measures it."""


def import_amazon2023(path: Path, writer: CatalogWriter) -> None:
    """Import one metadata file, or every meta_*.jsonl[.gz] of a folder; pictures come from images/ beside it."""
    files = [path] if path.is_file() else sorted((*path.glob("meta_*.jsonl"), *path.glob("meta_*.jsonl.gz")))
    if not files:
        raise CatalogError(path, ["no meta_*.jsonl or meta_*.jsonl.gz"], "Give the file or the folder that holds it.")
    folder = (path.parent if path.is_file() else path) / "images"
    pictures = image_index(folder)
    if not pictures:
        hint = "Put pictures there, named by parent_asin or by the file name in the address; nothing is downloaded."
        raise CatalogError(path, [f"no pictures in {folder}"], hint)
    writer.report.notes.append("this release has no bought-together links: give a pairs.jsonl to train or evaluate")
    for file in files:
        for row, raw in read_json_lines(file):
            if isinstance(raw, RowError):
                writer.skip(row, "broken row", f"{file.name}: {raw}")
                continue
            asin = raw.get("parent_asin")
            if not isinstance(asin, str) or not asin.strip():
                writer.skip(row, "no parent_asin", file.name)
                continue
            image = _picture(asin, raw.get("images"), pictures)
            if image is None:
                writer.skip(row, "picture not downloaded", asin)
                continue
            writer.add(row, _columns(asin, raw), image)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Stream the objects of a .jsonl or .gz file: (1-based line, object or the reason why there is none).

    Raises:
        CatalogError: the file cannot be read at all; a damaged gzip stream ends with a last RowError instead.
    """
    row = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            try:
                while line := file.readline(MAX_LINE):
                    row += 1
                    if len(line) == MAX_LINE:
                        yield row, RowError([f"line is longer than {MAX_LINE} bytes"])
                    elif line.strip():
                        try:
                            value = read_json(line)
                        except ValueError as error:
                            yield row, RowError([f"not valid JSON: {str(error)[:120]}"])
                        else:
                            yield row, value if isinstance(value, dict) else RowError(["not a JSON object"])
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                yield row + 1, RowError([f"the gzip stream is damaged from here on: {error}"])
    except OSError as error:
        raise CatalogError(path, [f"cannot be read: {error}"]) from error


def _picture(asin: str, images: object, pictures: dict[str, Path]) -> Path | None:
    if asin in pictures:
        return pictures[asin]
    for address in _addresses(images):
        stem = PurePosixPath(unquote(urlsplit(address).path)).stem
        # 61abc._AC_SL1500_.jpg names its size after the picture's own name
        for name in (stem, stem.split(".")[0]):
            if name and name in pictures:
                return pictures[name]
    return None


def _addresses(images: object) -> list[str]:
    """Addresses, the main picture's first, each in falling size."""
    if isinstance(images, dict):  # columns instead of rows
        columns = {key: value for key, value in images.items() if isinstance(value, list)}
        count = max(map(len, columns.values()), default=0)
        images = [{key: value[i] for key, value in columns.items() if i < len(value)} for i in range(count)]
    if not isinstance(images, list):
        return []
    rows = [row for row in images if isinstance(row, dict)]
    rows.sort(key=lambda row: row.get("variant") != "MAIN")
    found = (row.get(size) for row in rows for size in ("hi_res", "large", "thumb"))
    return [address for address in found if isinstance(address, str)]


def _columns(asin: str, raw: dict[str, Any]) -> dict[str, Any]:
    details = raw.get("details")
    if isinstance(details, str):
        try:
            details = read_json(details)
        except ValueError:
            details = None
    details = details if isinstance(details, dict) else {}
    categories = raw.get("categories")
    categories = [c for c in categories if isinstance(c, str)] if isinstance(categories, list) else []
    main = _text(raw.get("main_category"))
    attributes = {
        re.sub(r"\W+", "_", name.lower()).strip("_"): value
        for name in _DETAILS
        if (value := _text(details.get(name))) is not None
    }
    if main is not None and categories:
        attributes["main_category"] = main
    return {
        "id": asin,
        "title": _text(raw.get("title")),
        "brand": _text(details.get("Brand")) or _text(raw.get("store")),
        "category": categories[-1] if categories else main,
        "attributes": attributes,
        "price": _price(raw.get("price")),
    }


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _price(value: object) -> float | None:
    """Number, or the first number of a text such as "$12.99" or "from 1,012.99"; None for "—" and the like."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if 0 <= value < 1e12 else None
    match = re.search(r"\d[\d,]*(?:\.\d+)?", value) if isinstance(value, str) and len(value) < 64 else None
    return float(match.group().replace(",", "")) if match else None
