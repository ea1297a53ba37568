"""Pictures, runs of an importer and what they give, for the tests of importers of shops."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

from PIL import Image

from tgq_fast.data import Catalog, ImportReport, import_catalog
from tgq_fast.data.importers import ShopOptions


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (number * 37 % 256, number * 91 % 256, number * 17 % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def run(source: str, path: Path, **options: Any) -> tuple[Catalog, ImportReport]:
    out = path.parent / f"out-{source}-{time.monotonic_ns()}"
    report = import_catalog(source, path, out, options=ShopOptions(download=False, **options))
    catalog = Catalog.load(out)
    assert catalog.report.ok and len(catalog) == report.items
    return catalog, report


def bytes_of(catalog: Catalog, item_id: str) -> bytes:
    return catalog.picture(catalog.items[catalog.index(item_id)]).open().read()
