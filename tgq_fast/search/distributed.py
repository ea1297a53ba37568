"""Exact search of a pool that is spread over the processes of a `torch.distributed` group.

Each rank searches its own part. The hits then travel to the ranks that merge them, each rank a share of the queries, so
a rank sends and receives Q × k hits whatever the number of ranks. The same code runs on gloo and NCCL.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from tgq_fast.errors import ArgumentError, TGQError
from tgq_fast.reference import TopK
from tgq_fast.search import topk_arguments as arguments
from tgq_fast.search.topk import merge_topk, topk

__all__ = ["Ranks", "agree", "group_topk"]

QUERIES = ("replicated", "sharded")


class Ranks:
    """The processes of a group, and the few things that they tell one another.

    Args:
        group: a process group; None: the default one.

    Raises:
        ArgumentError: there is no process group, or this process is not in it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ArgumentError("group", "no process group", "torch.distributed.init_process_group to be called before")
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ArgumentError("group", "a group without this process", "a group that this process belongs to")
        nccl = "nccl" in dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def gather(self, own: Tensor) -> Tensor:
        """[ranks, *shape] from each rank's tensor of the same shape."""
        own = own.to(self.device).contiguous()
        out = own.new_empty(self.size * own.numel())
        dist.all_gather_into_tensor(out, own.reshape(-1), group=self.group)
        return out.view(self.size, *own.shape)

    def exchange(self, parts: Tensor) -> Tensor:
        """[ranks, …]: part r goes to rank r; part r of the result came from rank r."""
        parts = parts.to(self.device).contiguous()
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=self.group)
        return out

    def settle(self, work: Callable[[], Any], facts: int = 0) -> tuple[Any, list[list[int]]]:
        """Runs `work`, which returns (result, `facts` integers), on every rank; all ranks learn all integers.

        If it raises on one rank, every rank raises: that one its own error, the others one that names it. No rank is
        left waiting for another.
        """
        failure: BaseException | None = None
        result, numbers = None, [0] * facts
        try:
            result, numbers = work()
        except BaseException as error:  # Ctrl-C too: the others must not wait for this rank
            failure = error
        table = self.gather(torch.tensor([int(failure is not None), *numbers], dtype=torch.int64)).tolist()
        if failure is not None:
            raise failure
        failed = [rank for rank, row in enumerate(table) if row[0]]
        if failed:
            raise TGQError(f"group search: rank {failed[0]} failed; its own error says why")
        return result, [row[1:] for row in table]

    def merge(self, found: TopK, k: int, offsets: Sequence[int] | None = None) -> TopK:
        """Merges each rank's hits [Q, k] of the same Q queries; every rank gets the whole answer [Q, k]."""
        queries = found.scores.shape[0]
        share = max(1, -(-queries // self.size))
        mine = self.merge_shares(found, k, share, offsets)
        scores, indices = (self.gather(part).flatten(0, 1)[:queries] for part in mine)
        return TopK(scores.to(found.scores.device), indices.to(found.scores.device))

    def merge_shares(self, found: TopK, k: int, share: int, offsets: Sequence[int] | None) -> TopK:
        """This rank's [share, k] of the merged hits; rank r's queries are rows r·share … of the padded hits."""
        lacking = self.size * share - found.scores.shape[0]
        shape = (self.size, share, k)
        scores = self.exchange(pad(found.scores, (0, 0, 0, lacking)).view(shape))
        indices = self.exchange(pad(found.indices, (0, 0, 0, lacking), value=-1).view(shape))
        return merge_topk([TopK(*part) for part in zip(scores, indices)], k, offsets)


def group_topk(
    queries: Any,
    local_pool: Any,
    k: int,
    *,
    group: dist.ProcessGroup | None = None,
    layout: str = "replicated",
    exclude: Any = None,
    **options: Any,
) -> TopK:
    """:func:`~tgq_fast.search.topk.topk` over a pool whose rows are spread over the ranks of a process group.

    The pool is the ranks' parts one after another, in the order of ranks; parts may differ in size and be empty. The
    answer is that of one process with the whole pool, bit for bit with the compiled core. Every rank must call.

    Args:
        queries: [Q, D]. "replicated": the same on every rank. "sharded": each rank its own, any number of them.
        local_pool: [N_r, D] this rank's part.
        k: 1 … 2048, the same on every rank.
        group: a process group; None: the default one.
        layout: "replicated" or "sharded" queries.
        exclude: rows of the whole pool, as in :func:`topk`, for this rank's queries: replicated as they are.
        options: `backend`, `precision`, `num_threads` and `progress` of :func:`topk`.

    Returns:
        TopK on the queries' device, rows counted over the whole pool: of all queries on every rank when replicated, of
        this rank's queries when sharded.

    Raises:
        ArgumentError: a bad value, or ranks that disagree on D, k, dtype, layout or (replicated) Q: raised on all.
        TGQError: another rank failed; the error there says why.

    [ours]
    """
    ranks = Ranks(group)

    def prepare() -> tuple[tuple[Tensor, Tensor, Tensor | None], list[int]]:
        size = arguments.check_k(k)
        code = QUERIES.index(arguments.check_choice("layout", layout, QUERIES))
        q, p = arguments.check_matrices(queries, local_pool)
        # Rows of the whole pool, whose size is not known yet.
        rows = arguments.check_exclude(exclude, q.shape[0], torch.iinfo(torch.int64).max, q.device)
        dtypes = [arguments.DTYPES.index(tensor.dtype) for tensor in (q, p)]
        width = 0 if rows is None else rows.shape[1]
        return (q, p, rows), [size, q.shape[1], *dtypes, code, q.shape[0], p.shape[0], width]

    (own, pool, rows), facts = ranks.settle(prepare, facts=8)
    named: dict[str, Callable[[int], Any]] = {
        "k": int,
        "queries' width D": int,
        "queries' dtype": arguments.DTYPES.__getitem__,
        "pool's dtype": arguments.DTYPES.__getitem__,
        "layout": QUERIES.__getitem__,
    }
    agree("group_topk", facts, named | ({"number of queries": int} if layout == "replicated" else {}))
    counts, sizes, widths = ([row[column] for row in facts] for column in (5, 6, 7))
    offsets = [sum(sizes[:rank]) for rank in range(ranks.size)]
    total, share = sum(sizes), max(1, *counts)

    def search() -> tuple[TopK, list[int]]:
        if rows is not None and rows.numel() and int(rows.max()) >= total:
            raise ArgumentError("exclude", f"pool row {int(rows.max())}", f"rows below the whole pool's size {total}")
        return topk(asked, pool, k, exclude=_local(banned, offsets[ranks.rank], len(pool)), **options), []

    asked, banned = own, rows
    if layout == "replicated":
        found, _ = ranks.settle(search)
        return ranks.merge(found, k, offsets)
    lacking = share - len(own)
    asked = _joined(ranks.gather(pad(own, (0, 0, 0, lacking))), counts).to(own.device)
    if max(widths):
        padded = own.new_full((share, max(widths)), -1, dtype=torch.int64)
        if rows is not None:
            padded[: len(own), : rows.shape[1]] = rows
        banned = _joined(ranks.gather(padded), counts).to(own.device)
    found, _ = ranks.settle(search)
    spread = [_padded(part, share) for part in zip(found.scores.split(counts), found.indices.split(counts))]
    mine = ranks.merge_shares(
        TopK(torch.cat([part.scores for part in spread]), torch.cat([part.indices for part in spread])),
        k,
        share,
        offsets,
    )
    return TopK(mine.scores[: len(own)].to(own.device), mine.indices[: len(own)].to(own.device))


def agree(function: str, facts: list[list[int]], named: dict[str, Callable[[int], Any]]) -> None:
    """Refuses a call that differs between ranks in a named fact; every rank sees the same facts and so raises alike.

    Args:
        function: what was called.
        facts: each rank's integers, as :meth:`Ranks.settle` returns them.
        named: the names of the first columns, and how to show their values.
    """
    for column, (name, shown) in enumerate(named.items()):
        values = [row[column] for row in facts]
        if len(set(values)) > 1:
            given = ", ".join(str(shown(value)) for value in values)
            raise ArgumentError(function, f"{name} {given} by rank", "the same on every rank")


def _local(rows: Tensor | None, start: int, size: int) -> Tensor | None:
    """Excluded rows [Q, X] of the whole pool as rows of the part that starts at `start`; -1 for those elsewhere."""
    return None if rows is None else torch.where((rows >= start) & (rows < start + size), rows - start, -1)


def _joined(gathered: Tensor, counts: Sequence[int]) -> Tensor:
    """[sum of counts, …] from [ranks, share, …], of which the first counts[r] rows of rank r are meant."""
    return torch.cat([part[:count] for part, count in zip(gathered, counts)])


def _padded(part: tuple[Tensor, Tensor], rows: int) -> TopK:
    lacking = rows - part[0].shape[0]
    return TopK(pad(part[0], (0, 0, 0, lacking)), pad(part[1], (0, 0, 0, lacking), value=-1))
