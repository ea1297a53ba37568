"""Catalogue to pool: resumable, bounded memory, rejects, running out of memory."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tgq_fast.data import Catalog, Item
from tgq_fast.errors import ArgumentError, ImageError, NonFiniteError, PoolError
from tgq_fast.pool import ItemPool, embed_catalog, model_digest, open_embedded, zero_shot_embeddings


def make_catalog(n: int = 23) -> Catalog:
    return Catalog.from_items(
        [Item(f"i{i}", f"{i}.png", None, None, "c", {}, None, f"g{i // 3}", i + 1) for i in range(n)]
    )


class Encoder(torch.nn.Module):
    """Deterministic embeddings from the id; can refuse items, run out of memory and count its batches."""

    def __init__(self, *, bad: tuple[str, ...] = (), nan: tuple[str, ...] = (), room: int = 10**9) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.bad, self.nan, self.room, self.sizes = bad, nan, room, list[int]()

    def encode(self, items: Catalog, *, batch_size: int, on_error: str) -> torch.Tensor:
        self.sizes.append(len(items))
        if len(items) > self.room:
            raise torch.OutOfMemoryError("no room")
        for item in items.items:
            if item.id in self.bad:
                raise ImageError(item.id, item.file_name or "", "truncated")
        rows = torch.tensor([[float(item.id[1:]), 1.0, -2.0] for item in items.items])
        for i, item in enumerate(items.items):
            if item.id in self.nan:
                rows[i, 1] = float("nan")
        return rows


def embed(catalog: Catalog, model: Encoder, out: Path, **options: object):  # type: ignore[no-untyped-def]
    return embed_catalog(catalog, model, out, **{"dims": 3, "batch_size": 4, "shard_size": 10, **options})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in (".lock", ".readers")}


def test_pool_holds_the_catalogue_in_order(tmp_path: Path) -> None:
    catalog, model = make_catalog(), Encoder()
    seen: list[tuple[int, int]] = []
    report = embed(catalog, model, tmp_path / "pool", progress=lambda a, b: seen.append((a, b)))
    assert report.to_dict() == {
        "path": str(tmp_path / "pool"),
        "items": 23,
        "embedded": 23,
        "rejected": 0,
        "resumed": 0,
        "added": 23,
        "changed": 0,
        "removed": 0,
        "shards": 3,
    }
    pool = ItemPool.open(tmp_path / "pool")
    assert pool.ids() == catalog.ids and pool.embeddings()[:, 0].tolist() == list(range(23))
    assert pool.manifest.model == model_digest(model) and pool.manifest.source == catalog.digest()
    assert model.sizes == [4, 4, 2, 4, 4, 2, 3]  # batches never cross a shard
    assert seen[-1] == (23, 23)
    again = embed(catalog, Encoder(), tmp_path / "pool")
    assert again.resumed == 23 and again.embedded == 23


def test_rejects_are_listed_once_and_the_run_goes_on(tmp_path: Path) -> None:
    catalog = make_catalog()
    with pytest.raises(ImageError, match="i5"):
        embed(catalog, Encoder(bad=("i5",)), tmp_path / "strict")
    with pytest.raises(NonFiniteError, match="i6"):
        embed(catalog, Encoder(nan=("i6",)), tmp_path / "strict")
    everything = tuple(f"i{i}" for i in range(10, 20))
    report = embed(catalog, Encoder(bad=("i5", *everything), nan=("i6",)), tmp_path / "pool", on_error="skip")
    assert (report.embedded, report.rejected, report.shards) == (11, 12, 2)
    pool = ItemPool.open(tmp_path / "pool")
    pool.verify()
    assert pool.ids() == [f"i{i}" for i in range(23) if i not in (5, 6) and not 10 <= i < 20]
    rows = [json.loads(line) for line in (tmp_path / "pool" / "rejects.jsonl").read_text().splitlines()]
    assert {row["item_id"]: row["reason"] for row in rows} == {"i5": "truncated", "i6": "non_finite"} | dict.fromkeys(
        everything, "truncated"
    )
    assert rows[0]["row"] == 6


def test_out_of_memory_halves_the_batch_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Encoder(room=1)
    with caplog.at_level(logging.WARNING, logger="tgq_fast"):
        embed(make_catalog(), model, tmp_path / "pool")
    assert sum("out of memory" in message for message in caplog.messages) == 1
    assert model.sizes[:3] == [4, 2, 1] and set(model.sizes[3:]) == {1}
    assert len(ItemPool.open(tmp_path / "pool")) == 23
    with pytest.raises(torch.OutOfMemoryError):
        embed(make_catalog(), Encoder(room=0), tmp_path / "never")


def test_refusals(tmp_path: Path) -> None:
    catalog = make_catalog()
    embed(catalog, Encoder(), tmp_path / "pool")
    with pytest.raises(PoolError, match="already holds"):
        embed(catalog, Encoder(), tmp_path / "pool", resume=False)
    other = Encoder()
    other.weight.data += 1
    with pytest.raises(PoolError, match="model"):
        embed(catalog, other, tmp_path / "pool")
    with ItemPool.open(tmp_path / "pool", mode="a") as pool:
        pool.append(["extra"], torch.ones(1, 3))
    with pytest.raises(PoolError, match="by hand"):
        embed(catalog, Encoder(), tmp_path / "pool")
    with pytest.raises(ArgumentError, match="on_error"):
        embed(catalog, Encoder(), tmp_path / "new", on_error="ignore")
    with pytest.raises(ArgumentError, match="batch_size"):
        embed(catalog, Encoder(), tmp_path / "new", batch_size=0)


def catalog_with_pictures(folder: Path, names: str, **titles: str) -> Catalog:
    """Items a, b, c … whose pictures are files of a few bytes."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if not (folder / f"{name}.png").exists():
            (folder / f"{name}.png").write_bytes(b"picture of " + name.encode())
    return Catalog.from_items([Item(n, f"{n}.png", titles.get(n)) for n in names], root=folder)


class Pictures(torch.nn.Module):
    """Embeds the bytes of the pictures, and remembers which items it was asked for."""

    def __init__(self, *, bad: str = "", fields: tuple[str, ...] = ("title",)) -> None:
        super().__init__()
        self.config = SimpleNamespace(fields=fields, embedding_size=3, to_dict=lambda: {})
        self.bad, self.asked = bad, list[str]()

    def encode(self, items: Catalog, *, batch_size: int, on_error: str) -> torch.Tensor:
        self.asked += items.ids
        for item in items.items:
            if item.id in self.bad:
                raise ImageError(item.id, item.file_name or "", "truncated")
        return torch.tensor([[float(sum(items.image_path(i).read_bytes())), 1.0, 2.0] for i in items.items])


def update(catalog: Catalog, out: Path, **options: object) -> tuple[str, tuple[int, int, int], ItemPool]:
    """What was embedded, (added, changed, removed), and the pool."""
    model = Pictures(**options)  # type: ignore[arg-type]
    report = embed_catalog(catalog, model, out, on_error="skip", shard_size=4, batch_size=2)
    pool = ItemPool.open(out)
    pool.verify()
    assert pool.manifest.complete and pool.manifest.source == catalog.digest()
    expected = Pictures().encode(catalog, batch_size=1, on_error="raise")
    held = [row for row, name in enumerate(catalog.ids) if name not in str(options.get("bad", ""))]
    assert torch.equal(pool.get([catalog.ids[row] for row in held]), expected[held])
    assert len(pool) == len(held) == report.embedded
    return "".join(dict.fromkeys(model.asked)), (report.added, report.changed, report.removed), pool


def test_only_what_changed_is_embedded(tmp_path: Path) -> None:
    shop, out = tmp_path / "shop", tmp_path / "pool"
    catalog = catalog_with_pictures(shop, "abcdefg")
    assert update(catalog, out)[:2] == ("abcdefg", (7, 0, 0))
    before = contents(out)
    assert update(catalog, out)[:2] == ("", (0, 0, 0)) and contents(out) == before
    (shop / "c.png").write_bytes(b"another picture under the same name")
    assert update(catalog, out)[:2] == ("c", (0, 1, 0))
    status = os.stat(shop / "d.png")
    (shop / "d.png").write_bytes(b"picture of D")  # same size, same time
    os.utime(shop / "d.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert update(catalog, out)[:2] == ("d", (0, 1, 0))
    assert update(catalog_with_pictures(shop, "abcdefg", b="a title"), out)[:2] == ("b", (0, 1, 0))
    asked, counts, pool = update(catalog_with_pictures(shop, "bcdfgxy", b="a title"), out)
    assert (asked, counts) == ("xy", (2, 0, 2))
    assert sorted(pool.ids()) == sorted("bcdfgxy")
    with ItemPool.open(out, mode="a") as writer:  # compacting keeps the keys
        writer.compact()
    assert update(catalog_with_pictures(shop, "bcdfgxy", b="a title"), out)[:2] == ("", (0, 0, 0))


def test_fields_that_do_not_guide_change_nothing(tmp_path: Path) -> None:
    shop, out = tmp_path / "shop", tmp_path / "pool"
    assert update(catalog_with_pictures(shop, "abc"), out, fields=())[0] == "abc"
    asked, counts, pool = update(catalog_with_pictures(shop, "abc", b="a title"), out, fields=())
    assert (asked, counts) == ("", (0, 0, 0))
    assert pool.manifest.source == catalog_with_pictures(shop, "abc", b="a title").digest()


def test_refused_items_are_tried_again_and_leave_the_log(tmp_path: Path) -> None:
    shop, out = tmp_path / "shop", tmp_path / "pool"
    catalog = catalog_with_pictures(shop, "abcdefg")

    def refused() -> list[str]:
        manifest = ItemPool.open(out).manifest
        if manifest.rejects is None:
            return []
        lines = (out / "rejects.jsonl").read_bytes()[: manifest.rejects.bytes].splitlines()
        assert len(lines) == manifest.rejected
        return [json.loads(line)["item_id"] for line in lines]

    update(catalog, out, bad="bf")
    assert refused() == ["b", "f"]
    assert update(catalog, out, bad="f")[:2] == ("bf", (1, 0, 0)) and refused() == ["f"]
    (shop / "c.png").write_bytes(b"now unusable")
    assert update(catalog, out, bad="cf")[:2] == ("cf", (0, 0, 0)) and refused() == ["c", "f"]  # its old row is gone
    assert update(catalog, out)[1] == (2, 0, 0) and refused() == []


def test_another_catalogue_or_model_is_refused_before_anything_is_embedded(tmp_path: Path) -> None:
    shop, out = tmp_path / "shop", tmp_path / "pool"
    update(catalog_with_pictures(shop, "abc"), out)
    before = contents(out)
    model, other = Pictures(), Pictures()
    with pytest.raises(PoolError, match="none of them in this catalogue"):
        embed_catalog(catalog_with_pictures(shop, "xyz"), model, out)
    other.config.to_dict = lambda: {"layers": 2}
    with pytest.raises(PoolError, match="model"):
        embed_catalog(catalog_with_pictures(shop, "abc"), other, out)
    with ItemPool.create(tmp_path / "by hand", dims=3, model=model_digest(model)) as pool:
        pool.append(["a"], torch.ones(1, 3))
    with pytest.raises(PoolError, match="by hand"):
        embed_catalog(catalog_with_pictures(shop, "abc"), model, tmp_path / "by hand")
    assert not model.asked and not other.asked and contents(out) == before


def test_a_pool_of_this_state_or_none(tmp_path: Path) -> None:
    shop, out, model = tmp_path / "shop", tmp_path / "pool", Pictures()
    catalog = catalog_with_pictures(shop, "abc")
    update(catalog, out)
    assert len(open_embedded(out, catalog, model_digest(model))) == 3
    with pytest.raises(PoolError, match="another model"):
        open_embedded(out, catalog, "0")
    with pytest.raises(PoolError, match=r"has changed.*tgq-fast embed"):
        open_embedded(out, catalog_with_pictures(shop, "abcd"), model_digest(model))
    with ItemPool.open(out, mode="a") as pool:
        pool.delete(["b"])
    with pytest.raises(PoolError, match="holds 2 of 3"):
        open_embedded(out, catalog, model_digest(model))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_embed import Encoder, embed, make_catalog
from pathlib import Path

def stop(done, total):
    if done >= int(sys.argv[3]):
        while not (Path(sys.argv[1]) / "commit-00000002.json").exists():  # written meanwhile
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGKILL)

embed(make_catalog(), Encoder(bad=("i1", "i12")), Path(sys.argv[1]), on_error="skip", progress=stop)
"""


@pytest.mark.parametrize("at", [14])
def test_killed_run_resumes_to_the_same_bytes(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(__file__).parent)
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), folder, str(at)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    # Who wrote is part of the manifest; a commit made between the two processes is not what is tested here.
    writer = ItemPool.open(tmp_path / "killed").manifest.writers[0]
    monkeypatch.setattr("tgq_fast.pool.writer.package_identity", lambda: writer)
    bad = ("i1", "i12")
    report = embed(make_catalog(), Encoder(bad=bad), tmp_path / "killed", on_error="skip")
    assert report.resumed == 10 and report.rejected == 2
    embed(make_catalog(), Encoder(bad=bad), tmp_path / "whole", on_error="skip")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_writing_overlaps_with_the_model_one_stretch_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stretch is written while the second is encoded; the third waits until the first is written."""
    model, second, started = Encoder(), threading.Event(), list[int]()
    encode, upsert = model.encode, ItemPool.upsert

    def encoding(items: Catalog, **options: object) -> torch.Tensor:
        started.append(int(items.ids[0][1:]))
        if started[-1] == 18:  # the last batch of the second stretch
            second.set()
        return encode(items, **options)  # type: ignore[arg-type]

    def writing(pool: ItemPool, ids: list[str], *rest: object, **named: object) -> None:
        if "i0" in ids:
            assert second.wait(60), "the second stretch was not begun"
            assert max(started) <= 18
        upsert(pool, ids, *rest, **named)  # type: ignore[arg-type]
        if "i0" in ids:
            assert max(started) <= 18, "the third stretch was begun"

    monkeypatch.setattr(model, "encode", encoding)
    monkeypatch.setattr(ItemPool, "upsert", writing)
    embed(make_catalog(), model, tmp_path / "pool")
    assert len(ItemPool.open(tmp_path / "pool")) == 23
    with monkeypatch.context() as patch:
        patch.setattr(ItemPool, "upsert", fail)
        with pytest.raises(OSError, match="disk"):
            embed(make_catalog(), Encoder(), tmp_path / "full")


def fail(pool: ItemPool, ids: list[str], *rest: object, **named: object) -> None:
    if ids:
        raise OSError("disk full")


def test_digest_covers_weights_and_configuration() -> None:
    def build(value: float, width: int = 3) -> torch.nn.Module:
        model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, value)
        torch.nn.init.zeros_(model.bias)
        model.config = SimpleNamespace(to_dict=lambda: {"width": width, "transformers_version": str(value)})  # type: ignore[assignment]
        return model

    same = build(1.0), build(1.0)
    assert model_digest(same[0]) == model_digest(same[1]) != model_digest(build(2.0))
    assert model_digest(build(1.0, 4)) != model_digest(same[0])


def test_zero_shot_rows_are_normalised() -> None:
    features = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float16)
    features[4] = 0  # an item without a picture

    class Store:
        global_image = features
        has_image = np.arange(23) != 4
        valid = np.arange(23) != 7  # a picture that cannot be used

        def __len__(self) -> int:
            return 23

    rows = zero_shot_embeddings(make_catalog(), Store())  # type: ignore[arg-type]
    norms = rows.norm(dim=1)
    assert rows.shape == (23, 5) and norms[4] == 0 and rows[7].isnan().all()
    assert torch.allclose(norms[norms > 0], torch.ones(21))
    with pytest.raises(ArgumentError, match="store"):
        zero_shot_embeddings(make_catalog(5), Store())  # type: ignore[arg-type]


PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import torch
from test_embed import make_catalog
from tgq_fast.pool import embed_catalog

class Wide:
    def encode(self, items, *, batch_size, on_error):
        return torch.ones(len(items), 4096)

rows = int(sys.argv[3])
embed_catalog(make_catalog(rows), Wide(), sys.argv[1], dims=4096, digest="wide", batch_size=100, shard_size=500)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_peak_memory_does_not_grow_with_the_catalogue(tmp_path: Path) -> None:
    def peak_mib(rows: int) -> float:
        ran = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path / str(rows)), str(Path(__file__).parent), str(rows)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(ran.stdout) / 1024

    growth = peak_mib(7000) - peak_mib(2000)  # from four stretches on: two are in memory at most
    assert growth < 25, growth  # the embeddings themselves grow by 78 MiB
