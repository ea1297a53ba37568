"""The item pool on disk: embedding a catalogue into it, its files, searching it, tables of neighbours, exports."""

from tgq_fast.pool.embed import EmbedReport, embed_catalog, model_digest, open_embedded, zero_shot_embeddings
from tgq_fast.pool.item_pool import ItemPool, PoolHits
from tgq_fast.pool.near_duplicates import Duplicate, duplicates
from tgq_fast.pool.neighbour_table import NeighbourReport, neighbours

__all__ = [
    "Duplicate",
    "EmbedReport",
    "ItemPool",
    "NeighbourReport",
    "PoolHits",
    "duplicates",
    "embed_catalog",
    "model_digest",
    "neighbours",
    "open_embedded",
    "zero_shot_embeddings",
]
