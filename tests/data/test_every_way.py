"""One value, one reading: every way in which metadata comes gives the same text, the same gap, or a typed refusal."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tgq_fast.app.cli.options import assignments
from tgq_fast.data import Catalog
from tgq_fast.errors import TGQError
from tgq_fast.models import TGQFormerConfig, TGQFormerProcessor
from tgq_fast.models.encoding import as_examples

pd = pytest.importorskip("pandas")

REFUSED, CANNOT = "refused", "the format cannot hold it"
D = decimal.Decimal
PICTURE = Image.new("RGB", (16, 16), (200, 10, 10))
VALUES: list[tuple[str, Any, str | None]] = [
    ("integer", 2012, "2012"),
    ("negative", -7, "-7"),
    ("integral float", 2012.0, "2012"),
    ("minus zero", -0.0, "0"),
    ("float", 0.1, "0.1"),
    ("long float", 123456789.123456789, "123456789.12345679"),
    ("small float", 1e-7, "0.0000001"),
    ("large float", 1e22, "10000000000000000000000"),
    ("large integer", 2**53 + 1, "9007199254740993"),
    ("true", True, "yes"),
    ("false", False, "no"),
    ("None", None, None),
    ("NaN", math.nan, None),
    ("NaT", pd.NaT, None),
    ("NA", pd.NA, None),
    ("numpy NaN", np.float32("nan"), None),
    ("blank", "", None),
    ("spaces", "  ", None),
    ("word", "Red", "Red"),
    ("inner spaces", "  Dark \t Red ", "Dark Red"),
    ("case", "dark RED", "dark RED"),
    ("text that is a number", "007", "007"),
    ("text with decimals", "12.50", "12.50"),
    ("text like a gap", "None", "None"),
    ("comma and quote", 'a, "b"', 'a, "b"'),
    ("equals sign", "a=b", "a=b"),
    ("accents in two spellings", "Cafe\u0301", "Café"),
    ("date", datetime.date(2024, 2, 29), "2024-02-29"),
    ("midnight", datetime.datetime(2024, 2, 29), "2024-02-29"),
    ("moment", datetime.datetime(2024, 2, 29, 10, 30), "2024-02-29 10:30:00"),
    ("timestamp", pd.Timestamp("2024-02-29 10:30"), "2024-02-29 10:30:00"),
    ("decimal", D("12.50"), "12.5"),
    ("decimal integer", D("12.00"), "12"),
    ("numpy integer", np.int16(7), "7"),
    ("numpy float32", np.float32(0.1), "0.1"),
    ("numpy float64", np.float64(2.5), "2.5"),
    ("numpy bool", np.bool_(True), "yes"),
    ("numpy date", np.datetime64("2024-02-29"), "2024-02-29"),
    ("numpy text", np.str_("s"), "s"),
    ("bytes", "Café".encode(), "Café"),
    ("bytes that are no text", b"\xff\xfe", REFUSED),
    ("list", ["S", "M"], "S, M"),
    ("list with gaps", ["S", None, "M"], "S, M"),
    ("list of numbers", [1.0, 2.5], "1, 2.5"),
    ("empty list", [], None),
    ("nested list", [["S"], ["M"]], REFUSED),
    ("mapping", {"a": 1}, REFUSED),
    ("infinity", math.inf, REFUSED),
    ("list with a mapping", [{"a": 1}], REFUSED),
]
PROCESSOR = TGQFormerProcessor(TGQFormerConfig(fields=["x"]))


def loaded(catalog: Catalog) -> str | None:
    return catalog.items[0].field("x")


def processed(example: Any) -> str | None:
    text = PROCESSOR.metadata([example.metadata]).fields[0][0]
    return None if text is None else text.removeprefix("x: ")


def jsonl(value: Any, folder: Path) -> Any:
    try:
        line = json.dumps({"id": "a", "attributes": {"x": value}}) + "\n"
    except TypeError:
        return CANNOT
    (folder / "metadata.jsonl").write_text(line, encoding="utf-8")
    return loaded(Catalog.load(folder))


def parquet(value: Any, folder: Path) -> Any:
    try:
        table = pa.table({"id": ["a", "b"], "attributes.x": pa.array([value, None])})
        pq.write_table(table, folder / "metadata.parquet")
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return CANNOT
    return loaded(Catalog.load(folder))


def a_gap_changes(value: Any) -> bool:
    """Whether pandas makes another number of it in a column with a gap, which is one of float64."""
    return isinstance(value, np.float32) or (type(value) is int and int(float(value)) != value)


def parquet_of_a_frame(value: Any, folder: Path) -> Any:
    if a_gap_changes(value):
        return CANNOT
    try:
        frame = pd.DataFrame({"id": ["a", "b"], "attributes.x": pd.Series([value, None])})
        frame.to_parquet(folder / "metadata.parquet")
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return CANNOT
    return loaded(Catalog.load(folder))


def a_frame(column: Callable[[Any], Any]) -> Callable[[Any, Path], Any]:
    def way(value: Any, folder: Path) -> Any:
        made = column(value)
        if made.dtype != object and a_gap_changes(value):
            return CANNOT
        frame = pd.DataFrame({"id": ["a", "b"], "attributes.x": made})
        return loaded(Catalog.from_pandas(frame))

    return way


def a_dataset(value: Any, folder: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    try:
        made = datasets.Dataset.from_dict({"id": ["a", "b"], "attributes.x": [value, None]})
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return CANNOT
    return loaded(Catalog.from_dataset(made))


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "records": lambda v, _: loaded(Catalog.from_records([{"id": "a", "attributes": {"x": v}}])),
    "records, flat": lambda v, _: loaded(Catalog.from_records([{"id": "a", "attributes.x": v}])),
    "JSONL": jsonl,
    "Parquet": parquet,
    "Parquet by pandas": parquet_of_a_frame,
    "a frame of objects": a_frame(lambda v: pd.Series([v, None], dtype=object)),
    "a frame with a gap": a_frame(lambda v: pd.Series([v, None])),
    "a dataset": a_dataset,
    "encode(fields=) of each": lambda v, _: processed(as_examples([PICTURE], fields=[{"x": v}], known=["x"])[0]),
    "encode(fields=) of all": lambda v, _: processed(as_examples([PICTURE], fields={"x": v}, known=["x"])[0]),
    "encode(row)": lambda v, _: processed(as_examples([{"image": PICTURE, "x": v}], known=["x"])[0]),
    "encode(row with attributes)": lambda v, _: processed(as_examples([{"id": "q", "attributes": {"x": v}}])[0]),
    "processor": lambda v, _: (PROCESSOR.metadata([{"x": v}]).fields[0][0] or "x: ").removeprefix("x: ") or None,
}


def a_table(name: str, **options: Any) -> Callable[[str, Path], Any]:
    def way(text: str, folder: Path) -> Any:
        opened = gzip.open if name.endswith(".gz") else open
        with opened(folder / name, "wt", newline="", encoding="utf-8") as file:
            csv.writer(file, **options).writerows([["id", "attributes.x"], ["a", text], ["b", ""]])
        return loaded(Catalog.load(folder))

    return way


def a_row_of_text(text: str, folder: Path) -> Any:
    """Of a command line: what it makes of it is `fields` to encode."""
    fields = assignments([f"x={text}"], "--field")
    return processed(as_examples([PICTURE], fields=fields, known=["x"])[0])


def the_page(text: str, folder: Path) -> Any:
    app = pytest.importorskip("tgq_fast.serve.app")
    return processed(as_examples([PICTURE], fields=app._fields([f"x={text}"]), known=["x"])[0])


TEXT_WAYS = {
    "CSV": a_table("metadata.csv"),
    "CSV with all in quotes, packed": a_table("metadata.csv.gz", quoting=csv.QUOTE_ALL),
    "--field": a_row_of_text,
    "the page": the_page,
}


@pytest.mark.parametrize(("value", "expected"), [case[1:] for case in VALUES], ids=[case[0] for case in VALUES])
def test_every_way_gives_one_reading(value: Any, expected: str | None, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for number, (name, way) in enumerate(WAYS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            found[name] = way(value, folder)
        except TGQError:
            found[name] = REFUSED
    told = {name: text for name, text in found.items() if text not in (expected, CANNOT)}
    assert not told, told
    assert sum(text != CANNOT for text in found.values()) >= 9


TEXTS = sorted({text for _, _, text in VALUES if text not in (None, REFUSED)})
TEXTS += [value for _, value, text in VALUES if isinstance(value, str) and text is not None]


@pytest.mark.parametrize("name", TEXT_WAYS)
def test_ways_of_text_alone_read_it_as_the_others_do(name: str, tmp_path: Path) -> None:
    """The text of a value is its own text where only text can be given."""
    for number, text in enumerate(TEXTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        expected = loaded(Catalog.from_records([{"id": "a", "attributes": {"x": text}}]))
        assert TEXT_WAYS[name](text, folder) == expected, text


def test_mixed_columns_with_gaps_are_read_value_by_value() -> None:
    column = [1, None, "x", 2.5, True, datetime.date(2024, 2, 29), math.nan, np.int64(3), ["a", None], D("1.50")]
    expected = ["1", None, "x", "2.5", "yes", "2024-02-29", None, "3", "a", "1.5"]
    ids = [str(number) for number in range(len(column))]
    frame = pd.DataFrame({"id": ids, "attributes.x": pd.Series(column, dtype=object)})
    rows = [{"id": name, "attributes": {"x": value}} for name, value in zip(ids, column, strict=True)]
    for catalog in (Catalog.from_pandas(frame), Catalog.from_records(rows)):
        assert [item.field("x") for item in catalog.items] == expected


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "boolean", "string", "category"])
def test_columns_with_gaps_of_every_dtype_of_pandas(dtype: str, tmp_path: Path) -> None:
    given: dict[str, list[Any]] = {
        "boolean": [True, None, False],
        "string": ["1", None, "b"],
        "category": ["u", None, "v"],
    }
    texts = {"boolean": ["yes", None, "no"], "string": ["1", None, "b"], "category": ["u", None, "v"]}
    values = given.get(dtype, [1, None, 2**40])
    frame = pd.DataFrame({"id": list("abc"), "attributes.x": pd.Series(values, dtype=dtype)})
    frame.to_parquet(tmp_path / "metadata.parquet")
    for catalog in (Catalog.from_pandas(frame), Catalog.load(tmp_path)):
        assert [item.field("x") for item in catalog.items] == texts.get(dtype, ["1", None, "1099511627776"])
