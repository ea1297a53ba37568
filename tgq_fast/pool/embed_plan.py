"""What of a catalogue has to be embedded: compares it with a pool, item by item, by what pictures and fields hold.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tgq_fast.data import Catalog, Item
from tgq_fast.data.items import COLUMNS
from tgq_fast.data.pictures import Picture
from tgq_fast.errors import PoolError
from tgq_fast.io.json_text import read_json
from tgq_fast.pool.files import REJECTS_NAME
from tgq_fast.pool.item_pool import ItemPool

__all__ = ["Plan", "content_key", "content_keys", "plan"]

KEY_BYTES = 16
_PIECE = 1 << 20


def content_key(item: Item, picture: Picture | None, fields: Sequence[str] | None) -> bytes:
    """16 bytes that change whenever the bytes of the item's picture or a field change (BLAKE2b).

    Args:
        picture: the item's.
        fields: names of the metadata that guides; None: all of it.
    """
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    names = [*COLUMNS, *sorted(item.attributes)] if fields is None else fields
    state.update(json.dumps([[name, item.field(name)] for name in names]).encode())
    if picture is not None:
        try:
            with picture.open() as file:
                state.update(b"picture")
                while piece := file.read(_PIECE):
                    state.update(piece)
        except (OSError, ValueError):
            state.update(b"unreadable")
    return state.digest()


def content_keys(
    catalog: Catalog, items: Sequence[Item], fields: Sequence[str] | None, *, workers: int = 2
) -> list[bytes]:
    """:func:`content_key` of several items; pictures are read in `workers` threads."""

    def key(item: Item) -> bytes:
        return content_key(item, None if item.file_name is None else catalog.picture(item), fields)

    with ThreadPoolExecutor(workers, thread_name_prefix="tgq-content") as pool:
        return list(pool.map(key, items))


@dataclass(frozen=True)
class Plan:
    """What one run of embedding has to do.

    Attributes:
        todo: rows of the catalogue to embed: new ones and changed ones, in order.
        changed: those of them that the pool holds with other content.
        gone: ids of the pool that the catalogue does not have.
        resumes: an interrupted run over the same catalogue is taken up.
    """

    todo: list[int]
    changed: frozenset[int]
    gone: list[str]
    resumes: bool


def plan(catalog: Catalog, pool: ItemPool, fields: Sequence[str] | None) -> Plan:
    """Compare a catalogue with a pool. Reads the pictures of the items that the pool holds.

    Raises:
        PoolError: the pool holds items that were not embedded from a catalogue, or nothing of this one.
    """
    items = catalog.items
    manifest = pool.manifest
    if len(pool) and not manifest.source:
        raise PoolError(f"{pool.path}: holds {len(pool)} items that were added by hand; embed into another folder")
    rows = pool.rows(catalog.ids, missing="mark")
    held = np.flatnonzero(rows >= 0)
    if len(pool) and not len(held):
        raise PoolError(
            f"{pool.path}: holds {len(pool)} items, none of them in this catalogue; embed into another folder"
        )
    gone: list[str] = []
    if len(held) < len(pool):
        missing = np.setdiff1d(np.arange(len(pool)), rows[held])
        gone = [name for name in pool.names(missing) if name is not None]
        unknown = sum(key is None for key in pool.content(gone))
        if unknown:
            raise PoolError(
                f"{pool.path}: holds {unknown} items that are not in this catalogue and were added by hand or by an "
                "earlier release; delete them (ItemPool.delete) or embed into another folder"
            )
    chosen = [items[row] for row in held.tolist()]
    before = pool.content([item.id for item in chosen])
    now = content_keys(catalog, chosen, fields)
    same = {row for row, old, new in zip(held.tolist(), before, now, strict=True) if old == new}
    resumes = not manifest.complete and manifest.source == catalog.digest()
    refused = _refused(pool) if resumes else {}
    todo = [row for row in range(len(items)) if row not in same]
    again = [row for row in todo if items[row].id in refused]
    keys = content_keys(catalog, [items[row] for row in again], fields)
    skip = {row for row, key in zip(again, keys, strict=True) if refused[items[row].id] == key.hex()}
    return Plan([row for row in todo if row not in skip], frozenset(held.tolist()) - same, gone, resumes)


def _refused(pool: ItemPool) -> dict[str, str]:
    """Content keys of the items in the reject log, by id: tried already in the run that is taken up."""
    record = pool.manifest.rejects
    if record is None:
        return {}
    lines = (pool.path / REJECTS_NAME).read_bytes()[: record.bytes].decode("utf-8").splitlines()
    rows = [read_json(line) for line in lines]
    return {str(row["item_id"]): str(row.get("content")) for row in rows}
