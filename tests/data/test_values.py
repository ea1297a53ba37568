"""One value has one text, whoever brings it."""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgq_fast.data.items import RowError, parse_fields, parse_item
from tgq_fast.data.values import kind_of, number_text, plain_value

pd = pytest.importorskip("pandas")

GAPS = [None, math.nan, np.nan, np.float32("nan"), np.datetime64("NaT"), decimal.Decimal("NaN"), pd.NA, pd.NaT]
GAPS += [pa.scalar(None, pa.float64()), np.timedelta64("NaT"), np.array(math.nan)]


@pytest.mark.parametrize("gap", GAPS, ids=repr)
def test_every_gap_of_a_data_frame_is_a_gap(gap: Any) -> None:
    assert plain_value(gap) is None
    row = dict.fromkeys(("file_name", "title", "brand", "category", "price", "group_id", "attributes"), gap)
    item, _ = parse_item({"id": "a", **row, "attributes.x": [gap, 1], "attributes.y": gap})
    assert item.to_dict() == {"id": "a", "attributes": {"x": "1"}}
    assert parse_fields({"title": gap, "price": gap, "x": gap}, ["title", "price", "x"]) == {}


SAME = [
    ("1 day, 2:00:00", [datetime.timedelta(1, 7200), pd.Timedelta("1D 2h"), np.timedelta64(26, "h")]),
    ("2012", [2012, 2012.0, np.int16(2012), np.float32(2012), decimal.Decimal("2012.00"), pa.scalar(2012), "2012"]),
    ("0.1", [0.1, np.float32(0.1), np.float16(0.1), np.float64(0.1), decimal.Decimal("0.10"), pa.scalar(0.1)]),
    ("1234567.89", [1234567.89, decimal.Decimal("1234567.890")]),
    ("0.00001", [1e-5, decimal.Decimal("1e-5")]),
    ("2024-02-29", [datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29), np.datetime64("2024-02-29")]),
    ("2024-02-29", [pd.Timestamp("2024-02-29"), np.datetime64("2024-02-29T00:00:00"), "2024-02-29"]),
    ("2024-02-29 10:30:00", [datetime.datetime(2024, 2, 29, 10, 30), pd.Timestamp("2024-02-29 10:30")]),
    ("2024-02-29 10:30:00", [np.datetime64("2024-02-29T10:30:00"), pa.scalar(datetime.datetime(2024, 2, 29, 10, 30))]),
    ("yes", [True, np.bool_(True), pa.scalar(True), "yes"]),
    ("Café", ["Café", "Café".encode(), "Cafe\u0301", np.str_("Café"), pa.scalar("Café"), bytearray("Café".encode())]),
    ("S, M", [["S", "M"], ("S", None, "M"), np.array(["S", "M"]), pa.scalar(["S", "M"]), ["S", math.nan, "M"]]),
    ("0f0f0f0f-0f0f-0f0f-0f0f-0f0f0f0f0f0f", [uuid.UUID("0f" * 16)]),
]


@pytest.mark.parametrize(("text", "values"), SAME, ids=[text for text, _ in SAME])
def test_a_value_has_one_text_in_rows_and_in_queries(text: str, values: list[Any]) -> None:
    for value in values:
        item, _ = parse_item({"id": "a", "attributes": {"x": value}})
        assert item.field("x") == text, repr(value)
        assert parse_fields({"x": value}, ["x"]) == {"x": text}, repr(value)
        assert parse_fields({"attributes": {"x": value}}, ["x"]) == {"x": text}
        if not isinstance(plain_value(value), list):
            assert parse_item({"id": "a", "title": value})[0].title == text


def test_prices_keep_their_digits_and_are_read_alike() -> None:
    for value in (12.5, "12.5", decimal.Decimal("12.50"), np.float32(12.5)):
        item, _ = parse_item({"id": "a", "price": value})
        assert item.field("price") == "12.50" == parse_fields({"price": value}, ["price"])["price"]
    texts = [parse_item({"id": "a", "price": p})[0].field("price") for p in (1234567.0, 1234567.25, 0.001, 0.002)]
    assert texts == ["1234567.00", "1234567.25", "0.001", "0.002"]


@pytest.mark.parametrize("value", [12.0, np.float64(12), np.int64(12), decimal.Decimal(12), "12", pa.scalar(12)])
def test_ids_of_a_column_with_gaps(value: Any) -> None:
    item, _ = parse_item({"id": value, "group_id": value})
    assert item.id == "12" and item.group_id == "12"


@pytest.mark.parametrize(
    "value",
    [math.inf, {"a": 1}, b"\xff\xfe", 10**5000, [[1]], decimal.Decimal("Infinity"), np.float32("inf"), object(), 1j],
    ids=lambda v: type(v).__name__,
)
def test_what_is_no_metadata_is_refused_everywhere(value: Any) -> None:
    with pytest.raises(RowError, match="x"):
        parse_fields({"x": value}, ["x"])
    with pytest.raises(RowError, match="x"):
        parse_item({"id": "a", "attributes": {"x": value}})


def test_values_nested_without_end_are_refused_and_named() -> None:
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    for row in ({"id": "a", "attributes": {"x": deep}}, {"id": deep}, {"id": "a", "title": deep}):
        with pytest.raises(RowError):
            parse_item(row)
    assert kind_of(deep) == "list of 1" and kind_of(10**5000) == "int"


@given(st.floats(-1e300, 1e300))
def test_different_numbers_have_different_texts(value: float) -> None:
    assert float(number_text(value)) == value
    assert float(number_text(float(np.nextafter(value, math.inf)))) != value


@given(st.integers(-(2**60), 2**60))
def test_integers_read_as_floats_of_a_column_with_gaps(value: int) -> None:
    if float(value) == value:
        assert number_text(float(value)) == number_text(value) or abs(value) >= 10**18


def test_durations_that_have_no_common_text_keep_their_own() -> None:
    for value in (np.timedelta64(2, "M"), np.timedelta64(5, "ns"), np.timedelta64(10**18, "D")):
        assert plain_value(value) == str(value)
    assert plain_value(pd.Timedelta(5, "ns")) != plain_value(pd.Timedelta(0))


def test_a_series_is_a_list() -> None:
    assert plain_value(pd.Series(["a", None, "b"], index=[7, 8, 9])) == ["a", None, "b"]
    assert plain_value(pd.Index([1, 2])) == [1, 2]


def test_members_of_enumerations_and_masked_values() -> None:
    class Colour(str, enum.Enum):
        RED = "red"

    assert plain_value(Colour.RED) == "red" and plain_value(np.ma.masked) is None
    assert plain_value(np.ma.array([1, 2], mask=[True, False])) == [None, 2]
    assert plain_value(pa.array([1, None])) == [1, None] == plain_value(pa.chunked_array([[1, None]]))


def test_dates_of_numpy_are_what_pandas_and_arrow_write() -> None:
    for unit, text in {"Y": "2024-01-01", "M": "2024-02-01", "D": "2024-02-29", "h": "2024-02-29 10:00:00"}.items():
        assert plain_value(np.datetime64("2024-02-29T10:30:15", unit)) == text
    moment = datetime.datetime(2024, 2, 29, 10, 30, 15, 250_000)
    for unit in ("ms", "us", "ns"):
        assert plain_value(np.datetime64("2024-02-29T10:30:15.250", unit)) == plain_value(moment)
    exact = pd.Timestamp("2024-02-29 10:30:15.000000001")
    assert plain_value(exact.to_datetime64()) == plain_value(exact) == "2024-02-29 10:30:15.000000001"
    with pytest.raises(RowError, match="years 1"):
        plain_value(np.datetime64("20000-01-01"))
