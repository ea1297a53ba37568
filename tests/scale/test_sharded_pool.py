"""A pool whose shards several processes hold answers bit for bit as one process, also when holders are lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_parts_engine import HereCrew

from tgq_fast import _native
from tgq_fast.data import Catalog, Item
from tgq_fast.errors import ArgumentError, NonFiniteError, PoolError, WorkerError
from tgq_fast.evaluation import evaluate
from tgq_fast.pool import ItemPool
from tgq_fast.pool.item_pool import PoolHits
from tgq_fast.scale import ProcessCrew, ShardedPool
from tgq_fast.scale.crew import Crew, Job, Lost

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_missing() or "built")
ROWS, WIDTH, K = 90, 6, 12
QUERIES = torch.randint(-2, 3, (13, WIDTH), generator=torch.Generator().manual_seed(1)).float()


def make_pool(path: Path, *, shard_size: int = 7, dtype: str = "float32", rows: int = ROWS) -> ItemPool:
    """Small integers: many ties, within and across the shards; the second shard and some rows are deleted."""
    vectors = torch.randint(-2, 3, (rows, WIDTH), generator=torch.Generator().manual_seed(2)).float()
    with ItemPool.create(path, dims=WIDTH, shard_size=shard_size, dtype=dtype) as pool:
        if rows:
            pool.append([str(i) for i in range(rows)], vectors)
            pool.delete([str(i) for i in (*range(7, 14), 50, 89)])
    return ItemPool.open(path)


def same(found: PoolHits, expected: PoolHits) -> None:
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.indices, expected.indices)
    assert found.ids == expected.ids


def check(sharded: ShardedPool, pool: ItemPool) -> None:
    where = np.arange(len(pool)) % 3 > 0
    options: list[dict[str, Any]] = [{}, {"exclude_ids": [["3", "80", "nobody"]] * len(QUERIES)}, {"where": where}]
    for option in options:
        for k in (1, K, 200):
            same(sharded.search(QUERIES, k, **option), pool.search(QUERIES, k, **option))
    if not len(pool):
        return
    own = pool.ids()  # all rows ask
    rows = sharded.take(sharded.rows(own))
    assert torch.equal(rows, pool.get(own))
    same(sharded.search(rows, K, exclude_ids=own), pool.search(rows, K, exclude_ids=own))


@pytest.mark.parametrize("shard_size", [7, 40, 100])  # 13, 3 and 1 shards
def test_answers_are_those_of_one_process(shard_size: int, tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        pool = make_pool(tmp_path / dtype, shard_size=shard_size, dtype=dtype)
        for holders in (1, 2, 5):  # more holders than shards: some hold nothing
            with ShardedPool(tmp_path / dtype, HereCrew(holders)) as sharded:
                check(sharded, pool)
                assert len(sharded) == len(pool) and sharded.dims == WIDTH


def test_an_empty_pool_has_an_answer(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool", rows=0)
    with ShardedPool(tmp_path / "pool", HereCrew(2)) as sharded:
        check(sharded, pool)


def make_catalog(groups: int = 40, size: int = 6) -> Catalog:
    return Catalog.from_items([Item(f"{g}-{i}", group_id=f"g{g}") for g in range(groups) for i in range(size)])


def test_evaluation_is_that_of_one_process(tmp_path: Path) -> None:
    """Ranks below the depth of the search too, which holders count."""
    catalog = make_catalog()
    vectors = torch.randint(-2, 3, (len(catalog), WIDTH), generator=torch.Generator().manual_seed(3)).float()
    with ItemPool.create(tmp_path / "pool", dims=WIDTH, shard_size=50) as pool:
        pool.append(catalog.ids[::-1], vectors)
    seen: list[tuple[int, int]] = []
    with ShardedPool(tmp_path / "pool", HereCrew(3)) as sharded:
        for queries in (None, vectors.flip(0) + 1):
            one = evaluate(catalog, ItemPool.open(tmp_path / "pool"), ks=(1, 5), samples=9, queries=queries)
            many = evaluate(
                catalog, sharded, ks=(1, 5), samples=9, queries=queries, progress=lambda *at: seen.append(at)
            )
            assert many.to_dict() == one.to_dict() and np.array_equal(many.rank, one.rank)
            assert (one.rank > 5).mean() > 0.5
    assert seen[-1][0] == seen[-1][1]


def test_lost_holders_are_asked_again_and_named_when_lost_for_good(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool")

    class Losing(HereCrew):
        def __init__(self, times: int) -> None:
            super().__init__(3)
            self.left = times

        def answer(self, seconds: float | None = None) -> tuple[int, Any]:
            if self.left and self.given[-1][0] == 1:
                self.left -= 1
                return self.given.pop()[0], Lost("signal 9")
            return super().answer(seconds)

    with ShardedPool(tmp_path / "pool", Losing(2)) as sharded:
        check(sharded, pool)
    crew = Losing(3)
    with ShardedPool(tmp_path / "pool", crew) as sharded:
        with pytest.raises(WorkerError, match=r"holder 1 of 3 \(shards 4 to 7 of .*lost 3 times.*signal 9"):
            sharded.search(QUERIES, K)
        check(sharded, pool)  # begins anew


def test_a_crew_is_ended_with_a_pool_that_cannot_be_opened(tmp_path: Path) -> None:
    crew = HereCrew(2)
    with pytest.raises(PoolError):
        ShardedPool(tmp_path / "none", crew)
    assert crew.closed
    with pytest.raises(ArgumentError, match="seconds"):
        ShardedPool(tmp_path / "none", crew, seconds=0)


def test_bad_questions_are_refused_as_by_one_process(tmp_path: Path) -> None:
    make_pool(tmp_path / "pool")
    with ShardedPool(tmp_path / "pool", HereCrew(2)) as sharded:
        with pytest.raises(ArgumentError, match=r"^k"):
            sharded.search(QUERIES, 0)
        with pytest.raises(ArgumentError, match="exclude_ids"):
            sharded.search(QUERIES, K, exclude_ids=["3"])
        with pytest.raises(NonFiniteError):
            sharded.search(QUERIES * float("nan"), K)


# ---------------------------------------------------------------- processes


def processes(crew: ProcessCrew) -> dict[int, int]:
    """Holder → process id."""
    assert crew._run is not None
    return {holder: worker.process.pid for holder, worker in crew._run._workers.items()}


def check_losses(sharded: ShardedPool, pool: ItemPool, holders: Callable[[], dict[int, int]], late: float) -> list[int]:
    """A holder of two is killed, one answers no more for `late` seconds, and a file is damaged; the last processes."""
    check(sharded, pool)
    before = holders()
    os.kill(before[1], signal.SIGKILL)
    check(sharded, pool)
    after = holders()
    assert after[0] == before[0] and after[1] != before[1]
    os.kill(after[0], signal.SIGSTOP)
    patience, sharded.seconds = sharded.seconds, late
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=rf"holder 0 of 2 .*no answer within {late:g} seconds"):
        sharded.search(QUERIES, K)
    assert time.monotonic() - begin < 30
    sharded.seconds = patience
    same(sharded.search(QUERIES, K), pool.search(QUERIES, K))
    damaged = pool.path / pool.manifest.shards[-1].embeddings.name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(PoolError, match="SHA-256"):
        sharded.search(QUERIES, K)
    return list(after.values())


def test_processes_answer_also_when_killed_and_none_hangs(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool")
    crew = ProcessCrew(2)
    with ShardedPool(tmp_path / "pool", crew, seconds=120) as sharded:
        pids = check_losses(sharded, pool, lambda: processes(crew), late=1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids) or sys.platform != "linux"


def test_a_holder_without_the_pool_says_so(tmp_path: Path) -> None:
    make_pool(tmp_path / "pool")

    class Elsewhere(HereCrew):
        def start(self, job: Job) -> None:
            from dataclasses import replace

            super().start(replace(job, path=str(tmp_path / "elsewhere")))  # type: ignore[type-var]

    crew: Crew = Elsewhere(2)
    with ShardedPool(tmp_path / "pool", crew) as sharded, pytest.raises(PoolError, match="elsewhere: not there on"):
        sharded.search(QUERIES, K)
