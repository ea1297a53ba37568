"""Importers into our catalogue form: shops' own exports, tables, folders, and public data sets that users download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tgq_fast.arguments import checked
from tgq_fast.data.importers.abo import import_abo
from tgq_fast.data.importers.amazon2023 import import_amazon2023
from tgq_fast.data.importers.common import CatalogWriter, ImagePlacement, ImportReport
from tgq_fast.data.importers.download import DownloadLimits
from tgq_fast.data.importers.fashion import import_fashion
from tgq_fast.data.importers.folders import import_dataset, import_pictures
from tgq_fast.data.importers.grocery import import_grocery
from tgq_fast.data.importers.merchant import import_merchant
from tgq_fast.data.importers.shards import import_parquet, import_webdataset
from tgq_fast.data.importers.shop import ShopOptions
from tgq_fast.data.importers.shopify import import_shopify
from tgq_fast.data.importers.table import import_table
from tgq_fast.data.importers.woocommerce import import_woocommerce
from tgq_fast.errors import ArgumentError, CatalogError
from tgq_fast.io.places import RemotePath, place

__all__ = ["PUBLIC", "SHOP", "DownloadLimits", "ImportReport", "ShopOptions", "import_catalog"]

PUBLIC: dict[str, Callable[[Path, CatalogWriter], None]] = {
    "grocery": import_grocery,
    "fashion": import_fashion,
    "amazon2023": import_amazon2023,
    "abo": import_abo,
}
"""Public data set → importer."""

SHOP: dict[str, Callable[[Path, CatalogWriter, ShopOptions], None]] = {
    "merchant": import_merchant,
    "shopify": import_shopify,
    "woocommerce": import_woocommerce,
    "table": import_table,
    "pictures": import_pictures,
    "dataset": import_dataset,
    "parquet": import_parquet,
    "webdataset": import_webdataset,
}
"""Form of a shop's own data → importer."""


REMOTE = ("parquet", "webdataset")
"""Sources that are read from object stores, too."""


@checked
def import_catalog(
    source: str,
    path: str | Path,
    out: str | Path,
    *,
    limit: int | None = None,
    copy: ImagePlacement = "link",
    options: ShopOptions | None = None,
) -> ImportReport:
    """Convert a shop's export or a public data set.

    Args:
        source: "merchant" (Google Merchant feed: RSS, Atom or tab-separated), "shopify" or "woocommerce" (product CSV),
            "table" (CSV, TSV, Excel, Parquet, JSON lines), "pictures" (a folder of them), "dataset" (what `datasets`
            saved), "parquet" or "webdataset" (files or folders of them, in an object store, too); or a public data set:
            "grocery" (GroceryStoreDataset), "fashion" (Kaggle fashion-product-images, also -small), "amazon2023"
            (Amazon Reviews 2023 item metadata), "abo" (Amazon Berkeley Objects).
        path: the export, or the data set as downloaded and unpacked.
        out: catalogue folder to create; it must not hold a catalogue yet.
        limit: stop after this many items; None: all.
        copy: "link" makes hard links to the pictures where the file system allows and copies elsewhere; "copy" copies.
        options: how a shop's export is read.

    Returns:
        what was imported and what was left out, with reasons.

    Raises:
        ArgumentError: unknown source, `out` already holds a catalogue, another import is writing there, or
            `options.images` is no folder.
        CatalogError: `path` is not of that form, or nothing in it can be used.
        StorageError: `out` cannot be written to.
    """
    if source not in PUBLIC and source not in SHOP:
        raise ArgumentError("source", repr(source), "one of " + ", ".join((*SHOP, *PUBLIC)))
    if options is not None and source in PUBLIC:
        raise ArgumentError("options", "given", f"None: {source} is read in one way")
    there = place(path)
    if isinstance(there, RemotePath) and source not in REMOTE:
        raise ArgumentError("path", str(there), "a path of this machine; of stores, " + " and ".join(REMOTE) + " read")
    try:
        if not there.exists():
            raise CatalogError(there, ["no such file or folder"])
    except OSError as error:
        raise CatalogError(there, [f"cannot be read: {error}"]) from error
    path = Path(there)
    if source in ("merchant", "shopify", "woocommerce") and path.is_dir():
        raise CatalogError(path, ["a folder; expected the exported file"])
    if options is not None and options.images is not None and not options.images.is_dir():
        raise ArgumentError("images", str(options.images), "a folder of pictures")
    with CatalogWriter(source, out, limit=limit, placement=copy) as writer:
        if source in SHOP:
            SHOP[source](path, writer, options or ShopOptions())
        else:
            PUBLIC[source](path, writer)
        if not writer.report.items:
            reasons = [f"{count} × {reason}" for reason, count in writer.report.skipped.items()]
            if "picture missing" in writer.report.skipped and source in SHOP:
                reasons.append(f"pictures are looked for under {path.parent.resolve()}; `images` names another folder")
            raise CatalogError(path, ["no usable item", *reasons, *writer.report.examples[:5]])
    return writer.report
