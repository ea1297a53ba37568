"""Catalogues: typed rows, pairs, pictures, importers, the embedded demo catalogue and corruptions."""

from tgq_fast.data.catalog import Catalog, Policy
from tgq_fast.data.corruption import corrupt_image, corrupt_metadata, item_seed, useful_text
from tgq_fast.data.demo import write_demo_catalog
from tgq_fast.data.images import ImageLimits, load_image, validate_images
from tgq_fast.data.importers import ImportReport, import_catalog
from tgq_fast.data.items import Item, clean_text, parse_item
from tgq_fast.data.pairs import SPLITS, Pairs, PairSet
from tgq_fast.data.rejects import Reject, RejectLog
from tgq_fast.data.validation import ValidationReport

__all__ = [
    "SPLITS",
    "Catalog",
    "ImageLimits",
    "ImportReport",
    "Item",
    "PairSet",
    "Pairs",
    "Policy",
    "Reject",
    "RejectLog",
    "ValidationReport",
    "clean_text",
    "corrupt_image",
    "corrupt_metadata",
    "import_catalog",
    "item_seed",
    "load_image",
    "parse_item",
    "useful_text",
    "validate_images",
    "write_demo_catalog",
]
