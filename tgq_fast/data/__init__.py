"""Catalogues: typed rows, pairs, pictures, importers, the embedded demo catalogue and corruptions."""

from tgq_fast.data.catalog import Catalog, Policy
from tgq_fast.data.images import ImageLimits, load_image, validate_images
from tgq_fast.data.items import Item, clean_text, parse_item
from tgq_fast.data.pairs import SPLITS, Pairs, PairSet
from tgq_fast.data.rejects import Reject, RejectLog
from tgq_fast.data.validation import ValidationReport

__all__ = [
    "SPLITS",
    "Catalog",
    "ImageLimits",
    "Item",
    "PairSet",
    "Pairs",
    "Policy",
    "Reject",
    "RejectLog",
    "ValidationReport",
    "clean_text",
    "load_image",
    "parse_item",
    "validate_images",
]
