"""From a run, a pool or frozen features to the embeddings that are evaluated, clean or under a condition.

Every command that evaluates goes through here, so that two of them never disagree about a run: an item without a usable
picture has no embedding (NaN) and is no candidate, and a pool of another model is refused.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from tgq_fast.data import Catalog, corrupt_metadata, item_seed
from tgq_fast.data.conditions import CLEAN, Condition
from tgq_fast.data.item_table import ItemTable
from tgq_fast.evaluation import Evaluation, evaluate
from tgq_fast.models.features import FeatureStore, Progress
from tgq_fast.models.pictures import PictureFeatures
from tgq_fast.models.towers import TextTower, VisionTower
from tgq_fast.models.views import ViewStore
from tgq_fast.models.whitening import Whitening, fit_whitening, whitening_rows
from tgq_fast.pool import model_digest, open_embedded
from tgq_fast.pool.embed import RAW_FLOOR, WHITENED_FLOOR

if TYPE_CHECKING:
    from tgq_fast.models import TGQFormerConfig, TGQFormerModel

__all__ = [
    "Conditions",
    "Floor",
    "embed_model",
    "evaluate_under",
    "floors",
    "pool_embeddings",
]

_DAMAGE = 9  # tells this generator from the others of one seed


class Conditions:
    """Frozen features of a catalogue under conditions; each is computed once and kept on disk.

    Args:
        catalog: the catalogue.
        towers: frozen towers.
        store: its features as they are.
        cache_dir: of frozen features.
        seed: of all corruptions.
        opened: views that are open already, shared by several objects; those that are opened here are added.
        progress: called with (pictures done, pictures in all) while pictures are corrupted.
        verify: check the sha256 of cached views.
    """

    def __init__(
        self,
        catalog: Catalog,
        towers: tuple[VisionTower, TextTower],
        store: FeatureStore,
        *,
        cache_dir: str | Path | None = None,
        seed: int = 0,
        opened: dict[tuple[str, bytes], ViewStore] | None = None,
        progress: Progress | None = None,
        verify: bool = True,
    ) -> None:
        self.catalog, self.towers, self.clean, self.seed = catalog, towers, store, seed
        self.cache_dir, self.progress, self.verify = cache_dir, progress, verify
        self._opened = {} if opened is None else opened
        self._damaged = functools.lru_cache(maxsize=4)(self._damage)

    def views(self, condition: Condition, rows: NDArray[np.integer[Any]] | None = None) -> ViewStore:
        """Features of the corrupted pictures of some rows (all by default)."""
        chosen = np.arange(len(self.catalog)) if rows is None else np.asarray(rows, dtype=np.int64)
        alike = replace(condition, side="both")
        key = str(alike), chosen.tobytes()
        if key not in self._opened:
            self._opened[key] = ViewStore.open_or_build(
                self.catalog,
                self.towers[0],
                chosen,
                alike,
                seed=self.seed,
                cache_dir=self.cache_dir,
                progress=self.progress,
                verify=self.verify,
            )
        return self._opened[key]

    def store(self, condition: Condition, rows: NDArray[np.integer[Any]] | None = None) -> FeatureStore:
        """The catalogue's features where a condition holds.

        Args:
            condition: its side is ignored.
            rows: the only ones whose features will be read; None: all.
        """
        if condition.kind == "clean":
            return self.clean
        if not condition.pictures:
            return self._damaged(condition.damage, condition.amount)
        views = self.views(condition, rows)
        store = copy.copy(self.clean)
        chosen = np.flatnonzero(views.first >= 0)
        store.pictures = _Placed(self.clean.pictures, views)
        store.images = lambda row: views.picture(row) if views.first[row] >= 0 else self.clean.image(row)
        lost = chosen[~views.valid[views.first[chosen]]]
        reason = ("no view", str(condition))
        absent = {int(row): reason for row in lost if self.clean.has_image[row]}
        store.invalid = {**absent, **self.clean.invalid}
        return store

    def _damage(self, damage: str, share: float) -> FeatureStore:
        items = list(self.catalog.items)
        for row, item in enumerate(items):
            if np.random.default_rng([item_seed(self.seed, item.id), _DAMAGE]).random() < share:
                kind: Any = damage
                items[row] = corrupt_metadata(item, kind, seed=self.seed, donors=self.catalog.items)
        changed = replace(self.catalog, items=ItemTable.of(items))
        vision, text = self.towers
        store = FeatureStore.open_or_build(
            changed, vision, text, self.clean.config, self.cache_dir, on_error="skip", verify=False
        )
        store.pictures = self.clean.pictures
        return store


class _Placed:
    """Pictures of a catalogue some of which are replaced by views; raw features, as both are."""

    whitening = ""

    def __init__(self, own: PictureFeatures, views: ViewStore) -> None:
        self.key = views.key
        self.visual: Any = _Rows(own.visual, views.visual, views.first)
        self.global_image: Any = _Rows(own.global_image, views.global_image, views.first)

    @property
    def raw_image(self) -> Any:
        return self.global_image


class _Rows:
    """Rows of one array, some of which lie in another one."""

    def __init__(self, own: NDArray[Any], other: NDArray[Any], place: NDArray[np.int64]) -> None:
        self.own, self.other, self.place = own, other, place
        self.shape, self.dtype = own.shape, own.dtype

    def __getitem__(self, rows: NDArray[np.integer[Any]]) -> NDArray[Any]:
        place = self.place[rows]
        found = np.empty((len(place), *self.shape[1:]), self.dtype)
        found[place < 0] = self.own[np.asarray(rows)[place < 0]]
        found[place >= 0] = self.other[place[place >= 0]]
        return found


@dataclass(frozen=True)
class Floor:
    """What needs no training: the pooled frozen image feature, raw or whitened."""

    name: str
    whitening: Whitening | None = None

    def __call__(self, store: FeatureStore) -> Tensor:
        """[n, k] fp32 L2-normalised. An item whose picture cannot be used is NaN; one that has none is zero, and scores
        0 against all."""
        rows = np.arange(len(store))
        pooled = torch.from_numpy(np.asarray(store.pictures.global_image[rows], dtype=np.float32))
        if self.whitening is not None:
            with torch.no_grad():
                pooled = self.whitening.image(pooled)
        pooled = normalize(pooled, dim=1)
        pooled[torch.from_numpy(~store.has_image)] = 0.0
        pooled[sorted(store.invalid)] = float("nan")
        return pooled


def floors(store: FeatureStore, config: TGQFormerConfig, whitening: Whitening | None = None) -> list[Floor]:
    """The raw and the whitened floor.

    Args:
        store: raw features of the catalogue.
        config: tells how to fit the whitening; 512 components where a model uses none.
        whitening: one that is fitted already.
    """
    if whitening is None:
        wanted = copy.deepcopy(config)
        wanted.whitening = config.whitening or 512
        rows = whitening_rows(store.catalog, store.valid, wanted.whitening)
        if len(rows) < 3:
            return [Floor(RAW_FLOOR)]
        whitening, _ = fit_whitening(store.pictures, rows, wanted)
    return [Floor(RAW_FLOOR), Floor(WHITENED_FLOOR, whitening)]


def embed_model(model: TGQFormerModel, store: FeatureStore, rows: NDArray[np.integer[Any]] | None = None) -> Tensor:
    """[n, D] embeddings of a catalogue; NaN for items without a usable picture, and for rows not asked for."""
    catalog = store.catalog
    some = catalog if rows is None else Catalog.from_items([catalog.items[row] for row in rows], root=catalog.root)
    found = torch.as_tensor(model.encode(some, features=store, on_error="skip", batch_size=128))
    if rows is None:
        return found.clone()  # what encode returns belongs to inference mode and cannot be changed outside it
    vectors = torch.full((len(catalog), found.shape[1]), float("nan"))
    vectors[torch.from_numpy(np.asarray(rows))] = found
    return vectors


def pool_embeddings(path: str | Path, catalog: Catalog, model: TGQFormerModel) -> Tensor:
    """[n, D] embeddings of a catalogue from a pool; NaN for the items that embedding refused.

    Raises:
        PoolError: the pool was made by another model, of another state of the catalogue, or is not complete.
    """
    pool = open_embedded(path, catalog, model_digest(model))
    rows = pool.rows(catalog.ids, missing="mark")
    vectors = torch.full((len(catalog), pool.dims), float("nan"))
    held = torch.from_numpy(rows >= 0)
    vectors[held] = pool.embeddings()[torch.from_numpy(rows[rows >= 0])].float()
    return vectors


def evaluate_under(
    conditions: Conditions,
    embedder: TGQFormerModel | Floor,
    condition: Condition = CLEAN,
    *,
    clean: Tensor | None = None,
    changed: Tensor | None = None,
    split: str = "test",
    **options: Any,
) -> tuple[Evaluation, Tensor, Tensor]:
    """Evaluate a model or a floor where a condition holds on queries, pool or both.

    Args:
        clean, changed: embeddings of the whole catalogue as it is and where the condition holds, if known already.
        split, **options: of :func:`~tgq_fast.evaluation.evaluate`.

    Returns:
        The evaluation, and [n, D] what queries ask with and what stands in the pool.
    """

    def embed(store: FeatureStore, rows: NDArray[np.integer[Any]] | None = None) -> Tensor:
        return embedder(store) if isinstance(embedder, Floor) else embed_model(embedder, store, rows)

    queries = np.unique(conditions.catalog.split_pairs(split, every=True).query)
    if condition == CLEAN:
        changed = None
    elif changed is None:
        rows = None if condition.on("pool") else queries
        changed = embed(conditions.store(condition, rows), rows)
    if clean is None and not (condition.on("pool") and condition.on("query")):
        clean = embed(conditions.clean)
    pool = changed if condition.on("pool") else clean
    asked = changed if condition.on("query") else clean
    assert pool is not None and asked is not None
    same = asked is pool
    return (
        evaluate(conditions.catalog, pool, queries=None if same else asked, split=split, **options),
        asked,
        pool,
    )
