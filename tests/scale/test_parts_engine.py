"""Parts over several workers: the pool of one process, byte for byte, whatever is lost on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tgq_fast.data import Catalog, Item
from tgq_fast.errors import DependencyError, ImageError, TGQError, WorkerError
from tgq_fast.pool import ItemPool, embed_catalog
from tgq_fast.pool.embed_parts import EmbeddedPart, PartOptions
from tgq_fast.scale import PartsEngine, ProcessCrew, ray_crew
from tgq_fast.scale.crew import Job, Lost, Worker
from tgq_fast.scale.embed_job import Task
from tgq_fast.scale.parts import cut, is_current, part_path, read_part, write_part

ITEMS = 50


def make_shop(folder: Path, count: int = ITEMS) -> Catalog:
    """Items whose pictures are files of a few bytes."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        if not (folder / f"{i}.png").exists():
            (folder / f"{i}.png").write_bytes(b"picture %d" % i)
    return Catalog.from_items([Item(f"i{i}", f"{i}.png", None, None, "c", {}, None, None, i + 1) for i in range(count)],
                              root=folder)  # fmt: skip


class Model(torch.nn.Module):
    """Embeds bytes; each row also tells how many it was encoded with. Items of these names end the process, are
    refused, or raise. With `once`, a file that is made first, only the first time."""

    def __init__(self, *, lethal: tuple[str, ...] = (), bad: tuple[str, ...] = (), wrong: tuple[str, ...] = (),
                 once: str = "") -> None:  # fmt: skip
        super().__init__()
        self.lethal, self.bad, self.wrong, self.once = lethal, bad, wrong, once

    def encode(self, items: Catalog, *, batch_size: int, on_error: str) -> torch.Tensor:
        for item in items.items:
            if item.id in self.lethal and not (self.once and os.path.exists(f"{self.once}.{item.id}")):
                if self.once:
                    Path(f"{self.once}.{item.id}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if item.id in self.bad:
                raise ImageError(item.id, item.file_name or "", "truncated")
            if item.id in self.wrong:
                raise RuntimeError("a bug")
        rows = [[float(sum(items.image_path(item).read_bytes())), len(items), 1.0] for item in items.items]
        return torch.tensor(rows)


def embed(catalog: Catalog, model: torch.nn.Module, out: Path, engine: PartsEngine | None = None, **options: Any):  # type: ignore[no-untyped-def]
    given = {"dims": 3, "batch_size": 2, "shard_size": 15, "on_error": "skip", "codes": False, "digest": "m"}
    return embed_catalog(catalog, model, out, engine=engine, **{**given, **options})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in (".lock", ".readers")}


class HereCrew:
    """Workers in this process, whose answers come in an order of choice: the last one asked first. Loses what `lose`
    says: called with the ids of a task."""

    def __init__(self, count: int, lose: Any = None) -> None:
        self.count, self.lose, self.given, self.closed = count, lose, list[tuple[int, Task]](), False

    def start(self, job: Job) -> None:
        self.worker = Worker(job)

    def give(self, worker: int, task: Task) -> None:
        assert worker not in [busy for busy, _ in self.given]
        self.given.append((worker, task))

    def answer(self, seconds: float | None = None) -> tuple[int, Any]:
        worker, task = self.given.pop()
        if self.lose is not None and self.lose([i for i in task.catalog.ids if i not in task.refused]):
            return worker, Lost("signal 9")
        return worker, self.worker.do(task)

    def stop(self) -> None:
        self.given.clear()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def shop(tmp_path: Path) -> Catalog:
    return make_shop(tmp_path / "shop")


def test_answers_in_any_order_give_the_pool_of_one_process(shop: Catalog, tmp_path: Path) -> None:
    model = Model(bad=("i7", "i40"))
    crew, seen = HereCrew(4), list[tuple[int, int]]()
    report = embed(shop, model, tmp_path / "one")
    engine = PartsEngine(crew, tmp_path / "parts", batches=2)
    assert embed(shop, model, tmp_path / "many", engine, progress=lambda *at: seen.append(at)).embedded == 48
    assert report.rejected == 2 and seen[-1] == (ITEMS, ITEMS)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert crew.closed and not (tmp_path / "parts").exists()
    for pool, by in (("many", engine), ("one", None)):  # tries the refused ones again
        embed(shop, Model(), tmp_path / pool, by)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_lost_workers_cost_their_part_only(shop: Catalog, tmp_path: Path) -> None:
    times: dict[str, int] = {}

    def lose(ids: list[str]) -> bool:
        times[ids[0]] = times.get(ids[0], 0) + 1
        return times[ids[0]] <= 2  # every part twice

    embed(shop, Model(), tmp_path / "one")
    embed(shop, Model(), tmp_path / "many", PartsEngine(HereCrew(3, lose), tmp_path / "parts", batches=2))
    assert contents(tmp_path / "many") == contents(tmp_path / "one") and set(times.values()) == {3}


@pytest.mark.parametrize("lethal", [("i0",), ("i17", "i18"), ("i4", "i49")])
def test_items_that_end_their_worker_are_found_and_listed(
    shop: Catalog, tmp_path: Path, lethal: tuple[str, ...]
) -> None:
    tried: dict[str, int] = {}

    def lose(ids: list[str]) -> bool:
        for name in set(lethal).intersection(ids):
            if len(ids) == 1:
                tried[name] = tried.get(name, 0) + 1
        return bool(set(lethal).intersection(ids))

    report = embed(shop, Model(), tmp_path / "many", PartsEngine(HereCrew(2, lose), tmp_path / "parts", batches=3))
    assert (report.embedded, report.rejected) == (ITEMS - len(lethal), len(lethal))
    assert tried == dict.fromkeys(lethal, 3)
    rejects = (tmp_path / "many" / "rejects.jsonl").read_text()
    assert rejects.count('"ends_worker"') == len(lethal) and "signal 9" in rejects
    embed(shop, Model(bad=lethal), tmp_path / "one")  # the others share batches as if it had been refused by any reason
    for path in (tmp_path / "one").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes(), path.name


def test_under_the_policy_raise_such_an_item_ends_the_run_by_name(shop: Catalog, tmp_path: Path) -> None:
    engine = PartsEngine(HereCrew(2, lambda ids: "i20" in ids), tmp_path / "parts")
    with pytest.raises(WorkerError, match=r"i20.*3 times.*on_error='skip'"):
        embed(shop, Model(), tmp_path / "many", engine, on_error="raise")
    with pytest.raises(ImageError, match="i7"):
        engine = PartsEngine(HereCrew(2), tmp_path / "parts")
        embed(shop, Model(bad=("i7",)), tmp_path / "many", engine, on_error="raise")


def test_workers_at_fault_do_not_refuse_the_catalogue(shop: Catalog, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="the workers are at fault"):
        embed(shop, Model(), tmp_path / "a", PartsEngine(HereCrew(2, lambda ids: True), tmp_path / "p", batches=7))
    with pytest.raises(WorkerError, match="together but not alone"):
        engine = PartsEngine(HereCrew(2, lambda ids: len(ids) > 10), tmp_path / "q", batches=7)
        embed(shop, Model(), tmp_path / "b", engine)


class _Killed(BaseException):
    """As the driver would end by kill −9: nothing is tidied."""


def test_a_lost_driver_goes_on_with_finished_parts_and_attempts(
    shop: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def lose(ids: list[str]) -> bool:
        asked.append(ids)
        if len(asked) == 6:
            raise _Killed
        return "i0" in ids

    def run(lose: Any) -> None:
        embed(shop, Model(), tmp_path / "many", PartsEngine(HereCrew(2, lose), tmp_path / "parts", batches=2))

    with pytest.raises(_Killed):
        run(lose)
    kept = list((tmp_path / "parts").glob("part-*"))
    assert len(kept) > 1
    damaged = kept[0].read_bytes()
    kept[0].write_bytes(damaged[:-3] + b"123")  # one damaged, one of a picture that has changed since
    monkeypatch.setattr("tgq_fast.scale.engine.logger.warning", lambda *_: None)
    asked.clear()
    run(lambda ids: (asked.append(ids), "i0" in ids)[1])
    assert len([ids for ids in asked if "i0" in ids and len(ids) > 1]) <= 5  # attempts before the kill count
    assert ItemPool.open(tmp_path / "many").ids() == shop.ids[1:]


def test_a_part_is_current_while_its_pictures_are(shop: Catalog, tmp_path: Path) -> None:
    options = PartOptions(3, ("title",), batch_size=4)
    one, two = cut(shop.part(shop.items[:8]), [range(8)], options, 1)
    assert one.key != two.key and cut(shop.part(shop.items[:8]), [range(8)], options, 1)[0].key == one.key
    other = PartOptions(3, ("title",), batch_size=4, model="another")
    assert cut(shop.part(shop.items[:8]), [range(8)], other, 1)[0].key != one.key
    from tgq_fast.pool.embed_parts import PartEncoder

    def made() -> EmbeddedPart:
        (part,) = PartEncoder(shop, Model(), options).parts([one.rows])
        return part

    write_part(tmp_path, one, made())
    before = part_path(tmp_path, one).read_bytes()
    write_part(tmp_path, one, made())
    assert part_path(tmp_path, one).read_bytes() == before  # done twice: the same bytes
    done = read_part(tmp_path, one, 3)
    assert done is not None and is_current(shop, one, done, options)
    (shop.root / "2.png").write_bytes(b"another")
    assert not is_current(shop, one, done, options)
    for harm in (before[:100], before[:-1] + bytes([before[-1] ^ 1]), b"", before[:8]):
        part_path(tmp_path, one).write_bytes(harm)
        assert read_part(tmp_path, one, 3) is None


# ---------------------------------------------------------------- processes


def test_processes_give_the_pool_of_one_process_also_when_killed(shop: Catalog, tmp_path: Path) -> None:
    """One worker is killed by a part, once, and one item ends its worker whenever it is tried."""
    model = Model(lethal=("i20",), bad=("i7",), once=str(tmp_path / "once"))
    engine = PartsEngine(ProcessCrew(2), tmp_path / "parts", batches=2)
    embed(shop, model, tmp_path / "many", engine)
    embed(shop, Model(bad=("i7",)), tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert (tmp_path / "once.i20").exists()


def test_a_worker_that_cannot_start_is_told(shop: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match="does not start: exit code 1"):
        embed(shop, Model(), tmp_path / "many", PartsEngine(ProcessCrew(2), tmp_path / "parts"))


DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_parts_engine import Model, PartsEngine, ProcessCrew, embed, make_shop
root = Path(sys.argv[1])
def stop(done, total):
    if done >= 20:
        os.kill(os.getpid(), signal.SIGKILL)
engine = PartsEngine(ProcessCrew(2), root / "parts", batches=2)
embed(make_shop(root / "shop"), Model(), root / "many", engine, progress=stop)
"""


def test_a_killed_driver_leaves_no_workers_and_is_resumed(
    shop: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,  # so it returns when the workers, which hold its standard error, are gone too
        timeout=120,
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    done: list[int] = []

    def lose(ids: list[str]) -> bool:
        done.append(len(ids))
        return False

    writer = {"version": "0", "commit": "0"}
    monkeypatch.setattr("tgq_fast.pool.writer.package_identity", lambda: writer)
    embed(shop, Model(), tmp_path / "many", PartsEngine(HereCrew(2, lose), tmp_path / "parts", batches=2))
    assert sum(done) <= ITEMS - 20 + 4
    embed(shop, Model(), tmp_path / "one")
    for path in (tmp_path / "one").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes(), path.name


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tgq_fast.scale.ray_actors", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"tgq-fast\[ray\]"):
        ray_crew(2, address="local")


def test_errors_can_be_sent_between_processes() -> None:
    import pickle

    from tgq_fast import errors

    made: list[TGQError] = [
        errors.ImageError("i", "p", "truncated", "why", lasting=False),
        errors.NonFiniteError("embeddings", ["a"], 3),
        errors.ArgumentError("a", 1, "two", "do"),
        errors.CatalogError("p", ["row 1"], "hint"),
        errors.BackendError("op", "cpp", {"cpp": ["no"]}),
        errors.WorkerError("x"),
    ]
    for error in made:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
