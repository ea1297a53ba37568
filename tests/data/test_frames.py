"""Catalogues from records, data frames and datasets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tgq_fast.data import Catalog, load_image
from tgq_fast.errors import ArgumentError, CatalogError


def gradient(turn: int = 0) -> Image.Image:
    y, x = np.mgrid[0:30, 0:40]
    return Image.fromarray(np.stack([x * 6, y * 8, (x + y + turn) * 3 % 256], -1).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pixels(catalog: Catalog, row: int) -> np.ndarray:
    item = catalog.items[row]
    return np.asarray(load_image(catalog.picture(item), item.id))


def test_records_with_pictures_in_every_form(tmp_path: Path) -> None:
    image, data = gradient(), png(gradient())
    (tmp_path / "x.png").write_bytes(data)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    forms: list[Any] = [image, data, {"bytes": data, "path": None}, np.asarray(image), "x.png", Path("x.png")]
    forms += [[data, data], {"bytes": None, "path": "x.png"}, ["x.png"]]
    for form in forms:
        catalog = Catalog.from_records([{"id": "a", "image": form, "Colour": "red", "year": 2012.0}], root=tmp_path)
        assert np.array_equal(pixels(catalog, 0), np.asarray(image)), form
        assert catalog.items[0].attributes == {"Colour": "red", "year": "2012"}
    turned = Catalog.from_records([{"id": "a", "image": Image.open(tmp_path / "turned.png")}])
    assert np.array_equal(pixels(turned, 0), np.asarray(load_image(tmp_path / "turned.png", "a")))
    assert Catalog.from_records([{"image": data}, {"image": data}]).ids == ["1", "2"]
    mapped = Catalog.from_records([{"SKU": 7, "Farbe": "rot"}], columns={"id": "sku", "attributes.colour": "farbe"})
    assert mapped.items[0].to_dict() == {"id": "7", "attributes": {"colour": "rot"}}


def test_rows_that_are_none(tmp_path: Path) -> None:
    rows: list[Any] = [{"id": "a"}, 5, {"id": "a"}, {"id": "b", "price": -1}, {"id": "c", "image": object()}]
    rows += [{"id": "d", "image": Image.new("RGB", (2, 2))}, {"id": "e", "title": float("nan")}]
    with pytest.raises(CatalogError) as error:
        Catalog.from_records(rows)
    assert [problem.split(":")[0] for problem in error.value.problems] == [f"row {n}" for n in (2, 3, 4, 5, 6)]
    assert Catalog.from_records(rows, policy="skip").ids == ["a", "e"]
    with pytest.raises(CatalogError, match="no rows"):
        Catalog.from_records([])
    with pytest.raises(ArgumentError, match="policy"):
        Catalog.from_records([{"id": "a"}], policy="mend")  # type: ignore[arg-type]


def test_a_data_frame_with_its_gaps(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    gradient().save(tmp_path / "a.png")
    frame = pd.DataFrame(
        {
            "id": [1.0, 2.0, 3.0],
            "file_name": ["a.png", None, np.nan],
            "title": ["A", np.nan, None],
            "price": [1.5, np.nan, 3],
            "year": pd.array([2011, None, 2013], dtype="Int64"),
            "kind": pd.Categorical(["x", None, "y"]),
            "since": pd.to_datetime(["2024-01-02", None, "2024-01-03"]),
            "group_id": [7, 7, 8],
        }
    )
    catalog = Catalog.from_pandas(frame, root=tmp_path)
    assert [item.to_dict() for item in catalog.items] == [
        {"id": "1", "file_name": "a.png", "title": "A", "price": 1.5, "group_id": "7",
         "attributes": {"year": "2011", "kind": "x", "since": "2024-01-02"}},
        {"id": "2", "group_id": "7"},
        {"id": "3", "price": 3.0, "group_id": "8", "attributes": {"year": "2013", "kind": "y", "since": "2024-01-03"}},
    ]  # fmt: skip
    again = Catalog.from_pandas(frame.assign(id=["a", "b", "c"]).set_index("id"), root=tmp_path)
    assert again.ids == ["a", "b", "c"] and again.items[0].title == "A"
    with pytest.raises(ArgumentError, match="data frame"):
        Catalog.from_pandas([1, 2])


def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["shoe", "boot"]),
            "title": datasets.Value("string"),
        }
    )
    made = datasets.Dataset.from_list(
        [{"image": {"bytes": png(gradient(n)), "path": None}, "label": n % 2, "title": f"T{n}"} for n in range(5)],
        features=features,
    )
    catalog = Catalog.from_dataset(made)
    assert [item.attributes["label"] for item in catalog.items] == ["shoe", "boot"] * 2 + ["shoe"]
    for n in range(5):
        assert np.array_equal(pixels(catalog, n), np.asarray(gradient(n)))
    both = Catalog.from_dataset(datasets.DatasetDict({"train": made, "test": made.select(range(2))}))
    assert [item.attributes["split"] for item in both.items] == ["train"] * 5 + ["test"] * 2
    with pytest.raises(ArgumentError, match=r"datasets\.Dataset"):
        Catalog.from_dataset([1])
    # what it saves is read back too: to disk by the importer, as Parquet by load
    from tgq_fast.data import import_catalog

    made.save_to_disk(tmp_path / "disk")
    import_catalog("dataset", tmp_path / "disk", tmp_path / "out")
    imported = Catalog.load(tmp_path / "out")
    assert [item.category for item in imported.items] == ["shoe", "boot"] * 2 + ["shoe"]
    made.add_column("id", [f"i{n}" for n in range(5)]).to_parquet(tmp_path / "hub" / "data" / "train-00000.parquet")
    hub = Catalog.load(tmp_path / "hub")
    assert hub.ids == [f"i{n}" for n in range(5)] and np.array_equal(pixels(hub, 3), np.asarray(gradient(3)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "Float32", "float[pyarrow]", "double[pyarrow]"])
def test_narrow_numbers_have_the_text_that_a_parquet_file_gives(dtype: str, tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"id": ["a", "b"], "attributes.width": pd.Series([0.1, None], dtype=dtype)})
    frame.to_parquet(tmp_path / "metadata.parquet")
    for catalog in (Catalog.from_pandas(frame), Catalog.load(tmp_path)):
        assert [dict(item.attributes) for item in catalog.items] == [{"width": "0.1"}, {}]


def test_narrow_numbers_of_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"id": datasets.Value("string"), "width": datasets.Value("float32")})
    dataset = datasets.Dataset.from_dict({"id": ["a"], "width": [0.1]}, features=features)
    assert Catalog.from_dataset(dataset).items[0].attributes == {"width": "0.1"}


def test_gaps_of_a_picture_column_in_every_spelling() -> None:
    pd = pytest.importorskip("pandas")
    for gap in (None, "", float("nan"), pd.NA, pd.NaT, np.float32("nan")):
        frame = pd.DataFrame({"id": ["a", "b"], "file_name": pd.Series(["x.png", gap], dtype=object)})
        assert [item.file_name for item in Catalog.from_pandas(frame).items] == ["x.png", None], repr(gap)
    frame = pd.DataFrame({"id": ["a"], "file_name": pd.array([None], dtype="string")})
    assert Catalog.from_pandas(frame).items[0].file_name is None


def test_dates_beyond_the_calendar_of_python_are_problems() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"id": ["a", "b"], "attributes.made": np.array(["2024-02-29", "20000-01-01"], dtype="M8[s]")})
    catalog = Catalog.from_pandas(frame, policy="skip")
    assert [item.field("made") for item in catalog.items] == ["2024-02-29"]
    assert "made" in catalog.report.problems[0]


def test_periods_in_parquet_are_refused_where_they_are_used(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"id": ["a"], "attributes.month": pd.PeriodIndex(["2024-02"], freq="M")})
    assert Catalog.from_pandas(frame).items[0].field("month") == "2024-02"
    frame.to_parquet(tmp_path / "metadata.parquet")
    with pytest.raises(CatalogError, match="astype"):
        Catalog.load(tmp_path)
    frame.rename(columns={"attributes.month": "unused"}).to_parquet(tmp_path / "metadata.parquet")
    assert Catalog.load(tmp_path).items[0].id == "a"
