"""Conditions on items, and searches for the neighbours of a pool's own items under them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from tgq_fast.arguments import checked
from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.pool.filters import Selection
from tgq_fast.pool.item_table import ITEMS_NAME, ItemColumns, read_items
from tgq_fast.pool.join import PerGroup, filtered_search
from tgq_fast.pool.reader import PoolReader
from tgq_fast.pool.search import PoolHits, PoolSearch
from tgq_fast.search.topk_arguments import check_k

if TYPE_CHECKING:
    from tgq_fast.pool.item_pool import ItemPool

__all__ = ["columns_of", "groups_of", "rows_like", "search_like", "select"]


def columns_of(reader: PoolReader, table: pa.Table | None) -> ItemColumns:
    """The columns of a table, or of the one beside the pool, in the order of the pool's rows.

    Raises:
        ArgumentError: the table has no ids, or none of the pool's.
        PoolError: there is no table beside the pool.
    """
    if table is None:
        table = read_items(reader.path)
        if table is None:
            raise PoolError(f"{reader.path}: has no {ITEMS_NAME}; give a table or a catalogue, or run tgq-fast embed")
    if "id" not in table.column_names:
        raise ArgumentError("table", f"columns {table.column_names}", 'a column "id"')
    ids = table.column("id").cast(pa.string()).combine_chunks()
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    shard_of, position = reader.find(ids)
    rows = reader.to_rows(shard_of, position)
    if len(reader) and (rows < 0).all():
        raise ArgumentError("table", "ids none of which is in the pool", f"items of {reader.path}")
    return ItemColumns(table, rows, len(reader))


@checked
def select(pool: ItemPool, where: str, table: pa.Table | None = None) -> Selection:
    """Conditions on the items' columns, for :meth:`search_like`; its `base` also for the `where` of :meth:`search`.

    Args:
        where: such as "category = same, in_stock = true, price within 30%"; see
            :mod:`tgq_fast.pool.filters`.
        table: has a column "id" and those that are named; None: what `tgq-fast embed` wrote beside the pool.

    Raises:
        ArgumentError: a condition that cannot be read, or a column that is not there.
        PoolError: there is no table.
    """
    return Selection(where, columns_of(pool._state[0], table))


def search_like(
    pool: ItemPool, ids: Sequence[str], k: int, *, select: Selection | None = None, per_group: PerGroup | None = None
) -> PoolHits:
    """The k best neighbours of items of the pool, themselves left out, among the items that meet conditions.

    Args:
        ids: n ids of the pool.
        k: 1 … 2048.
        select: of :meth:`select`; "same" and "within" compare with each item's own values.
        per_group: at most so many neighbours of one group.

    Returns:
        :class:`PoolHits` [n, k]; fewer than k hits only where no more items meet the conditions.

    Raises:
        ArgumentError: an unknown id, a bad k, or conditions of another version of the pool.
        PoolError: a shard is damaged.
    """
    reader, search = pool._state
    return rows_like(reader, search, reader.rows(ids), k, select, per_group)


def groups_of(reader: PoolReader, most: int, table: pa.Table | None) -> PerGroup:
    """At most `most` neighbours of one `group_id`."""
    if most < 1:
        raise ArgumentError("per_group", most, "at least 1")
    return PerGroup(columns_of(reader, table).codes("group_id"), most)


def rows_like(
    reader: PoolReader,
    search: PoolSearch,
    own: np.ndarray,
    k: int,
    selection: Selection | None = None,
    groups: PerGroup | None = None,
    excluded: torch.Tensor | None = None,
) -> PoolHits:
    """:func:`search_like` of pool rows `own` [n]; `excluded` [n, X] pool rows are left out instead of the items."""
    k, queries = check_k(k), reader.take(own)
    excluded = torch.from_numpy(own)[:, None] if excluded is None else excluded
    for name, size in (("select", selection and len(selection.base)), ("per_group", groups and len(groups.codes))):
        if size is not None and size != len(reader):
            raise ArgumentError(name, f"of {size} rows", f"one of this version of the pool, {len(reader)} rows")
    if selection is None and groups is None:
        found = search.best_rows(queries, k, excluded)
    else:
        everything = Selection.of_all(len(reader)) if selection is None else selection
        found = filtered_search(search, queries, own, k, excluded, everything, groups)
    return PoolHits(found.scores, found.indices, reader.ids_at(found.indices))
