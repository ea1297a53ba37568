"""Exact top-k by definition: the whole score matrix, sorted by (score descending, index ascending)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """Search result.

    Attributes:
        scores: [Q, k] descending; -inf where fewer than k valid rows exist.
        indices: [Q, k] int64 pool rows; -1 where fewer than k valid rows exist.
    """

    scores: Tensor
    indices: Tensor

    def _repr_html_(self) -> str:
        """The first queries as a table, for notebooks."""
        count, k = self.scores.shape
        head = "".join(f"<th>{rank + 1}</th>" for rank in range(min(k, 10)))
        rows = ""
        for query in range(min(count, 10)):
            best = zip(self.indices[query, :10].tolist(), self.scores[query, :10].tolist())
            rows += f"<tr><th>{query}</th>" + "".join(f"<td>{row}<br><small>{s:.4f}</small></td>" for row, s in best)
            rows += "</tr>"
        return f"<table><caption>TopK: {count} queries, k = {k}</caption><tr><th></th>{head}</tr>{rows}</table>"


def exact_topk(
    queries: Tensor, pool: Tensor, k: int, *, exclude: Tensor | None = None, allowed: Tensor | None = None
) -> TopK:
    """Maximum inner product search of [Q, D] against [N, D] through a stable sort of all scores.

    NaN scores are never returned; ties go to the lower pool index; -0 and +0 tie; missing hits pad with (-inf, -1).

    Args:
        exclude: [Q] or [Q, X] int64 pool rows a query must not return; negative entries mean none.
        allowed: [N] bool, false for rows that no query may return.
    """
    scores = queries @ pool.T + 0.0  # [Q, N]; + 0.0 turns -0 into +0
    valid = ~torch.isnan(scores)
    if allowed is not None:
        valid &= allowed
    if exclude is not None:
        excluded = exclude[:, None] if exclude.ndim == 1 else exclude  # [Q, X]
        for column in excluded.T:
            hit = column >= 0
            valid[hit.nonzero()[:, 0], column[hit]] = False
    # Two stable sorts: first by score, then valid rows to the front.
    order = torch.where(valid, scores, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, valid.gather(1, order).to(torch.int8).sort(dim=1, descending=True, stable=True).indices)
    order = order[:, :k]
    kept = valid.gather(1, order)
    top = torch.where(kept, scores.gather(1, order), float("-inf"))
    index = torch.where(kept, order, -1)
    missing = k - order.shape[1]
    if missing > 0:
        top = torch.nn.functional.pad(top, (0, missing), value=float("-inf"))
        index = torch.nn.functional.pad(index, (0, missing), value=-1)
    return TopK(top, index)
