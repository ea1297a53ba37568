"""The item pool: round trips, determinism under kill -9, refusals, search, faiss."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tgq_fast.errors import ArgumentError, NonFiniteError, PoolError
from tgq_fast.pool import files as pool_files
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.reference import exact_topk


def vectors(n: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def names(n: int, start: int = 0) -> list[str]:
    return [f"item-{i}" for i in range(start, start + n)]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in (".lock", ".readers")}


def make(folder: Path, n: int = 25, shard_size: int = 10, **options: object) -> Path:
    with ItemPool.create(folder, dims=8, shard_size=shard_size, **options) as pool:  # type: ignore[arg-type]
        pool.append(names(n), vectors(n))
    return folder


def test_round_trip(tmp_path: Path) -> None:
    make(tmp_path / "pool", model="m1", source="c1")
    pool = ItemPool.open(tmp_path / "pool")
    assert len(pool) == 25 and pool.dims == 8 and pool.manifest.model == "m1"
    assert [t.shape[0] for _, t in pool.shards()] == [10, 10, 5]
    assert pool.ids() == names(25)
    assert torch.equal(pool.embeddings(), vectors(25))
    assert torch.equal(pool.get(["item-20", "item-3"]), vectors(25)[[20, 3]])
    assert pool.rows(["item-24", "nobody"], missing="mark").tolist() == [24, -1]
    pool.verify()
    assert set(pool.manifest.writers[0]) == {"version", "commit"}
    for name in ("manifest.json", "commit-00000001.json"):
        text = (tmp_path / "pool" / name).read_text().lower()
        assert not any(key in text for key in ("time", "date"))


def test_append_starts_a_new_shard_and_leaves_old_bytes(tmp_path: Path) -> None:
    folder = make(tmp_path / "pool")
    before = contents(folder)
    with ItemPool.open(folder, mode="a") as pool:
        pool.append(names(4, 25), vectors(4, seed=1))
    after = contents(folder)
    assert all(after[name] == data for name, data in before.items())
    assert len(after) == len(before) + 4  # three files of the shard and the commit
    pool = ItemPool.open(folder)
    assert [t.shape[0] for _, t in pool.shards()] == [10, 10, 5, 4]
    assert torch.equal(pool.embeddings(), torch.cat((vectors(25), vectors(4, seed=1))))
    with pytest.raises(PoolError, match="mode='a'"):
        pool.append(["x"], vectors(1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_storage(tmp_path: Path, dtype: str) -> None:
    make(tmp_path / "pool", dtype=dtype)
    pool = ItemPool.open(tmp_path / "pool")
    assert torch.equal(pool.embeddings(), vectors(25).to(getattr(torch, dtype)))
    assert pool.search(pool.embeddings()[:3].float(), 1).indices[:, 0].tolist() == [0, 1, 2]


# One process that forks a writer per line of standard input, "folder moment n". The writer kills itself with SIGKILL
# right before or after the n-th time it makes something durable, or with that file half written. Prints how each writer
# ended.
KILLER = """
import os, signal, sys
import torch
from tgq_fast.pool import log as pool_log
from tgq_fast.io.identity import package_identity
from tgq_fast.pool.item_pool import ItemPool

package_identity()  # remembered, so that a commit made meanwhile does not change who writes
pool_log.FOLD_COMMITS = 2

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def write(folder, moment, n):
    calls, fsync, replace = [0], os.fsync, os.replace
    def count(work, tear):
        calls[0] += 1
        if calls[0] == n and moment == "before":
            die()
        if calls[0] == n and moment == "torn":
            tear()
            die()
        work()
        if calls[0] == n and moment == "after":
            die()
    def cut(handle):
        if os.path.isfile(f"/proc/self/fd/{handle}"):
            os.truncate(f"/proc/self/fd/{handle}", os.fstat(handle).st_size - 7)
    os.fsync = lambda handle: count(lambda: None, lambda: cut(handle))  # nothing here tests the disk
    os.replace = lambda source, target: count(lambda: replace(source, target), lambda: None)
    x = torch.randn(25, 8, generator=torch.Generator().manual_seed(0))
    with ItemPool.create(folder, dims=8, shard_size=10, resume=True) as pool:
        for start in range(len(pool), 25, 10):
            stop = min(start + 10, 25)
            lines = '{"item_id": "bad-%d"}\\n' % start
            pool.append([f"item-{i}" for i in range(start, stop)], x[start:stop], reject_lines=lines)

for line in sys.stdin:
    folder, moment, n = line.split()
    child = os.fork()
    if not child:
        write(folder, moment, int(n))
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if os.path.exists(folder + "/manifest.json"):
        ItemPool.open(folder).verify()  # readers always see a committed state
    print(ended, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
def test_killed_at_any_point_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    # The first manifest (3 points), three appends of 3 files, rejects, folder and commit (8), and a fold (3). Right
    # before one is right after another.
    points = [("after", n) for n in range(1, 31)] + [("torn", n) for n in (1, 4, 5, 6, 7, 9, 15, 23, 26)]
    once = [f"{tmp_path}/{moment}{n} {moment} {n}" for moment, n in points]
    finish = [f"{tmp_path}/{moment}{n} never 0" for moment, n in points]
    again = [f"{tmp_path}/again {moment} {n}" for moment, n in [("torn", 1), ("after", 5), ("torn", 7), ("before", 9)]]
    lines = [*once, *again, f"{tmp_path}/whole never 0", f"{tmp_path}/again never 0", *finish]
    ran = subprocess.run(
        [sys.executable, "-c", KILLER], input="\n".join(lines), text=True, capture_output=True, check=True
    )
    killed = len(once) + len(again)
    assert [int(code) for code in ran.stdout.split()] == [-signal.SIGKILL] * killed + [0] * (len(lines) - killed)
    whole = contents(tmp_path / "whole")
    # Three files for each of three shards, the manifest with two commits in it, the third commit, the rejects.
    assert len(whole) == 12 and "rejects.jsonl" in whole and "commit-00000003.json" in whole
    for name in ["again", *(f"{moment}{n}" for moment, n in points)]:
        assert contents(tmp_path / name) == whole, name


def test_one_append_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "pool")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with ItemPool.open(folder, mode="a") as pool, monkeypatch.context() as patch:
        patch.setattr("tgq_fast.pool.log.write_atomic", fail)
        with pytest.raises(OSError, match="disk full"):
            pool.append(names(25, 100), vectors(25))
    assert len(ItemPool.open(folder)) == 25
    with ItemPool.open(folder, mode="a") as pool:
        assert not (folder / "shard-000003.safetensors").exists()  # swept
        pool.append(names(1, 100), vectors(1))
    assert len(ItemPool.open(folder)) == 26


def test_failed_append_leaves_the_open_pool_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_once(path: Path, data: bytes) -> None:
        calls.append(path)
        raise OSError("disk full")

    with ItemPool.open(make(tmp_path / "pool"), mode="a") as pool:
        with monkeypatch.context() as patch:
            patch.setattr("tgq_fast.pool.log.write_atomic", fail_once)
            with pytest.raises(OSError, match="disk full"):
                pool.append(names(3, 100), vectors(3))
        assert len(pool) == 25 and calls
        pool.append(names(3, 100), vectors(3))
        assert len(pool) == 28
    ItemPool.open(tmp_path / "pool").verify()


def test_ids_are_kept_while_they_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "pool")
    for kept, count in ((1 << 20, 3), (0, 0)):
        monkeypatch.setattr(pool_files, "KEPT_ID_BYTES", kept)
        pool = ItemPool.open(folder)
        for _ in range(2):
            hits = pool.search(vectors(3), 25)
            assert hits.ids == [[f"item-{i}" for i in line] for line in hits.indices.tolist()]
            assert pool.ids() == names(25)
        assert sum(name.endswith(".ids.parquet") for name in pool._files._kept) == count


def test_two_writers(tmp_path: Path) -> None:
    folder = make(tmp_path / "pool")
    with ItemPool.open(folder, mode="a"):
        with pytest.raises(PoolError, match="another"):
            ItemPool.open(folder, mode="a")
        with pytest.raises(PoolError, match="another"):
            ItemPool.create(folder, dims=8, shard_size=10, resume=True)
        assert len(ItemPool.open(folder)) == 25  # readers are welcome
    with ItemPool.open(folder, mode="a") as pool:
        pool.append(["late"], vectors(1))


@pytest.mark.parametrize("bad", [[""], ["item-3"], ["\ud800"], [7]])
def test_bad_ids(tmp_path: Path, bad: list) -> None:
    with ItemPool.open(make(tmp_path / "pool"), mode="a") as pool:
        with pytest.raises(ArgumentError, match="ids"):
            pool.append(bad, vectors(1))
        with pytest.raises(ArgumentError, match="twice"):
            pool.append(["new", "new"], vectors(2))
        assert len(pool) == 25


def test_non_finite_rows_are_named(tmp_path: Path) -> None:
    rows = vectors(4)
    rows[1, 2], rows[3, 0] = float("nan"), float("inf")
    with ItemPool.create(tmp_path / "pool", dims=8) as pool:
        with pytest.raises(NonFiniteError) as caught:
            pool.append(names(4), rows)
        assert caught.value.ids == ("item-1", "item-3") and caught.value.count == 2
    half = ItemPool.create(tmp_path / "half", dims=8, dtype="float16")
    with half, pytest.raises(NonFiniteError, match="item-0"):
        half.append(names(1), torch.full((1, 8), 1e6))  # overflows fp16


def test_wrong_shapes(tmp_path: Path) -> None:
    with ItemPool.create(tmp_path / "pool", dims=8) as pool:
        for rows in (vectors(2, 7), vectors(2)[0], vectors(2).long()):
            with pytest.raises(ArgumentError, match="embeddings"):
                pool.append(names(2), rows)
        with pytest.raises(ArgumentError, match="ids"):
            pool.append(names(3), vectors(2))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_damage_is_refused_with_the_reason(tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return make(tmp_path / name)

    with pytest.raises(PoolError, match="no such folder"):
        ItemPool.open(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PoolError, match=r"no manifest\.json"):
        ItemPool.open(tmp_path / "empty")
    folder = damaged("truncated")
    os.truncate(folder / "shard-000001.safetensors", 40)
    with pytest.raises(PoolError, match="truncated"):
        ItemPool.open(folder)
    folder = damaged("missing")
    (folder / "shard-000002.ids.parquet").unlink()
    with pytest.raises(PoolError, match="missing"):
        ItemPool.open(folder)
    folder = damaged("flipped")
    flip(folder / "shard-000001.safetensors")
    with pytest.raises(PoolError, match="SHA-256"):
        ItemPool.open(folder).search(vectors(1), 1)
    with pytest.raises(PoolError, match="SHA-256"):
        ItemPool.open(folder).verify()
    ItemPool.open(folder, verify=False).search(vectors(1), 1)
    folder = damaged("ids")
    flip(folder / "shard-000000.ids.parquet", 10)
    with pytest.raises(PoolError, match="SHA-256"):
        ItemPool.open(folder).ids()
    folder = damaged("index")
    flip(folder / "shard-000002.index.safetensors")
    with pytest.raises(PoolError, match="SHA-256"):
        ItemPool.open(folder).rows(["item-3"])
    folder = damaged("commit")
    flip(folder / "commit-00000001.json", 300)
    with pytest.raises(PoolError, match=r"commit-00000001.*checksum|JSON"):
        ItemPool.open(folder)
    folder = damaged("manifest")
    with ItemPool.open(folder, mode="a") as pool:
        pool._log.start(pool.manifest)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"rows": 10', '"rows": 11', 1))
    with pytest.raises(PoolError, match="checksum"):
        ItemPool.open(folder)
    (folder / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(PoolError, match="JSON"):
        ItemPool.open(folder)
    (folder / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(PoolError, match="foreign"):
        ItemPool.open(folder)


def test_create_refuses_other_folders_and_other_pools(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(PoolError, match=r"cat\.png"):
        ItemPool.create(tmp_path / "photos", dims=8)
    folder = make(tmp_path / "pool", model="m1")
    with pytest.raises(PoolError, match="already holds"):
        ItemPool.create(folder, dims=8, shard_size=10, model="m1")
    with pytest.raises(PoolError, match="model"):
        ItemPool.create(folder, dims=8, shard_size=10, model="m2", resume=True)
    with pytest.raises(ArgumentError, match="dtype"):
        ItemPool.create(tmp_path / "new", dims=8, dtype="int8")


@pytest.mark.parametrize("shard_size", [1, 4, 10, 100])
def test_search_is_exact_whatever_the_sharding(tmp_path: Path, shard_size: int) -> None:
    rows = torch.randint(-2, 3, (30, 8), generator=torch.Generator().manual_seed(3)).float()  # many ties
    queries = torch.randint(-2, 3, (5, 8), generator=torch.Generator().manual_seed(4)).float()
    with ItemPool.create(tmp_path / "pool", dims=8, shard_size=shard_size) as pool:
        pool.append(names(30), rows)
    pool = ItemPool.open(tmp_path / "pool")
    steps: list[tuple[int, int]] = []
    for k in (1, 6, 40):
        hits = pool.search(queries, k, progress=lambda done, total: steps.append((done, total)))
        expected = exact_topk(queries, rows, k)
        assert torch.equal(hits.indices, expected.indices) and torch.equal(hits.scores, expected.scores)
        assert hits.ids[0] == [None if i < 0 else f"item-{i}" for i in expected.indices[0].tolist()]
    assert steps[-1] == (30, 30)
    excluded = [["item-0", "item-29"], [], ["nobody"], ["item-7"], ["item-1", "item-2", "item-3"]]
    table = torch.tensor([[0, 29, -1], [-1] * 3, [-1] * 3, [7, -1, -1], [1, 2, 3]])
    assert torch.equal(
        pool.search(queries, 30, exclude_ids=excluded).indices, exact_topk(queries, rows, 30, exclude=table).indices
    )
    single = pool.search(queries, 5, exclude_ids=["item-0", None, None, None, "item-4"])
    assert "item-0" not in single.ids[0] and "item-4" not in single.ids[4]


def test_search_bad_arguments(tmp_path: Path) -> None:
    pool = ItemPool.open(make(tmp_path / "pool"))
    with pytest.raises(ArgumentError, match="queries"):
        pool.search(vectors(2, 7), 1)
    with pytest.raises(ArgumentError, match="k"):
        pool.search(vectors(2), 0)
    with pytest.raises(ArgumentError, match="exclude_ids"):
        pool.search(vectors(2), 1, exclude_ids=["item-0"])
    with pytest.raises(NonFiniteError):
        pool.search(torch.full((1, 8), float("nan")), 1)
    with pytest.raises(ArgumentError, match="nobody"):
        pool.get(["nobody"])


def test_empty_pool(tmp_path: Path) -> None:
    ItemPool.create(tmp_path / "pool", dims=8).close()
    pool = ItemPool.open(tmp_path / "pool")
    pool.verify()
    hits = pool.search(vectors(2), 3)
    assert hits.indices.tolist() == [[-1] * 3] * 2 and hits.ids == [[None] * 3] * 2
    assert pool.embeddings().shape == (0, 8) and pool.ids() == []


def test_faiss_round_trip(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    pool = ItemPool.open(make(tmp_path / "pool"))
    index = pool.to_faiss()
    queries = vectors(4, seed=9)
    _, labels = index.search(queries.numpy(), 5)
    assert labels.tolist() == pool.search(queries, 5).indices.tolist()
    again = ItemPool.from_faiss(index, pool.ids(), tmp_path / "again", shard_size=10)
    assert torch.equal(again.embeddings(), pool.embeddings()) and again.ids() == pool.ids()
    with pytest.raises(ArgumentError, match="ids"):
        ItemPool.from_faiss(index, ["one"], tmp_path / "third")
    with pytest.raises(ArgumentError, match="inner-product"):
        ItemPool.from_faiss(faiss.IndexFlatL2(8), [], tmp_path / "fourth")


def test_faiss_indexes_that_give_rows_back_and_others(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    rows = vectors(40).numpy()
    graph = faiss.IndexHNSWFlat(8, 4, faiss.METRIC_INNER_PRODUCT)
    half = faiss.IndexScalarQuantizer(8, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for number, index in enumerate((graph, half)):
        index.train(rows)
        index.add(rows)
        pool = ItemPool.from_faiss(index, names(40), tmp_path / str(number))
        assert torch.equal(
            pool.embeddings(), torch.from_numpy(rows if index is graph else rows.astype("float16")).float()
        )
    labelled = faiss.IndexIDMap(faiss.IndexFlatIP(8))
    labelled.add_with_ids(rows, np.arange(40)[::-1].copy())
    both_ways = faiss.IndexIDMap2(faiss.IndexFlatIP(8))  # gives vectors back, by label
    both_ways.add_with_ids(rows, np.arange(40)[::-1].copy())
    lists = faiss.IndexIVFFlat(faiss.IndexFlatIP(8), 8, 2, faiss.METRIC_INNER_PRODUCT)
    lists.train(rows)
    lists.add_with_ids(rows, np.arange(40)[::-1].copy())
    for other in (labelled, both_ways, lists, faiss.IndexReplicas(), object()):
        with pytest.raises(ArgumentError, match="index"):
            ItemPool.from_faiss(other, names(40), tmp_path / "refused")
    again = ItemPool.from_faiss(labelled.index, names(40), tmp_path / "inner")  # what the hint says
    assert torch.equal(again.embeddings(), torch.from_numpy(rows))
