"""Catalogues that stream: Parquet with pictures, WebDataset shards, object stores; what is damaged is listed, once."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tgq_fast.data import Catalog, import_catalog, load_image
from tgq_fast.data import parquet_pictures as parquet_pictures_module
from tgq_fast.errors import ArgumentError, CatalogError, ImageError
from tgq_fast.io import places

COUNT = 12


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, numbers: range, *, group: int = 4, gaps: frozenset[int] = frozenset()) -> None:
    cells = [None if i in gaps else {"bytes": picture(i), "path": f"{i}.png"} for i in numbers]
    table = pa.table(
        {"id": [f"i{i}" for i in numbers], "title": [f"t{i}" for i in numbers],
         "image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, compression="none", use_dictionary=False)


def write_tar(path: Path, numbers: range, mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for i in numbers:
            members = {"png": picture(i), "json": json.dumps({"id": f"i{i}", "title": f"t{i}"}).encode()}
            for kind, data in members.items():
                facts = tarfile.TarInfo(f"sub/{i:05d}.{kind}")
                facts.size = len(data)
                archive.addfile(facts, io.BytesIO(data))


def check(catalog: Catalog, numbers: list[int]) -> None:
    """The items are these, with their own pictures, also after a trip to another process."""
    assert catalog.ids == [f"i{i}" for i in numbers]
    for other in (catalog, pickle.loads(pickle.dumps(catalog.part(catalog.items)))):
        for item, i in zip(other.items, numbers):
            assert item.title == f"t{i}"
            if item.file_name is not None:
                expected = load_image(picture(i), "x")
                assert load_image(other.picture(item), item.id).tobytes() == expected.tobytes()


WRITERS: dict[str, Callable[[Path, range], None]] = {"parquet": write_parquet, "tar": write_tar}


@pytest.fixture(params=sorted(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def shards(tmp_path: Path, kind: str) -> Path:
    for part in range(3):
        WRITERS[kind](tmp_path / "shop" / f"part-{part}.{kind}", range(4 * part, 4 * part + 4))
    return tmp_path / "shop"


def test_a_folder_a_file_and_a_list_of_shards_are_catalogues(shards: Path, kind: str) -> None:
    check(Catalog.load(shards), list(range(COUNT)))
    check(Catalog.load(shards / f"part-1.{kind}"), [4, 5, 6, 7])
    parts = [shards / f"part-{part}.{kind}" for part in (2, 0)]
    check(Catalog.load(parts), [8, 9, 10, 11, 0, 1, 2, 3])
    with pytest.raises(ArgumentError, match="each once"):
        Catalog.load([parts[0], parts[0]])
    with pytest.raises(ArgumentError):
        Catalog.load([])


def test_object_stores_give_the_same_catalogue(shards: Path, kind: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), f"/bucket-{kind}/shop", recursive=True)
    here, there = Catalog.load(shards), Catalog.load(f"memory://bucket-{kind}/shop")
    check(there, list(range(COUNT)))
    assert there.digest() == here.digest()
    check(Catalog.load(Path(f"memory://bucket-{kind}/shop")), list(range(COUNT)))  # folded by the command line
    check(Catalog.load(shards.as_uri()), list(range(COUNT)))
    check(Catalog.load([f"memory://bucket-{kind}/shop/part-1.{kind}"]), [4, 5, 6, 7])
    with pytest.raises(CatalogError, match=r"memory://bucket-x/none(.|\n)*no such"):
        Catalog.load("memory://bucket-x/none")


def test_pictures_by_address_and_below_a_remote_catalogue(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/pics/shop/images/0.png": picture(0), "/pics/other/1.png": picture(1)})
    rows = [{"id": "i0", "title": "t0", "file_name": "images/0.png"},
            {"id": "i1", "title": "t1", "file_name": "memory://pics/other/1.png"},
            {"id": "i2", "title": "t2", "file_name": "memory://pics/other/2.png"}]  # fmt: skip
    memory.pipe("/pics/shop/metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
    catalog = Catalog.load("memory://pics/shop")
    check(catalog.part(catalog.items[:2]), [0, 1])
    with pytest.raises(ImageError, match="missing") as caught:
        load_image(catalog.picture(catalog.items[2]), "i2")
    assert not caught.value.lasting
    bad = [{"id": "a", "file_name": "https://example.org/a.png"}, {"id": "b", "file_name": "memory://p/../b.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, bad)))
    with pytest.raises(CatalogError, match=r"web address(.|\n)*'memory://p/\.\./b"):
        Catalog.load(tmp_path)


def test_a_store_that_does_not_answer_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a",
                        "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    places._system.cache_clear()
    try:
        with pytest.raises(CatalogError, match=r"s3://bucket/shop(.|\n)*cannot be read"):
            Catalog.load("s3://bucket/shop")
        (tmp_path / "metadata.jsonl").write_text('{"id": "a", "file_name": "s3://bucket/a.png"}')
        catalog = Catalog.load(tmp_path)
        with pytest.raises(ImageError, match="unreadable") as caught:
            load_image(catalog.picture(catalog.items[0]), "a")
        assert not caught.value.lasting
    finally:
        places._system.cache_clear()


def test_a_damaged_shard_is_listed_and_the_rest_goes_on(shards: Path, kind: str) -> None:
    middle = shards / f"part-1.{kind}"
    whole = middle.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no such format" * 100):
        middle.write_bytes(damaged)
        catalog = Catalog.load(shards, policy="skip")
        kept = [i for i in range(COUNT) if f"i{i}" in catalog]
        assert set(kept) >= {0, 1, 2, 3, 8, 9, 10, 11}
        assert (len(catalog.report.rejected) == 1 and f"part-1.{kind}" in str(catalog.report.rejected[0])) or kept
        assert catalog.report.problem_count == 1
        check(catalog, kept)
        with pytest.raises(CatalogError):
            Catalog.load(shards)
    middle.unlink()
    for part in shards.iterdir():
        part.write_bytes(b"")
    with pytest.raises(CatalogError):
        Catalog.load(shards, policy="skip")


def test_a_broken_tar_header_is_not_the_end(tmp_path: Path) -> None:
    """Python's tarfile ends there without a word."""
    write_tar(tmp_path / "a.tar", range(6))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    at = data.index(b"sub/00003.png")
    data[at : at + 512] = b"\xff" * 512
    (tmp_path / "a.tar").write_bytes(bytes(data))
    catalog = Catalog.load(tmp_path, policy="skip")
    check(catalog, [0, 1, 2])
    assert "damaged" in str(catalog.report.rejected[0])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: at - at % 512])  # cut between two members
    assert Catalog.load(tmp_path, policy="skip").report.problem_count == 1


def test_samples_of_many_forms(tmp_path: Path) -> None:
    parts = {"a.jpg": picture(0), "a.txt": b" a shirt \n", "a.cls": b"3", "b.c.PNG": picture(1),
             "b.thumb.png": picture(2), "c.json": b"[1]", "d.json": b"{", "e.json": b'{"id": 7, "price": 2.5}',
             "f.txt": b"\xff", "g.json": b'{"id": "g", "title": "red"}', "g.txt": b"blue",
             "g.meta.json": b'{"brand": "x"}', "h.json": b'{"brand": "x"}',
             "h.meta.json": b'{"brand": "y"}'}  # fmt: skip
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in parts.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            archive.addfile(facts, io.BytesIO(data))
    catalog = Catalog.load(tmp_path, policy="skip")
    assert catalog.ids == ["a", "b", "7", "g"] and catalog.report.problem_count == 4
    assert (catalog.items[3].title, catalog.items[3].brand) == ("red", "x")
    assert "disagree about brand" in str(catalog.report.rejected[-1])
    assert (catalog.items[0].title, catalog.items[0].category, catalog.items[2].price) == ("a shirt", "3", 2.5)
    expected = load_image(picture(1), "b").tobytes()
    assert load_image(catalog.picture(catalog.items[1]), "b").tobytes() == expected
    assert catalog.items[2].file_name is None


def test_parquet_with_gaps_and_a_damaged_row_group(tmp_path: Path) -> None:
    write_parquet(tmp_path / "gaps" / "a.parquet", range(600), group=100, gaps=frozenset(range(500)))
    catalog = Catalog.load(tmp_path / "gaps")  # the first picture stands in row 501
    assert sum(item.file_name is not None for item in catalog.items) == 100
    check(catalog.part(catalog.items[495:505]), list(range(495, 505)))

    file = tmp_path / "bad" / "a.parquet"
    write_parquet(file, range(12))
    facts = pq.ParquetFile(file).metadata.row_group(1).column(1)  # titles of rows 5 to 8
    data = bytearray(file.read_bytes())
    start = facts.data_page_offset
    data[start : start + facts.total_compressed_size] = b"\xff" * facts.total_compressed_size
    file.write_bytes(bytes(data))
    catalog = Catalog.load(tmp_path / "bad", policy="skip")
    check(catalog, [0, 1, 2, 3, 8, 9, 10, 11])
    (rejected,) = catalog.report.rejected
    assert rejected.row == 5 and "rows 5 to 8" in str(rejected)
    assert catalog.items[4].row == 9


def test_pictures_of_a_large_row_group_are_read_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", range(90), group=90)
    monkeypatch.setattr(parquet_pictures_module, "_WHOLE", 0)
    monkeypatch.setattr(parquet_pictures_module, "_STEP", 4)
    monkeypatch.setattr(parquet_pictures_module, "_STEPS", 3)
    catalog = Catalog.load(tmp_path)
    check(catalog, list(range(90)))
    for row in (89, 0, 13, 12, 5, 88):  # back, too
        assert catalog.picture(catalog.items[row]).open().read() == picture(row)
    (window,) = catalog.source._groups.values()  # type: ignore[union-attr]
    assert len(window._steps) == 3


@pytest.mark.parametrize("packed", [False, True])
def test_import_of_shards(shards: Path, kind: str, packed: bool, tmp_path: Path) -> None:
    source = "webdataset" if kind == "tar" else "parquet"
    if packed:
        if kind == "parquet":
            pytest.skip("Parquet packs itself")
        for part in sorted(shards.iterdir()):
            part.with_name(part.name + ".gz").write_bytes(gzip.compress(part.read_bytes()))
            part.unlink()
    else:
        (shards / f"part-3.{kind}").write_bytes(b"damaged")
    report = import_catalog(source, shards, tmp_path / "out")
    assert report.items == COUNT and sum(report.skipped.values()) == (not packed)
    check(Catalog.load(tmp_path / "out"), list(range(COUNT)))
    fsspec.filesystem("memory").put(str(shards), f"/import-{kind}-{packed}", recursive=True)
    again = import_catalog(source, f"memory://import-{kind}-{packed}", tmp_path / "again")
    assert again.items == COUNT
    with pytest.raises(ArgumentError, match="of this machine"):
        import_catalog("table", "memory://import/x.csv", tmp_path / "third")
