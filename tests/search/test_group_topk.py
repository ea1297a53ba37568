"""Two gloo processes with a part of the pool each give the answer of one process with the whole pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tgq_fast.errors import ArgumentError, PoolError, TGQError
from tgq_fast.evaluation.ranks import positive_ranks
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.reference import TopK
from tgq_fast.search.distributed import group_topk
from tgq_fast.search.topk import topk

QUERIES, ROWS, WIDTH, K = 13, 90, 6, 12


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers: many ties, within and across the parts."""
    generator = seed(1)
    pool = torch.randint(-2, 3, (ROWS, WIDTH), generator=generator).float()
    pool[7] = pool[70]
    pool[11, 0] = float("nan")
    queries = torch.randint(-2, 3, (QUERIES, WIDTH), generator=generator).float()
    exclude = torch.randint(-1, ROWS, (QUERIES, 3), generator=generator)
    exclude[0] = torch.tensor([2, 3, 45])  # beside the cuts
    return queries, pool, exclude


def same(found: TopK, expected: TopK) -> None:
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)


def answers(rank: int) -> None:
    queries, pool, exclude = problem()
    for cut in (45, 3, 0, ROWS):  # equal, uneven, and either part empty; k exceeds the small parts
        part = pool[:cut] if rank == 0 else pool[cut:]
        for k in (1, K, 200):
            for banned in (None, exclude):
                same(group_topk(queries, part, k, exclude=banned), topk(queries, pool, k, exclude=banned))
        for first in (4, 0, QUERIES):  # rank 0's share of the queries
            mine = slice(0, first) if rank == 0 else slice(first, QUERIES)
            expected = topk(queries[mine], pool, K, exclude=exclude[mine])
            same(group_topk(queries[mine], part, K, exclude=exclude[mine], layout="sharded"), expected)
            lone = exclude[mine] if rank == 0 else None  # exclusions on one rank only
            expected = topk(queries[mine], pool, K, exclude=lone)
            same(group_topk(queries[mine], part, K, exclude=lone, layout="sharded"), expected)
    for layout in ("replicated", "sharded"):
        assert group_topk(queries[:0], pool, 3, layout=layout).indices.shape == (0, 3)
    for dtype in (torch.float16, torch.bfloat16):
        low = pool.to(dtype)
        found = group_topk(queries.numpy(), low[:50] if rank == 0 else low[50:], K, num_threads=1, backend="torch")
        same(found, topk(queries, low, K, backend="torch"))


def one_of_many(rank: int) -> None:
    queries, pool, _ = problem()
    lone = [dist.new_group([r]) for r in range(2)]
    same(group_topk(queries, pool[rank:], K, group=lone[rank]), topk(queries, pool[rank:], K))
    with pytest.raises(ArgumentError, match="group: got a group without this process"):
        group_topk(queries, pool, K, group=lone[1 - rank])


def refusals(rank: int) -> None:
    queries, pool, exclude = problem()

    def stop(share: float) -> None:
        raise LookupError("enough")

    disagree: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("width D 6, 5 by rank", (queries[:, : 6 - rank], pool[:, : 6 - rank], K), {}),
        ("k 12, 13 by rank", (queries, pool, K + rank), {}),
        ("queries 13, 12 by rank", (queries[rank:], pool, K), {}),
        (r"pool's dtype torch.float32, torch.float16 by rank", (queries, pool.half() if rank else pool, K), {}),
        ("layout replicated, sharded by rank", (queries, pool, K), {"layout": "sharded" if rank else "replicated"}),
    ]
    for said, arguments, options in disagree:
        with pytest.raises(ArgumentError, match=said):
            group_topk(*arguments, **options)
    # A value that only rank 1 can see to be wrong: that rank says why, the other one which rank it was.
    wrong: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ArgumentError, "^k: got 0", (queries, pool, 0), {}),
        (ArgumentError, "^queries: got", (queries[:, :5], pool, K), {}),
        (ArgumentError, "^exclude: got pool row 500", (queries, pool, K), {"exclude": exclude.clamp(min=500)}),
        (ArgumentError, "^num_threads: got", (queries, pool, K), {"num_threads": 0}),
        (LookupError, "enough", (queries, pool, K), {"progress": stop, "backend": "torch"}),
    ]
    for kind, said, arguments, options in wrong:
        for layout in ("replicated", "sharded"):
            if rank == 1:
                with pytest.raises(kind, match=said):
                    group_topk(*arguments, **options, layout=layout)
            else:
                with pytest.raises(TGQError, match="rank 1 failed"):
                    group_topk(queries, pool, K, layout=layout)
    same(group_topk(queries, pool[rank::2], K), group_topk(queries, pool[rank::2], K))  # the group still works


def pool_on_disk(rank: int, folder: str) -> None:
    """Each rank reads its share of the shards only: the files of the others may be damaged."""
    queries, _, _ = problem()
    rows = torch.randint(-2, 3, (ROWS, WIDTH), generator=seed(2)).float()
    for shard_size in (7, 45, 100):  # 13, 2 and 1 shards
        path = Path(folder, f"pool-{shard_size}")
        if rank == 0:
            with ItemPool.create(path, dims=WIDTH, shard_size=shard_size) as pool:
                pool.append([str(i) for i in range(ROWS)], rows)
        dist.barrier()
        pool = ItemPool.open(path)
        hits = pool.search(queries, K, exclude_ids=[["3", "80"]] * QUERIES, group=dist.group.WORLD)
        expected = topk(queries, rows, K, exclude=[[3, 80]] * QUERIES)
        same(TopK(hits.scores, hits.indices), expected)
        assert hits.ids == [[str(i) for i in line] for line in expected.indices.tolist()]
        count = -(-ROWS // shard_size)
        assert sorted(name for name in pool._files._kept if name.count(".") == 1) == [
            f"shard-{number:06d}.safetensors" for number in range(count * rank // 2, count * (rank + 1) // 2)
        ]
        with pytest.raises(ArgumentError, match="k 12, 13 by rank"):
            pool.search(queries, K + rank, group=dist.group.WORLD)
        pairs = torch.arange(ROWS).repeat(3).numpy(), torch.randperm(3 * ROWS, generator=seed(4)).numpy() % ROWS
        for depth in (0, 5):
            shared, hits_of = positive_ranks(pool, *pairs, depth=depth, group=dist.group.WORLD)
            alone, hits_alone = positive_ranks(rows, *pairs, depth=depth)
            assert (shared == alone).all() and torch.equal(hits_of, hits_alone) and shared.max() > 30
    damaged = Path(folder, "pool-45", "shard-000001.safetensors")
    dist.barrier()
    if rank == 0:
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    dist.barrier()
    with pytest.raises(PoolError if rank == 1 else TGQError, match="SHA-256" if rank == 1 else "rank 1 failed"):
        ItemPool.open(Path(folder, "pool-45")).search(queries, K, group=dist.group.WORLD)


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        answers(rank)
        one_of_many(rank)
        refusals(rank)
        pool_on_disk(rank, folder)
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.start_processes(rank_main, args=(str(tmp_path),), nprocs=2, start_method="spawn")


def test_without_a_process_group() -> None:
    with pytest.raises(ArgumentError, match=r"group: got no process group, expected torch\.distributed"):
        group_topk(torch.zeros(1, 2), torch.zeros(3, 2), 1)
