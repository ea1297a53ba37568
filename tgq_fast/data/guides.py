"""Which metadata may guide when nobody says: a documented rule over the catalogue's own statistics.

Source: ours (docs/method.md, "Which metadata guides").
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from tgq_fast.data.catalog import Catalog

__all__ = ["IDENTIFYING", "FieldFacts", "field_facts", "suggest_fields"]

IDENTIFYING = ("title", "brand", "price")
"""Columns that name a product rather than describe it; they guide only when asked for by name."""

MAX_VALUES = 100
MIN_PRESENT = 0.5
MIN_AGREEMENT = 0.5
IMPLIED = 0.98


@dataclass(frozen=True)
class FieldFacts:
    """Why a field was chosen or not.

    Attributes:
        name: the field.
        values: distinct values.
        present: share of items that have it.
        agreement: share of the training pairs (both sides present) with equal values; NaN without such pairs.
        reason: why it does not guide; empty when it does.
    """

    name: str
    values: int
    present: float
    agreement: float
    reason: str = ""

    @property
    def chosen(self) -> bool:
        """Whether it guides by default."""
        return not self.reason


def suggest_fields(catalog: Catalog) -> list[str]:
    """Fields that guide by default, category first, then attributes by name; may be empty."""
    return [facts.name for facts in field_facts(catalog) if facts.chosen]


def field_facts(catalog: Catalog) -> list[FieldFacts]:
    """Every field of the catalogue with the numbers the rule looks at and its verdict."""
    pairs = catalog.split_pairs("train")
    names = catalog.field_names()
    names.sort(key=lambda name: (name != "category", name))
    kept: list[list[str | None]] = []
    facts = []
    for name in names:
        column = catalog.items.field(name)
        counts = Counter(value for value in column if value is not None)
        present = sum(counts.values()) / max(1, len(column))
        agreement = _agreement(column, pairs.query, pairs.target)
        if name in IDENTIFYING:
            reason = "identifies a product; name it among the fields to use it"
        elif present < MIN_PRESENT:
            reason = f"missing on {1 - present:.0%} of the items"
        elif len(counts) < 2:
            reason = "one value only"
        elif len(counts) > MAX_VALUES:
            reason = f"more than {MAX_VALUES} values"
        elif agreement < MIN_AGREEMENT:
            reason = f"training pairs agree on it in {agreement:.0%} only"
        elif any(_implied(column, earlier) >= IMPLIED for earlier in kept):
            reason = "implied by a field that guides already"
        else:
            reason = ""
            kept.append(column)
        facts.append(FieldFacts(name, len(counts), present, agreement, reason))
    return facts


def _agreement(column: list[str | None], query: np.ndarray, target: np.ndarray) -> float:
    sides = [(column[q], column[t]) for q, t in zip(query.tolist(), target.tolist())]
    both = [left == right for left, right in sides if left is not None and right is not None]
    return sum(both) / len(both) if both else float("nan")


def _implied(column: list[str | None], by: list[str | None]) -> float:
    """Share of the items whose value is the commonest one among the items with the same value of `by`."""
    cells: dict[str | None, Counter[str | None]] = defaultdict(Counter)
    for value, key in zip(column, by):
        if value is not None:
            cells[key][value] += 1
    total = sum(sum(counts.values()) for counts in cells.values())
    return sum(max(counts.values()) for counts in cells.values()) / total if total else 1.0
