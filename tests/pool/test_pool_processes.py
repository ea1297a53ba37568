"""Pools that several processes and threads read and write, and writers that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from pool_model import WIDTH, vectors

from tgq_fast.pool.item_pool import ItemPool

WRITER = """
import os, sys, torch
from tgq_fast.pool import log as pool_log
from tgq_fast.pool.item_pool import ItemPool
os.fsync = lambda handle: None
pool_log.FOLD_COMMITS = 5
ids = [f"i{i}" for i in range(12)]
with ItemPool.open(sys.argv[1], mode="a") as pool:
    for number in range(1, int(sys.argv[2]) + 1):
        pool.upsert(ids, torch.full((12, 6), float(number)))
        if number % 20 == 0:
            pool.compact()
"""


def test_a_reader_never_sees_a_mixture(tmp_path: Path) -> None:
    commits = int(os.environ.get("TGQ_POOL_COMMITS", "100"))
    folder = tmp_path / "pool"
    with ItemPool.create(folder, dims=WIDTH, shard_size=4) as pool:
        pool.append([f"i{i}" for i in range(12)], torch.zeros(12, WIDTH))
    reader = ItemPool.open(folder)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(commits)])
    seen = set()
    while (ended := writer.poll()) is None or reader.refresh():
        pool = ItemPool.open(folder)
        for one in (reader, pool):
            found = one.search(torch.ones(1, WIDTH), 20)
            values = set(found.scores[0, :12].tolist())
            assert len(values) == 1 and found.indices[0, 12:].tolist() == [-1] * 8
            assert sorted(found.ids[0][:12]) == sorted(f"i{i}" for i in range(12))
            seen |= values
        pool.close()
        reader.refresh()
    assert ended == 0 and reader.get(["i3"])[0, 0] == commits and len(seen) > 2


KILLED = """
import os, random, signal, sys, torch
from tgq_fast.pool import log as pool_log
from tgq_fast.pool.item_pool import ItemPool

pool_log.FOLD_COMMITS = 4

def work(folder, first, kill):
    events, draw = [0], random.Random(first)
    def count(name, real):
        def call(*arguments, **options):
            events[0] += 1
            if events[0] == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    os.fsync = count("fsync", lambda handle: None)
    os.replace, os.unlink = count("replace", os.replace), count("unlink", os.unlink)
    with ItemPool.open(folder, mode="a") as pool:
        for step in range(first, first + 1000):
            draw = random.Random(step)
            ids = [f"i{i}" for i in draw.sample(range(30), draw.randrange(1, 9))]
            if draw.random() < 0.6:
                pool.upsert(ids, torch.full((len(ids), 6), float(step)))
            else:
                pool.delete(ids, missing="ignore")
            print(step, flush=True)
            if draw.random() < 0.3:
                pool.compact()

for line in sys.stdin:
    folder, first, kill = line.split()
    child = os.fork()
    if not child:
        work(folder, int(first), int(kill))
        os._exit(1)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def replay(steps: int) -> list[tuple[str, float]]:
    items: list[tuple[str, float]] = []
    for step in range(steps):
        draw = random.Random(step)
        ids = [f"i{i}" for i in draw.sample(range(30), draw.randrange(1, 9))]
        items = [item for item in items if item[0] not in ids]
        if draw.random() < 0.6:
            items += [(name, float(step)) for name in ids]
    return items


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_kills_lose_nothing_and_duplicate_nothing(tmp_path: Path) -> None:
    folder, kills = tmp_path / "pool", int(os.environ.get("TGQ_POOL_KILLS", "25"))
    ItemPool.create(folder, dims=WIDTH, shard_size=5).close()
    killer = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert killer.stdin is not None and killer.stdout is not None
    done, draw = 0, random.Random(5)
    for _ in range(kills):
        killer.stdin.write(f"{folder} {done} {draw.randrange(1, 40)}\n")
        for line in killer.stdout:
            if line.startswith("ended"):
                assert int(line.split()[1]) == -signal.SIGKILL
                break
            done = int(line) + 1
        pool = ItemPool.open(folder)
        pool.verify()
        found = list(zip(pool.ids(), pool.embeddings()[:, 0].tolist()))
        if found != replay(done):  # killed after the commit and before its line
            done += 1
            assert found == replay(done)
    killer.stdin.close()
    assert killer.wait() == 0 and done > kills


def test_threads_share_one_pool(tmp_path: Path) -> None:
    rows = vectors(400, seed=3) + torch.arange(400)[:, None] / 1000
    with ItemPool.create(tmp_path / "pool", dims=WIDTH, shard_size=3) as pool:
        pool.append([f"i{i}" for i in range(400)], rows)
    want = ItemPool.open(tmp_path / "pool").search(rows[:40], 5).ids
    faults: list[str] = []

    def work(pool: ItemPool, start: int) -> None:
        try:
            if pool.search(rows[start : start + 10], 5, exclude_ids=[[]] * 10).ids != want[start : start + 10]:
                faults.append("wrong answer")
            if not torch.equal(pool.get([f"i{start}", "i399"]), rows[[start, 399]]):
                faults.append("wrong row")
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(4):
            pool = ItemPool.open(tmp_path / "pool")
            threads = [threading.Thread(target=work, args=(pool, start)) for start in (0, 10, 20, 30)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not faults
