"""Search of a pool block by block: what is read ahead, what stays in memory, and what happens when it goes wrong."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgq_fast.errors import PoolError
from tgq_fast.pool import search as pool_search
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.reference import exact_topk
from tgq_fast.search import blocks
from tgq_fast.search.blocks import cut_blocks, one_ahead

ROWS, WIDTH = 100, 8


def integers(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-2, 3, (rows, WIDTH), generator=torch.Generator().manual_seed(seed)).float()


def make(folder: Path, cuts: tuple[int, ...]) -> ItemPool:
    """A pool of shards with these numbers of rows."""
    rows = integers(ROWS)
    with ItemPool.create(folder, dims=WIDTH, shard_size=64) as pool:
        start = 0
        for size in cuts:
            pool.append([f"item-{i}" for i in range(start, start + size)], rows[start : start + size])
            start += size
    return ItemPool.open(folder)


@given(st.lists(st.integers(0, 40)), st.integers(1, 60), st.data())
def test_blocks_cover_the_shards_in_order(sizes: list[int], most: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(sizes)))
    shards = range(first, data.draw(st.integers(first, len(sizes))))
    before = blocks.BLOCK_BYTES
    blocks.BLOCK_BYTES = most * 4
    try:
        cut = cut_blocks(sizes, 4, shards)
    finally:
        blocks.BLOCK_BYTES = before
    rows = [(part.shard, row) for block in cut for part in block.parts for row in range(part.first, part.stop)]
    assert rows == [(shard, row) for shard in shards for row in range(sizes[shard])]
    start = sum(sizes[:first])
    for block in cut:
        assert block.start == start and 1 <= block.rows <= most
        start += block.rows
    for one, other in itertools.pairwise(cut):  # no two neighbours could have been one
        whole = all(p.stop - p.first == sizes[p.shard] for p in (*one.parts, *other.parts))
        assert not whole or one.rows + sizes[other.parts[0].shard] > most


def test_exactly_the_next_thing_is_prepared_meanwhile() -> None:
    begun: list[int] = []
    second = threading.Event()

    def prepare(number: int, stop: threading.Event) -> int:
        begun.append(number)
        if number == 1:
            second.set()
        return number * 10

    ready = one_ahead(prepare, [0, 1, 2, 3])
    assert next(ready) == 0
    assert second.wait(60) and begun == [0, 1]  # not further
    assert list(ready) == [10, 20, 30] and begun == [0, 1, 2, 3]
    assert list(one_ahead(prepare, [])) == []


def test_preparing_fails_where_it_is_due_and_is_called_off_on_closing() -> None:
    def fail(number: int, stop: threading.Event) -> int:
        if number == 2:
            raise LookupError("two")
        return number

    seen = []
    with pytest.raises(LookupError, match="two"):
        for value in one_ahead(fail, [0, 1, 2, 3]):
            seen.append(value)
    assert seen == [0, 1]

    stopped = []

    def wait(number: int, stop: threading.Event) -> int:
        if number:
            stopped.append(stop.wait(60))
        return number

    ready = one_ahead(wait, [0, 1, 2])
    next(ready)
    ready.close()
    assert stopped == [True]


@pytest.mark.parametrize("cuts", [(100,), (64, 36), (10,) * 10, (1, 50, 3, 40, 2, 4)])
@pytest.mark.parametrize("most", [7, 30, 1000])
def test_any_blocks_give_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: tuple, most: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", most * WIDTH * 4)
    pool, queries = make(tmp_path / "pool", cuts), integers(9, seed=1)
    expected = exact_topk(queries, integers(ROWS), 12)
    for kept in (0, 1 << 20):
        monkeypatch.setattr(pool_search, "KEPT_BYTES", kept)
        for _ in range(2):
            hits = pool.search(queries, 12)
            assert torch.equal(hits.indices, expected.indices) and torch.equal(hits.scores, expected.scores)
        assert kept or not pool._state[1]._joined


def test_joined_shards_are_kept_and_appending_renews_them(tmp_path: Path) -> None:
    folder, queries = tmp_path / "pool", integers(4, seed=1)
    make(folder, (10,) * 5)
    with ItemPool.open(folder, mode="a") as pool:
        pool.search(queries, 3)
        (kept,) = pool._state[1]._joined.values()
        pool.search(queries, 3)
        assert next(iter(pool._state[1]._joined.values())) is kept and len(kept.tensor) == 50
        pool.append(["best"], 100 * queries[:1])
        assert pool.search(queries[:1], 1).ids == [["best"]]


def test_a_shard_cut_off_during_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10 * WIDTH * 4)
    pool, queries = make(tmp_path / "pool", (10,) * 10), integers(4, seed=1)

    def cut(done: int, total: int) -> None:
        os.truncate(tmp_path / "pool" / "shard-000007.safetensors", 50)

    with pytest.raises(PoolError, match=r"shard-000007.*truncated"):
        pool.search(queries, 3, progress=cut)
    with pytest.raises(PoolError, match=r"shard-000007.*truncated"):
        pool.embeddings()


def test_a_mapped_shard_cut_off_between_searches(tmp_path: Path) -> None:
    pool = make(tmp_path / "pool", (100 - 36, 36))
    pool.embeddings()
    os.truncate(tmp_path / "pool" / "shard-000001.safetensors", 50)
    with pytest.raises(PoolError, match="truncated"):
        pool.search(integers(2), 3)


@pytest.mark.parametrize("at", [1, 4])
def test_ctrl_c_and_exceptions_of_progress_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10 * WIDTH * 4)
    pool, queries = make(tmp_path / "pool", (10,) * 10), integers(4, seed=1)
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        assert total == 100
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.search(queries, 3, progress=stop)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == at and calls == sorted(calls)
    assert not any(thread.name == "tgq-read-ahead" for thread in threading.enumerate())
    assert torch.equal(pool.search(queries, 3).indices, exact_topk(queries, integers(ROWS), 3).indices)


MEMORY = """
import sys, torch
from tgq_fast.pool import ItemPool, search as pool_search
from tgq_fast.search import blocks, topk
import numpy as np

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) << 10

folder, kind = sys.argv[1:]
torch.set_num_threads(1)
blocks.BLOCK_BYTES, pool_search.KEPT_BYTES = 4 << 20, 0
topk(torch.zeros(4, 256), torch.zeros(40, 256), 5)
most = before = anonymous()
def look(*_):
    global most
    most = max(most, anonymous())
if kind == "memmap":
    with open(folder, "wb") as file:
        file.truncate(256 << 20)
    pool = np.memmap(folder, dtype=np.float32, mode="r", shape=(1 << 18, 256))
    topk(torch.ones(4, 256), pool, 5, progress=look)
else:
    with ItemPool.open(folder) as pool:
        pool.search(torch.ones(4, 256), 5, progress=look)
print(most - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["small shards", "large shards", "memmap"])
def test_a_search_keeps_few_blocks_in_memory(tmp_path: Path, kind: str) -> None:
    if kind != "memmap":
        size = 1000 if kind == "small shards" else 1 << 20
        with ItemPool.create(tmp_path / "pool", dims=256, shard_size=size) as pool:
            pool.append([str(i) for i in range(64_000)], torch.ones(1, 256).expand(64_000, 256))  # 65 MB
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "pool"), kind], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 24 << 20  # a few blocks of 4 MB, far less than the pool
