"""Searches whose filter depends on the query's item: one search for all queries that share a filter, exactly.

Conditions that many queries share (`category = same`) become a mask of the pool. Those that few share (`price within
30%`, one neighbour per group) are checked on the hits of a search that asked for more than k; a query that is left with
too few asks for more, and at last is searched by itself with everything in its mask. So no answer has fewer than k
items unless no more items meet the conditions, and order and ties are those of a search over the items that do.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgq_fast.pool.filters import Selection
from tgq_fast.pool.search import PoolSearch
from tgq_fast.reference import TopK
from tgq_fast.search.topk_arguments import MAX_K

SAMPLE = 64

__all__ = ["PerGroup", "filtered_search"]


@dataclass(frozen=True)
class PerGroup:
    """At most `most` items of a group in an answer.

    Attributes:
        codes: [N] int64 group of each pool row; items with a negative code are in no group.
        most: how many.
    """

    codes: np.ndarray
    most: int

    def keep(self, rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """[Q, w] bool: `kept` without the hits that come after `most` kept ones of their group.

        Args:
            rows: [Q, w] pool rows, best first.
        """
        codes = np.where(kept, self.codes[rows], -1)
        alone = codes < 0
        codes = np.where(alone, -1 - np.arange(codes.shape[1]), codes)  # told apart
        order = np.argsort(codes, axis=1, kind="stable")
        ordered = np.take_along_axis(codes, order, axis=1)
        place = np.arange(codes.shape[1])
        first = np.where(np.diff(ordered, axis=1, prepend=ordered[:, :1] - 1) != 0, place, 0)
        number = place - np.maximum.accumulate(first, axis=1)  # how many of the group come before
        few = np.empty_like(kept)
        np.put_along_axis(few, order, number < self.most, axis=1)
        return kept & few


class _Answers:
    """[Q, k] hits that are filled in query by query."""

    def __init__(self, queries: int, k: int) -> None:
        self.scores = np.full((queries, k), -np.inf, dtype=np.float32)
        self.rows = np.full((queries, k), -1, dtype=np.int64)

    def put(self, members: np.ndarray, scores: np.ndarray, rows: np.ndarray, kept: np.ndarray) -> None:
        """The first k kept hits of each of `members`."""
        k = self.rows.shape[1]
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        there = np.take_along_axis(kept, order, axis=1)
        width = order.shape[1]
        self.rows[members, :width] = np.where(there, np.take_along_axis(rows, order, axis=1), -1)
        self.scores[members, :width] = np.where(there, np.take_along_axis(scores, order, axis=1), -np.inf)


def filtered_search(
    search: PoolSearch,
    queries: Tensor,
    own: np.ndarray,
    k: int,
    excluded: Tensor | None,
    selection: Selection,
    per_group: PerGroup | None = None,
) -> TopK:
    """The k best items for each query among those that meet its conditions.

    Args:
        queries: [Q, D] finite, on the CPU.
        own: [Q] pool row of each query's item, which relative conditions compare with; -1 only where there are none.
        excluded: [Q, X] int64 pool rows that a query must not get; -1 for none.

    Returns:
        scores [Q, k] and pool rows [Q, k]; (-inf, -1) where fewer meet the conditions.
    """
    answers = _Answers(len(queries), k)
    checked = selection.checked or per_group is not None
    for members, allowed in selection.groups(own):
        count = int(allowed.sum())
        width = _width(selection, own[members], allowed, k, per_group) if checked else k
        while len(members):
            banned = None if excluded is None else excluded[members]
            found = search.best_rows(queries[members], width, banned, allowed)
            scores, rows = found.scores.numpy(), found.indices.numpy()
            kept = rows >= 0
            if selection.checked:
                kept &= selection.check(own[members][:, None], rows)
            if per_group is not None:
                kept = per_group.keep(rows, kept)
            settled = (kept.sum(axis=1) >= k) | (rows[:, -1] < 0) | (width >= count)
            answers.put(members[settled], scores[settled], rows[settled], kept[settled])
            members = members[~settled]
            if width == MAX_K:
                break  # those that are left are searched one by one
            width = min(MAX_K, 4 * width)
        for number in members.tolist():
            mask = allowed & selection.check(own[number], np.arange(len(allowed))) if selection.checked else allowed
            banned = None if excluded is None else excluded[number : number + 1]
            one = _one_by_one(search, queries[number : number + 1], k, banned, mask, per_group)
            answers.put(np.array([number]), *one, one[1] >= 0)
    return TopK(torch.from_numpy(answers.scores), torch.from_numpy(answers.rows))


def _width(selection: Selection, own: np.ndarray, allowed: np.ndarray, k: int, per_group: PerGroup | None) -> int:
    """How many hits to ask for, so that most queries are left with k: from the share of a sample that would be kept."""
    rows = np.flatnonzero(allowed)
    kept = 1.0
    if selection.checked and len(rows):
        some = rows[:: max(1, len(rows) // SAMPLE)]
        each = selection.check(own[:: max(1, len(own) // SAMPLE), None], some).mean(axis=1)
        kept = max(float(np.quantile(each, 0.1)), 1e-3)
    wanted = 2 * k if per_group is not None else k
    # Hits that fall away at random leave `wanted` of them but for three deviations.
    wanted = int((wanted + 3 * np.sqrt(wanted * (1 - kept))) / kept) + 2
    return max(1, min(MAX_K, wanted, len(rows)))


def _one_by_one(
    search: PoolSearch,
    query: Tensor,
    k: int,
    excluded: Tensor | None,
    allowed: np.ndarray,
    per_group: PerGroup | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows [1, k] of one query; what has been found leaves the mask, with its group once that is full."""
    if per_group is None:
        found = search.best_rows(query, k, excluded, allowed)
        return found.scores.numpy(), found.indices.numpy()
    allowed = allowed.copy()
    scores, rows = np.full((1, k), -np.inf, np.float32), np.full((1, k), -1, np.int64)
    count: dict[int, int] = {}
    filled = 0
    while filled < k:
        found = search.best_rows(query, min(MAX_K, 4 * k), excluded, allowed)
        for score, row in zip(found.scores[0].tolist(), found.indices[0].tolist()):
            if row < 0 or filled == k:
                return scores, rows
            group = int(per_group.codes[row])
            allowed[row] = False
            if group >= 0:
                if count.get(group, 0) == per_group.most:
                    continue
                count[group] = count.get(group, 0) + 1
                if count[group] == per_group.most:
                    allowed &= per_group.codes != group
            scores[0, filled], rows[0, filled] = score, row
            filled += 1
    return scores, rows
