"""Full-pool evaluation: every item of the pool is a candidate, the query itself is excluded.

Source: protocol, docs/method.md (H@K of TGQ-Former's public digest over the whole pool); intervals and the exact ranks
beyond the search depth are ours.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tgq_fast.arguments import checked
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError, NonFiniteError
from tgq_fast.evaluation.metrics import (
    ABSENT,
    Interval,
    bootstrap_interval,
    group_sums,
    query_table,
    ranking_metrics,
)
from tgq_fast.evaluation.ranks import Pool, positive_ranks
from tgq_fast.io.files import write_atomic
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.search.topk_arguments import MAX_K, as_tensor

if TYPE_CHECKING:
    from tgq_fast.data import Catalog

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]

_HELD_BYTES = 512 << 20  # a pool of no more fp32 rows is read at once: a search of all its rows is one triangle then


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one embedding of a catalogue.

    Attributes:
        split: which pairs were tested.
        pool_size: number of candidates, the query included.
        queries, pairs: how many were tested.
        missing_pairs: pairs whose query or target is not in the pool; they count as not found.
        ks: cut-offs.
        metrics: name → :class:`Interval`; names as in :mod:`tgq_fast.evaluation.metrics`, and "1-NN", the share of
            queries whose nearest neighbour has the same `group_id` (only when every query has one).
        confidence, samples, seed: of the bootstrap, which draws groups: connected components of the catalogue.
        query, target, rank, weight: [P] catalogue rows, exact rank (ABSENT when missing) and weight of every pair.
        group: [U] component of each of `np.unique(query)`.
    """

    split: str
    pool_size: int
    queries: int
    pairs: int
    missing_pairs: int
    ks: tuple[int, ...]
    metrics: dict[str, Interval]
    confidence: float
    samples: int
    seed: int
    query: np.ndarray = field(repr=False)
    target: np.ndarray = field(repr=False)
    rank: np.ndarray = field(repr=False)
    weight: np.ndarray = field(repr=False)
    group: np.ndarray = field(repr=False)

    def __getitem__(self, name: str) -> float:
        """Value of a metric by name, such as "H@10"."""
        if name not in self.metrics:
            raise ArgumentError("metric", repr(name), "one of " + ", ".join(self.metrics))
        return self.metrics[name].value

    def _repr_html_(self) -> str:
        """Metrics with their intervals as a table, for notebooks."""
        rows = "".join(
            f"<tr><th>{name}</th><td>{m.value:.4f}</td><td>{m.low:.4f} … {m.high:.4f}</td></tr>"
            for name, m in self.metrics.items()
        )
        said = f"{html.escape(self.split)}: {self.queries} queries, pool of {self.pool_size}"
        head = f"<tr><th></th><th>value</th><th>{self.confidence:.0%} interval</th></tr>"
        return f"<table><caption>{said}</caption>{head}{rows}</table>"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary; undefined numbers (no test pairs) are null."""

        def number(value: float) -> float | None:
            return value if np.isfinite(value) else None

        return {
            "split": self.split,
            "pool_size": self.pool_size,
            "queries": self.queries,
            "pairs": self.pairs,
            "missing_pairs": self.missing_pairs,
            "ks": list(self.ks),
            "bootstrap": {"samples": self.samples, "confidence": self.confidence, "seed": self.seed},
            "metrics": {
                name: {"value": number(m.value), "low": number(m.low), "high": number(m.high)}
                for name, m in self.metrics.items()
            },
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The summary as JSON text; also written to `path`, atomically, when given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_atomic(path, text.encode("utf-8"))
        return text

    def table(self) -> str:
        """Plain text: one row per metric family, one column per K, intervals in brackets."""
        return format_table({"": self})


def format_table(evaluations: dict[str, Evaluation]) -> str:
    """Several evaluations side by side, one row per model and metric family."""
    if not evaluations:
        return ""
    first = next(iter(evaluations.values()))
    rows = [["model", "metric", *(f"K={k}" for k in first.ks)]]
    for name, evaluation in evaluations.items():

        def cell(metric: str, source: Evaluation = evaluation) -> str:
            m = source.metrics.get(metric)
            if m is None:
                return ""
            return f"{m.value:.4f}" + (f" [{m.low:.4f}, {m.high:.4f}]" if source.samples else "")

        for family in ("H", "HR", "Recall", "NDCG"):
            rows.append([name, family + "@K", *(cell(f"{family}@{k}") for k in first.ks)])
        for single in ("MRR", "1-NN"):
            if single in evaluation.metrics:
                rows.append([name, single, cell(single)])
    if set(evaluations) == {""}:
        rows = [row[1:] for row in rows]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    notes = f"{first.split}: {first.queries} queries, {first.pairs} pairs, pool of {first.pool_size}"
    if first.missing_pairs:
        notes += f", {first.missing_pairs} pairs with an item outside the pool count as not found"
    return "\n".join([notes, lines[0], "-" * len(lines[0]), *lines[1:]])


@plain_defaults()
@checked
def evaluate(
    catalog: Catalog,
    embedded: Pool | Tensor | np.ndarray,
    *,
    queries: Tensor | np.ndarray | None = None,
    ks: Sequence[int] = (1, 10, 100),
    split: str = "test",
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Evaluation:
    """Evaluate embeddings on the pairs of one split; the pool is every embedded item.

    Args:
        catalog: the catalogue; its pairs name queries and targets.
        embedded: a pool of the catalogue (items may be missing from it), :class:`~tgq_fast.pool.ItemPool` or
            :class:`~tgq_fast.scale.ShardedPool`, of any size; or [n, D] in catalogue order, where a row of NaN is an
            item without a usable picture: it is no candidate, and pairs with it are missing.
        queries: [n, D] in catalogue order, what items ask with as queries where that is not what stands in the pool
            (a corrupted picture, say). None: their own embedding.
        ks: cut-offs.
        split: "train", "validation" or "test".
        samples: bootstrap draws over groups (connected components); 0 for none.
        group: a `torch.distributed` group whose ranks share the work on an :class:`~tgq_fast.pool.ItemPool`: each calls
            with the same arguments and gets the whole, the very same evaluation.

    Returns:
        :class:`Evaluation`.

    Raises:
        ArgumentError: wrong shape, no pairs in the split, or a pool of other items.
        NonFiniteError: embeddings hold NaN or infinity.
    """
    cuts = tuple(sorted({int(k) for k in ks}))
    if not cuts or cuts[0] < 1:
        raise ArgumentError("ks", list(ks), "cut-offs of at least 1")
    pairs = catalog.split_pairs(split, every=True)
    if not len(pairs.query):
        raise ArgumentError("split", repr(split), "a split with at least one pair", "check the catalogue's pairs file")
    component = catalog.components()[np.unique(pairs.query)]  # before any of the pool is in memory
    candidates, row_of = _candidates(catalog, embedded, shared=group is not None)
    query_row, target_row = row_of[pairs.query], row_of[pairs.target]  # pool rows, -1 when not embedded
    known = (query_row >= 0) & (target_row >= 0)
    rank = np.full(len(pairs.query), ABSENT, dtype=np.int64)
    width = candidates.shape[1] if isinstance(candidates, Tensor) else candidates.dims
    asked = None if queries is None else _Asked(catalog, queries, width, row_of)
    if asked is not None:
        known[known] = torch.isfinite(asked[torch.from_numpy(query_row[known])]).all(dim=1).numpy()
    depth = min(cuts[-1], MAX_K)
    found, hits = positive_ranks(
        candidates, query_row[known], target_row[known], depth=depth, asked=asked, progress=progress, group=group
    )
    rank[known] = found
    weight = np.asarray(pairs.weight, dtype=np.float64)
    metrics = ranking_metrics(
        pairs.query, rank, cuts, weight=weight, group=component, samples=samples, confidence=confidence, seed=seed
    )
    nearest = _nearest_neighbour(catalog, np.unique(query_row[known]), hits[:, 0].numpy(), row_of)
    if nearest is not None:
        value = float(nearest.mean())
        low, high = value, value
        if samples:
            mine = np.isin(np.unique(pairs.query), pairs.query[known])
            sums = group_sums(nearest, component[mine]), group_sums(np.ones(len(nearest)), component[mine])
            low, high = bootstrap_interval(*sums, samples=samples, confidence=confidence, seed=seed)
        metrics["1-NN"] = Interval(value, low, high)
    return Evaluation(
        split=split,
        pool_size=len(candidates),
        queries=len(np.unique(pairs.query)),
        pairs=len(pairs.query),
        missing_pairs=int((~known).sum()),
        ks=cuts,
        metrics=metrics,
        confidence=confidence,
        samples=samples,
        seed=seed,
        query=pairs.query,
        target=pairs.target,
        rank=rank,
        weight=weight,
        group=component,
    )


class _Asked:
    """What embedded rows ask with; NaN where a query has no embedding."""

    def __init__(self, catalog: Catalog, queries: Tensor | np.ndarray, width: int, row_of: np.ndarray) -> None:
        size = len(catalog.items)
        self._given = as_tensor("queries", queries).cpu()
        if self._given.shape != (size, width) or not self._given.is_floating_point():
            raise ArgumentError(
                "queries", f"{tuple(self._given.shape)} {self._given.dtype}", f"floating [{size}, {width}]"
            )
        items = np.flatnonzero(row_of >= 0)
        item_of = np.empty(len(items), dtype=np.int64)
        item_of[row_of[items]] = items
        self._item_of = torch.from_numpy(item_of)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._given[self._item_of[rows]].float()


def _candidates(
    catalog: Catalog, embedded: Pool | Tensor | np.ndarray, *, shared: bool
) -> tuple[Tensor | Pool, np.ndarray]:
    """fp32 [N, D], or the pool where that is large or shared, and, for each catalogue row, its row in them or -1."""
    size = len(catalog.items)
    if not isinstance(embedded, Tensor | np.ndarray):
        if not hasattr(embedded, "count_before"):
            raise ArgumentError("embedded", f"a {type(embedded).__name__}", "a pool, or [n, D] rows of the catalogue")
        row_of = embedded.rows(catalog.items.text("id"), missing="mark")
        if (row_of >= 0).sum() != len(embedded):
            raise ArgumentError(
                "pool",
                f"{len(embedded)} items, {(row_of >= 0).sum()} of them in the catalogue",
                "a pool of this catalogue",
            )
        small = 4 * len(embedded) * embedded.dims <= _HELD_BYTES
        if small and not shared and isinstance(embedded, ItemPool):
            return embedded.embeddings().float(), row_of
        return embedded, row_of
    if shared:
        raise ArgumentError("group", f"with a {type(embedded).__name__}", "an ItemPool, which its ranks can share")
    vectors = as_tensor("embeddings", embedded).cpu()
    if vectors.ndim != 2 or vectors.shape[0] != size or not vectors.is_floating_point():
        raise ArgumentError(
            "embeddings", f"{tuple(vectors.shape)} {vectors.dtype}", f"floating [{size}, D], one row per item"
        )
    absent = torch.isnan(vectors).all(dim=1)
    bad = (~torch.isfinite(vectors).all(dim=1) & ~absent).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteError("embeddings", [catalog.items[i].id for i in bad[:20]], len(bad))
    row_of = np.where(absent.numpy(), -1, np.cumsum(~absent.numpy()) - 1).astype(np.int64)
    return (vectors[~absent] if bool(absent.any()) else vectors).float(), row_of


def _nearest_neighbour(
    catalog: Catalog, query_rows: np.ndarray, nearest: np.ndarray, row_of: np.ndarray
) -> np.ndarray | None:
    """[U] 1.0 where the nearest neighbour shares the query's `group_id`; None when a query has none."""
    group_of = catalog.items.groups()
    if (group_of < 0).all():
        return None
    item_of = np.full(int(row_of.max(initial=-1)) + 1, -1, dtype=np.int64)
    item_of[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
    groups = group_of[item_of[query_rows]]
    if not len(groups) or (groups < 0).any():
        return None
    same = (nearest >= 0) & (group_of[item_of[nearest]] == groups)
    return same.astype(np.float64)


@dataclass(frozen=True)
class Comparison:
    """Difference `first − second` of a metric over the same queries, and its paired bootstrap interval over groups."""

    metric: str
    difference: Interval


@checked
def compare(first: Evaluation, second: Evaluation, metric: str) -> Comparison:
    """Paired comparison: both models are scored on the same bootstrap draws of groups.

    Raises:
        ArgumentError: the evaluations are not over the same pairs, or an unknown metric.
    """
    if not (np.array_equal(first.query, second.query) and np.array_equal(first.target, second.target)):
        raise ArgumentError("second", "another set of pairs", "an evaluation over the same pairs as first")
    tables = [query_table(e.query, e.rank, first.ks, weight=e.weight) for e in (first, second)]
    if metric not in tables[0].numerator:
        raise ArgumentError("metric", repr(metric), "one of " + ", ".join(tables[0].numerator))
    numerator = group_sums(tables[0].numerator[metric] - tables[1].numerator[metric], first.group)
    denominator = group_sums(tables[0].denominator[metric], first.group)
    value = float(numerator.sum() / denominator.sum())
    low, high = bootstrap_interval(
        numerator, denominator, samples=first.samples or 1000, confidence=first.confidence, seed=first.seed
    )
    return Comparison(metric, Interval(value, low, high))
