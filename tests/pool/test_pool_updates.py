"""Pools that change: every reader sees one version, whole; what is deleted never comes back; kills lose nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pool_model import WIDTH, Model, vectors
from safetensors.torch import save_file

from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.io.files import write_atomic
from tgq_fast.io.identity import canonical_json
from tgq_fast.pool import ids as pool_ids
from tgq_fast.pool import log as pool_log
from tgq_fast.pool import reader as pool_reader
from tgq_fast.pool import writer as pool_writer
from tgq_fast.pool.ids import HashLevels, hash_ids, match
from tgq_fast.pool.item_pool import ItemPool


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing here tests the disk


@pytest.mark.parametrize("bits", [64, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_changes_equal_a_plain_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, bits: int) -> None:
    if bits < 64:  # ids collide all the time
        few = np.uint64(2**bits - 1)
        for module in (pool_ids, pool_reader, pool_writer):
            monkeypatch.setattr(module, "hash_ids", lambda ids: hash_ids(ids) & few)
    monkeypatch.setattr(pool_log, "FOLD_COMMITS", 3)
    draw, model = random.Random(seed), Model()
    ItemPool.create(tmp_path / "pool", dims=WIDTH, shard_size=7).close()
    reader = ItemPool.open(tmp_path / "pool")
    for _ in range(12):
        with ItemPool.open(tmp_path / "pool", mode="a") as pool:
            for _ in range(draw.randrange(3)):
                chosen = [f"i{i}" for i in draw.sample(range(40), draw.randrange(12))]
                rows = vectors(len(chosen), seed=draw.randrange(10**6))
                if draw.random() < 0.6:
                    pool.upsert(chosen, rows)
                    model.upsert(chosen, rows)
                else:
                    present = sum(name in chosen for name, _ in model.items)
                    assert pool.delete(chosen, missing="ignore") == present
                    model.delete(chosen)
                    assert [key for key in pool.content(chosen)] == [None] * len(chosen)
            model.check(pool)
            if draw.random() < 0.3:
                pool.compact()
                assert not pool.manifest.dead
                model.check(pool)
        reader.refresh()
        model.check(reader)
        model.check(ItemPool.open(tmp_path / "pool"))
    ItemPool.open(tmp_path / "pool").verify()


def test_compacting_leaves_what_is_whole_and_removes_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    with ItemPool.create(folder, dims=WIDTH, shard_size=10) as pool:
        pool.append([f"a{i}" for i in range(20)], vectors(20), content=[bytes([i]) * 16 for i in range(20)])
        for i in range(6):
            pool.append([f"b{i}"], vectors(1, seed=i))
        pool.delete(["a3", "b2"])
        before, whole = pool.embeddings(), (folder / "shard-000001.safetensors").stat().st_ino
        assert pool.compact() == 7  # the first, and six of one row; not the second
        assert [shard.rows for shard in pool.manifest.shards] == [9, 10, 5]
        assert torch.equal(pool.embeddings(), before)
        assert pool.content(["a2", "a4", "a19", "b0", "nobody"]) == [b"\2" * 16, b"\4" * 16, b"\23" * 16, None, None]
        assert pool.compact() == 0
        pool.delete([name for name in pool.ids() if name.startswith("a")])
        assert pool.compact() == 2 and pool.ids() == ["b0", "b1", "b3", "b4", "b5"]
        pool.delete(pool.ids())
        pool.compact()
        assert len(pool) == 0 and not pool.manifest.shards
    assert whole and not list(folder.glob("shard-*"))


def test_a_reader_keeps_its_version_until_it_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    with ItemPool.create(folder, dims=WIDTH, shard_size=5) as pool:
        pool.append([f"a{i}" for i in range(10)], vectors(10))
    reader = ItemPool.open(folder)
    with ItemPool.open(folder, mode="a") as pool:
        pool.delete(["a0", "a1", "a2"])
        pool.upsert(["a5"], 100 * torch.ones(1, WIDTH))
        pool.compact()
        assert reader.ids() == [f"a{i}" for i in range(10)] and torch.equal(reader.embeddings(), vectors(10))
        assert reader.manifest.version == 1
    with ItemPool.open(folder, mode="a"):
        assert (folder / "shard-000000.safetensors").exists()  # the reader may still map it
    assert reader.refresh() and not reader.refresh()
    assert reader.ids() == [*(f"a{i}" for i in (3, 4, 6, 7, 8, 9)), "a5"]
    assert reader.search(torch.ones(1, WIDTH), 1).ids == [["a5"]]
    with ItemPool.open(folder, mode="a"):
        assert not (folder / "shard-000000.safetensors").exists()
    assert reader.ids()[0] == "a3"


def test_an_iterator_keeps_the_version_it_began_with(tmp_path: Path) -> None:
    with ItemPool.create(tmp_path / "pool", dims=WIDTH, shard_size=2) as pool:
        pool.append(list("abcdef"), vectors(6))
        parts = pool.batches(2)
        seen = [next(parts)[1]]
        pool.delete(["a", "c", "e"])
        pool.compact()
        assert pool.ids() == list("bdf")
        assert torch.equal(torch.cat(seen + [part for _, part in parts]), vectors(6))


def test_writing_stays_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [0]

    def count(path: Path, data: bytes) -> None:
        written[0] += len(data)
        write_atomic(path, data)

    monkeypatch.setattr(pool_log, "write_atomic", count)
    with ItemPool.create(tmp_path / "pool", dims=WIDTH, shard_size=4) as pool:
        for number in range(300):
            pool.append([f"i{number}"], vectors(1))
        final = len((tmp_path / "pool" / "manifest.json").read_bytes())
        assert len(list((tmp_path / "pool").glob("commit-*"))) < 250
    assert written[0] < 6 * final  # each append writing the whole manifest would be 150 times
    assert ItemPool.open(tmp_path / "pool").ids() == [f"i{n}" for n in range(300)]


def as_release_1(folder: Path) -> None:
    """A pool as the first release wrote it."""
    folder.mkdir()
    shards = []
    for number in range(2):
        stem = f"shard-{number:06d}"
        save_file({"embeddings": vectors(5, seed=number)}, folder / f"{stem}.safetensors")
        ids = [f"i{i}" for i in range(number * 5, number * 5 + 5)]
        pq.write_table(pa.table({"id": pa.array(ids)}), folder / f"{stem}.ids.parquet")
        record = {"rows": 5, "source_stop": number * 5 + 5}
        for name, suffix in (("embeddings", ".safetensors"), ("ids", ".ids.parquet")):
            data = (folder / f"{stem}{suffix}").read_bytes()
            sha = hashlib.sha256(data).hexdigest()
            record[name] = {"name": f"{stem}{suffix}", "bytes": len(data), "sha256": sha}  # type: ignore[assignment]
        shards.append(record)
    body = {"format": "tgq-fast item pool", "format_version": 1, "items": 10, "dims": WIDTH, "dtype": "float32"}
    body |= {"shard_size": 5, "model": "m", "source": "s", "writers": [{"version": "0", "commit": "c"}]}
    body |= {"shards": shards, "rejects": None, "rejected": 0}
    body["checksum"] = hashlib.sha256(canonical_json(body).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(body))


def test_pools_of_the_first_release(tmp_path: Path) -> None:
    folder, model = tmp_path / "pool", Model()
    as_release_1(folder)
    model.upsert([f"i{i}" for i in range(10)], torch.cat((vectors(5), vectors(5, seed=1))))
    pool = ItemPool.open(folder)
    pool.verify()
    model.check(pool)
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 1  # readers change nothing
    with ItemPool.open(folder, mode="a") as pool:
        with pytest.raises(ArgumentError, match="i3"):
            pool.append(["i3"], vectors(1))
        pool.upsert(["i3", "new"], vectors(2, seed=7))
        model.upsert(["i3", "new"], vectors(2, seed=7))
        model.check(pool)
        pool.compact()
    model.check(ItemPool.open(folder))
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 2


def test_refusals(tmp_path: Path) -> None:
    with ItemPool.create(tmp_path / "pool", dims=WIDTH) as pool:
        pool.append(["a", "b"], vectors(2))
        for wrong in (["c"], ["a", "c"]):
            with pytest.raises(ArgumentError, match="'c'"):
                pool.delete(wrong)
        for call in (pool.delete, lambda ids: pool.upsert(ids, vectors(len(ids)))):
            with pytest.raises(ArgumentError, match="ids"):
                call("ab")
            with pytest.raises(ArgumentError, match="twice"):
                call(["a", "a"])
        with pytest.raises(ArgumentError, match="content"):
            pool.upsert(["c"], vectors(1), content=[b"short"])
        assert pool.ids() == ["a", "b"] and pool.manifest.version == 1
    reader = ItemPool.open(tmp_path / "pool")
    for what in (lambda: reader.upsert(["c"], vectors(1)), lambda: reader.delete(["a"]), reader.compact):
        with pytest.raises(PoolError, match="mode='a'"):
            what()


def test_commits_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    with ItemPool.create(folder, dims=WIDTH) as pool:
        pool.append(["a", "b"], vectors(2))
        pool.delete(["a"])
    second = folder / "commit-00000002.json"
    whole = second.read_bytes()
    for damage in (whole[:-9], whole[: len(whole) // 2], b"", b"{}", b"[" * 200_000, b'"x"', whole.replace(b"2", b"3")):
        second.write_bytes(damage)
        with pytest.raises(PoolError, match="commit-00000002"):
            ItemPool.open(folder)
    second.write_bytes((folder / "commit-00000001.json").read_bytes())
    with pytest.raises(PoolError, match="commit-00000002"):
        ItemPool.open(folder)
    with ItemPool.create(tmp_path / "other", dims=WIDTH) as pool:
        pool.append(["x", "y"], vectors(2))
        pool.delete(["y"])
    second.write_bytes((tmp_path / "other" / second.name).read_bytes())
    with pytest.raises(PoolError, match="mixed"):
        ItemPool.open(folder)
    second.write_bytes(whole)
    assert ItemPool.open(folder).ids() == ["b"]
    for deep in ('{"a":' * 100_000, "[" * 100_000, '{"format": NaN'):
        (folder / "manifest.json").write_text(deep)
        with pytest.raises(PoolError, match="JSON"):
            ItemPool.open(folder)


def test_a_commit_that_fails_has_not_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ItemPool.create(tmp_path / "pool", dims=WIDTH) as pool:
        pool.append(["a", "b"], vectors(2))

        def written_and_failed(path: Path, data: bytes) -> None:
            write_atomic(path, data)
            raise OSError("the folder cannot be synced")

        with monkeypatch.context() as patch:
            patch.setattr(pool_log, "write_atomic", written_and_failed)
            with pytest.raises(OSError, match="synced"):
                pool.upsert(["a"], vectors(1, seed=1))
        assert ItemPool.open(tmp_path / "pool").ids() == ["a", "b"]
        pool.upsert(["c"], vectors(1, seed=2))
    assert ItemPool.open(tmp_path / "pool").ids() == ["a", "b", "c"]
    ItemPool.open(tmp_path / "pool").verify()


@pytest.mark.parametrize("suffix", [".safetensors", ".ids.parquet", ".index.safetensors"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_changed_since_it_was_read(tmp_path: Path, suffix: str, verify: bool) -> None:
    with ItemPool.create(tmp_path / "pool", dims=WIDTH) as pool:
        pool.append(list("abcdefgh"), vectors(8))
    pool = ItemPool.open(tmp_path / "pool", verify=verify)

    def use() -> list[list[str | None]]:
        return pool.search(vectors(2), 3, exclude_ids=["a", "b"]).ids

    before, path = use(), tmp_path / "pool" / f"shard-000000{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[:-20] + bytes([data[-20] ^ 64]) + data[-19:])
    os.utime(path, ns=(1, 1))
    with pytest.raises(PoolError, match=r"SHA-256|changed since"):
        use()
    path.write_bytes(data)
    os.utime(path, ns=(2, 2))  # only its time is another one
    if verify:
        assert use() == before


def test_lazily_negated_rows_and_queries(tmp_path: Path) -> None:
    def negated(x: torch.Tensor) -> torch.Tensor:
        return torch.complex(torch.zeros_like(x), -x).conj().imag

    with ItemPool.create(tmp_path / "pool", dims=WIDTH) as pool:
        pool.append(list("abcdefgh"), negated(vectors(8)))
        assert torch.equal(pool.embeddings(), vectors(8))
        assert pool.search(negated(vectors(3)), 4).ids == pool.search(vectors(3), 4).ids


@pytest.mark.parametrize("given", [[5], [None, "a"], ["a", 7], [[b"a"]], 5, "a", [object()]])
def test_odd_exclusions(tmp_path: Path, given: object) -> None:
    with ItemPool.create(tmp_path / "pool", dims=WIDTH) as pool:
        pool.append(["a"], vectors(1))
        with pytest.raises(ArgumentError, match="exclude_ids"):
            pool.search(vectors(1), 1, exclude_ids=given)  # type: ignore[arg-type]
        for rows in (torch.zeros(1, WIDTH).to(torch.float8_e4m3fn), np.zeros((1, WIDTH), np.longdouble), [[0.0] * 6]):
            with pytest.raises(ArgumentError, match="queries"):
                pool.search(rows, 1)  # type: ignore[arg-type]
            with pytest.raises(ArgumentError, match="embeddings"):
                pool.append(["b"], rows)  # type: ignore[arg-type]


def test_hashes_of_ids() -> None:
    odd = ["a", "b", "ab", "ba", *("a" * n for n in (7, 8, 9, 16, 255, 256, 5000)), "x\0", "x", "ä", "a" * 255 + "ä"]
    ids = pa.array(odd, type=pa.string())
    hashes = hash_ids(ids)
    assert len(set(hashes.tolist())) == len(odd) and (hash_ids(ids[3:9]) == hashes[3:9]).all()
    assert hash_ids(pa.array(["item-7"])).tolist() == [17372802353566938374]  # the same for ever: it is on disk
    assert len(hash_ids(pa.array([], type=pa.string()))) == 0


@pytest.mark.parametrize(("many", "few"), [(1000, 20), (20, 1000)])
def test_match_finds_every_pair(many: int, few: int) -> None:
    draw = np.random.default_rng(0)
    stored, wanted = (draw.integers(0, 300, n).astype(np.uint64) for n in (many, few))
    order = np.argsort(stored, kind="stable").astype(np.uint32)
    wanted.sort()
    found = match(pool_ids.IdIndex(stored[order], order), wanted)
    expected = {(i, j) for i, w in enumerate(wanted) for j, s in enumerate(stored) if w == s}
    assert set(zip(*(part.tolist() for part in found))) == expected and len(found[0]) == len(expected)


def test_levels_hold_what_was_added() -> None:
    levels, draw = HashLevels(), np.random.default_rng(0)
    assert not levels.contains(np.array([1], np.uint64)).any()
    added = [draw.integers(0, 2**63, draw.integers(0, 50)).astype(np.uint64) for _ in range(60)]
    for part in added:
        levels.add(part)
    assert levels.contains(np.concatenate(added)).all() and len(levels._levels) <= 12
    assert not levels.contains(draw.integers(2**63, 2**64, 50, dtype=np.uint64)).any()
