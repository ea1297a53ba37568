"""Pools to faiss indexes and back.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgq_fast.arguments import checked
from tgq_fast.errors import ArgumentError, DependencyError

if TYPE_CHECKING:
    from tgq_fast.pool.item_pool import ItemPool

STEP = 65_536  # rows read from an index at a time


def to_faiss(pool: ItemPool) -> Any:
    """A `faiss.IndexFlatIP` with the pool's rows in order (its labels are pool rows, see :meth:`ItemPool.ids_at`)."""
    index = _faiss().IndexFlatIP(pool.dims)
    for _, rows in pool.batches(STEP):
        index.add(rows.float().numpy())
    return index


@checked
def from_faiss(cls: type[ItemPool], index: Any, ids: Sequence[str], path: str | Path, **options: Any) -> ItemPool:
    """Write a pool from a faiss index that gives its vectors back row by row; returns it opened for reading.

    Args:
        index: inner-product index; row i belongs to ids[i].
        options: passed to :meth:`ItemPool.create`.

    Raises:
        ArgumentError: another kind of index, metric or number of ids.
    """
    index = check_index(index, ids)
    with cls.create(path, dims=index.d, **options) as pool:
        for start in range(0, index.ntotal, STEP):
            rows = index.reconstruct_n(start, min(STEP, index.ntotal - start))
            pool.append(ids[start : start + len(rows)], rows)
    return cls.open(path)


def check_index(index: Any, ids: Sequence[str]) -> Any:
    """The index, if its row i can be read back and belongs to ids[i]; ArgumentError otherwise.

    Only flat indexes and graphs over one qualify: others keep labels of their own (and give vectors in another order),
    or cannot be asked for a vector without harm.
    """
    faiss = _faiss()
    if not isinstance(index, faiss.Index):
        raise ArgumentError("index", type(index).__name__, "a faiss.Index of floats")
    index = faiss.downcast_index(index)
    storage = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
    if not isinstance(storage, faiss.IndexFlatCodes):
        raise ArgumentError(
            "index",
            type(index).__name__,
            "an index that gives its vectors back row by row: IndexFlatIP, IndexScalarQuantizer, IndexPQ, IndexHNSW",
            "Of an IndexIDMap pass its .index, and as ids those of its .id_map in that order.",
        )
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ArgumentError("index", f"metric {index.metric_type}", "an inner-product index (METRIC_INNER_PRODUCT)")
    if not index.is_trained or len(ids) != index.ntotal:
        given = f"{len(ids)} ids" if index.is_trained else "an index that is not trained"
        raise ArgumentError("ids", given, f"{index.ntotal}, one per vector of the index")
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise DependencyError("faiss is not installed; pip install 'tgq-fast[faiss]'") from None
    return faiss
