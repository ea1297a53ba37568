"""Rows read a block at a time: a column whose values are all plain is settled at once, any other value by value.

What the exact reader (:func:`~tgq_fast.data.items.parse_item`) would change with a note, or refuse, is left to it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from tgq_fast.data import items as exact
from tgq_fast.data.items import COLUMNS, MAX_ATTRIBUTES, MAX_ID, MAX_PATH, MAX_TEXT, MAX_TITLE, Item, RowError

__all__ = ["TEXTS", "Block", "block_of_items", "read_block"]

TEXTS = ("id", "file_name", "title", "brand", "category", "group_id")
"""Columns of text."""

_TEXT, _GAPS = {str}, {str, type(None)}


class Block(NamedTuple):
    """Columns of some items.

    Attributes:
        texts: column of `TEXTS` → [n] texts, None where missing.
        prices: [n] prices.
        rows: [n] row numbers.
        counts: [n] number of attributes.
        keys, values: [sum of counts] names and texts of the attributes, item after item.
    """

    texts: Mapping[str, Sequence[str | None]]
    prices: Sequence[float | None]
    rows: Sequence[int]
    counts: Sequence[int]
    keys: Sequence[str]
    values: Sequence[str]


def block_of_items(items: Sequence[Item]) -> Block:
    """The columns of items."""
    attributes = [item.attributes for item in items]
    return Block(
        {name: [getattr(item, name) for item in items] for name in TEXTS},
        [item.price for item in items],
        [item.row for item in items],
        list(map(len, attributes)),
        list(chain.from_iterable(attributes)),
        list(chain.from_iterable(entries.values() for entries in attributes)),
    )


def read_block(
    rows: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
    refuse: Callable[[int, Mapping[str, Any], RowError], None],
    alter: Callable[[int, str], None],
) -> Block:
    """The items of some rows with the schema's column names.

    Args:
        numbers: row number of each.
        refuse: called with number, row and reasons of a row that cannot be used.
        alter: called with number and note for what was changed in a row.
    """
    doubt: set[int] = set()
    texts = {
        "id": _settle(rows, "id", exact.read_identifier, _plain_ids, doubt),
        "file_name": _settle(rows, "file_name", lambda _, *given: exact.read_file_name(*given), _plain_paths, doubt),
        "group_id": _settle(rows, "group_id", exact.read_identifier, _plain_ids, doubt),
    }
    for name in ("title", "brand", "category"):
        limit = MAX_TITLE if name == "title" else MAX_TEXT
        texts[name] = _settle(rows, name, _reader(limit), partial(_plain_texts, limit=limit), doubt)
    prices = _settle(rows, "price", lambda _, *given: exact.read_price(*given), _plain_prices, doubt)
    for at, item_id in enumerate(texts["id"]):
        if item_id is None:
            texts["id"][at] = texts["file_name"][at]
            if texts["id"][at] is None:
                doubt.add(at)
    counts, keys, values = _attributes(rows, doubt)
    block = Block(texts, prices, numbers, counts, keys, values)
    return _with_exact(block, rows, doubt, refuse, alter) if doubt else block


def _with_exact(
    block: Block,
    rows: Sequence[Mapping[str, Any]],
    doubt: set[int],
    refuse: Callable[[int, Mapping[str, Any], RowError], None],
    alter: Callable[[int, str], None],
) -> Block:
    """The block with what the exact reader says of the rows in doubt."""
    items: dict[int, Item] = {}
    for at in sorted(doubt):
        try:
            items[at], notes = exact.parse_item(rows[at], block.rows[at])
        except RowError as error:
            refuse(block.rows[at], rows[at], error)
            continue
        for note in notes:
            alter(block.rows[at], note)
    kept = [at for at in range(len(rows)) if at not in doubt or at in items]

    def column(name: str, settled: Sequence[Any]) -> list[Any]:
        return [getattr(items[at], name) if at in items else settled[at] for at in kept]

    ends = np.cumsum([0, *block.counts]).tolist()
    counts: list[int] = []
    keys: list[str] = []
    values: list[str] = []
    for at in kept:
        if at in items:
            own, said = list(items[at].attributes), list(items[at].attributes.values())
        else:
            own, said = (list(part[ends[at] : ends[at + 1]]) for part in (block.keys, block.values))
        counts.append(len(own))
        keys += own
        values += said
    texts = {name: column(name, settled) for name, settled in block.texts.items()}
    return Block(texts, column("price", block.prices), [block.rows[at] for at in kept], counts, keys, values)


def _reader(limit: int) -> Callable[[str, Any, list[str]], Any]:
    return lambda name, value, said: exact.read_text(name, value, said, said, limit)


def _settle(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    read: Callable[[str, Any, list[str]], Any],
    plain: Callable[[list[Any]], list[Any] | None],
    doubt: set[int],
) -> list[Any]:
    """The values of a column: at once where `plain` can, else each by `read`, whose complaints put the row in doubt."""
    values = [row.get(name) for row in rows]
    settled = plain(values)
    if settled is not None:
        return settled
    settled = []
    for at, value in enumerate(values):
        said: list[str] = []
        settled.append(read(name, value, said))
        if said:
            doubt.add(at)
    return settled


def _plain_texts(values: list[Any], limit: int) -> list[Any] | None:
    """The texts if all of them are clean already, with None for blank ones."""
    kinds = set(map(type, values))
    if not kinds <= _GAPS:
        return None
    texts = values if kinds <= _TEXT else [value or "" for value in values]
    if not _clean(texts) or max(map(len, texts), default=0) > limit:
        return None
    return [text or None for text in texts] if "" in texts else texts


def _clean(texts: Sequence[str]) -> bool:
    """Whether :func:`~tgq_fast.data.items.clean_text` would change none of the texts."""
    if not "".join(texts).isprintable():
        return False
    lines = "\n" + "\n".join(texts) + "\n"  # printable texts have no line ends of their own
    if "  " in lines or " \n" in lines or "\n " in lines:
        return False
    return lines.isascii() or unicodedata.is_normalized("NFC", lines)


def _plain_ids(values: list[Any]) -> list[Any] | None:
    if set(map(type, values)) <= {int} and values and min(values) > -(10**18) and max(values) < 10**18:
        return list(map(str, values))
    return _plain_texts(values, MAX_ID)


def _plain_paths(values: list[Any]) -> list[Any] | None:
    texts = _plain_texts(values, MAX_PATH)
    if texts is None:
        return None
    lines = "\n" + "\n".join(filter(None, texts))
    return None if ":" in lines or "\\" in lines or ".." in lines or "\n/" in lines else texts


def _plain_prices(values: list[Any]) -> list[Any] | None:
    kinds = set(map(type, values))
    if not kinds <= {float, type(None)}:
        return None
    known = np.array(values if kinds <= {float} else [value for value in values if value is not None], np.float64)
    return values if ((known >= 0) & (known < np.inf)).all() else None


def _plain_name(key: Any) -> bool:
    return type(key) is str and key != "" and exact.attribute_name(key) == key and key not in COLUMNS


def _attributes(rows: Sequence[Mapping[str, Any]], doubt: set[int]) -> tuple[list[int], list[str], list[str]]:
    """counts, keys and values of a block."""
    named: list[Mapping[Any, Any]] = [row.get("attributes") for row in rows]  # type: ignore[misc]
    dotted = exact.attribute_columns(tuple(set().union(*rows)))
    if dotted or set(map(type, named)) - {dict}:
        for at, row in enumerate(rows):
            said: list[str] = []
            given = exact.given_attributes(named[at], said) or {}
            if said:
                doubt.add(at)
            columns = {name: row[column] for column, name in exact.attribute_columns(tuple(row))} if dotted else {}
            named[at] = {**given, **columns} if columns else given
            if len(named[at]) < len(given) + len(columns):
                doubt.add(at)  # an attribute twice
    keys = list(chain.from_iterable(named))
    odd = {key for key in set(keys) if not _plain_name(key)}
    many = [at for at, entries in enumerate(named) if len(entries) > MAX_ATTRIBUTES]
    strange = [at for at, entries in enumerate(named) if not odd.isdisjoint(entries)] if odd else []
    for at in {*many, *strange}:
        doubt.add(at)
        named[at] = {}
    if doubt:
        keys = list(chain.from_iterable(named))
    counts = list(map(len, named))
    given_values = list(chain.from_iterable(entries.values() for entries in named))
    values = _plain_texts(given_values, MAX_TEXT)
    if values is None:
        owner = np.repeat(np.arange(len(named)), counts).tolist()
        values = []
        for at, key, value in zip(owner, keys, given_values):
            complaints: list[str] = []
            values.append(exact.read_attribute(key, value, complaints, complaints))
            if complaints:
                doubt.add(at)
    if None in values:
        ends = np.cumsum([0, *counts]).tolist()
        there = [value is not None for value in values]
        counts = [sum(there[ends[at] : ends[at + 1]]) for at in range(len(counts))]
        keys = [key for key, present in zip(keys, there) if present]
        values = [value for value in values if value is not None]
    return counts, keys, values
