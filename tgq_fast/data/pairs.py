"""Positive pairs: the pairs file, pairs implied by group ids, connected components and the split by component."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tgq_fast.data.items import RowError, read_identifier
from tgq_fast.data.rows import read_rows
from tgq_fast.data.values import amount, kind_of, plain_value
from tgq_fast.errors import ArgumentError
from tgq_fast.io.places import Place

__all__ = ["SPLITS", "PairSet", "Pairs", "components", "group_pairs", "named_ids", "read_pairs", "split_of_components"]

SPLITS = ("train", "validation", "test")
_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}
UNSPLIT = -1
_BLOCK = 1 << 16  # components whose ids are Python objects at a time, and pairs that are made at a time
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

    @property
    def items(self) -> NDArray[np.int64]:
        """[n] int64 the items that stand in a pair, ascending, each once."""
        return np.union1d(self.query, self.target).astype(np.int64)


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
    path: Place, index: Mapping[str, int], rejected: frozenset[str] = frozenset()
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


def named_ids(path: Place) -> list[str]:
    """Every id that a pairs file names, once; what is wrong with a row is not looked at."""
    found: dict[str, None] = {}
    for _, raw in read_rows(path, required=("query", "target")):
        if not isinstance(raw, RowError):
            for name in ("query", "target"):
                value = read_identifier(name, raw.get(name), [])
                if value is not None:
                    found[value] = None
    return list(found)


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


def components(groups: NDArray[np.int64], query: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected components of n items over shared groups and pairs.

    Args:
        groups: [n] int64 number of each item's group, -1 for none.
        query, target: [P] int64 items that belong together.

    Returns:
        [n] int64 labels, numbered by first appearance; an item with neither group nor pair is alone.
    """
    root = np.arange(len(groups), dtype=np.int64)  # always an item of the component that comes first so far
    grouped = np.flatnonzero(groups >= 0)
    _, first, place = np.unique(groups[grouped], return_index=True, return_inverse=True)
    root[grouped] = grouped[first][place]
    while True:  # every two rounds at least halve the components that can be joined
        one, other = root[query], root[target]
        apart = one != other
        if not apart.any():
            break
        query, target, one, other = query[apart], target[apart], one[apart], other[apart]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(root, further := root[root]):
            root = further
    labels: NDArray[np.int64] = np.cumsum(root == np.arange(len(root)), dtype=np.int64)[root]
    labels -= 1
    return labels


def group_pairs(groups: NDArray[np.int64], *, every: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ordered pairs of the items that share a group: (query [P], target [P]), group by group as they first appear.

    Args:
        groups: [n] int64 number of each item's group in order of first appearance, -1 for none.
        every: all mates of a query, which is what a ranking must know; a group of more than `MAX_GROUP_PAIRS` pairs
            then has as many evenly chosen queries as stay below. Without it, each query's next `MAX_TARGETS` mates.
    """
    grouped = np.flatnonzero(groups >= 0)
    members = grouped[np.argsort(groups[grouped], kind="stable")]  # [m] group after group
    sizes = np.bincount(groups[grouped])
    starts = np.cumsum(sizes) - sizes
    own = groups[members]
    place, size = np.arange(len(members)) - starts[own], sizes[own]
    mates = size - 1 if every else np.minimum(size - 1, MAX_TARGETS)
    if every:
        chosen = np.ones(len(members), bool)
        for group in np.flatnonzero(sizes * (sizes - 1) > MAX_GROUP_PAIRS).tolist():
            count = int(sizes[group])
            kept = np.linspace(0, count - 1, max(1, MAX_GROUP_PAIRS // (count - 1))).astype(np.int64)
            chosen[starts[group] : starts[group] + count] = False
            chosen[starts[group] + kept] = True
        mates = np.where(chosen, mates, 0)
    ends = np.cumsum(mates)
    total = int(mates.sum())
    query, target = np.empty(total, np.int64), np.empty(total, np.int64)
    cuts = np.searchsorted(ends, np.arange(_BLOCK, total, _BLOCK)).tolist()
    for first, stop in pairwise([0, *cuts, len(members)]):
        own_mates = mates[first:stop]
        begin, at = ends[first:stop] - own_mates, np.repeat(np.arange(first, stop), own_mates)
        here = int(begin[0]) if len(begin) else 0
        pairs = slice(here, here + len(at))
        step = np.arange(here, here + len(at)) - np.repeat(begin, own_mates) + 1
        query[pairs] = members[at]
        target[pairs] = members[starts[own[at]] + (place[at] + step) % size[at]]
    return query, target


def split_of_components(labels: NDArray[np.int64], ids: pa.LargeStringArray) -> NDArray[np.int8]:
    """[n] int8 split code of each item: 80/10/10 by a hash of its component's smallest id.

    The hash, not a shuffle, so that adding products never moves an untouched component to another split. Items that are
    alone get the code of no split: a split is one of pairs, and they are in none.

    Args:
        labels: [n] int64 component of each item.
        ids: [n].
    """
    codes = np.full(len(labels), UNSPLIT, np.int8)
    shared = np.flatnonzero(np.bincount(labels)[labels] > 1)
    if not len(shared):
        return codes
    table = pa.table({"label": labels[shared], "id": ids.take(pa.array(shared)).cast(pa.large_binary())})
    smallest = table.group_by("label").aggregate([("id", "min")])  # by bytes, which is the order of code points
    of_label = np.full(int(labels.max()) + 1, UNSPLIT, np.int8)
    for batch in smallest.to_batches(max_chunksize=_BLOCK):
        found = [_code_of(least) for least in batch.column("id_min").to_pylist()]
        of_label[batch.column("label").to_numpy()] = found
    codes[shared] = of_label[labels[shared]]
    return codes


def _code_of(item_id: bytes) -> int:
    share = int.from_bytes(hashlib.sha256(item_id).digest()[:8], "big") / 2.0**64
    return 0 if share < 0.8 else 1 if share < 0.9 else 2


def split_code(split: str) -> int:
    """Index of a split name in `SPLITS`; ArgumentError for any other name."""
    if split not in SPLITS:
        raise ArgumentError("split", repr(split), "one of " + ", ".join(map(repr, SPLITS)))
    return SPLITS.index(split)
