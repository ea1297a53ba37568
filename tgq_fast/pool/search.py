"""Exact search of an item pool on disk, block by block from its memory map."""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tgq_fast.errors import ArgumentError, NonFiniteError
from tgq_fast.pool.reader import PoolReader
from tgq_fast.reference import TopK
from tgq_fast.search.blocks import Block, Part, cut_blocks, one_ahead, read_ahead
from tgq_fast.search.codes import Codes, join_codes
from tgq_fast.search.count import Marks, count_before
from tgq_fast.search.distributed import Ranks, agree
from tgq_fast.search.rules import Rule
from tgq_fast.search.topk import merge_topk, topk_by_rules
from tgq_fast.search.topk_arguments import check_k, floating_rows

if TYPE_CHECKING:
    from tgq_fast.pool.item_pool import ItemPool

KEPT_BYTES = 512 << 20  # of joined small shards, kept for the next search
ONCE_BYTES = 64 << 20  # of a block whose copy is not kept
COUNT_BYTES = 32 << 20  # of one in which rows are only counted: larger ones are no faster

GATHER_BELOW = 0.5  # share of a block's rows


class PoolHits(NamedTuple):
    """Neighbours found in a pool.

    Attributes:
        scores: [Q, k] fp32, descending; -inf where fewer than k items remain.
        indices: [Q, k] int64 pool rows; -1 where fewer than k items remain.
        ids: Q lists of k item ids; None where fewer than k items remain.
    """

    scores: Tensor
    indices: Tensor
    ids: list[list[str | None]]


class _Loaded(NamedTuple):
    tensor: Tensor
    codes: Codes | None


class PoolSearch:
    """Searches one state of a pool; use it through :class:`tgq_fast.pool.item_pool.ItemPool`.

    Args:
        reader: the state.
    """

    def __init__(self, reader: PoolReader) -> None:
        self._reader = reader
        self._joined: dict[Block, _Loaded] = {}  # blocks that are not in one piece on disk
        self._lock = threading.Lock()

    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        exclude_ids: Sequence[str | None] | Sequence[Sequence[str]] | None = None,
        where: np.ndarray | None = None,
        progress: Callable[[int, int], None] | None = None,
        group: dist.ProcessGroup | None = None,
        keep: bool = True,
    ) -> PoolHits:
        """See :meth:`tgq_fast.pool.item_pool.ItemPool.search`."""
        if group is None:
            best = self._search_share(queries, k, exclude_ids, where, progress, 0, 1, keep)
        else:
            ranks = Ranks(group)

            def search() -> tuple[TopK, list[int]]:
                found = self._search_share(queries, k, exclude_ids, where, progress, ranks.rank, ranks.size, keep)
                return found, [len(found.scores), k, len(self._reader)]

            found, facts = ranks.settle(search, facts=3)
            agree("search", facts, {"number of queries": int, "k": int, "items in the pool": int})
            best = ranks.merge(found, k)
        return PoolHits(best.scores, best.indices, self._reader.ids_at(best.indices))

    def _search_share(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        exclude_ids: Sequence[Any] | None,
        where: np.ndarray | None,
        progress: Callable[[int, int], None] | None,
        rank: int,
        ranks: int,
        keep: bool,
    ) -> TopK:
        """Best rows [Q, k] of one rank's stretch of shards, as rows of the whole pool."""
        asked = self.checked(queries, k, exclude_ids, where)
        return self.best_rows(*asked, self.shards_of(rank, ranks), progress, keep=keep)

    def checked(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        exclude_ids: Sequence[Any] | None,
        where: np.ndarray | None,
    ) -> tuple[Tensor, int, Tensor | None, np.ndarray | None]:
        """The first arguments of :meth:`best_rows`."""
        wanted = floating_rows("queries", queries, self._reader.files.dims)
        if wanted.dtype == torch.float64:
            wanted = wanted.float()
        bad = (~torch.isfinite(wanted).all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise NonFiniteError("queries", bad[:20], len(bad))
        if where is not None:
            where = np.asarray(where)
            if where.dtype != np.bool_ or where.shape != (len(self._reader),):
                raise ArgumentError("where", f"{where.dtype} {where.shape}", f"bool ({len(self._reader)},)")
        return wanted, check_k(k), self._excluded_rows(exclude_ids, wanted.shape[0]), where

    def shards_of(self, rank: int, ranks: int) -> range:
        """The stretch of shards that one of several processes searches."""
        count = len(self._reader.manifest.shards)
        return range(count * rank // ranks, count * (rank + 1) // ranks)

    def best_rows(
        self,
        queries: Tensor,
        k: int,
        excluded: Tensor | None,
        allowed: np.ndarray | None = None,
        shards: range | None = None,
        progress: Callable[[int, int], None] | None = None,
        rules: Sequence[Rule] = (),
        sampled_k: int = 0,
        *,
        keep: bool = True,
    ) -> TopK:
        """Best rows [Q, k] of a stretch of shards, or of all, as rows of the whole pool. Arguments are checked already.

        Args:
            excluded: [Q, X] int64 pool rows; -1 for none.
            allowed: [N] bool, the pool rows that may be returned; blocks without any are not read.
            rules: of the pool's rows and these queries; `sampled_k` as in :func:`tgq_fast.search.topk.topk_by_rules`.
            keep: hold what is joined of small shards for the next search.
        """
        sizes = np.diff(self._reader.starts).tolist()
        shards = range(len(sizes)) if shards is None else shards
        blocks = cut_blocks(sizes, self._row_bytes, shards, None if keep else ONCE_BYTES)
        if allowed is not None:
            blocks = [block for block in blocks if allowed[block.start : block.start + block.rows].any()]
        total = sum(block.rows for block in blocks)
        best: TopK | None = None
        done = 0
        with closing(one_ahead(partial(self._load, keep=keep), blocks)) as ready:
            for block in blocks:
                loaded = next(ready)
                local = None
                if excluded is not None:
                    inside = (excluded >= block.start) & (excluded < block.start + block.rows)
                    local = torch.where(inside, excluded - block.start, -1)
                report = None
                if progress is not None:
                    report = partial(_report, progress, done, block.rows, total)
                chosen = None if allowed is None else allowed[block.start : block.start + block.rows]
                here = [rule.of_rows(slice(block.start, block.start + block.rows)) for rule in rules]
                search = partial(topk_by_rules, sampled_k=sampled_k, progress=report)
                found = _search(search, queries, loaded, k, here, local, chosen)
                found = TopK(found.scores, torch.where(found.indices < 0, -1, found.indices + block.start))
                best = found if best is None else merge_topk([best, found], k)
                done += block.rows
                del loaded  # before the next but one is read
        if best is None:  # nothing to search
            nothing = (len(queries), k)
            low = torch.full(nothing, float("-inf"), dtype=torch.float32, device="cpu")
            best = TopK(low, torch.full(nothing, -1, dtype=torch.int64, device="cpu"))
        return best

    def count_before(
        self,
        queries: Tensor,
        marks: Marks,
        shards: range | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """[M] int64 rows of a stretch of shards, or of all, that come before each mark."""
        sizes = np.diff(self._reader.starts).tolist()
        shards = range(len(sizes)) if shards is None else shards
        blocks = cut_blocks(sizes, self._row_bytes, shards, COUNT_BYTES)
        total, done = sum(block.rows for block in blocks), 0
        before = torch.zeros(len(marks.rows), dtype=torch.int64, device="cpu")
        with closing(one_ahead(partial(self._load, coded=False, keep=False), blocks)) as ready:
            for block in blocks:
                loaded = next(ready)
                report = None if progress is None else partial(_report, progress, done, block.rows, total)
                before += count_before(queries, loaded.tensor, marks, first_row=block.start, progress=report)
                done += block.rows
                del loaded
        return before

    @property
    def _row_bytes(self) -> int:
        return self._reader.files.dims * self._reader.files.dtype.itemsize

    def _load(self, block: Block, stop: threading.Event, *, coded: bool = True, keep: bool = True) -> _Loaded:
        """[n, D] of a block and, where asked for, their codes: views of a shard's maps; or joined in memory, without
        deleted rows."""
        reader = self._reader
        kept = self._joined.get(block)
        views, codes, copied = [], list[Codes](), len(block.parts) > 1
        for part in block.parts:
            shard = reader.manifest.shards[part.shard]
            tensor = reader.files.tensor(shard, stop)  # also says if what was joined before has changed since
            alive = reader.alive(shard)
            rows: slice | Tensor = slice(part.first, part.stop)
            if alive is not None:
                rows, copied = torch.from_numpy(alive[rows]), True
            if kept is not None:
                continue
            views.append(tensor[rows])
            found = reader.files.codes(shard, stop) if coded else None
            if found is not None:
                codes.append(found.part(part.first, part.stop) if isinstance(rows, slice) else found.take(rows))
            elif alive is None:  # with codes few rows are read
                self._read_ahead(part)
        if kept is not None:
            return kept
        joined = join_codes(codes) if len(codes) == len(views) else None
        loaded = _Loaded(views[0] if len(views) == 1 else torch.cat(views), joined)
        with self._lock:
            held = sum(one.tensor.nbytes for one in self._joined.values())
            if keep and copied and held + loaded.tensor.nbytes <= KEPT_BYTES:
                self._joined[block] = loaded
        return loaded

    def _read_ahead(self, part: Part) -> None:
        record, row = self._reader.manifest.shards[part.shard], self._row_bytes
        header = record.embeddings.bytes - record.rows * row
        path = self._reader.path / record.embeddings.name
        read_ahead(path, header + part.first * row, (part.stop - part.first) * row)

    def _excluded_rows(self, exclude_ids: Sequence[Any] | None, queries: int) -> Tensor | None:
        if exclude_ids is None:
            return None
        if isinstance(exclude_ids, str) or not hasattr(exclude_ids, "__len__") or len(exclude_ids) != queries:
            given = f"{len(exclude_ids)} entries" if hasattr(exclude_ids, "__len__") else type(exclude_ids).__name__
            raise ArgumentError("exclude_ids", given, f"{queries} entries, one per query")
        try:
            lists = [[] if e is None else [e] if isinstance(e, str) else list(e) for e in exclude_ids]
            names = [item_id for entry in lists for item_id in entry]
            if not all(isinstance(name, str) for name in names):
                raise TypeError
        except TypeError:
            expected = "an id, a list of ids or None per query"
            raise ArgumentError("exclude_ids", reprlib.repr(exclude_ids), expected) from None
        width = max((len(entry) for entry in lists), default=0)
        if not width:
            return None
        rows = iter(self._reader.rows(names, missing="mark").tolist())
        table = [[next(rows) for _ in entry] + [-1] * (width - len(entry)) for entry in lists]
        return torch.tensor(table, dtype=torch.int64, device="cpu")


def pool_count_before(
    pool: ItemPool,
    queries: Tensor,
    marks: Marks,
    *,
    progress: Callable[[int, int], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[M] int64: how many rows of the pool come before each mark, read block by block; deleted ones are none.

    Args:
        queries: [Q, D] fp32 on the CPU.
        marks: pool rows and their scores, see :func:`tgq_fast.search.count.count_before`.
        progress: called now and then with (rows counted, rows in the pool).
        group: ranks that share the work, as in :meth:`~tgq_fast.pool.item_pool.ItemPool.search`.

    Raises:
        BackendError: there is no compiled core.
        PoolError: a shard is damaged, or was changed or cut off since the pool was opened.
    """
    search = pool._state[1]
    if group is None:
        return search.count_before(queries, marks, progress=progress)
    ranks = Ranks(group)

    def count() -> tuple[Tensor, list[int]]:
        before = search.count_before(queries, marks, search.shards_of(ranks.rank, ranks.size), progress)
        return before, [len(queries), len(marks.rows), len(pool)]

    before, facts = ranks.settle(count, facts=3)
    agree("count_before", facts, {"number of queries": int, "number of marks": int, "items in the pool": int})
    return ranks.gather(before).sum(dim=0).cpu()


def _search(
    search: Callable[..., TopK],
    queries: Tensor,
    loaded: _Loaded,
    k: int,
    rules: Sequence[Rule],
    excluded: Tensor | None,
    allowed: np.ndarray | None,
) -> TopK:
    """Best rows of a block, by `topk_by_rules`. Few allowed rows are searched by themselves, many with a mask."""
    rows, codes = loaded
    if allowed is None or allowed.all():
        return search(queries, rows, k, rules, exclude=excluded, codes=codes)
    if allowed.mean() > GATHER_BELOW:
        return search(queries, rows, k, rules, exclude=excluded, codes=codes, allowed=torch.from_numpy(allowed))
    chosen = torch.from_numpy(np.flatnonzero(allowed))
    if excluded is not None:
        place = torch.full((len(rows),), -1, dtype=torch.int64, device="cpu")
        place[chosen] = torch.arange(len(chosen), device="cpu")
        excluded = torch.where(excluded < 0, -1, place[excluded.clamp(min=0)])
    found = search(queries, rows[chosen], k, [rule.of_rows(chosen) for rule in rules], exclude=excluded)
    return TopK(found.scores, torch.where(found.indices < 0, -1, chosen[found.indices.clamp(min=0)]))


def _report(progress: Callable[[int, int], None], done: int, rows: int, total: int, share: float) -> None:
    progress(done + int(share * rows), total)
