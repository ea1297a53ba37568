"""The order of copies and searches when a pool is streamed: every order that the marks allow gives the same answer."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from tgq_fast.errors import ArgumentError
from tgq_fast.reference import TopK
from tgq_fast.search.topk import merge_topk, topk
from tgq_fast.search.topk_arguments import check_matrices
from tgq_fast.search.topk_stream import AHEAD, COPIES, SEARCHES, SLOTS, split, stream

PARTS = split(1500, 8, 4, 128 * 8 * 4)


class Work:
    def __init__(self, waits: list[Work], action: Callable[[], None]) -> None:
        self.waits, self.action, self.done = waits, action, False


class FakeLanes:
    """A device whose lanes run work at random times, in any order that marks allow, on real data."""

    def __init__(self, pool: torch.Tensor, queries: torch.Tensor, staged: bool, seed: int, broken: str = "") -> None:
        self.pool, self.queries, self.staged, self.broken = pool, queries, staged, broken
        rows = PARTS[0][1]
        self.pinned = torch.full((SLOTS, rows, pool.shape[1]), float("nan"))
        self.buffers = torch.full((SLOTS, rows, pool.shape[1]), float("nan"))
        self.queues: dict[str, deque[Work]] = {COPIES: deque(), SEARCHES: deque()}
        self.pending: dict[str, list[Work]] = {COPIES: [], SEARCHES: []}
        self.answer = TopK(torch.full((len(queries), 5), float("-inf")), torch.full((len(queries), 5), -1))
        self.random, self.lock = random.Random(seed), threading.RLock()
        self.most_ahead = 0

    def stage(self, slot: int, begin: int, end: int) -> None:
        with self.lock:
            self.pinned[slot, : end - begin] = self.pool[begin:end]
            self.run_some()

    def copy(self, slot: int, begin: int, end: int) -> Work:
        def action() -> None:
            self.buffers[slot, : end - begin] = (self.pinned[slot] if self.staged else self.pool[begin:])[: end - begin]

        return self.push(COPIES, action)

    def search(self, slot: int, begin: int, end: int) -> Work:
        def action() -> None:
            found = topk(self.queries, self.buffers[slot, : end - begin], 5)
            self.answer = merge_topk([self.answer, found], 5, [0, begin])

        return self.push(SEARCHES, action)

    def wait(self, lane: str, mark: Work) -> None:
        if self.broken != lane:
            self.pending[lane].append(mark)

    def finish(self, mark: Work) -> None:
        if self.broken == "host" and threading.current_thread() is not threading.main_thread():
            return
        with self.lock:
            while not mark.done:
                self.run_one()

    def push(self, lane: str, action: Callable[[], None]) -> Work:
        with self.lock:
            work, self.pending[lane] = Work(self.pending[lane], action), []
            self.queues[lane].append(work)
            self.most_ahead = max(self.most_ahead, len(self.queues[SEARCHES]))
            self.run_some()
            return work

    def run_some(self) -> None:
        while self.random.random() < 0.4 and any(self.ready()):
            self.run_one()

    def ready(self) -> list[str]:
        return [lane for lane, queue in self.queues.items() if queue and all(mark.done for mark in queue[0].waits)]

    def run_one(self) -> None:
        work = self.queues[self.random.choice(self.ready())].popleft()
        work.action()
        work.done = True


def run(staged: bool, seed: int, broken: str = "", progress: Callable[[float], None] | None = None) -> bool:
    """Whether the answer is right."""
    generator = torch.Generator().manual_seed(seed)
    pool, queries = torch.randn(1500, 8, generator=generator), torch.randn(3, 8, generator=generator)
    lanes = FakeLanes(pool, queries, staged, seed, broken)
    stream(lanes, PARTS, staged, progress)
    assert not lanes.queues[COPIES]  # the pool is the caller's again
    assert lanes.most_ahead <= AHEAD + 1
    while lanes.queues[SEARCHES]:
        lanes.run_one()
    expected = topk(queries, pool, 5)
    return torch.equal(lanes.answer.indices, expected.indices) and torch.equal(lanes.answer.scores, expected.scores)


@pytest.mark.parametrize("staged", [False, True])
def test_every_allowed_order_gives_the_answer(staged: bool) -> None:
    assert all(run(staged, seed) for seed in range(30))


@pytest.mark.parametrize(("staged", "broken"), [(False, COPIES), (False, SEARCHES), (True, COPIES), (True, "host")])
def test_a_missing_wait_is_seen(staged: bool, broken: str) -> None:
    assert not all(run(staged, seed, broken) for seed in range(30))


@pytest.mark.parametrize("staged", [False, True])
def test_progress_rises_and_what_it_raises_ends_the_search(staged: bool) -> None:
    shares: list[float] = []
    assert run(staged, 1, progress=shares.append)
    assert shares == sorted(shares) and len(shares) == len(PARTS) - AHEAD and 0 < shares[0] < shares[-1] < 1

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run(staged, 1, progress=interrupt)
    assert threading.active_count() == before


def test_an_error_while_staging_is_raised() -> None:
    class Truncated(FakeLanes):
        def stage(self, slot: int, begin: int, end: int) -> None:
            if begin:
                raise OSError("the file is shorter than its header says")

    lanes = Truncated(torch.zeros(1500, 8), torch.zeros(1, 8), True, 0)
    with pytest.raises(OSError, match="shorter"):
        stream(lanes, PARTS, True)
    assert not lanes.queues[COPIES]


def test_parts_cover_the_pool_once() -> None:
    for rows, width, size in [(1, 1, 2), (1000, 8, 4), (129, 1 << 20, 4), (5, 0, 4), (10**8, 256, 2)]:
        parts = split(rows, width, size)
        assert parts[0][0] == 0 and parts[-1][1] == rows
        assert all(a[1] == b[0] and a[1] % 128 == 0 for a, b in pairwise(parts))
        assert all(end - begin <= max(128, (32 << 20) // max(1, width * size)) for begin, end in parts)
    assert split(0, 8, 4) == []


def test_which_devices_go_together() -> None:
    host, meta = torch.zeros(2, 4), torch.zeros(2, 4, device="meta")
    check_matrices(host, host)
    for queries, pool in ((host, meta), (meta, host)):  # neither is a pool in host memory for queries on a GPU
        with pytest.raises(ArgumentError, match="device"):
            check_matrices(queries, pool)
