"""Items that are nearly the same: groups whose members are linked by scores of at least a threshold.

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tgq_fast.arguments import checked
from tgq_fast.data.pairs import components
from tgq_fast.errors import ArgumentError
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.pool.reader import PoolReader
from tgq_fast.pool.search import PoolSearch
from tgq_fast.search.topk_arguments import MAX_K

__all__ = ["Duplicate", "duplicates"]

STEP = 4096  # items at a time
FIRST_K = 16


@dataclass(frozen=True)
class Duplicate:
    """One member of a group.

    Attributes:
        group: number of the group, from 1, in pool order of their first members.
        item: the id.
        nearest: the member that it is most like.
        score: their inner product.
    """

    group: int
    item: str
    nearest: str
    score: float


@checked
def duplicates(
    pool: ItemPool, threshold: float, *, progress: Callable[[int, int], None] | None = None
) -> list[Duplicate]:
    """Groups of items such that every member has a score of at least `threshold` with another one, and all are linked
    by such pairs; every pair of the pool is looked at. Members follow in pool order, groups in that of their first.

    Args:
        threshold: of the inner product: the cosine where the pool is normalised, as `tgq-fast embed` makes it.
        progress: called with (items done, items).
    """
    if not math.isfinite(threshold):
        raise ArgumentError("threshold", threshold, "a finite number, such as 0.98")
    reader, search = pool._state
    total = len(reader)
    query: list[np.ndarray] = []
    target: list[np.ndarray] = []
    best = np.full((2, total), -1.0)  # the nearest row, and its score
    for start in range(0, total, STEP):
        own = np.arange(start, min(start + STEP, total))
        for item, row, score, rank in _pairs(reader, search, own, threshold):
            query.append(item)
            target.append(row)
            first = rank == 0
            best[0, item[first]], best[1, item[first]] = row[first], score[first]
        if progress is not None:
            progress(start + len(own), total)
    none = np.empty(0, np.int64)
    label = components(np.full(total, -1, np.int64), np.concatenate([none, *query]), np.concatenate([none, *target]))
    members = np.flatnonzero(best[0] >= 0)
    names, nearest = reader.names(members), reader.names(best[0, members].astype(np.int64))
    _, first = np.unique(label[members], return_index=True)
    number = {int(label[members[row]]): group for group, row in enumerate(np.sort(first).tolist(), start=1)}
    found = [
        Duplicate(number[int(label[row])], str(name), str(other), float(best[1, row]))
        for row, name, other in zip(members.tolist(), names, nearest)
    ]
    return sorted(found, key=lambda one: one.group)


def _pairs(
    reader: PoolReader, search: PoolSearch, own: np.ndarray, threshold: float
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(item, row, score, rank) of every pair of these items with any row at or above the threshold."""
    found = []
    k, excluded = FIRST_K, torch.from_numpy(own)[:, None]
    while len(own):
        hits = search.best_rows(reader.take(own), k, excluded)
        scores, rows = hits.scores.numpy(), hits.indices.numpy()
        near = (rows >= 0) & (scores >= threshold)
        more = near[:, -1] & (k < len(reader))  # the last one is still near: there may be others
        there = near & ~more[:, None] if k < MAX_K else near
        number, rank = there.nonzero()
        found.append((own[number], rows[number, rank], scores[number, rank], rank + (excluded.shape[1] - 1)))
        if k == MAX_K:  # leave out what has been found
            excluded = torch.cat((excluded, hits.indices), dim=1)
        own, excluded = own[more], excluded[torch.from_numpy(more)]
        k = min(MAX_K, 8 * k)
    return found
