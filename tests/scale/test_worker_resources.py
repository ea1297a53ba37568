"""Full disks and too little memory: a typed error or a listed item, the rest whole, nothing twice."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_parts_engine import HereCrew, Model, contents, embed, make_shop

from tgq_fast.data import Catalog
from tgq_fast.errors import StorageError
from tgq_fast.pool import ItemPool
from tgq_fast.scale import PartsEngine, ProcessCrew
from tgq_fast.scale.embed_job import Task


def test_a_full_disk_ends_the_run_by_name_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of whoever commits is full at one write after the other: of attempts, parts, shards and commits."""
    shop = make_shop(tmp_path / "shop", 9)
    options: dict[str, Any] = {"shard_size": 6}
    embed(shop, Model(bad=("i4",)), tmp_path / "one", **options)
    sync, left = os.fsync, [0]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    def run() -> None:
        engine = PartsEngine(HereCrew(2), tmp_path / "parts", batches=1)
        embed(shop, Model(bad=("i4",)), tmp_path / "many", engine, **options)

    monkeypatch.setattr(os, "fsync", full)
    refused = 0
    for at in range(1, 200):
        for folder in ("many", "parts"):
            if (tmp_path / folder).exists():
                for file in (tmp_path / folder).iterdir():
                    file.unlink()
        left[0] = at
        try:
            run()
        except StorageError as error:
            assert "No space left" in str(error) and str(tmp_path) in str(error)
            refused += 1
            run()
        assert contents(tmp_path / "many") == contents(tmp_path / "one"), at
        if left[0] > 0:
            break
    assert 20 < refused == at - 1


def test_a_disk_that_is_full_again_and_again_is_no_fault_of_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = make_shop(tmp_path / "shop", 9)
    tried: list[int] = []

    class Counting(HereCrew):
        def give(self, worker: int, task: Task) -> None:
            tried.append(len(task.catalog))
            super().give(worker, task)

    def run() -> None:
        embed(shop, Model(), tmp_path / "many", PartsEngine(Counting(1), tmp_path / "parts", batches=2))

    def full(*_: object) -> None:
        raise StorageError(tmp_path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    with monkeypatch.context() as patched:
        patched.setattr("tgq_fast.scale.engine.write_part", full)
        for _ in range(4):
            with pytest.raises(StorageError):
                run()
    run()
    assert tried == [4, 4, 4, 4, 4, 4, 1]  # no search for an item that ends its worker


class Hungry(Model):
    """Of these items one wants more memory than the process may have; `killed`: as where the kernel ends it instead."""

    def __init__(self, *names: str, killed: bool = False) -> None:
        super().__init__()
        self.names, self.killed = names, killed

    def encode(self, items: Catalog, *, batch_size: int, on_error: str) -> torch.Tensor:
        if self.names and set(self.names).intersection(items.ids):
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            kept = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), kept[1]))
            try:
                bytes(1 << 30)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, kept)
        return super().encode(items, batch_size=batch_size, on_error=on_error)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by /proc")
@pytest.mark.parametrize("killed", [False, True])
def test_an_item_that_takes_all_memory_of_a_worker_is_listed_and_the_rest_embedded(
    killed: bool, tmp_path: Path
) -> None:
    shop = make_shop(tmp_path / "shop", 8)
    engine = PartsEngine(ProcessCrew(1), tmp_path / "parts", batches=1)  # one that dies is started again
    report = embed(shop, Hungry("i5", killed=killed), tmp_path / "many", engine)
    assert (report.embedded, report.rejected) == (7, 1)
    rejects = (tmp_path / "many" / "rejects.jsonl").read_text()
    assert rejects.count("\n") == 1 and '"item_id": "i5"' in rejects and '"ends_worker"' in rejects
    assert ("signal 9" if killed else "MemoryError") in rejects
    embed(shop, Model(bad=("i5",)), tmp_path / "one")
    for path in (tmp_path / "one").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes(), path.name
    embed(shop, Model(), tmp_path / "many", PartsEngine(HereCrew(1), tmp_path / "parts"))  # with enough memory
    assert sorted(ItemPool.open(tmp_path / "many").ids()) == sorted(shop.ids)


class Sizes(torch.nn.Module):
    """Tells the bytes of each picture file."""

    def encode(self, items: Catalog, *, batch_size: int, on_error: str) -> torch.Tensor:
        return torch.tensor([[float(len(items.picture(item).open().read())), 1, 2] for item in items.items])


def test_a_task_is_sent_with_the_pictures_of_its_items_alone(tmp_path: Path) -> None:
    """Pictures in memory: all of a catalogue with each task would be its square."""
    shop = Catalog.from_records([{"id": str(i), "image": _png(i)} for i in range(40)])
    sent: list[int] = []

    class Sending(HereCrew):
        def give(self, worker: int, task: Task) -> None:
            sent.append(len(pickle.dumps(task)))
            super().give(worker, pickle.loads(pickle.dumps(task)))

    embed(shop, Sizes(), tmp_path / "many", PartsEngine(Sending(2), tmp_path / "parts", batches=2))
    embed(shop, Sizes(), tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert max(sent) < 3 * sum(len(_png(i)) for i in range(4)) + 8000


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
