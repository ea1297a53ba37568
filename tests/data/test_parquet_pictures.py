"""Pictures in Parquet, whatever Arrow type holds them; types that cannot hold one are refused by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tgq_fast.data import Catalog
from tgq_fast.errors import CatalogError


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(buffer, "BMP")  # all of one size
    return buffer.getvalue()


PICTURES = [picture(colour) for colour in ("red", "blue", "lime")]
BINARY = pa.array(PICTURES, pa.binary())
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

READ: dict[str, Any] = {
    "binary": BINARY,
    "large_binary": BINARY.cast(pa.large_binary()),
    "binary_view": pa.array(PICTURES, pa.binary_view()),
    "fixed_size_binary": pa.array(PICTURES, pa.binary(len(PICTURES[0]))),
    "dictionary": BINARY.dictionary_encode(),
    "struct": pa.array([{"bytes": p, "path": "a.bmp"} for p in PICTURES], STRUCT),
    "struct of large": pa.array([{"bytes": p} for p in PICTURES], pa.struct([("bytes", pa.large_binary())])),
    "struct of dictionary": pa.StructArray.from_arrays([BINARY.dictionary_encode()], ["bytes"]),
    "list": pa.array([[p] for p in PICTURES], pa.list_(pa.binary())),
    "list of view": pa.array([[p] for p in PICTURES], pa.list_(pa.binary_view())),
    "large_list": pa.array([[p] for p in PICTURES], pa.large_list(pa.binary())),
    "fixed_size_list": pa.array([[p] for p in PICTURES], pa.list_(pa.binary(), 1)),
    "list of struct": pa.array([[{"bytes": p, "path": None}] for p in PICTURES], pa.list_(STRUCT)),
    "list after a gap": pa.array([[None, p] for p in PICTURES], pa.list_(pa.binary())),
}


def save(folder: Path, column: Any, name: str = "image") -> Path:
    ids = [f"i{n}" for n in range(len(column))]
    pq.write_table(pa.table({"id": ids, name: column}), folder / "metadata.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("name", ["image", "Images"])
def test_pictures_of_every_binary_type_are_read(tmp_path: Path, kind: str, name: str) -> None:
    catalog = Catalog.load(save(tmp_path, READ[kind], name))
    assert catalog.source is not None and not catalog.report.warnings
    assert [catalog.source.read(item.file_name) for item in catalog.items] == PICTURES  # type: ignore[arg-type]


def test_cells_of_a_list_may_hold_none_or_several(tmp_path: Path) -> None:
    cells = pa.array([[], None, [None], PICTURES[:2], [PICTURES[2]]], pa.list_(pa.binary()))
    catalog = Catalog.load(save(tmp_path, cells))
    assert [item.file_name is not None for item in catalog.items] == [False, False, False, True, True]
    read = [catalog.source.read(item.file_name) for item in catalog.items if item.file_name]  # type: ignore[union-attr]
    assert read == [PICTURES[0], PICTURES[2]]
    assert any("1 row(s) name several pictures" in line for line in catalog.report.warnings)


REFUSED: dict[str, Any] = {
    "list<element: list<element: binary>>": pa.array([[[p]] for p in PICTURES]),
    "struct<data: binary>": pa.array([{"data": p} for p in PICTURES]),
    "map<string, binary": pa.array([[("bytes", p)] for p in PICTURES], pa.map_(pa.string(), pa.binary())),
    "list<element: uint8>": pa.array([list(p[:9]) for p in PICTURES], pa.list_(pa.uint8())),
    "list<element: list<element: list<element: int64>>>": pa.array([[[[1, 2, 3]] * 2] * 2] * 3),
    "double": pa.array([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_types_that_hold_no_picture_are_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CatalogError) as error:
        Catalog.load(save(tmp_path, REFUSED[kind]), policy="skip")
    told = str(error.value)
    assert f"column image is {kind}" in told and "binary (a file)" in told and "a struct {bytes, path}" in told


def test_such_a_column_beside_one_that_is_read_does_no_harm(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "file_name": ["a.jpg"], "images": [3], "photo": [{"data": b"x"}]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    assert Catalog.load(tmp_path).items[0].file_name == "a.jpg"


def test_a_struct_of_pictures_under_another_name_is_not_left_out_silently(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"column\(s\) shot hold pictures"):
        Catalog.load(save(tmp_path, REFUSED["struct<data: binary>"], "shot"))
