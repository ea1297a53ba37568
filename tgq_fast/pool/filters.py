"""Which items a search may return: conditions on columns, some of them compared with the query's own item.

    category = same, in_stock = true, price within 30%, brand != same, color in red|blue, price < 50

Conditions are joined by commas, and all must hold. Names and values with commas stand in quotes. An item without a
value meets `!=` and no other condition; a query without one meets no `= same` and no `within`. Text is compared without
case.

Source: ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import pyarrow as pa
import torch

from tgq_fast.data.items import clean_text
from tgq_fast.errors import ArgumentError
from tgq_fast.pool.item_table import ItemColumns, folded
from tgq_fast.search.rules import Rule

__all__ = ["Condition", "Selection", "parse_where"]

EXAMPLE = "conditions such as 'category = same, in_stock = true, price within 30%, color in red|blue'"
_QUOTED = r"\"[^\"]*\"|'[^']*'"
_CONDITION = re.compile(
    rf"\s*(?P<name>{_QUOTED}|[^\s=!<>,'\"]+)\s*(?P<op>=|!=|<=|>=|<|>|\bin\b|\bwithin\b)\s*"
    rf"(?P<value>{_QUOTED}|[^,]*?)\s*(?:,|$)",
)
WINDOW = 256  # queries that one search takes where numbers must be near
CUT = 1 << 12  # rows of a pool that is worth many searches of stretches of numbers
NARROW = 0.125  # share of the rows that a query's number reaches, below which such searches are the quicker way
SHARED = 32  # queries that a search under a mask of their own is worth
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII)
_TRUE, _FALSE = {"true", "yes", "1"}, {"false", "no", "0"}
_ORDER = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


@dataclass(frozen=True)
class Condition:
    """One condition: `op` is =, !=, <, <=, >, >=, in or within; the value "same" is that of the query's item."""

    name: str
    op: str
    value: str

    @property
    def relative(self) -> bool:
        """Whether it compares with the query's item."""
        return self.op == "within" or self.value == "same"


def parse_where(text: str) -> list[Condition]:
    """The conditions of a text; ArgumentError says which part cannot be read."""
    found: list[Condition] = []
    at = 0
    while at < len(text):
        part = _CONDITION.match(text, at)
        if part is None:
            raise ArgumentError("where", repr(text[at:].strip()[:80]), EXAMPLE)
        name, op, value = part["name"].strip("\"'"), part["op"], part["value"]
        if not value or (op in _ORDER and (value == "same" or not _is_number(value))):
            raise ArgumentError("where", repr(part[0].strip(" ,")), EXAMPLE)
        if op == "within" and not (value.endswith("%") and _is_number(value[:-1]) and float(value[:-1]) >= 0):
            raise ArgumentError("where", repr(part[0].strip(" ,")), "a share such as 'price within 30%'")
        found.append(Condition(name, op, value if value == "same" else value.strip("\"'")))
        at = part.end()
    if not found:
        raise ArgumentError("where", repr(text), EXAMPLE)
    return found


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _exact(text: str) -> Decimal | None:
    """The number that a text is, with all its digits: long codes that differ are no equal floats."""
    return Decimal(text) if _NUMBER.fullmatch(text) else None


class Selection:
    """Conditions over the columns of a pool.

    Args:
        where: the conditions as text.
        columns: of the pool's items.

    Attributes:
        base: [N] bool, the items that meet every condition that does not depend on the query.
        relative: whether there are others.
    """

    def __init__(self, where: str, columns: ItemColumns) -> None:
        self._start(columns.count)
        for condition in parse_where(where):
            if condition.op == "within":
                self._near.append((columns.numbers(condition.name), float(condition.value[:-1]) / 100))
            elif condition.value == "same" and condition.op in ("=", "!="):
                (self._same if condition.op == "=" else self._other).append(columns.codes(condition.name))
            else:
                self.base &= _fixed(condition, columns)

    def _start(self, count: int) -> None:
        self.base = np.ones(count, dtype=bool)
        self._same: list[np.ndarray] = []  # codes that must be the query's
        self._other: list[np.ndarray] = []  # codes that must not be the query's
        self._near: list[tuple[np.ndarray, float]] = []  # numbers, and how far from the query's as a share of it

    @classmethod
    def of_all(cls, count: int) -> Selection:
        """No conditions."""
        selection = cls.__new__(cls)
        selection._start(count)
        return selection

    @property
    def relative(self) -> bool:
        """Whether a condition compares with the query's item."""
        return bool(self._same or self._other or self._near)

    def digest(self) -> str:
        """SHA-256 over everything that decides."""
        state = hashlib.sha256(self.base.tobytes())
        for name, arrays in (("same", self._same), ("other", self._other), ("near", [n for n, _ in self._near])):
            for array in arrays:
                state.update(name.encode() + array.tobytes())
        state.update(str([share for _, share in self._near]).encode())
        return state.hexdigest()

    def groups(self, own: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of queries, [N] bool what they may get but for the rules): queries of equal values.

        Args:
            own: [Q] pool row of each query's item.
        """
        all_alike = np.zeros(len(own), dtype=np.int64)
        keys = np.stack([all_alike, *(codes[own] for codes in self._same)], axis=1)
        values, group = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(group.reshape(-1), kind="stable")
        bounds = np.searchsorted(group.reshape(-1)[order], np.arange(len(values) + 1))
        for number, key in enumerate(values.tolist()):
            if min(key) < 0:
                continue  # a query without the value
            allowed = self.base.copy()
            for codes, code in zip(self._same, key[1:]):
                allowed &= codes == code
            yield from self._windows(own, order[bounds[number] : bounds[number + 1]], allowed)

    def _windows(
        self, own: np.ndarray, members: np.ndarray, allowed: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Many queries cut into stretches of near numbers, each with the rows that can be near any of them."""
        width = min(WINDOW, len(members) // 4)
        few = width < SHARED or len(allowed) < CUT
        if not self._near or few or self._reached(own[members], allowed) > NARROW:
            yield members, allowed
            return
        numbers, share = self._near[0]
        members = members[np.argsort(numbers[own[members]], kind="stable")]  # those without a number come last
        for first in range(0, len(members), width):
            part = members[first : first + width]
            asked = numbers[own[part]]
            reach = share * np.abs(asked)
            with np.errstate(invalid="ignore"):
                low, high = np.fmin.reduce(asked - reach), np.fmax.reduce(asked + reach)
                slack = 1e-9 * max(abs(low), abs(high))  # the check itself rounds otherwise
                yield part, allowed & (numbers >= low - slack) & (numbers <= high + slack)

    def _reached(self, own: np.ndarray, allowed: np.ndarray) -> float:
        """Share of the allowed rows whose number is near enough to that of a query in the middle of all."""
        numbers, share = self._near[0]
        asked = np.nanmedian(numbers[own]) if np.isfinite(numbers[own]).any() else np.nan
        near = np.abs(numbers[allowed] - asked) <= share * np.abs(asked)
        return float(near.mean()) if len(near) else 0.0

    def rules(self, own: np.ndarray) -> list[Rule]:
        """The conditions that few queries share, for queries of these pool rows [Q]."""
        rules = [Rule(torch.from_numpy(codes), torch.from_numpy(codes[own])) for codes in self._other]
        for numbers, share in self._near:
            asked = numbers[own]
            rules.append(Rule(*map(torch.from_numpy, (numbers, asked, share * np.abs(asked)))))
        return rules


def _fixed(condition: Condition, columns: ItemColumns) -> np.ndarray:
    """[N] bool: where a condition holds that does not depend on the query."""
    if condition.op in _ORDER:
        numbers = columns.numbers(condition.name)
        with np.errstate(invalid="ignore"):
            below: np.ndarray = _ORDER[condition.op](numbers, float(condition.value))
        return below
    wanted: set[str] = set()
    for part in condition.value.split("|") if condition.op == "in" else [condition.value]:
        (value,) = folded(pa.array([clean_text(part)])).to_pylist()
        wanted |= _TRUE if value in ("true", "yes") else _FALSE if value in ("false", "no") else {value}
    numeric = {_exact(value) for value in wanted} - {None}
    codes, texts = columns.coded(condition.name)
    hit = np.array([text in wanted or (bool(numeric) and _exact(text) in numeric) for text in texts] + [False], bool)
    found: np.ndarray = hit[codes]
    return ~found if condition.op == "!=" else found
