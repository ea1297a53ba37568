"""Positive pairs: the pairs file, pairs implied by group ids, connected components and the split by component."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgq_fast.data.items import RowError, read_identifier
from tgq_fast.data.rows import read_rows
from tgq_fast.data.values import amount, kind_of, plain_value
from tgq_fast.errors import ArgumentError

__all__ = ["SPLITS", "PairSet", "Pairs", "components", "group_pairs", "read_pairs", "split_of_components"]

SPLITS = ("train", "validation", "test")
_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}
UNSPLIT = -1
MAX_TARGETS = 32
"""For training, a group of more than this many items gives each query its next 32 members, so that one huge group stays
linear."""
MAX_GROUP_PAIRS = 1 << 20
"""For evaluation every mate is a positive; a group with more pairs than this has only some of its items as queries."""


@dataclass(frozen=True)
class PairSet:
    """Pairs of one split.

    Attributes:
        query, target: [P] int64 item indices.
        weight: [P] float32.
    """

    query: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.query)


@dataclass(frozen=True)
class Pairs:
    """Every pair of the pairs file.

    Attributes:
        query, target: [P] int64 item indices.
        weight: [P] float32.
        split: [P] int8, index into `SPLITS`, or -1 where the file names no split.
    """

    query: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float32]
    split: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.query)

    def select(self, chosen: NDArray[np.bool_]) -> PairSet:
        """Pairs where `chosen` [P] is True, in file order."""
        return PairSet(self.query[chosen], self.target[chosen], self.weight[chosen])


def make_pairs(rows: Sequence[tuple[int, int, float, int]]) -> Pairs:
    """Pairs from (query, target, weight, split code) rows."""
    query, target, weight, split = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Pairs(
        np.asarray(query, np.int64),
        np.asarray(target, np.int64),
        np.asarray(weight, np.float32),
        np.asarray(split, np.int8),
    )


def read_pairs(
    path: Path, index: Mapping[str, int], rejected: frozenset[str] = frozenset()
) -> Iterator[tuple[int, tuple[int, int, float, int] | RowError | None]]:
    """Stream a pairs file: (row number, (query, target, weight, split code)), an error, or None.

    None stands for a pair that names an item whose own row was refused: it goes with the item and is no second problem.
    """
    for number, raw in read_rows(path, required=("query", "target")):
        if isinstance(raw, RowError):
            yield number, raw
            continue
        try:
            yield number, _parse_pair(raw, index, rejected)
        except RowError as error:
            yield number, error


def _parse_pair(
    raw: Mapping[str, Any], index: Mapping[str, int], rejected: frozenset[str]
) -> tuple[int, int, float, int] | None:
    problems: list[str] = []
    ends: list[int] = []
    dropped = False
    for name in ("query", "target"):
        known = len(problems)
        value = read_identifier(name, raw.get(name), problems)
        if value is None:
            if len(problems) == known:
                problems.append(f"{name} is missing, expected an item id")
            continue
        found = index.get(value)
        if found is not None:
            ends.append(found)
        elif value in rejected:
            dropped = True
        else:
            problems.append(f"{name} {value[:80]!r} is not an item of the catalogue")
    if len(ends) == 2 and ends[0] == ends[1]:
        problems.append(f"query and target are the same item {str(raw['query'])[:80]!r}")
    split = _parse_split(raw.get("split"), problems)
    weight = _parse_weight(raw.get("weight"), problems)
    if problems:
        raise RowError(problems)
    return None if dropped else (ends[0], ends[1], weight, split)


def _parse_split(value: object, problems: list[str]) -> int:
    given = plain_value(value)
    name = given.strip().lower() if isinstance(given, str) else given
    if name is None or name == "":
        return UNSPLIT
    name = _ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in SPLITS:
        problems.append(f"split is {kind_of(value)}, expected one of {', '.join(SPLITS)}")
        return UNSPLIT
    return SPLITS.index(str(name))


def _parse_weight(value: object, problems: list[str]) -> float:
    try:
        weight = amount(value)
    except RowError:
        weight = 0.0
    if weight is None:
        return 1.0
    if not 0 < weight <= 1e30:
        problems.append(f"weight is {kind_of(value)}, expected a finite number above 0")
    return weight


def components(
    n: int, groups: Sequence[str | None], query: NDArray[np.int64], target: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Connected components of n items over shared group ids and pairs.

    Returns:
        [n] int64 labels, numbered by first appearance; an item with neither group nor pair is alone.
    """
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        i, j = root(i), root(j)
        if i != j:  # the smaller index stays root, so that a root is its component's first item
            parent[max(i, j)] = min(i, j)

    first: dict[str, int] = {}
    for i, group in enumerate(groups):
        if group is not None:
            join(i, first.setdefault(group, i))
    for i, j in zip(query.tolist(), target.tolist(), strict=True):
        join(i, j)
    labels: dict[int, int] = {}
    return np.fromiter((labels.setdefault(root(i), len(labels)) for i in range(n)), np.int64, n)


def group_pairs(groups: Sequence[str | None], *, every: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ordered pairs of the items that share a group id: (query [P], target [P]).

    Args:
        groups: [n] group id of each item, None for none.
        every: all mates of a query, which is what a ranking must know; a group of more than `MAX_GROUP_PAIRS` pairs
            then has as many evenly chosen queries as stay below. Without it, each query's next `MAX_TARGETS` mates.
    """
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(i)
    empty = np.empty(0, np.int64)
    query, target = [empty], [empty]
    for indices in members.values():
        size = len(indices)
        mates = size - 1 if every else min(size - 1, MAX_TARGETS)
        if not mates:
            continue
        chosen = np.arange(size)
        if every and size * mates > MAX_GROUP_PAIRS:
            chosen = np.linspace(0, size - 1, max(1, MAX_GROUP_PAIRS // mates)).astype(np.int64)
        places = (chosen[:, None] + np.arange(1, mates + 1)) % size  # [queries, mates]
        rows = np.asarray(indices, np.int64)
        query.append(np.repeat(rows[chosen], mates))
        target.append(rows[places].reshape(-1))
    return np.concatenate(query), np.concatenate(target)


def split_of_components(labels: NDArray[np.int64], ids: Sequence[str]) -> NDArray[np.int8]:
    """[n] int8 split code of each item: 80/10/10 by a hash of its component's smallest id.

    The hash, not a shuffle, so that adding products never moves an untouched component to another split.
    """
    smallest: dict[int, str] = {}
    for label, item_id in zip(labels.tolist(), ids, strict=True):
        if label not in smallest or item_id < smallest[label]:
            smallest[label] = item_id

    def code(item_id: str) -> int:
        share = int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:8], "big") / 2.0**64
        return 0 if share < 0.8 else 1 if share < 0.9 else 2

    codes = {label: code(item_id) for label, item_id in smallest.items()}
    return np.fromiter((codes[label] for label in labels.tolist()), np.int8, len(labels))


def split_code(split: str) -> int:
    """Index of a split name in `SPLITS`; ArgumentError for any other name."""
    if split not in SPLITS:
        raise ArgumentError("split", repr(split), "one of " + ", ".join(map(repr, SPLITS)))
    return SPLITS.index(split)
