"""Frozen features of corrupted pictures: the views that training draws from, and the pictures of an evaluation.

Computed once per tower, pictures and recipe, then memory-mapped; a killed build goes on where its journal ends. A view
depends on its condition, the seed and the item alone, never on the order of work.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgq_fast.data.ahead import in_order
from tgq_fast.data.catalog import Catalog
from tgq_fast.data.conditions import PICTURE_KINDS, Condition
from tgq_fast.data.corruption import item_seed
from tgq_fast.data.items import Item
from tgq_fast.errors import ArgumentError, ImageError
from tgq_fast.models import features
from tgq_fast.models.backbones import cache_root
from tgq_fast.models.feature_files import ChunkedArray
from tgq_fast.models.features import Progress, digest_pictures
from tgq_fast.models.pictures import encode_chunk
from tgq_fast.models.towers import VisionTower
from tgq_fast.models.view_pictures import PictureMaker

__all__ = ["ViewRecipe", "ViewStore", "training_views"]

_DRAW = 8  # tells this generator from the others of one seed


@dataclass(frozen=True)
class ViewRecipe:
    """What training views are drawn from.

    Attributes:
        kinds: kind → weight of it among the views.
        area: range of the covered share of overlays.
        products: of a scene.
        crop: range of the share of the picture that a crop keeps.
        per_item: views of each item; training draws one of them afresh whenever it needs one.
        seed: of all draws.
    """

    kinds: Mapping[str, float] = field(
        default_factory=lambda: {
            "badge": 0.12,
            "text_strip": 0.12,
            "border": 0.07,
            "collage": 0.07,
            "scene": 0.40,
            "closeup": 0.15,
            "crop": 0.07,
        }
    )
    area: tuple[float, float] = (0.05, 0.45)
    products: int = 4
    crop: tuple[float, float] = (0.45, 1.0)
    per_item: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the recipe.

        Raises:
            ArgumentError: an unknown kind, a negative weight or none above 0, an empty range, or no views.
        """
        strange = [kind for kind in self.kinds if kind not in PICTURE_KINDS]
        if strange:
            raise ArgumentError("kinds", ", ".join(strange), "kinds of pictures: " + ", ".join(PICTURE_KINDS))
        if not self.kinds or min(self.kinds.values()) < 0 or not sum(self.kinds.values()) > 0:
            raise ArgumentError("kinds", dict(self.kinds), "weights of at least 0, one of them above")
        for name, (low, high) in (("area", self.area), ("crop", self.crop)):
            if not 0 < low <= high <= (0.9 if name == "area" else 1.0):
                raise ArgumentError(name, f"{low} to {high}", "a range of shares above 0, smaller first")
        if self.per_item < 1:
            raise ArgumentError("per_item", self.per_item, "at least 1 view")
        Condition.parse(f"scene:{self.products}")

    def conditions(self, item_id: str) -> list[Condition]:
        """The views of one item."""
        names = sorted(self.kinds)
        weights = np.array([self.kinds[name] for name in names], dtype=np.float64)
        rng = np.random.default_rng([item_seed(self.seed, item_id), _DRAW])
        chosen = rng.choice(len(names), size=self.per_item, p=weights / weights.sum())
        shares = rng.random(self.per_item)
        return [self._condition(names[i], share) for i, share in zip(chosen.tolist(), shares.tolist(), strict=True)]

    def _condition(self, kind: str, share: float) -> Condition:
        if kind in ("scene", "closeup"):
            return Condition(kind, float(self.products))
        if kind == "background":
            return Condition(kind, 1.0)
        low, high = self.crop if kind == "crop" else self.area
        return Condition(kind, round(low + share * (high - low), 4))


class ViewStore:
    """Frozen features of V views of some items of a catalogue; build or open one with :meth:`open_or_build`.

    View v of the m-th item is row m · V + v of the arrays.

    Attributes:
        key: digest of what the features are of.
        whitening: "", the features are raw.
        conditions: what was done to each picture.
        valid: [m · V] bool: rows that may be used; the others belong to pictures that are missing or unusable.
        first: [n] int64 first view of each item of the catalogue, or -1.
        per_item: V.
    """

    whitening = ""

    def __init__(
        self,
        array: ChunkedArray,
        key: str,
        rows: NDArray[np.int64],
        size: int,
        conditions: list[Condition],
        maker: PictureMaker,
    ) -> None:
        self._array, self.key, self.conditions, self._maker = array, key, conditions, maker
        self.per_item = len(conditions) // max(1, len(rows))
        self.first = np.full(size, -1, dtype=np.int64)
        self.first[rows] = np.arange(len(rows)) * self.per_item
        self.valid = np.ones(len(conditions), dtype=bool)
        self.valid[[int(row) for row in array.notes]] = False

    def __len__(self) -> int:
        return len(self.conditions)

    @property
    def visual(self) -> NDArray[np.float16]:
        """[m · V, L, dv] visual tokens, memory-mapped."""
        return self._array["visual"]

    @property
    def global_image(self) -> NDArray[np.float16]:
        """[m · V, dg] pooled image features."""
        return self._array["global"]

    @property
    def raw_image(self) -> NDArray[np.float16]:
        """The same: views are raw features."""
        return self.global_image

    @property
    def shares(self) -> NDArray[np.float16]:
        """[m · V, 2, L] share of each token's cell that shows the item, and that shows anything foreign.

        Both are 0 for tokens of no place; what is missing to 1 is the margin that preprocessing adds.
        """
        return self._array["shares"]

    def picture(self, row: int, number: int = 0) -> Image.Image:
        """The picture that a view's features are of.

        Args:
            row: of an item that has views.
            number: of the view among its V.

        Raises:
            ImageError: the item's own picture cannot be used.
        """
        condition = self.conditions[int(self.first[row]) + number]
        made = self._maker.picture(row, number, condition)
        if made is None:
            item = self._maker.catalog.items[row]
            raise ImageError(item.id, item.file_name or "", "no view", str(condition))
        return made[0]

    def draw(self, rows: NDArray[np.int64], share: float, rng: np.random.Generator) -> NDArray[np.int64]:
        """[B] view of each row, or -1: its own picture; an item is replaced with probability `share`, evenly by one of
        its usable views."""
        asked = rng.random(len(rows)) < share
        chosen = self.first[rows] + rng.integers(self.per_item, size=len(rows))
        usable = asked & (self.first[rows] >= 0)
        usable[usable] = self.valid[chosen[usable]]
        return np.where(usable, chosen, -1)

    @classmethod
    def open_or_build(
        cls,
        catalog: Catalog,
        vision: VisionTower,
        rows: Sequence[int] | NDArray[np.integer[Any]],
        recipe: ViewRecipe | Condition,
        *,
        groups: NDArray[np.integer[Any]] | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
        workers: int = 2,
        verify: bool = True,
    ) -> ViewStore:
        """Open the views, computing what is missing.

        Args:
            catalog: items and pictures.
            vision: frozen tower; its key, the pictures and the recipe key the cache.
            rows: items that get views.
            recipe: of training views; or one condition, which gives every item one view (seeded by `seed`).
            groups: [n] label of each item; the further products of a scene or collage have the same label as the item
                itself, so that no fold sees another's pictures. None: any item.
            cache_dir: where caches live; None: `$TGQ_CACHE` or ~/.cache/tgq_fast.
            progress: called with (pictures done, pictures in all).
            workers: threads that decode and corrupt pictures.
            verify: check the sha256 of every chunk of a complete cache; damaged caches are made anew.

        Raises:
            ArgumentError: a row out of range, or labels of another number of items.
            NonFiniteError: the tower gave NaN or infinity.
        """
        chosen = np.unique(np.asarray(rows, dtype=np.int64))
        if chosen.size and (chosen[0] < 0 or chosen[-1] >= len(catalog)):
            raise ArgumentError("rows", f"{chosen[0]} … {chosen[-1]}", f"rows in 0 … {len(catalog) - 1}")
        labels = np.zeros(len(catalog), np.int64) if groups is None else np.asarray(groups, np.int64)
        if labels.shape != (len(catalog),):
            raise ArgumentError("groups", f"shape {labels.shape}", f"one label for each of {len(catalog)} items")
        if isinstance(recipe, ViewRecipe):
            seed = recipe.seed
            views = [recipe.conditions(catalog.items[row].id) for row in chosen.tolist()]
            described: Any = asdict(recipe)
        else:
            views, described = [[recipe] for _ in chosen], str(recipe)
        pictures, unread, _ = digest_pictures(catalog, workers)
        donors = hashlib.sha256(json.dumps([(i.id, i.category) for i in catalog.items]).encode())
        donors.update(labels.tobytes())
        facts = {"tower": vision.key, "pictures": pictures, "donors": donors.hexdigest()}
        facts |= {"items": hashlib.sha256(chosen.tobytes()).hexdigest()}
        facts |= {"recipe": json.dumps(described, sort_keys=True), "seed": str(seed)}
        key = hashlib.sha256(f"views-1|{json.dumps(facts, sort_keys=True)}|{features.CHUNK}".encode()).hexdigest()
        layout: dict[str, tuple[str, Sequence[int]]] = {
            "visual": ("<f2", [vision.num_tokens, vision.width]),
            "global": ("<f2", [vision.global_width]),
            "shares": ("<f2", [2, vision.num_tokens]),
        }
        flat = [condition for each in views for condition in each]
        root = Path(cache_dir) if cache_dir is not None else cache_root()
        array = ChunkedArray(root / "views" / key[:32], layout, rows=len(flat), chunk=features.CHUNK, facts=facts)
        maker = PictureMaker(catalog, vision, labels, seed, unread)
        with array.building(verify=verify) as todo:
            if len(todo):
                _fill(array, list(todo), chosen, views, maker, progress, workers)
        return cls(array, key, chosen, len(catalog), flat, maker)


def training_views(
    catalog: Catalog,
    vision: VisionTower,
    recipe: ViewRecipe,
    *,
    folds: NDArray[np.integer[Any]] | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    verify: bool = True,
) -> ViewStore:
    """Views of the items of the training pairs.

    Their scenes and collages show items of training pairs and of no pair at all, never of validation or test pairs.

    Args:
        folds: [n] fold of items of train and validation pairs, -1 for others: validation items then get views too, and
            an item's scenes stay within its own fold and split, so that all trials on the folds can share the views.
        recipe, cache_dir, progress, verify: of :meth:`ViewStore.open_or_build`.
    """
    labels = np.zeros(len(catalog), dtype=np.int64) if folds is None else np.asarray(folds, np.int64) + 1
    apart = int(labels.max(initial=0)) + 1
    train, validation, test = (
        pairs.items for pairs in (catalog.split_pairs(split, every=True) for split in ("train", "validation", "test"))
    )
    labels[np.setdiff1d(validation, train)] += apart
    labels[test] = -1
    return ViewStore.open_or_build(
        catalog,
        vision,
        train if folds is None else np.union1d(train, validation),
        recipe,
        groups=labels,
        cache_dir=cache_dir,
        progress=progress,
        verify=verify,
    )


def _fill(
    array: ChunkedArray,
    todo: list[int],
    rows: NDArray[np.int64],
    views: list[list[Condition]],
    maker: PictureMaker,
    progress: Progress | None,
    workers: int,
) -> None:
    tasks = [(int(row), number, c) for row, each in zip(rows, views, strict=True) for number, c in enumerate(each)]
    chunk, vision = features.CHUNK, maker.vision
    chunks = [range(number * chunk, min((number + 1) * chunk, len(tasks))) for number in todo]
    with ThreadPoolExecutor(workers) as pool:
        made = in_order(pool, maker, [tasks[at] for places in chunks for at in places], 2 * chunk)
        for places in chunks:
            batch = [next(made) for _ in places]
            items: list[Item] = [maker.catalog.items[tasks[at][0]] for at in places]
            values = encode_chunk(vision, [None if found is None else found[0] for found in batch], items)
            shares = np.zeros((len(batch), 2, vision.num_tokens), np.float16)
            for place, found in enumerate(batch):
                if found is not None:
                    shares[place] = found[1]
            missing = [at for at, found in zip(places, batch, strict=True) if found is None]
            array.append({**values, "shares": shares}, missing, lasting=maker.lasting)
            if progress is not None:
                progress(places.stop, len(tasks))
