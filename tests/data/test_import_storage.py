"""Imports into places that cannot take them: a typed error that names the path, and nothing that a rerun trips over."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hostile_places import Full
from PIL import Image

from tgq_fast.data import Catalog, import_catalog
from tgq_fast.data.importers import common
from tgq_fast.errors import ArgumentError, StorageError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / "pictures" / "a" / f"{n}.png")
    return tmp_path / "pictures"


def copies(folder: Path, out: Path, copy: str) -> Any:
    return import_catalog("pictures", folder, out, copy=copy)  # type: ignore[arg-type]


@pytest.mark.parametrize("copy", ["link", "copy"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_pictures_that_cannot_be_placed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: str, code: int
) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", refuse)
        patch.setattr(os, "link", refuse)
        with pytest.raises(StorageError, match="shop") as error:
            copies(pictures, tmp_path / "shop", copy)
    assert error.value.errno == code
    assert [path.name for path in (tmp_path / "shop").iterdir()] == ["images"]
    copies(pictures, tmp_path / "shop", copy)  # the same command again
    assert len(Catalog.load(tmp_path / "shop")) == 3


@pytest.mark.parametrize("copy", ["link", "copy"])
def test_rows_that_a_full_disk_does_not_take(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: str
) -> None:
    def opened(path: Path, mode: str) -> Any:
        return Full(open(path, mode))

    with monkeypatch.context() as patch:
        patch.setattr(common, "open", opened, raising=False)
        with pytest.raises(StorageError, match=r"shop.*No space left"):
            copies(pictures, tmp_path / "shop", copy)
    assert [path.name for path in (tmp_path / "shop").iterdir()] == ["images"]
    copies(pictures, tmp_path / "shop", copy)
    assert len(Catalog.load(tmp_path / "shop")) == 3


@pytest.mark.parametrize("copy", ["link", "copy"])
def test_places_that_are_taken(pictures: Path, tmp_path: Path, copy: str) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "shop"):
        with pytest.raises(StorageError, match="file"):
            copies(pictures, out, copy)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "notes.txt").write_text("mine")
    assert copies(pictures, tmp_path / "shop", copy).items == 3
    before = (tmp_path / "shop" / "metadata.jsonl").read_bytes()
    with pytest.raises(ArgumentError, match="a folder without a catalogue"):
        copies(pictures, tmp_path / "shop", copy)
    assert (tmp_path / "shop" / "metadata.jsonl").read_bytes() == before
    assert (tmp_path / "shop" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("copy", ["link", "copy"])
def test_a_folder_of_pictures_by_a_relative_path(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    report = copies(Path(pictures.name), Path("shop"), copy)
    assert report.items == 3 and (report.linked, report.copied) == ((3, 0) if copy == "link" else (0, 3))
