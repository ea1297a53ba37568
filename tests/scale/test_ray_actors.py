"""Parts and shards of a pool over actors of a Ray cluster of its own; skipped without Ray."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_parts_engine import Model, contents, embed, make_shop
from test_sharded_pool import QUERIES, check, check_losses, make_catalog, make_pool

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, WorkerError
from tgq_fast.evaluation import evaluate
from tgq_fast.pool import ItemPool
from tgq_fast.scale import PartsEngine, ShardedPool, ray_crew
from tgq_fast.scale.crew import Lost

ray = pytest.importorskip("ray")


@dataclass
class Fragile:
    """A job whose worker is killed while it starts, as often as `folder` has files; each takes one away."""

    folder: Path

    def begin(self) -> Callable[[int], int]:
        for file in sorted(self.folder.iterdir()):
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda task: task + 1


@dataclass
class Large:
    """A job that only has a size."""

    data: bytes

    def begin(self) -> Callable[[int], int]:
        return lambda task: task


def test_actors_that_are_killed_while_they_start_end_a_run_only_where_none_comes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    with closing(ray_crew(1, address="local", cpus=0.5)) as crew:
        crew.start(Fragile(tmp_path))
        for _ in range(2):  # four in all
            crew.stop()
            crew.start(Fragile(tmp_path))
            (tmp_path / "a").touch(), (tmp_path / "b").touch()
            for lost in (True, True, False):
                crew.give(0, 1)
                worker, answer = crew.answer()
                assert worker == 0 and (isinstance(answer, Lost) if lost else answer == 2)
        crew.stop()
        crew.start(Fragile(tmp_path))
        for name in "abc":
            (tmp_path / name).touch()
        with pytest.raises(WorkerError, match="actor 0 does not start"):
            for _ in range(3):
                crew.give(0, 1)
                crew.answer()


def test_actors_give_the_pool_of_one_process_also_when_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor dies of a part, once; no cluster that runs on the machine is joined, and none is left."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what a bare ray.init would join
    shop = make_shop(tmp_path / "shop")
    with pytest.raises(ArgumentError, match="address"):
        ray_crew(2, address="")
    with pytest.raises(WorkerError, match="wants 999 CPU"):
        ray_crew(2, address="local", cpus=999)
    assert not ray.is_initialized()
    crew = ray_crew(2, address="local", cpus=0.5)
    model = Model(lethal=("i20",), bad=("i7",), once=str(tmp_path / "once"))
    embed(shop, model, tmp_path / "many", PartsEngine(crew, tmp_path / "parts", batches=2))
    assert not ray.is_initialized()
    embed(shop, Model(bad=("i7",)), tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert (tmp_path / "once.i20").exists()


def processes(crew: Any) -> dict[int, int]:
    """Holder → process id."""
    pids = {holder: actor.__ray_call__.remote(lambda _: os.getpid()) for holder, (actor, _) in crew._actors.items()}
    return {holder: ray.get(pid) for holder, pid in pids.items()}


@pytest.mark.skipif(not _native.available(), reason=_native.why_missing() or "built")
def test_actors_hold_a_pool_and_answer_as_one_process_also_when_killed_and_none_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirteen shards, one of them without a row, over two actors, which fill their cluster; one shard over two."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    pool = make_pool(tmp_path / "pool")
    lone = make_pool(tmp_path / "lone", shard_size=100, dtype="float16")
    empty = make_pool(tmp_path / "empty", rows=0)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        crew = ray_crew(2, address="local")
        with ShardedPool(tmp_path / "pool", crew, seconds=240) as sharded:
            check_losses(sharded, pool, lambda: processes(crew), late=2)
        for one, path in ((lone, "lone"), (empty, "empty")):
            with ShardedPool(tmp_path / path, ray_crew(2, address="local"), seconds=240) as sharded:
                check(sharded, one)
        catalog = make_catalog()
        with ItemPool.create(tmp_path / "embedded", dims=6, shard_size=13) as made:
            made.append(catalog.ids[::-1], QUERIES.repeat(20, 1)[: len(catalog)])
        with ShardedPool(tmp_path / "embedded", ray_crew(2, address="local"), seconds=240) as sharded:
            many = evaluate(catalog, sharded, ks=(1, 5), samples=9)
        one_process = evaluate(catalog, ItemPool.open(tmp_path / "embedded"), ks=(1, 5), samples=9)
        assert many.to_dict() == one_process.to_dict() and (many.rank == one_process.rank).all()
    finally:
        ray.shutdown()


def test_what_the_cluster_cannot_hold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose disk is full, where what is sent neither fits into memory nor may be spilled."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    full = {"local_fs_capacity_threshold": 0.0}
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20,
        _system_config=full,
    )  # fmt: skip
    try:
        with closing(ray_crew(1, address="local")) as crew, pytest.raises(WorkerError, match="does not take what all"):
            crew.start(Large(bytes(200 << 20)))
    finally:
        ray.shutdown()
