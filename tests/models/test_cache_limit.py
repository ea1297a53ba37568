"""A size limit on the folder of frozen features: what was used longest ago goes, and nobody who uses it notices."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tgq_fast.errors import ArgumentError
from tgq_fast.models.cache_limit import VARIABLE, cache_limit
from tgq_fast.models.feature_files import ChunkedArray

ROWS = 8


def array(root: Path, name: str, kind: str = "features") -> ChunkedArray:
    return ChunkedArray(root / kind / name, {"x": ("<f4", [256])}, rows=ROWS, chunk=4, facts={"of": name})


def build(root: Path, name: str, kind: str = "features") -> ChunkedArray:
    made = array(root, name, kind)
    with made.building() as todo:
        for _ in todo:
            made.append({"x": np.full((4, 256), ord(name[0]), np.float32)}, [])
    return made


def age(root: Path, name: str, seconds: int, kind: str = "features") -> None:
    manifest = root / kind / name / "manifest.json"
    os.utime(manifest, (manifest.stat().st_atime, manifest.stat().st_mtime - seconds))


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path, "a")
    build(tmp_path, "b", "whitened")
    build(tmp_path, "c")
    for name, kind, seconds in (("a", "features", 30), ("b", "whitened", 20), ("c", "features", 10)):
        age(tmp_path, name, seconds, kind)
    assert array(tmp_path, "a").open_complete(verify=True)  # used just now
    (tmp_path / "features" / "unfinished").mkdir()
    (tmp_path / "features" / "unfinished" / "journal.jsonl").write_text("{}")
    (tmp_path / "backbones" / "tower").mkdir(parents=True)
    (tmp_path / "backbones" / "tower" / "manifest.json").write_bytes(bytes(50_000))
    monkeypatch.setenv(VARIABLE, "30 kB")  # three of them, of a little more than 8 kB each
    build(tmp_path, "d")
    left = {path.name for kind in ("features", "whitened") for path in (tmp_path / kind).iterdir()}
    assert left == {"a", "c", "d", "unfinished"}
    assert (tmp_path / "backbones" / "tower" / "manifest.json").exists()
    monkeypatch.setenv(VARIABLE, "1")
    build(tmp_path, "e")
    assert {path.name for path in (tmp_path / "features").iterdir()} == {"e", "unfinished"}
    assert (first["x"] == ord("a")).all()  # who has it open keeps it
    assert not array(tmp_path, "a").open_complete(verify=True)
    assert (build(tmp_path, "a")["x"] == ord("a")).all()  # and who wants it again makes it again


def test_without_a_limit_nothing_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in "abc":
        build(tmp_path, name)
    assert len(list((tmp_path / "features").iterdir())) == 3


def test_sizes_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, size in {"": None, "12": 12, "1.5 GB": 1_500_000_000, "50gb": 50 * 10**9, "2T": 2 * 10**12}.items():
        monkeypatch.setenv(VARIABLE, text)
        assert cache_limit() == size
    for text in ("many", "-1", "5 XB", "1e9"):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(ArgumentError, match=VARIABLE):
            cache_limit()
        with pytest.raises(ArgumentError, match=VARIABLE), array(tmp_path, "a").building():
            pass
