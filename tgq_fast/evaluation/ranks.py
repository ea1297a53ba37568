"""Exact ranks among all rows of a pool, in memory or streamed from an item pool that is larger than memory.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tgq_fast.defaults import plain_defaults
from tgq_fast.evaluation.metrics import ABSENT
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.search.topk import topk

__all__ = ["positive_ranks"]

_SCORE_BYTES = 64 << 20  # score block of the exact rank count
_PART_ROWS = 16_384  # of a pool that is streamed
_TILE_QUERIES = 4096  # that search a streamed pool at a time


class Asking(Protocol):
    """What rows ask with when they are queries."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """[n, D] fp32 of rows [n] int64."""
        ...


@torch.no_grad()
@plain_defaults()
def positive_ranks(
    embeddings: Tensor | ItemPool,
    query: np.ndarray,
    target: np.ndarray,
    *,
    depth: int = 0,
    asked: Asking | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Exact 1-based rank of each target among all rows but the query, and the top `depth` rows per distinct query.

    Ranks down to `depth` come from the search itself; deeper ones are counted: one plus the rows that score higher, or
    score the same and have a lower index. Nothing of size queries × pool is kept, and of an item pool no more than a
    few thousand rows at a time.

    Args:
        embeddings: [N, D] fp32 rows, or an open pool; queries are rows too.
        query, target: [P] row numbers.
        depth: search depth k.
        asked: what the rows ask with when they are queries, such as [N, D] fp32; None: their own embedding.
        progress: called with (queries done, queries).

    Returns:
        ([P] int64 ranks; :data:`ABSENT` where target is the query itself, [U, depth] int64 hits of `np.unique(query)`).
    """
    candidates = _Stored(embeddings) if isinstance(embeddings, ItemPool) else _Held(embeddings)
    queries, label = np.unique(query, return_inverse=True)
    ranks = np.full(len(query), ABSENT, dtype=np.int64)
    pairs = np.flatnonzero(target != query)
    hits = torch.full((len(queries), depth), -1, dtype=torch.int64)
    if depth and len(queries):
        report = None if progress is None else lambda share: progress(int(share * len(queries)), len(queries))
        hits = candidates.search(torch.from_numpy(queries), asked, depth, report)
        deep = []
        for some in np.array_split(pairs, max(1, len(pairs) * depth * 8 // _SCORE_BYTES)):
            found = hits[label[some]] == torch.from_numpy(target[some])[:, None]  # [pairs, depth]
            inside = found.any(dim=1).numpy()
            ranks[some[inside]] = found.to(torch.int8).argmax(dim=1).numpy()[inside] + 1
            deep.append(some[~inside])
        pairs = np.concatenate(deep)
    # Positives beyond the search depth: their queries' scores, block by block.
    pairs = pairs[np.argsort(label[pairs], kind="stable")]
    asking, starts = np.unique(label[pairs], return_index=True)
    block = max(1, _SCORE_BYTES // max(1, 4 * candidates.part_rows))
    for first in range(0, len(asking), block):
        some = pairs[starts[first] : starts[first + block] if first + block < len(asking) else len(pairs)]
        rows = torch.from_numpy(queries[asking[first : first + block]])
        wanted = candidates.take(rows) if asked is None else asked[rows]
        line = np.searchsorted(asking, label[some]) - first
        # Search and count may round a near tie differently; the search decided it is not among its hits.
        ranks[some] = np.maximum(_ranks(candidates, rows, wanted, line, target[some]), depth + 1)
    if progress is not None:
        progress(len(queries), len(queries))
    return ranks, hits


def _ranks(
    candidates: _Held | _Stored, rows: Tensor, wanted: Tensor, line: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """Ranks [P] of targets among all rows but the query's, counted.

    Args:
        rows: [B] rows of the queries.
        wanted: [B, D] what they ask with.
        line, target: [P] position of a pair's query in `rows`, and its target row.
    """

    def scored() -> Iterator[tuple[int, Tensor]]:
        for start, part in candidates.parts():
            scores = wanted @ part.T  # [B, n]
            inside = ((rows >= start) & (rows < start + len(part))).nonzero()[:, 0]
            scores[inside, rows[inside] - start] = float("-inf")
            yield start, scores

    # What is streamed is multiplied twice: the same product of the same shapes, so that equal scores are equal.
    once = list(scored()) if len(candidates) <= candidates.part_rows else None
    lines, targets = torch.from_numpy(line), torch.from_numpy(target)
    mine = torch.empty(len(line))
    for start, scores in once or scored():
        there = ((targets >= start) & (targets < start + scores.shape[1])).nonzero()[:, 0]
        mine[there] = scores[lines[there], targets[there] - start]
    above = torch.zeros(len(line), dtype=torch.int64)
    for start, scores in once or scored():
        columns = torch.arange(start, start + scores.shape[1])
        for some in torch.arange(len(line)).split(len(rows)):
            theirs, own, positive = scores[lines[some]], mine[some, None], targets[some, None]
            better = (theirs > own) | ((theirs == own) & (columns < positive))
            above[some] += (better & (columns != positive)).sum(dim=1)
    return above.numpy() + 1


class _Held:
    """Candidates in memory."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.part_rows = max(1, len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Tensor) -> Tensor:
        return self.rows[rows]

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.rows

    def search(
        self, queries: Tensor, asked: Asking | None, depth: int, report: Callable[[float], None] | None
    ) -> Tensor:
        if asked is not None:
            wanted = asked[queries]
        else:
            # The very same tensor when every row is a query: the search then computes one triangle of the scores.
            wanted = self.rows if len(queries) == len(self.rows) else self.rows[queries]
        return topk(wanted, self.rows, depth, exclude=queries, progress=report).indices


class _Stored:
    """Candidates of an open item pool."""

    def __init__(self, pool: ItemPool) -> None:
        self.pool = pool
        self.part_rows = min(_PART_ROWS, max(1, len(pool)))

    def __len__(self) -> int:
        return len(self.pool)

    def take(self, rows: Tensor) -> Tensor:
        return self.pool.take(rows.numpy()).float()

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        held = torch.empty(self.part_rows, self.pool.dims)  # always the same memory, so that products round alike
        for start, rows in self.pool.batches(self.part_rows):
            yield start, held[: len(rows)].copy_(rows)

    def search(
        self, queries: Tensor, asked: Asking | None, depth: int, report: Callable[[float], None] | None
    ) -> Tensor:
        hits = torch.empty(len(queries), depth, dtype=torch.int64)
        for first in range(0, len(queries), _TILE_QUERIES):
            tile = queries[first : first + _TILE_QUERIES]

            def done(rows: int, of: int, first: int = first, tile: Tensor = tile) -> None:
                if report is not None:
                    report((first + len(tile) * rows / max(of, 1)) / len(queries))

            wanted = self.take(tile) if asked is None else asked[tile]
            own = self.pool.names(tile.numpy())
            hits[first : first + len(tile)] = self.pool.search(wanted, depth, exclude_ids=own, progress=done).indices
        return hits
