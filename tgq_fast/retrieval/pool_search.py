"""Exact search of an item pool on disk, block by block from its memory map."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tgq_fast.errors import ArgumentError, NonFiniteError
from tgq_fast.reference import TopK
from tgq_fast.retrieval.blocks import Block, Part, cut_blocks, one_ahead, read_ahead
from tgq_fast.retrieval.distributed import Ranks, agree
from tgq_fast.retrieval.manifest import Manifest
from tgq_fast.retrieval.pool_reader import PoolReader
from tgq_fast.retrieval.shadow_files import join_shadows, rows_of
from tgq_fast.retrieval.topk import merge_topk, topk
from tgq_fast.retrieval.topk_arguments import check_k
from tgq_fast.retrieval.topk_native import Shadow

KEPT_BYTES = 512 << 20  # of joined small shards, kept for the next search


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
    shadow: Shadow | None


class PoolSearch(PoolReader):
    """The searching half; use it through :class:`tgq_fast.retrieval.pool.ItemPool`."""

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool) -> None:
        super().__init__(path, manifest, verify=verify)
        self._joined: dict[Block, _Loaded] = {}  # blocks of small shards

    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        *,
        exclude_ids: Sequence[str | None] | Sequence[Sequence[str]] | None = None,
        progress: Callable[[int, int], None] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> PoolHits:
        """Exact maximum inner product search from the memory map, block by block; the next block is read and checked
        meanwhile, so a pool may be larger than memory.

        Args:
            queries: [Q, D] floating.
            k: hits per query, 1 … 2048.
            exclude_ids: per query one id (or None), or a list of ids, that it must not return. Ids that are not in the
                pool exclude nothing.
            progress: called now and then with (rows searched, rows in the pool); what it raises ends the search.
            group: a `torch.distributed` group (`torch.distributed.group.WORLD` for all processes) whose ranks share
                the work: each calls with the same arguments, reads its share of the shards and gets the whole answer.

        Returns:
            :class:`PoolHits`; ties go to the lower pool row, whatever the sharding.

        Raises:
            ArgumentError: wrong shape, k < 1 or a wrong number of exclusions.
            NonFiniteError: a query holds NaN or infinity.
            PoolError: a shard is damaged, or was cut off since the pool was opened.
            KeyboardInterrupt: Ctrl-C.
        """
        if group is None:
            best = self._search_share(queries, k, exclude_ids, progress, 0, 1)
        else:
            ranks = Ranks(group)

            def search() -> tuple[TopK, list[int]]:
                found = self._search_share(queries, k, exclude_ids, progress, ranks.rank, ranks.size)
                return found, [len(found.scores), k, len(self)]

            found, facts = ranks.settle(search, facts=3)
            agree("search", facts, {"number of queries": int, "k": int, "items in the pool": int})
            best = ranks.merge(found, k)
        return PoolHits(best.scores, best.indices, self.ids_at(best.indices))

    def _search_share(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        exclude_ids: Sequence[Any] | None,
        progress: Callable[[int, int], None] | None,
        rank: int,
        ranks: int,
    ) -> TopK:
        """Best rows [Q, k] of one rank's stretch of shards, as rows of the whole pool."""
        wanted = torch.as_tensor(queries)
        if wanted.ndim != 2 or wanted.shape[1] != self.dims or not wanted.is_floating_point():
            raise ArgumentError("queries", f"{tuple(wanted.shape)} {wanted.dtype}", f"floating [Q, {self.dims}]")
        wanted = wanted.detach().cpu()
        if wanted.dtype == torch.float64:
            wanted = wanted.float()
        bad = (~torch.isfinite(wanted).all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise NonFiniteError("queries", bad[:20], len(bad))
        excluded = self._excluded_rows(exclude_ids, wanted.shape[0])
        count = len(self.manifest.shards)
        shards = range(count * rank // ranks, count * (rank + 1) // ranks)
        return self._search_blocks(wanted, check_k(k), excluded, shards, progress)

    def _search_blocks(
        self,
        queries: Tensor,
        k: int,
        excluded: Tensor | None,
        shards: range,
        progress: Callable[[int, int], None] | None,
    ) -> TopK:
        """Best rows [Q, k] of a stretch of shards, as rows of the whole pool."""
        sizes = [record.rows for record in self.manifest.shards]
        blocks = cut_blocks(sizes, self.dims * self.dtype.itemsize, shards)
        total = sum(sizes[shard] for shard in shards)
        best = TopK(torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64))
        done = 0
        with closing(one_ahead(self._load, blocks)) as ready:
            for block in blocks:
                loaded = next(ready)
                local = None
                if excluded is not None:
                    inside = (excluded >= block.start) & (excluded < block.start + block.rows)
                    local = torch.where(inside, excluded - block.start, -1)
                report = None
                if progress is not None:
                    report = partial(_report, progress, done, block.rows, total)
                found = topk(queries, loaded.tensor, k, exclude=local, progress=report, shadow=loaded.shadow)
                best = merge_topk([best, found], k, offsets=[0, block.start])
                done += block.rows
                del loaded  # before the next but one is read
        return merge_topk([best], k)  # pads an empty pool's answer

    def _load(self, block: Block, stop: threading.Event) -> _Loaded:
        """[n, D] of a block and its shadow: views of a shard's maps, or small shards joined in memory."""
        if block in self._joined:
            return self._joined[block]
        views, shadows = [], []
        for part in block.parts:
            views.append(self._shard(part.shard, stop)[part.first : part.stop])
            shadow = self._shadow(part.shard, stop)
            if shadow is not None:
                shadows.append(rows_of(shadow, part.first, part.stop))
            else:  # with a shadow few rows are read
                self._read_ahead(part)
        joined = join_shadows(shadows) if len(shadows) == len(views) else None
        if len(views) == 1:
            return _Loaded(views[0], joined)
        loaded = _Loaded(torch.cat(views), joined)
        if sum(kept.tensor.nbytes for kept in self._joined.values()) + loaded.tensor.nbytes <= KEPT_BYTES:
            self._joined[block] = loaded
        return loaded

    def _read_ahead(self, part: Part) -> None:
        record, row = self.manifest.shards[part.shard], self.dims * self.dtype.itemsize
        header = record.embeddings.bytes - record.rows * row
        read_ahead(self.path / record.embeddings.name, header + part.first * row, (part.stop - part.first) * row)

    def _excluded_rows(self, exclude_ids: Sequence[Any] | None, queries: int) -> Tensor | None:
        if exclude_ids is None:
            return None
        if isinstance(exclude_ids, str) or len(exclude_ids) != queries:
            raise ArgumentError("exclude_ids", f"{len(exclude_ids)} entries", f"{queries}, one per query")
        lists = [[] if e is None else [e] if isinstance(e, str) else list(e) for e in exclude_ids]
        width = max((len(entry) for entry in lists), default=0)
        if not width:
            return None
        rows = iter(self.rows([item_id for entry in lists for item_id in entry], missing="mark").tolist())
        table = [[next(rows) for _ in entry] + [-1] * (width - len(entry)) for entry in lists]
        return torch.tensor(table, dtype=torch.int64)


def _report(progress: Callable[[int, int], None], done: int, rows: int, total: int, share: float) -> None:
    progress(done + int(share * rows), total)
