"""Importers of public data sets that users download themselves, into our catalogue form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tgq_fast.data.importers.abo import import_abo
from tgq_fast.data.importers.amazon2023 import import_amazon2023
from tgq_fast.data.importers.common import CatalogWriter, ImagePlacement, ImportReport
from tgq_fast.data.importers.fashion import import_fashion
from tgq_fast.data.importers.grocery import import_grocery
from tgq_fast.errors import ArgumentError, CatalogError

__all__ = ["SOURCES", "ImportReport", "import_catalog"]

SOURCES: dict[str, Callable[[Path, CatalogWriter], None]] = {
    "grocery": import_grocery,
    "fashion": import_fashion,
    "amazon2023": import_amazon2023,
    "abo": import_abo,
}
"""Source name → importer."""


def import_catalog(
    source: str,
    path: str | Path,
    out: str | Path,
    *,
    limit: int | None = None,
    copy: ImagePlacement = "link",
) -> ImportReport:
    """Convert a public data set.

    Args:
        source: "grocery" (GroceryStoreDataset), "fashion" (Kaggle fashion-product-images, also -small), "amazon2023"
            (Amazon Reviews 2023 item metadata) or "abo" (Amazon Berkeley Objects).
        path: the data set as downloaded and unpacked.
        out: catalogue folder to create; it must not hold a catalogue yet.
        limit: stop after this many items; None: all.
        copy: "link" makes hard links to the pictures where the file system allows and copies elsewhere; "copy" copies.

    Returns:
        what was imported and what was left out, with reasons.

    Raises:
        ArgumentError: unknown source, or `out` already holds a catalogue.
        CatalogError: `path` is not that data set, or nothing in it can be used.
    """
    if source not in SOURCES:
        raise ArgumentError("source", repr(source), "one of " + ", ".join(SOURCES))
    path = Path(path)
    if not path.exists():
        raise CatalogError(path, ["no such file or folder"], f"Download the {source} data set first.")
    with CatalogWriter(source, out, limit=limit, placement=copy) as writer:
        SOURCES[source](path, writer)
        if not writer.report.items:
            reasons = [f"{count} × {reason}" for reason, count in writer.report.skipped.items()]
            raise CatalogError(path, ["no usable item", *reasons])
    return writer.report
