"""Items in Arrow columns: a sequence that makes each :class:`Item` when it is asked for.

A million products take about 150 bytes each, where as Python objects they take ten times as much. Attributes lie one
after another, so that a shop with thousands of rare ones costs what they hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tgq_fast.data.items import COLUMNS, Item
from tgq_fast.data.row_blocks import TEXTS, Block, block_of_items
from tgq_fast.data.values import price_text
from tgq_fast.errors import ArgumentError

__all__ = ["ItemTable", "ItemTableBuilder"]

_FLUSH = 1 << 13  # items that are Python objects at a time
_JOINED = 32  # blocks that are joined as they come: small arrays waste memory
_BLOCK = 1 << 11  # items that an iteration makes ahead


class ItemTable(Sequence[Item]):
    """Items, read only. Made by :class:`ItemTableBuilder`.

    Args:
        texts: column of `TEXTS` → [n] text, null where missing; of type null where all are.
        prices: [n] float64, null where missing; of type null where all are.
        numbers: [n] int64 rows of the metadata file.
        ends: [n + 1] int64; the attributes of item i are entries ends[i] … ends[i + 1] of the following two.
        keys: [m] int32 index into `names`.
        values: [m] text.
        names: attribute names.
    """

    def __init__(
        self,
        texts: dict[str, pa.LargeStringArray],
        prices: pa.DoubleArray,
        numbers: NDArray[np.int64],
        ends: NDArray[np.int64],
        keys: NDArray[np.int32],
        values: pa.LargeStringArray,
        names: tuple[str, ...],
    ) -> None:
        self._texts, self._prices, self._numbers = texts, prices, numbers
        self._ends, self._keys, self._values, self._names = ends, keys, values, names

    @classmethod
    def of(cls, items: Iterable[Item]) -> ItemTable:
        """The table of some items; a table stays what it is. ArgumentError for text that is not Unicode."""
        if isinstance(items, ItemTable):
            return items
        builder = ItemTableBuilder()
        for item in items:
            builder.add(item)
        return builder.build()

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> ItemTable: ...
    def __getitem__(self, index: int | slice) -> Item | ItemTable:
        if isinstance(index, slice):
            return self.take(np.arange(len(self), dtype=np.int64)[index])
        place = range(len(self))[index]
        return next(self._items(place, place + 1))

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), _BLOCK):
            yield from self._items(start, min(start + _BLOCK, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ItemTable of {len(self)} items"

    def _items(self, start: int, stop: int) -> Iterator[Item]:
        part = slice(start, stop)
        texts = [self._texts[name][part].to_pylist() for name in TEXTS]
        prices, numbers = self._prices[part].to_pylist(), self._numbers[part].tolist()
        ends = self._ends[start : stop + 1].tolist()
        names = [self._names[key] for key in self._keys[ends[0] : ends[-1]].tolist()]
        values = self._values[ends[0] : ends[-1]].to_pylist()
        for at, (item_id, file_name, title, brand, category, group_id) in enumerate(zip(*texts)):
            own = slice(ends[at] - ends[0], ends[at + 1] - ends[0])
            attributes = dict(zip(names[own], values[own]))
            price, number = prices[at], numbers[at]
            yield Item(item_id, file_name, title, brand, category, attributes, price, group_id, number)

    def take(self, rows: NDArray[np.integer[Any]]) -> ItemTable:
        """The table of some rows [r], in this order."""
        counts = np.diff(self._ends)[rows]
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        entries = np.repeat(self._ends[rows] - ends[:-1], counts) + np.arange(ends[-1])
        at = pa.array(rows, pa.int64())
        return ItemTable(
            {name: column.take(at) for name, column in self._texts.items()},
            self._prices.take(at),
            self._numbers[rows],
            ends,
            self._keys[entries],
            self._values.take(pa.array(entries, pa.int64())),
            self._names,
        )

    # --------------------------------------------------------------- columns

    def text(self, name: str) -> pa.LargeStringArray:
        """[n] a column of `TEXTS`, null where missing."""
        column = self._texts[name]
        return pa.nulls(len(self), pa.large_string()) if pa.types.is_null(column.type) else column

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[n] int64 rows of the metadata file."""
        return self._numbers

    def prices(self) -> pa.DoubleArray:
        """[n] float64, null where missing."""
        return pa.nulls(len(self), pa.float64()) if pa.types.is_null(self._prices.type) else self._prices

    def attribute(self, name: str) -> pa.LargeStringArray:
        """[n] texts of one attribute, null where missing."""
        entries = np.full(len(self), -1, np.int64)
        if name in self._names:
            held = np.flatnonzero(self._keys == self._names.index(name))
            entries[np.searchsorted(self._ends, held, side="right") - 1] = held
        return self._values.take(pa.array(entries, mask=entries < 0))

    def attribute_counts(self) -> Counter[str]:
        """Attribute → items that have it, in order of first appearance."""
        counts = np.bincount(self._keys, minlength=len(self._names)).tolist()
        return Counter({name: count for name, count in zip(self._names, counts) if count})

    def field(self, name: str) -> list[str | None]:
        """[n] texts of a metadata field, as :meth:`Item.field` gives them."""
        if name == "price":
            return [None if price is None else price_text(price) for price in self._prices.to_pylist()]
        texts: list[str | None] = (self.text(name) if name in COLUMNS else self.attribute(name)).to_pylist()
        return texts

    def field_names(self) -> list[str]:
        """Metadata fields that at least one item has: columns first, then attributes by name."""
        columns = {**self._texts, "price": self._prices}
        names = [name for name in COLUMNS if columns[name].null_count < len(self)]
        return names + sorted(self.attribute_counts().keys() - set(COLUMNS))

    def missing(self) -> dict[str, int]:
        """Field → items that lack it, by name: of every column but the id, and of every attribute that occurs."""
        counts = {name: len(self) - count for name, count in self.attribute_counts().items()}
        counts |= {name: column.null_count for name, column in self._texts.items() if name != "id"}
        return dict(sorted((counts | {"price": self._prices.null_count}).items()))

    def groups(self) -> NDArray[np.int64]:
        """[n] int64 number of each item's group, in order of first appearance; -1 for none."""
        coded = self.text("group_id").dictionary_encode()
        codes: NDArray[np.int64] = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return codes


class ItemTableBuilder:
    """Takes items block by block, or one by one, and keeps few of them as Python objects."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # attribute name → its number
        self._items: list[Item] = []
        self._blocks: list[_Columns] = []
        self._done: list[_Columns] = []

    def add(self, item: Item) -> None:
        """Add one item."""
        self._items.append(item)
        if len(self._items) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        items, self._items = self._items, []
        self.extend(block_of_items(items))

    def extend(self, block: Block) -> None:
        """Add a block of items. ArgumentError for text that is not Unicode."""
        numbers = self._numbers
        try:
            columns: _Columns = {name: _array(texts, pa.large_string()) for name, texts in block.texts.items()}
            columns["value"] = pa.array(block.values, pa.large_string())
            columns["price"] = _array(block.prices, pa.float64())
            columns["row"] = np.array(block.rows, np.int64)
        except (pa.ArrowException, UnicodeEncodeError, TypeError, OverflowError) as error:
            raise ArgumentError("items", str(error)[:200], "items whose fields are valid text and numbers") from None
        columns["count"] = np.array(block.counts, np.int64)
        for name in dict.fromkeys(block.keys):
            numbers.setdefault(name, len(numbers))
        columns["key"] = np.array(list(map(numbers.__getitem__, block.keys)), np.int32)
        self._blocks.append(columns)
        if len(self._blocks) == _JOINED:
            self._done.append(_join(self._blocks))

    def build(self) -> ItemTable:
        """The table; the builder is empty afterwards."""
        self._flush()
        self._done.append(_join(self._blocks))
        columns, names = _join(self._done, tidy=True), tuple(self._numbers)
        self._numbers = {}
        counts = columns.pop("count")
        if counts.any():
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        else:  # nobody has attributes: no memory for where they end
            ends = np.broadcast_to(np.int64(0), len(counts) + 1)
        del counts
        pa.default_memory_pool().release_unused()
        return ItemTable(
            {name: columns[name] for name in TEXTS},
            columns["price"],
            columns["row"],
            ends,
            columns["key"],
            columns["value"],
            names,
        )


_Columns = dict[str, Any]  # Arrow and numpy arrays


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values as an Arrow array; gaps alone as one of nulls, which takes no memory."""
    array = pa.array(values, kind)
    return pa.nulls(len(array)) if array.null_count == len(array) else array


def _join(blocks: list[_Columns], *, tidy: bool = False) -> _Columns:
    """One block of several, which are emptied: a column at a time is there twice, if what is free is given back."""
    joined: _Columns = {}
    for name in list(blocks[0]):
        parts = [block.pop(name) for block in blocks]
        if isinstance(parts[0], np.ndarray):
            joined[name] = np.concatenate(parts)
        else:
            kind = next((part.type for part in parts if not pa.types.is_null(part.type)), pa.null())
            joined[name] = pa.concat_arrays([part if part.type == kind else part.cast(kind) for part in parts])
        if tidy:
            del parts
            pa.default_memory_pool().release_unused()
    blocks.clear()
    return joined
