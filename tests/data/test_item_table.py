"""Items in columns, and rows read a block at a time, against lists and the exact reader of single rows."""

from __future__ import annotations

import pickle
import random
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgq_fast.data import Catalog, Item, clean_text, parse_item
from tgq_fast.data.columns import Columns
from tgq_fast.data.item_table import ItemTable
from tgq_fast.data.items import RowError, read_file_name, read_identifier
from tgq_fast.data.loading import load_items
from tgq_fast.data.pairs import group_pairs
from tgq_fast.data.validation import ValidationReport
from tgq_fast.errors import ArgumentError

ITEMS = [
    Item("a", "a.jpg", "A", attributes={"colour": "red", "size": "4"}, price=3.0, group_id="g", row=1),
    Item("b", brand="B", category="c", attributes={"size": "5", "price": "x"}, group_id="h", row=4),
    Item("c", "ä.jpg", price=0.1, row=5),
    Item("d", title="D", attributes={"size": "日本"}, group_id="g", row=9),
]
TEXTS = [
    "",
    " ",
    "a",
    " x ",
    "Größe",
    "Gro\u0308ße",
    "\u212b",
    "a  b",
    "t\tx",
    "\u200bz",
    "\ufeff",
    "x" * 600,
    "\ud800",
]
TEXTS += ["y" * 2100, "x ", "a\u00a0b", "\u2003e", "日本語", "nan", "12", "1e3", "\x7f", "q\u0085", "e\u0301" * 300]
OTHERS: list[Any] = [None, None, True, 0, -1, 12, 10**18, 10**30, 3.5, 12.0, float("nan"), float("inf"), -0.0, -2.5]
OTHERS += [[], ["a", " b"], [None, "x", 3], {}, {"a": 1}, ["a", {"x": 1}], b"bytes", b"\xff"]
PATHS = [
    "a/b.jpg",
    "/abs",
    "../up",
    "a/../b",
    "C:\\x",
    "c:x",
    "a\\..\\b",
    "http://x/y",
    "\\r",
    "//u/x",
    "a..b",
    "..",
    "...",
]
NAMES = [
    "id",
    "file_name",
    "title",
    "brand",
    "category",
    "price",
    "group_id",
    "attributes",
    "image",
    "Title",
    "ID",
    "x",
]
NAMES += ["attributes.size", "attributes. size", "Attributes.colour", "attributes.", "photo"]


Row = tuple[int, dict[str, Any] | RowError]


def rows(seed: int) -> Iterator[Row]:
    draw = random.Random(seed)
    strange = draw.choice([0.01, 0.3, 1.0])

    def value() -> Any:
        return draw.choice(TEXTS if draw.random() < 0.5 else OTHERS)

    def attributes() -> Any:
        names = ["colour", " sp ", "title", "", "\u200b", "Ä", "k"]
        some = {draw.choice(names): value() for _ in range(draw.randrange(4))}
        many = {f"k{n}": "v" for n in range(draw.choice([3, 199, 201]))}
        return draw.choice([some, many, value(), '{"a": "b"}', "{bad", '{"a": {"b": 1}}', [("k", "v")], {1: "x"}])

    for number in range(1, 700):
        if draw.random() > strange:
            title, kept = draw.choice(["x", "Größe"]), {"colour": "red", "year": draw.choice(["2", None, ""])}
            row = {"id": f"n{number}", "file_name": f"{number}.jpg", "title": title, "attributes": kept, "price": 1.5}
            yield number, row | {"group_id": f"g{number % 9}"}
        elif draw.random() < 0.03:
            yield number, RowError(["broken"])
        else:
            row = {name: value() for name in draw.sample(NAMES, draw.randrange(1, 7))}
            if draw.random() < 0.8:
                row["id"] = draw.choice([f"i{draw.randrange(200)}", draw.randrange(200), value()])
            if "file_name" in row:
                row["file_name"] = draw.choice([*PATHS, value()])
            if "attributes" in row:
                row["attributes"] = attributes()
            yield number, row


def one_by_one(given: Iterable[Row], report: ValidationReport) -> list[Item]:
    """What the rows mean, row by row."""
    columns, first, items = Columns(), dict[str, int](), []
    for number, raw in given:
        report.rows += 1
        if isinstance(raw, RowError):
            report.reject("metadata", number, None, raw.messages)
            continue
        row = columns.read(raw)
        try:
            item, notes = parse_item(row, number)
        except RowError as error:
            report.reject("metadata", number, read_identifier("id", row.get("id"), []), error.messages)
            continue
        if first.setdefault(item.id, number) != number:
            said = f"id {item.id!r} was already used in row {first[item.id]}"
            report.reject("metadata", number, item.id, [said])
            continue
        for note in notes:
            report.warn(f"row {number}: {note}")
        items.append(item)
    return items


def check(given: list[Row]) -> None:
    wanted, report = ValidationReport("x"), ValidationReport("x")
    items = one_by_one(given, wanted)
    found = load_items(given, "x", report)
    assert list(map(repr, found)) == list(map(repr, items))  # the order of attributes and -0.0, too
    assert (report.rows, report.items) == (wanted.rows, len(items))
    assert report.rejected == wanted.rejected and report.problems == wanted.problems
    assert [warning for warning in report.warnings if warning.startswith("row ")] == wanted.warnings


@pytest.mark.parametrize("seed", range(12))
def test_blocks_give_what_single_rows_give(seed: int) -> None:
    check(list(rows(seed)))


@pytest.mark.parametrize("name", ["id", "file_name", "title", "price", "group_id", "attributes", "attributes.size"])
def test_one_odd_value_among_plain_ones(name: str) -> None:
    plain = {"id": "a", "file_name": "a.jpg", "title": "A", "price": 1.0, "group_id": "g", "attributes": {"size": "4"}}
    for value in [*TEXTS, *OTHERS, *PATHS, {"size": None}, {"size": " x"}, {"size": -1}, {"": "x"}, {"title": "x"}]:
        check([(1, plain), (2, plain | {"id": "b", name: value}), (3, plain | {"id": "c"})])


def plain_clean(text: str) -> str:
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    text = re.sub("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]", "", text)
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", unicodedata.normalize("NFC", text))
    return re.sub(r"\s+", " ", text).strip()


def test_cleaning_of_every_character_is_that_of_the_definition() -> None:
    for code in range(sys.maxunicode + 1):
        text = f"a{chr(code)}b{chr(code)} "
        assert clean_text(text) == plain_clean(text), hex(code)


@given(st.text(st.sampled_from("a /.\\:é\u0301\u00a0\n"), max_size=6))
def test_shortcuts_agree_with_the_definitions(text: str) -> None:
    assert clean_text(text) == plain_clean(text)
    problems: list[str] = []
    posix, windows = PurePosixPath(text), PureWindowsPath(text)
    outside = posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\n" in text
    found = read_file_name(text, problems)
    assert bool(problems) == bool(text.strip() and ("://" in text or outside))
    assert found == (None if problems or not text.strip() else text)


def test_a_table_is_the_sequence_of_its_items() -> None:
    table = ItemTable.of(ITEMS)
    assert list(table) == ITEMS == [table[n] for n in range(4)] and table[-1] == ITEMS[-1] and table == ITEMS
    assert table != ITEMS[:3] and table != "text" and len(ItemTable.of([])) == 0 and ItemTable.of(table) is table
    for part in (slice(1, 3), slice(None, None, -1), slice(3, None), slice(0, 0), slice(None, None, 2)):
        assert list(table[part]) == ITEMS[part]
    assert list(table[1:].take(np.array([2, 0, 2]))) == [ITEMS[3], ITEMS[1], ITEMS[3]]
    assert list(pickle.loads(pickle.dumps(table[1:3]))) == ITEMS[1:3]
    with pytest.raises(IndexError):
        table[4]
    many = [Item(f"i{n}", attributes={f"k{n % 7}": "v"} if n % 3 else {}) for n in range(20_000)]
    assert list(ItemTable.of(many)) == many
    with pytest.raises(ArgumentError, match="valid text"):
        ItemTable.of([Item("\ud800")])


def test_columns_of_a_table_are_the_fields_of_its_items() -> None:
    for items in (ITEMS, ITEMS[2:3], ITEMS[::-1]):
        table = ItemTable.of(items)
        for name in ("title", "brand", "category", "price", "size", "colour", "nothing"):
            assert table.field(name) == [item.field(name) for item in items]
        names = {name for item in items for name in item.attributes}
        assert table.attribute_counts() == {n: sum(n in item.attributes for item in items) for n in names}
        for name in names:
            assert table.attribute(name).to_pylist() == [item.attributes.get(name) for item in items]
    assert ItemTable.of(ITEMS).groups().tolist() == [0, 1, -1, 0]
    assert Catalog.from_items(ITEMS).field_names() == ["title", "brand", "category", "price", "colour", "size"]


@pytest.mark.parametrize("every", [False, True])
def test_pairs_of_groups_come_group_by_group(every: bool) -> None:
    draw = np.random.default_rng(0)
    for size in (0, 1, 30, 3000):
        _, groups = np.unique(draw.integers(-1, max(1, size // 40), size), return_inverse=True)
        groups = groups.reshape(-1) - 1
        seen: dict[int, int] = {}
        groups = np.array([-1 if g < 0 else seen.setdefault(g, len(seen)) for g in groups.tolist()], np.int64)
        wanted = []
        for group in range(len(seen)):
            rows = np.flatnonzero(groups == group).tolist()
            mates = len(rows) - 1 if every else min(len(rows) - 1, 32)
            wanted += [(q, rows[(at + s) % len(rows)]) for at, q in enumerate(rows) for s in range(1, mates + 1)]
        query, target = group_pairs(groups, every=every)
        assert list(zip(query.tolist(), target.tolist())) == wanted
