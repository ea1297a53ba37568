"""Conditions that a query and a pool row meet together or not, tested on hits only: what a mask of the pool cannot say.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["Rule"]


@dataclass(frozen=True)
class Rule:
    """One condition. With `reach`, numbers that must be near; without, labels that must differ.

    Attributes:
        rows: [N] of the pool rows: int64 labels, negative where a row has none and meets the condition; or float64
            numbers.
        queries: [Q] of the queries, of the same dtype.
        reach: [Q] float64, how far a row's number may be from the query's; NaN is near nothing.
    """

    rows: Tensor
    queries: Tensor
    reach: Tensor | None = None

    def of_rows(self, rows: slice | Tensor) -> Rule:
        """The rule for some of the pool's rows."""
        return replace(self, rows=self.rows[rows].contiguous())

    def of_queries(self, queries: Tensor) -> Rule:
        """The rule for some of the queries."""
        reach = None if self.reach is None else self.reach[queries]
        return replace(self, queries=self.queries[queries], reach=reach)

    def met(self, queries: slice, rows: slice | Tensor) -> Tensor:
        """[q, n] bool: where some queries and some rows meet it."""
        theirs, own = self.rows[rows], self.queries[queries, None]
        if self.reach is None:
            return (theirs < 0) | (theirs != own)
        return (theirs - own).abs() <= self.reach[queries, None]

    def addresses(self) -> tuple[int, ...]:
        """What `rules_of` in csrc/bindings/bindings.cpp reads."""
        arrays = (self.rows, self.queries) if self.reach is None else (self.rows, self.queries, self.reach)
        return tuple(array.data_ptr() for array in arrays)
