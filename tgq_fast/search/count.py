"""How many rows come before given ones in the order of a search: exact ranks below any depth, part by part of a pool.

With the compiled core scores are those of a search on a CPU, bit for bit. Without it they are fp64 products rounded to
fp32: equal rows score the same in every part, but a search by PyTorch may round a near tie differently.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tgq_fast import _native
from tgq_fast.errors import ArgumentError
from tgq_fast.search import topk_native
from tgq_fast.search.topk_arguments import as_tensor

__all__ = ["Marks", "count_before", "score_rows"]

_SCORES = 1 << 22  # that PyTorch holds at a time


class Marks(NamedTuple):
    """Scores and rows of queries, query after query.

    Attributes:
        starts: [Q + 1] int64; query q has the marks starts[q] … starts[q + 1].
        scores: [M] fp32, as :func:`score_rows` gives them; no NaN.
        rows: [M] int64 rows of the whole pool.
    """

    starts: Tensor
    scores: Tensor
    rows: Tensor


def score_rows(queries: Tensor, rows: Tensor) -> Tensor:
    """[n] fp32 score of row i of `rows` [n, D] for row i of `queries` [n, D]."""
    queries, rows = as_tensor("queries", queries), as_tensor("rows", rows)
    if not _native.available():
        return (queries.double() * rows.double()).sum(dim=1).float()
    scores = torch.empty(len(rows), dtype=torch.float32, device="cpu")
    topk_native.score_rows(queries, rows, scores)
    return scores


def count_before(
    queries: Tensor,
    pool: Tensor,
    marks: Marks,
    *,
    first_row: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """[M] int64: how many rows of a pool, or of a part of it, come before each mark.

    A row comes before a mark when its score is higher, or the same with a lower row; NaN never does. Counts of parts
    add up to those of the whole.

    Args:
        queries: [Q, D] fp32 on the CPU.
        pool: [n, D] rows of the pool.
        first_row: of these among the rows that marks name.
        progress: called now and then with the share done; what it raises ends the count.

    Raises:
        ArgumentError: marks that are not those of these queries.
    """
    queries, pool = as_tensor("queries", queries), as_tensor("pool", pool)
    marks = Marks(*(as_tensor("marks", values) for values in marks))
    starts, count = marks.starts, len(marks.rows)
    if len(starts) != len(queries) + 1 or int(starts[0]) or int(starts[-1]) != count or len(marks.scores) != count:
        given = f"{len(starts)} starts up to {int(starts[-1])}, {len(marks.scores)} scores, {count} rows"
        raise ArgumentError("marks", given, f"starts from 0 up to the number of rows, of {len(queries)} queries")
    before = torch.zeros(len(marks.rows), dtype=torch.int64, device="cpu")
    if _native.available():
        dense = (starts.contiguous(), marks.scores.contiguous(), marks.rows.contiguous(), before)
        topk_native.count_before(queries, pool, first_row, dense, torch.get_num_threads(), progress)
        return before
    line = torch.repeat_interleave(torch.arange(len(queries)), marks.starts.diff())
    step = max(1, _SCORES // max(1, len(queries)))
    for start in range(0, len(pool), step):
        part = pool[start : start + step]
        scores = (queries.double() @ part.double().T).float()
        rows = torch.arange(first_row + start, first_row + start + len(part))
        for some in torch.arange(len(line)).split(max(1, len(queries))):
            theirs, own = scores[line[some]], marks.scores[some, None]
            before[some] += ((theirs > own) | ((theirs == own) & (rows < marks.rows[some, None]))).sum(dim=1)
    return before
