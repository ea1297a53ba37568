"""Catalogue to pool: resumable, bounded memory, rejects, running out of memory."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tgq_fast.data import Catalog, Item
from tgq_fast.errors import ArgumentError, ImageError, NonFiniteError, PoolError
from tgq_fast.retrieval import ItemPool, embed_catalog, model_digest, zero_shot_embeddings


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
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


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
    assert (report.embedded, report.rejected, report.shards) == (11, 12, 3)
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
    with pytest.raises(PoolError, match="source"):
        embed(make_catalog(5), Encoder(), tmp_path / "pool")
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


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_embed import Encoder, embed, make_catalog
from pathlib import Path

def stop(done, total):
    if done >= int(sys.argv[3]):
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
    monkeypatch.setattr("tgq_fast.retrieval.pool.package_identity", lambda: writer)
    bad = ("i1", "i12")
    report = embed(make_catalog(), Encoder(bad=bad), tmp_path / "killed", on_error="skip")
    assert report.resumed == 10 and report.rejected == 2
    embed(make_catalog(), Encoder(bad=bad), tmp_path / "whole", on_error="skip")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


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
    features[4] = 0  # an item without a usable image

    class Store:
        global_image = features

        def __len__(self) -> int:
            return 23

    rows = zero_shot_embeddings(make_catalog(), Store())  # type: ignore[arg-type]
    norms = rows.norm(dim=1)
    assert rows.shape == (23, 5) and norms[4] == 0
    assert torch.allclose(norms[norms > 0], torch.ones(22))
    with pytest.raises(ArgumentError, match="store"):
        zero_shot_embeddings(make_catalog(5), Store())  # type: ignore[arg-type]


PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import torch
from test_embed import make_catalog
from tgq_fast.retrieval import embed_catalog

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

    growth = peak_mib(6000) - peak_mib(1000)
    assert growth < 25, growth  # the embeddings themselves grow by 78 MiB
