"""What the server answers from: pools that follow their folders, the catalogue, the models that made the pools."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tgq_fast.data import Catalog, Item
from tgq_fast.data.items import RowError, parse_fields
from tgq_fast.errors import ArgumentError, PoolError, TGQError
from tgq_fast.pool import ItemPool, model_digest

if TYPE_CHECKING:
    from PIL import Image

    from tgq_fast.models import TGQFormerModel

__all__ = ["Query", "ServedPool", "Shop", "UnknownItem"]

logger = logging.getLogger(__name__)

MAX_K = 200
_VALUES = 500  # distinct values of a field offered for choice


class UnknownItem(KeyError):
    """No item of that id here."""


@dataclass(frozen=True)
class Query:
    """One question to a pool: an item of it by id, or a vector [D]."""

    k: int
    item: str | None = None
    vector: Tensor | None = None


class ServedPool:
    """An item pool that is opened again when its folder has changed; searches go to one version, whole.

    Args:
        path: the pool's folder.
        name: what the API calls it; None: the folder's name.

    Raises:
        PoolError: it cannot be opened.
    """

    def __init__(self, path: str | Path, *, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or self.path.resolve().name
        self.pool = self._open()
        self.reloads = 0
        self.trouble: str | None = None

    def _open(self) -> ItemPool:
        """The pool as it lies there, asked once: what a first question loads is there before anybody waits for it."""
        pool = ItemPool.open(self.path)
        if len(pool):
            found = pool.search(torch.ones(1, pool.dims), 1)
            pool.rows([name for name in found.ids[0] if name is not None])
        return pool

    def refresh(self) -> bool:
        """Open the pool again if there is a newer version; what cannot be opened leaves the old version in place."""
        try:
            if not self.pool.moved():
                return False
            pool = self._open()
        except (TGQError, OSError) as error:
            if str(error) != self.trouble:
                logger.warning("pool %s: not reloaded, the version in memory stays: %s", self.name, error)
            self.trouble = str(error)
            return False
        self.pool, self.trouble = pool, None
        self.reloads += 1
        logger.info("pool %s: reloaded, %d items", self.name, len(pool))
        return True

    def answer(self, queries: Sequence[Query]) -> list[list[tuple[str, float]] | Exception]:
        """(id, score) of each query's neighbours, best first; an unknown item gives its query an exception."""
        pool = self.pool  # one version for the whole batch
        wanted = [query.item for query in queries if query.item is not None]
        rows = pool.rows(wanted, missing="mark") if wanted else np.empty(0, np.int64)
        known = dict(zip(wanted, rows.tolist()))
        good = [query for query in queries if query.item is None or known[query.item] >= 0]
        hits: dict[int, list[tuple[str, float]]] = {}
        if good:
            own = iter(pool.take(rows[rows >= 0]).float())  # in the order of their queries
            vectors = torch.stack([next(own) if query.vector is None else query.vector for query in good])
            found = pool.search(vectors, max(query.k for query in good), exclude_ids=[query.item for query in good])
            for query, ids, scores in zip(good, found.ids, found.scores.tolist(), strict=True):
                pairs = zip(ids[: query.k], scores)
                hits[id(query)] = [(name, score) for name, score in pairs if name is not None]
        return [hits[id(query)] if id(query) in hits else UnknownItem(query.item) for query in queries]


class Shop:
    """Everything a server needs, opened.

    Args:
        pools: the pools to search, first one first.
        models: runs that made them, for queries by picture and for what queries look at.
        catalog: items with their metadata and pictures; None: ids and scores only.

    Raises:
        ArgumentError: no pool, or two of one name.
        PoolError: a model made none of the pools.
    """

    def __init__(
        self, pools: Sequence[ServedPool], *, models: Sequence[TGQFormerModel] = (), catalog: Catalog | None = None
    ) -> None:
        if not pools:
            raise ArgumentError("pools", "none", "at least one pool")
        self.pools = {pool.name: pool for pool in pools}
        if len(self.pools) != len(pools):
            raise ArgumentError("pools", ", ".join(pool.name for pool in pools), "folders of different names")
        self.catalog = catalog
        self.models: dict[str, TGQFormerModel] = {}
        for model in models:
            digest = model_digest(model)
            made = [pool.name for pool in pools if pool.pool.manifest.model == digest]
            if not made:
                raise PoolError("a model was given that made none of the pools; embed the catalogue with it")
            self.models |= dict.fromkeys(made, model)

    def pool(self, name: str | None) -> ServedPool:
        """A pool by name; the first one without."""
        if name is None:
            return next(iter(self.pools.values()))
        if name not in self.pools:
            raise UnknownItem(name)
        return self.pools[name]

    @property
    def fields(self) -> list[str]:
        """Metadata that a query by picture may carry."""
        names = [name for model in self.models.values() for name in model.config.fields]
        return list(dict.fromkeys(names))

    @cached_property
    def values(self) -> dict[str, list[str]]:
        """Distinct values of each such field in the catalogue, the most frequent first."""
        if self.catalog is None:
            return {}
        counts: dict[str, dict[str, int]] = {name: {} for name in self.fields}
        for item in self.catalog.items:
            for name, seen in counts.items():
                if (value := item.field(name)) is not None:
                    seen[value] = seen.get(value, 0) + 1
        return {name: sorted(seen, key=lambda v: (-seen[v], v))[:_VALUES] for name, seen in counts.items()}

    def item(self, item_id: str) -> Item | None:
        """The catalogue's item of an id, if there is a catalogue and it has one."""
        if self.catalog is None or item_id not in self.catalog:
            return None
        return self.catalog.items[self.catalog.index(item_id)]

    def describe(self, item_id: str) -> dict[str, Any]:
        """An item as the API tells it: id, and what the catalogue knows."""
        item = self.item(item_id)
        if item is None:
            return {"id": item_id, "picture": False}
        return {
            "id": item.id,
            "title": item.title,
            "brand": item.brand,
            "category": item.category,
            "price": item.price,
            "group_id": item.group_id,
            "attributes": dict(item.attributes),
            "picture": item.file_name is not None,
        }

    def browse(self, text: str, where: Mapping[str, str], offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """How many items match, and one stretch of them: words in id, title, brand or category; equal fields.

        Raises:
            ArgumentError: a value that no field can have, such as a price that is no number.
        """
        if self.catalog is None:
            ids = self.pool(None).pool.ids()
            found = [name for name in ids if text.lower() in name.lower()]
            return len(found), [self.describe(name) for name in found[offset : offset + limit]]
        words = text.lower().split()
        try:
            asked = parse_fields(where, list(where))  # as a row's are read: 12.5 is the price 12.50
        except RowError as error:
            raise ArgumentError("where", str(error), "name=value") from error
        matching = [
            item.id
            for item in self.catalog.items
            if all(name in asked and item.field(name) == asked[name] for name in where) and _holds(item, words)
        ]
        return len(matching), [self.describe(item_id) for item_id in matching[offset : offset + limit]]

    def vector(self, pool: ServedPool, image: Image.Image, fields: Mapping[str, str]) -> Tensor:
        """[D] embedding of a picture with metadata by the model that made a pool.

        Raises:
            ArgumentError: no model of this pool is loaded, or a field does not guide it.
        """
        model = self.models.get(pool.name)
        if model is None:
            raise ArgumentError("pool", repr(pool.name), "a pool whose run was given as its model")
        return torch.as_tensor(model.encode([image], fields=[dict(fields)])).float()[0]


def _holds(item: Item, words: Sequence[str]) -> bool:
    if not words:
        return True
    text = " ".join(filter(None, (item.id, item.title, item.brand, item.category))).lower()
    return all(word in text for word in words)
