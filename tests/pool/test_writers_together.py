"""Writers that meet: of one pool, in a forked child, of one table; and what a full disk leaves of them."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pool_model import WIDTH, vectors

from tgq_fast.errors import PoolError, StorageError
from tgq_fast.io import files
from tgq_fast.pool import ItemPool, neighbour_table, neighbours

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def pool(tmp_path: Path) -> ItemPool:
    with ItemPool.create(tmp_path / "pool", dims=WIDTH, shard_size=40) as made:
        made.append([f"i{n}" for n in range(120)], vectors(120))
    return ItemPool.open(tmp_path / "pool")


def in_child(call: Callable[[], object]) -> str:
    """Name of what a forked child raises, or "" when it ends well."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            call()
            os.write(write, b"well")
        except BaseException as error:
            os.write(write, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as told:
        return told.read().removeprefix("well")


@forks
def test_a_forked_child_neither_writes_nor_frees_the_lock(pool: ItemPool) -> None:
    writers = [ItemPool.open(pool.path, mode="a")]

    def drop() -> None:
        writers.clear()
        gc.collect()

    assert in_child(lambda: writers[0].append(["x"], vectors(1))) == "PoolError"
    assert in_child(drop) == ""
    with pytest.raises(PoolError, match="another process"):
        ItemPool.open(pool.path, mode="a")
    with writers[0] as writer:
        writer.append(["mine"], vectors(1))
    with ItemPool.open(pool.path, mode="a") as again:
        assert "mine" in again.ids() and "x" not in again.ids()


def test_a_pool_may_be_closed_in_another_thread(pool: ItemPool) -> None:
    writer = ItemPool.open(pool.path, mode="a")
    thread = threading.Thread(target=writer.close)
    thread.start()
    thread.join()
    ItemPool.open(pool.path, mode="a").close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EFBIG])
def test_a_disk_that_takes_nothing_more_leaves_the_pool_as_it_was(
    pool: ItemPool, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with ItemPool.open(pool.path, mode="a") as writer:
        calls: list[Callable[[], object]] = [
            lambda: writer.append(["new"], vectors(1)),
            lambda: writer.upsert(["i3"], vectors(1)),
            lambda: writer.delete(["i3"]),
        ]
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", refuse)
            for call in calls:
                with pytest.raises(StorageError, match=os.strerror(code)):
                    call()
        assert writer.ids() == pool.ids()
        writer.verify()
        writer.append(["new"], vectors(1))
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError):
        ItemPool.open(pool.path, mode="a")
    with pytest.raises(StorageError):
        ItemPool.create(pool.path.with_name("b"), dims=2)


def test_two_calls_never_mix_their_parts_in_one_table(
    pool: ItemPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbour_table, "PART_ROWS", 20)
    for k in (2, 3):
        neighbours(pool, tmp_path / f"{k}.csv", k=k)
    inside, leave = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        inside.set()
        assert leave.wait(30)

    with ThreadPoolExecutor(1) as other:
        first = other.submit(neighbours, pool, tmp_path / "both.csv", k=2, progress=wait)
        inside.wait(30)
        try:
            with pytest.raises(PoolError, match="another process"):
                neighbours(pool, tmp_path / "both.csv", k=3)
        finally:
            leave.set()
        first.result(30)
    assert (tmp_path / "both.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    neighbours(pool, tmp_path / "both.csv", k=3)
    assert (tmp_path / "both.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".parts")]


def test_a_table_that_cannot_be_written_is_refused_before_the_search(pool: ItemPool, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    begun: list[int] = []
    for out in (tmp_path / "folder.csv", tmp_path / "file" / "x.csv"):
        with pytest.raises(StorageError):
            neighbours(pool, out, k=2, progress=lambda done, total: begun.append(done))
    assert not begun


def test_exports_are_written_as_every_file_is(pool: ItemPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").write_bytes(b"old")
    os.chmod(tmp_path / "real", 0o600)
    (tmp_path / "link.parquet").symlink_to("real")
    pool.to_parquet(tmp_path / "link.parquet")
    assert (tmp_path / "link.parquet").is_symlink() and (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    written = (tmp_path / "real").read_bytes()
    pool.to_numpy(tmp_path / "np")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(files.os, "fsync", refuse)
    for export in (lambda: pool.to_parquet(tmp_path / "link.parquet"), lambda: pool.to_numpy(tmp_path / "np")):
        with pytest.raises(StorageError, match="No space"):
            export()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "real").read_bytes() == written and torch.equal(pool.embeddings(), vectors(120))
