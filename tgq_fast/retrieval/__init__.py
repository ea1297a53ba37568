"""Item pool on disk, exact search, metrics and full-pool evaluation.

`topk` and `evaluate` are functions here, and modules of the same names hold them.
"""

from tgq_fast.retrieval.codes import Codes, build_codes
from tgq_fast.retrieval.distributed import group_topk
from tgq_fast.retrieval.embed import EmbedReport, embed_catalog, model_digest, open_embedded, zero_shot_embeddings
from tgq_fast.retrieval.evaluate import Comparison, Evaluation, compare, evaluate, format_table
from tgq_fast.retrieval.metrics import Interval
from tgq_fast.retrieval.pool import ItemPool, PoolHits
from tgq_fast.retrieval.pool_duplicates import Duplicate, duplicates
from tgq_fast.retrieval.pool_neighbours import NeighbourReport, neighbours
from tgq_fast.retrieval.topk import TopK, merge_topk, topk

__all__ = [
    "Codes",
    "Comparison",
    "Duplicate",
    "EmbedReport",
    "Evaluation",
    "Interval",
    "ItemPool",
    "NeighbourReport",
    "PoolHits",
    "TopK",
    "build_codes",
    "compare",
    "duplicates",
    "embed_catalog",
    "evaluate",
    "format_table",
    "group_topk",
    "merge_topk",
    "model_digest",
    "neighbours",
    "open_embedded",
    "topk",
    "zero_shot_embeddings",
]
