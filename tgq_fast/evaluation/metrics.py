"""Ranking metrics from the ranks of the positives, and their bootstrap intervals over groups of queries.

Input is one row per test pair (query q, positive p): which query it belongs to and the exact 1-based rank of p among
the candidates of q (the whole pool without q; ties: higher score first, then lower pool row). A positive that is not in
the pool has rank :data:`ABSENT`, which no metric counts as found.

Two families. *Pair* metrics average over pairs; *query* metrics average over queries.

=============  ======  ==============================================================================
name           family  per pair or query
=============  ======  ==============================================================================
``H@K``        pair    1 when p is in the top K: the share of test pairs that are found (docs/method.md)
``HR@K``       query   1 when any positive of q is in the top K
``Recall@K``   query   share of the positives of q that are in the top K
``NDCG@K``     query   binary relevance, discount 1 / log2(1 + rank), ideal over min(K, positives)
``MRR``        query   1 / rank of the best positive
=============  ======  ==============================================================================

Pair weights weigh pairs in ``H@K``; a query weighs as the mean weight of its pairs.

Source: H@K and full-pool protocol, TGQ-Former's public digest; the rest is standard; the intervals are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tgq_fast.errors import ArgumentError

__all__ = ["ABSENT", "Interval", "bootstrap_interval", "group_sums", "query_table", "ranking_metrics"]

ABSENT = np.iinfo(np.int64).max
"""Rank of a positive that cannot be found at any depth."""


@dataclass(frozen=True)
class Interval:
    """A metric with its bootstrap percentile interval; `low` and `high` equal `value` when none was asked for."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class QueryTable:
    """Per query sums from which every metric is a ratio.

    Attributes:
        queries: [U] distinct query labels, ascending.
        numerator, denominator: metric name → [U] float64; the metric is Σ numerator / Σ denominator.
    """

    queries: np.ndarray
    numerator: dict[str, np.ndarray]
    denominator: dict[str, np.ndarray]

    def value(self, name: str) -> float:
        """The metric over all queries; NaN without queries."""
        total = float(self.denominator[name].sum())
        return float(self.numerator[name].sum()) / total if total else float("nan")


def query_table(
    query: np.ndarray, rank: np.ndarray, ks: Sequence[int], *, weight: np.ndarray | None = None
) -> QueryTable:
    """Reduce pairs to per query sums.

    Args:
        query: [P] integer label of the query of each pair.
        rank: [P] int64 1-based rank of its positive, or :data:`ABSENT`. Ranks of one query are distinct.
        ks: cut-offs K.
        weight: [P] pair weights of at least 0. None: all one.

    Raises:
        ArgumentError: shapes differ, a rank or K below 1, or a negative or non-finite weight.
    """
    query, rank = np.asarray(query), np.asarray(rank)
    w = np.ones(len(query)) if weight is None else np.asarray(weight, dtype=np.float64)
    if query.ndim != 1 or rank.shape != query.shape or w.shape != query.shape:
        raise ArgumentError(
            "rank", f"shapes {query.shape}, {rank.shape}, {w.shape}", "equal 1-d query, rank and weight"
        )
    if rank.size and rank.min() < 1:
        raise ArgumentError("rank", int(rank.min()), "1-based ranks")
    if not ks or any(int(k) < 1 for k in ks):
        raise ArgumentError("ks", list(ks), "cut-offs of at least 1")
    if not np.isfinite(w).all() or (w < 0).any():
        raise ArgumentError("weight", "negative or non-finite", "finite weights of at least 0")

    queries, label = np.unique(query, return_inverse=True)
    users = len(queries)

    def per_query(values: np.ndarray) -> np.ndarray:
        return np.bincount(label, weights=values, minlength=users)

    positives = per_query(np.ones(len(query)))  # [U]
    pair_weight = per_query(w)
    query_weight = pair_weight / np.maximum(positives, 1)
    finite_rank = rank.astype(np.float64)
    best = np.full(users, np.inf)
    np.minimum.at(best, label, np.where(rank == ABSENT, np.inf, finite_rank))
    gain = np.where(rank == ABSENT, 0.0, 1.0 / np.log2(1.0 + finite_rank))  # [P]

    numerator: dict[str, np.ndarray] = {}
    denominator: dict[str, np.ndarray] = {}
    for k in ks:
        found = rank <= k  # ABSENT is larger than any K
        recall = per_query(found.astype(np.float64)) / np.maximum(positives, 1)
        ideal = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))))
        ndcg = per_query(gain * found) / ideal[np.minimum(positives, k).astype(np.int64)]
        numerator[f"H@{k}"], denominator[f"H@{k}"] = per_query(w * found), pair_weight
        for name, values in (("HR", (best <= k).astype(np.float64)), ("Recall", recall), ("NDCG", ndcg)):
            numerator[f"{name}@{k}"], denominator[f"{name}@{k}"] = query_weight * values, query_weight
    numerator["MRR"], denominator["MRR"] = query_weight / best, query_weight
    return QueryTable(queries, numerator, denominator)


def bootstrap_interval(
    numerator: np.ndarray,
    denominator: np.ndarray,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of Σ numerator / Σ denominator when units are drawn with replacement.

    The draws depend on (seed, number of units) only, so two models evaluated on the same queries see the same draws.

    Args:
        numerator, denominator: [U] sums of each unit: a query, or better a group of them (see :func:`group_sums`).
        samples: bootstrap draws.
        confidence: mass inside the interval.

    Raises:
        ArgumentError: samples below 1 or confidence outside (0, 1).
    """
    if samples < 1:
        raise ArgumentError("samples", samples, "at least 1 draw")
    if not 0 < confidence < 1:
        raise ArgumentError("confidence", confidence, "a probability in (0, 1)")
    users = len(numerator)
    if not users:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    values = np.empty(samples)
    for draw in range(samples):  # one draw at a time: memory of one query list, whatever `samples`
        counts = np.bincount(rng.integers(users, size=users), minlength=users)
        total = counts @ denominator
        values[draw] = counts @ numerator / total if total else np.nan
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values, (tail, 1 - tail)) if np.isfinite(values).any() else (np.nan, np.nan)
    return float(low), float(high)


def group_sums(values: np.ndarray, group: np.ndarray | None) -> np.ndarray:
    """[U] per query sums → [G] sums of their groups; queries of one group are no independent draws.

    Args:
        group: [U] integer label of each query; None: each query is its own.
    """
    if group is None:
        return values
    _, label = np.unique(group, return_inverse=True)
    return np.bincount(label, weights=values)


def ranking_metrics(
    query: np.ndarray,
    rank: np.ndarray,
    ks: Sequence[int],
    *,
    weight: np.ndarray | None = None,
    group: np.ndarray | None = None,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """All metrics of the module with intervals; arguments of :func:`query_table` and :func:`bootstrap_interval`.

    Args:
        group: [U] label of the group that each of `np.unique(query)` belongs to; the bootstrap draws groups. None: it
            draws queries.
        samples: 0 skips the bootstrap.
    """
    table = query_table(query, rank, ks, weight=weight)
    metrics: dict[str, Interval] = {}
    for name in table.numerator:
        value = table.value(name)
        low, high = value, value
        if samples:
            sums = group_sums(table.numerator[name], group), group_sums(table.denominator[name], group)
            low, high = bootstrap_interval(*sums, samples=samples, confidence=confidence, seed=seed)
        metrics[name] = Interval(value, low, high)
    return metrics
