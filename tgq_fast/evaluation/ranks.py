"""Exact ranks among all rows of a pool: in memory, streamed from one that is larger than memory, or held by several
processes.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tgq_fast.defaults import plain_defaults
from tgq_fast.evaluation.metrics import ABSENT
from tgq_fast.pool.item_pool import ItemPool, PoolHits
from tgq_fast.search import count
from tgq_fast.search.count import Marks
from tgq_fast.search.topk import topk
from tgq_fast.search.topk_arguments import as_tensor

__all__ = ["Pool", "positive_ranks"]

_SCORE_BYTES = 64 << 20  # of what is compared at a time
_TILE_QUERIES = 4096  # that go through a pool at a time


class Asking(Protocol):
    """What rows ask with when they are queries."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """[n, D] fp32 of rows [n] int64."""
        ...


class Pool(Protocol):
    """Embeddings on disk: :class:`~tgq_fast.pool.ItemPool`, or :class:`~tgq_fast.scale.ShardedPool`."""

    def __len__(self) -> int: ...
    @property
    def dims(self) -> int:
        """D."""
        ...

    def rows(self, ids: Any, *, missing: Any = "raise") -> np.ndarray:
        """[n] pool rows of ids."""
        ...

    def names(self, rows: np.ndarray) -> list[str | None]:
        """Ids of pool rows."""
        ...

    def take(self, rows: np.ndarray) -> Tensor:
        """[n, D] embeddings of pool rows."""
        ...

    def search(self, queries: Tensor, k: int, *, exclude_ids: Sequence[str | None], progress: Any = None) -> PoolHits:
        """The best rows of the whole pool."""
        ...

    def count_before(self, queries: Tensor, marks: Marks, *, progress: Any = None) -> Tensor:
        """[M] rows of the whole pool that come before each mark."""
        ...


@torch.no_grad()
@plain_defaults()
def positive_ranks(
    embeddings: Tensor | Pool,
    query: np.ndarray,
    target: np.ndarray,
    *,
    depth: int = 0,
    asked: Asking | None = None,
    progress: Callable[[int, int], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Exact 1-based rank of each target among all rows but the query, and the top `depth` rows per distinct query.

    Ranks down to `depth` come from the search itself; deeper ones are counted with the search's own scores: one plus
    the rows that score higher, or score the same and have a lower index. Nothing of size queries × pool is kept, and of
    a pool on disk no more than two blocks at a time.

    Args:
        embeddings: [N, D] fp32 rows, or an open pool; queries are rows too.
        query, target: [P] row numbers.
        depth: search depth k.
        asked: what the rows ask with when they are queries, such as [N, D] fp32; None: their own embedding.
        progress: called with (queries done, queries).
        group: a `torch.distributed` group whose ranks share the work on an :class:`~tgq_fast.pool.ItemPool`; each calls
            with the same arguments and gets the whole answer.

    Returns:
        ([P] int64 ranks; :data:`ABSENT` where target is the query itself, [U, depth] int64 hits of `np.unique(query)`).
    """
    candidates = _Held(embeddings) if isinstance(embeddings, Tensor) else _Stored(embeddings, group)
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
    # Positives beyond the search depth.
    pairs = pairs[np.argsort(label[pairs], kind="stable")]
    asking, starts = np.unique(label[pairs], return_index=True)
    for first in range(0, len(asking), _TILE_QUERIES):
        some = pairs[starts[first] : starts[first + _TILE_QUERIES] if first + _TILE_QUERIES < len(asking) else None]
        rows = torch.from_numpy(queries[asking[first : first + _TILE_QUERIES]])
        line = torch.from_numpy(np.searchsorted(asking, label[some]) - first)
        counted = _counted(candidates, rows, asked, line, torch.from_numpy(target[some])).numpy()
        ranks[some] = np.maximum(counted, depth + 1)  # a search by PyTorch may round a near tie differently
    if progress is not None:
        progress(len(queries), len(queries))
    return ranks, hits


def _counted(candidates: _Held | _Stored, rows: Tensor, asked: Asking | None, line: Tensor, target: Tensor) -> Tensor:
    """Ranks [P] of targets among all rows but the query's.

    Args:
        rows: [B] rows of the queries.
        line, target: [P] position of a pair's query in `rows`, ascending, and its target row.
    """
    wanted = candidates.take(rows) if asked is None else asked[rows]
    scores = torch.empty(len(line))
    for some in torch.arange(len(line)).split(max(1, _SCORE_BYTES // (8 * max(1, wanted.shape[1])))):
        scores[some] = candidates.score(wanted[line[some]], target[some])
    own = candidates.score(wanted, rows)[line]
    marks = Marks(torch.searchsorted(line, torch.arange(len(rows) + 1)), scores, target)
    itself = (own > scores) | ((own == scores) & (rows[line] < target))
    return candidates.count_before(wanted, marks) - itself.to(torch.int64) + 1


class _Held:
    """Candidates in memory."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = as_tensor("embeddings", rows)

    def take(self, rows: Tensor) -> Tensor:
        return self.rows[rows]

    def score(self, wanted: Tensor, rows: Tensor) -> Tensor:
        return count.score_rows(wanted, self.rows[rows])

    def count_before(self, wanted: Tensor, marks: Marks) -> Tensor:
        return count.count_before(wanted, self.rows, marks)

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
    """Candidates of an open item pool, searched and counted by this process or by those that share it."""

    def __init__(self, pool: Pool, group: dist.ProcessGroup | None) -> None:
        self.pool = pool
        self._shared: dict[str, Any] = {} if group is None else {"group": group}

    def take(self, rows: Tensor) -> Tensor:
        return self.pool.take(rows.numpy()).float()

    def score(self, wanted: Tensor, rows: Tensor) -> Tensor:
        return count.score_rows(wanted, self.pool.take(rows.numpy()))

    def count_before(self, wanted: Tensor, marks: Marks) -> Tensor:
        return self.pool.count_before(wanted, marks, **self._shared)

    def search(
        self, queries: Tensor, asked: Asking | None, depth: int, report: Callable[[float], None] | None
    ) -> Tensor:
        hits = torch.empty(len(queries), depth, dtype=torch.int64)
        kept = {"keep": len(queries) > _TILE_QUERIES} if isinstance(self.pool, ItemPool) else {}
        for first in range(0, len(queries), _TILE_QUERIES):
            tile = queries[first : first + _TILE_QUERIES]

            def done(rows: int, of: int, first: int = first, tile: Tensor = tile) -> None:
                if report is not None:
                    report((first + len(tile) * rows / max(of, 1)) / len(queries))

            wanted = self.take(tile) if asked is None else asked[tile]
            own = self.pool.names(tile.numpy())
            found = self.pool.search(wanted, depth, exclude_ids=own, progress=done, **self._shared, **kept)
            hits[first : first + len(tile)] = found.indices
        return hits
