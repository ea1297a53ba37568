"""Searches whose filter depends on the query's item: one search for all queries that share a filter, exactly.

Conditions that many queries share (`category = same`) become a mask of the pool. Those that few share (`price within
30%`) are rules, which the search tests on hits. At most so many items of a group is neither: such searches ask for more
than k, a query that is left with too few asks for more, and at last is searched by itself. So no answer has fewer than
k items unless no more items meet the conditions, and order and ties are those of a search over the items that do.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tgq_fast.pool.filters import Selection
from tgq_fast.pool.search import PoolSearch
from tgq_fast.reference import TopK
from tgq_fast.search.rules import Rule
from tgq_fast.search.topk_arguments import MAX_K

SAMPLED = 4096  # rows from which on a search takes its first thresholds from a sample
PROBES = 16  # queries that say how deep the answers under a rule lie
WIDER = 16  # times k: how deep they look

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
    for members, allowed in selection.groups(own):
        rules = selection.rules(own[members])
        banned = None if excluded is None else excluded[members]
        asked = queries[members]
        among = _expected(search, asked, rules, banned, allowed, k)
        if per_group is None:
            found = search.best_rows(asked, k, banned, allowed, rules=rules, sampled_k=among)
            answers.put(members, found.scores.numpy(), found.indices.numpy(), found.indices.numpy() >= 0)
            continue
        size, width = int(allowed.sum()), 2 * k + 2
        left = np.arange(len(members))
        while len(left) and width < 4 * MAX_K:
            width = max(1, min(MAX_K, width, size))
            here = torch.from_numpy(left)
            some = [rule.of_queries(here) for rule in rules]
            barred = None if banned is None else banned[here]
            found = search.best_rows(asked[here], width, barred, allowed, rules=some, sampled_k=among * width // k)
            scores, rows = found.scores.numpy(), found.indices.numpy()
            kept = per_group.keep(rows, rows >= 0)
            settled = (kept.sum(axis=1) >= k) | (rows[:, -1] < 0) | (width >= size)
            answers.put(members[left[settled]], scores[settled], rows[settled], kept[settled])
            left, width = left[~settled], 4 * MAX_K if width == MAX_K else 4 * width
        for at in left.tolist():
            alone = [rule.of_queries(torch.tensor([at], device="cpu")) for rule in rules]
            barred = None if banned is None else banned[at : at + 1]
            one = _one_by_one(search, asked[at : at + 1], k, barred, allowed, per_group, alone)
            answers.put(members[[at]], *one, one[1] >= 0)
    return TopK(torch.from_numpy(answers.scores), torch.from_numpy(answers.rows))


def _expected(
    search: PoolSearch, queries: Tensor, rules: Sequence[Rule], excluded: Tensor | None, allowed: np.ndarray, k: int
) -> int:
    """How many rows the k best that meet the rules are among, for most queries: a few are asked without rules."""
    size = int(allowed.sum())
    if not rules or size < SAMPLED:
        return k
    some = torch.arange(0, len(queries), max(1, len(queries) // PROBES))
    barred = None if excluded is None else excluded[some]
    found = search.best_rows(queries[some], min(MAX_K, WIDER * k, size), barred, allowed)
    met = found.indices >= 0
    for rule in rules:
        asked = rule.of_queries(some)
        met &= torch.stack(
            [asked.of_rows(rows).met(slice(q, q + 1), slice(None))[0] for q, rows in enumerate(found.indices)]
        )
    kept, width = met.sum(dim=1), met.shape[1]
    depth = torch.where(kept >= k, (met.cumsum(dim=1) < k).sum(dim=1) + 1, width * k // kept.clamp(min=1))
    return min(int(depth.double().quantile(0.9)), size)


def _one_by_one(
    search: PoolSearch,
    query: Tensor,
    k: int,
    excluded: Tensor | None,
    allowed: np.ndarray,
    per_group: PerGroup,
    rules: Sequence[Rule],
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows [1, k] of one query; what has been found leaves the mask, with its group once that is full."""
    allowed = allowed.copy()
    scores, rows = np.full((1, k), -np.inf, np.float32), np.full((1, k), -1, np.int64)
    count: dict[int, int] = {}
    filled = 0
    while filled < k:
        found = search.best_rows(query, min(MAX_K, 4 * k), excluded, allowed, rules=rules)
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
