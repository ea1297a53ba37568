"""The codes beside a pool: same answers with and without, never trusted when they do not fit, whole or not there."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tgq_fast import _native
from tgq_fast.errors import PoolError
from tgq_fast.pool import search as pool_search
from tgq_fast.pool.code_files import read_codes, write_codes
from tgq_fast.pool.item_pool import ItemPool, PoolHits
from tgq_fast.search import blocks
from tgq_fast.search.codes import WIDEST, build_codes, encode_rows
from tgq_fast.search.topk import topk

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_missing() or "built")

ROWS, WIDTH, SHARD = 6000, 70, 1300


def rows(kind: str = "random") -> torch.Tensor:
    values = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    if kind == "clustered":
        values = torch.nn.functional.normalize(values[:1] + 1e-5 * values, dim=1)
    if kind == "ties":
        values = values.round()
        values[1::2] = values[:-1:2]
    return values


def make(folder: Path, kind: str = "random", dtype: str = "float32", codes: bool = True) -> Path:
    with ItemPool.create(folder, dims=WIDTH, dtype=dtype, shard_size=SHARD) as pool:
        pool.append([f"item-{i}" for i in range(ROWS)], rows(kind))
        assert not codes or pool.build_codes() == 5
    return folder


def code_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.codes.safetensors"))


def facts_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as handle:
        return json.loads(handle.metadata()["tgq_fast"])


def ask(folder: Path, verify: bool = True) -> PoolHits:
    with ItemPool.open(folder, verify=verify) as pool:
        return pool.search(rows()[:20], 15, exclude_ids=[f"item-{i}" for i in range(20)])


def same(found: PoolHits, expected: PoolHits) -> None:
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("kind", ["random", "clustered", "ties"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_same_answers_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str) -> None:
    folder = make(tmp_path / "pool", kind, dtype, codes=False)
    expected = ask(folder)
    with ItemPool.open(folder, mode="a") as pool:
        assert pool.build_codes() == 5 and pool.build_codes() == 0
    for most in (700, 3000, 10_000):  # parts of a shard, two shards, all of them
        monkeypatch.setattr(blocks, "BLOCK_BYTES", most * WIDTH * 4)
        same(ask(folder), expected)
        monkeypatch.setattr(pool_search, "KEPT_BYTES", 0)
        same(ask(folder, verify=False), expected)


def test_a_search_believes_the_codes(tmp_path: Path) -> None:
    folder = make(tmp_path / "pool")
    expected = ask(folder)
    for path, (_, tensor) in zip(code_files(folder), ItemPool.open(folder).shards(), strict=True):
        source = facts_of(path)["source"]
        true = encode_rows(tensor, read_codes(path, tensor, source, verify=True).basis)
        # Codes of other rows, and bounds that deny it: only a search that believes them goes wrong.
        none = (0.0,) * len(true.step)
        lie = replace(true, codes=true.codes.roll(1, dims=1), step=none, norm=none, rest=true.rest * 0)
        write_codes(path, lie, source)
    assert not torch.equal(ask(folder).indices, expected.indices)
    for path in code_files(folder):
        path.unlink()
    same(ask(folder), expected)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _alter(path: Path, **facts: str) -> None:
    with safe_open(path, "pt") as handle:
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"tgq_fast": json.dumps(facts_of(path) | facts)})


def _other_shard(path: Path) -> None:
    path.write_bytes(code_files(path.parent)[0].read_bytes())


def _other_sizes(path: Path) -> None:
    write_codes(path, build_codes(rows()[:7]), facts_of(path)["source"])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 5),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "flipped": _flip,
    "stale": lambda path: _alter(path, source="0" * 64),
    "another format version": lambda path: _alter(path, format_version="0"),
    "wrong checksum": lambda path: _alter(path, checksum="0" * 64),
    "of another shard": _other_shard,
    "of other sizes": _other_sizes,
    "metadata that is no JSON": lambda path: save_file({"x": torch.ones(1)}, path, metadata={"tgq_fast": "["}),
    "foreign": lambda path: path.write_bytes(b"hello"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_ignored_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = make(tmp_path / "pool", codes=False)
    expected = ask(folder)
    with ItemPool.open(folder, mode="a") as pool:
        pool.build_codes()
    whole = [path.read_bytes() for path in code_files(folder)]
    DAMAGE[damage](code_files(folder)[2])
    with caplog.at_level(logging.WARNING), ItemPool.open(folder) as pool:
        for _ in range(2):
            same(pool.search(rows()[:20], 15, exclude_ids=[f"item-{i}" for i in range(20)]), expected)
        assert [record.name for record in caplog.records] == ["tgq_fast.pool.files"]  # said once
        assert "shard-000002.codes.safetensors" in caplog.text
    with ItemPool.open(folder, mode="a") as pool:
        assert pool.build_codes() == 1
    assert [path.read_bytes() for path in code_files(folder)] == whole
    caplog.clear()
    same(ask(folder), expected)
    assert not caplog.records


def test_codes_cut_off_between_searches(tmp_path: Path) -> None:
    folder = make(tmp_path / "pool")
    with ItemPool.open(folder) as pool:
        expected = pool.search(rows()[:9], 5)
        pool._state[1]._joined.clear()
        os.truncate(code_files(folder)[1], 100)
        same(pool.search(rows()[:9], 5), expected)


def test_writers_sweep_what_belongs_to_no_shard(tmp_path: Path) -> None:
    folder = make(tmp_path / "pool")
    kept = code_files(folder)
    (folder / "shard-000077.codes.safetensors").write_bytes(kept[0].read_bytes())
    (folder / ".shard-000001.codes.safetensors.123.tmp").write_bytes(b"half")
    _alter(kept[3], source="0" * 64)
    ItemPool.open(folder).verify()
    with ItemPool.open(folder, mode="a") as pool:
        assert code_files(folder) == [*kept[:3], kept[4]] and not list(folder.glob(".*tmp"))
        pool.append(["late"], torch.ones(1, WIDTH))  # gets its own at once
        assert pool.build_codes() == 1
    assert len(code_files(folder)) == 6


def test_refusals(tmp_path: Path) -> None:
    folder = make(tmp_path / "pool")
    with pytest.raises(PoolError, match="mode='a' to build its codes"):
        ItemPool.open(folder).build_codes()
    with pytest.raises(PoolError, match="no readable codes"):
        read_codes(folder / "manifest.json", rows(), "", verify=True)
    with ItemPool.create(tmp_path / "narrow", dims=8) as pool:  # the codes of a row would be longer than the row
        pool.append(["one"], torch.ones(1, 8))
        assert pool.build_codes() == 0 and not code_files(tmp_path / "narrow")
    with ItemPool.create(
        tmp_path / "wide", dims=WIDEST + 1
    ) as pool:  # the rotation alone would be longer than all rows
        pool.append(["one", "two"], torch.randn(2, WIDEST + 1))
        assert pool.build_codes() == 0 and not code_files(tmp_path / "wide")


# Forks a writer per line "folder moment n"; the writer kills itself around its n-th rename.
KILLER = """
import os, signal, sys
from tgq_fast.io import files
from tgq_fast.pool import ItemPool

def write(folder, moment, n):
    calls, replace = [0], os.replace
    def patched(source, target):
        calls[0] += 1
        if calls[0] == n and moment != "after":
            if moment == "torn":
                os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
    files.os.replace = patched
    with ItemPool.open(folder, mode="a") as pool:
        pool.build_codes()

for line in sys.stdin:
    folder, moment, n = line.split()
    child = os.fork()
    if not child:
        write(folder, moment, int(n))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_point(tmp_path: Path) -> None:
    points = [(moment, n) for n in (1, 2, 5) for moment in ("before", "torn", "after")]
    for moment, n in points:
        make(tmp_path / f"{moment}{n}", codes=False)
    whole = [path.read_bytes() for path in code_files(make(tmp_path / "whole"))]
    lines = "\n".join(f"{tmp_path}/{moment}{n} {moment} {n}" for moment, n in points)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", KILLER], input=lines, text=True, capture_output=True, check=True, env=environment
    )
    assert [int(code) for code in ran.stdout.split()] == [-signal.SIGKILL] * len(points)
    expected = ask(tmp_path / "whole")
    for moment, n in points:
        folder = tmp_path / f"{moment}{n}"
        done = n if moment == "after" else n - 1
        assert [path.read_bytes() for path in code_files(folder)] == whole[:done]
        same(ask(folder), expected)
        with ItemPool.open(folder, mode="a") as pool:
            assert pool.build_codes() == 5 - done
        assert [path.read_bytes() for path in code_files(folder)] == whole and not list(folder.glob(".*tmp"))


def test_topk_takes_codes(tmp_path: Path) -> None:
    pool = rows()
    expected = topk(pool[:9], pool, 7)
    found = topk(pool[:9], pool, 7, codes=build_codes(pool))
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)
    assert torch.equal(topk(pool[:9], pool, 7, codes=build_codes(pool), backend="torch").indices, expected.indices)
