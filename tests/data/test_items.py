"""Row schema and text cleaning."""

from __future__ import annotations

import json
import math
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgq_fast.data.items import MAX_TEXT, MAX_TITLE, Item, RowError, clean_text, parse_item


def test_a_full_row_is_typed() -> None:
    raw = {
        "id": 7,
        "file_name": "images/a.jpg",
        "title": "  Red\tbag ",
        "brand": "Café",
        "category": "",
        "attributes": {"gender": "Women", "year": 2011, "sizes": ["S", "M"], "vegan": True, "season": None, "fit": " "},
        "price": "12.5",
        "group_id": "g1",
    }
    item, notes = parse_item(raw, 3)
    assert item.id == "7" and item.row == 3 and item.price == 12.5 and item.group_id == "g1"
    assert item.title == "Red bag" and item.brand == "Café" and item.category is None
    assert item.attributes == {"gender": "Women", "year": "2011", "sizes": "S, M", "vegan": "yes"}
    assert notes == []
    assert item.field("price") == "12.50" and item.field("gender") == "Women" and item.field("absent") is None


def test_file_name_stands_in_for_a_missing_id() -> None:
    item, _ = parse_item({"file_name": "images/x.png"})
    assert item.id == "images/x.png"


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({}, "id and file_name"),
        ({"id": None, "file_name": " "}, "id and file_name"),
        ({"id": 1.5}, "id is float"),
        ({"id": True}, "id is bool"),
        ({"id": "a\x00b"}, "control"),
        ({"id": "a\ud800"}, "control"),
        ({"id": "x" * 300}, "300 characters"),
        ({"id": 10**5000}, "digits"),
        ({"id": "a", "title": {"en": "Bag"}}, "title is dict"),
        ({"id": "a", "title": b"\xff"}, "title is 1 bytes that are not UTF-8"),
        ({"id": "a", "brand": ["b"]}, "brand is list"),
        ({"id": "a", "price": "cheap"}, "price"),
        ({"id": "a", "price": -1}, "at least 0"),
        ({"id": "a", "price": math.inf}, "finite"),
        ({"id": "a", "price": True}, "price"),
        ({"id": "a", "price": 10**400}, "price"),
        ({"id": "a", "attributes": [1]}, "attributes is list"),
        ({"id": "a", "attributes": "{broken"}, "not a JSON object"),
        ({"id": "a", "attributes": "[" * 100_000}, "not a JSON object"),
        ({"id": "a", "attributes": {"x": {"y": 1}}}, "attribute 'x'"),
        ({"id": "a", "attributes": {"x": math.inf}}, "finite"),
        ({"id": "a", "attributes": {" ": "v"}}, "blank name"),
        ({"id": "a", "attributes": {str(i): "v" for i in range(201)}}, "201 attributes"),
        ({"id": "a", "file_name": 3}, "file_name is int"),
    ],
)
def test_bad_rows_say_why(raw: dict, word: str) -> None:
    with pytest.raises(RowError, match=word):
        parse_item(raw)


@pytest.mark.parametrize(
    "name",
    [
        "../x.jpg",
        "a/../../x.jpg",
        "/etc/passwd",
        "C:\\x.jpg",
        "C:x.jpg",
        "\\\\host\\x",
        "..\\x.jpg",
        "a\x00.jpg",
        "\\x.jpg",
    ],
)
def test_file_names_must_stay_inside(name: str) -> None:
    with pytest.raises(RowError, match="file_name"):
        parse_item({"id": "a", "file_name": name})


@pytest.mark.parametrize("name", ["images/a..b.jpg", "a b/ü.jpg", "images/.hidden.png"])
def test_harmless_file_names_pass(name: str) -> None:
    assert parse_item({"id": "a", "file_name": name})[0].file_name == name


def test_every_problem_of_a_row_is_listed() -> None:
    with pytest.raises(RowError) as error:
        parse_item({"id": "a", "title": [1], "price": "x", "attributes": 3})
    assert len(error.value.messages) == 3


def test_megabyte_titles_are_cut_at_a_defined_length_and_noted() -> None:
    item, notes = parse_item(
        {"id": "a", "title": "x" * 1_000_000, "brand": "y" * 1_000, "attributes": {"k": "z" * 999}}
    )
    assert item.title == "x" * MAX_TITLE and item.brand == "y" * MAX_TEXT and item.attributes["k"] == "z" * MAX_TEXT
    assert notes == [
        f"title has 1000000 characters, cut to {MAX_TITLE}",
        f"brand has 1000 characters, cut to {MAX_TEXT}",
        f"attribute 'k' has 999 characters, cut to {MAX_TEXT}",
    ]


def test_an_attribute_named_like_a_column_is_noted() -> None:
    item, notes = parse_item({"id": "a", "attributes": {"brand": "B"}})
    assert item.field("brand") is None and "name of a column" in notes[0]


@pytest.mark.parametrize(
    ("given_text", "clean"),
    [
        ("e\u0301", "é"),
        ("a\u202eb", "ab"),
        ("\ufeffa\u200bb", "ab"),
        ("a\x00\x07b", "a b"),
        ("a\u2028b\r\n\tc", "a b c"),
        ("\ud83d", "\ufffd"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("   ", ""),
        ("a  b", "a b"),
    ],
)
def test_odd_unicode(given_text: str, clean: str) -> None:
    assert clean_text(given_text) == clean


@given(st.text(st.characters(exclude_categories=[])))
def test_clean_text_is_nfc_one_line_and_idempotent(text: str) -> None:
    clean = clean_text(text)
    assert clean == clean.strip() and "\n" not in clean and "  " not in clean
    assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in clean)
    assert unicodedata.is_normalized("NFC", clean)
    assert clean_text(clean) == clean


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["id", "file_name", "title", "brand", "category", "attributes", "price", "group_id", "attributes.x"]
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(KEYS | st.text(), JSON, max_size=9))
def test_any_row_is_either_a_valid_item_or_a_row_error(raw: dict) -> None:
    try:
        item, _ = parse_item(raw, 1)
    except RowError as error:
        assert error.messages
        return
    assert item.id and len(item.title or "") <= MAX_TITLE
    assert item.price is None or (math.isfinite(item.price) and item.price >= 0)
    assert all(isinstance(v, str) and v for v in item.attributes.values())
    # what was accepted reads back as itself
    again, notes = parse_item(json.loads(json.dumps(item.to_dict())), 1)
    assert again == item and not [n for n in notes if "cut" in n]


def test_items_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Item("a").id = "b"  # type: ignore[misc]
