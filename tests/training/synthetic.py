"""A small catalogue with synthetic features: items of a group share a direction in the image, and a category."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from tgq_fast.data import Catalog, Item
from tgq_fast.models import FrozenFeatures, TGQFormerConfig, Whitening
from tgq_fast.models.pictures import ChosenViews, PictureArrays, read_pictures
from tgq_fast.models.whitening import whitened_pictures

LENGTH, WIDTH, TEXT = 5, 16, 12


def make_config(**changes: Any) -> TGQFormerConfig:
    values: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_anchored_queries": 2,
        "num_exploratory_queries": 2,
        "gate_bottleneck": 8,
        "alignment_size": 8,
        "fields": ("category", "gender"),
        "visual_width": WIDTH,
        "global_width": WIDTH,
        "text_width": TEXT,
        "num_visual_tokens": LENGTH,
        "embedding_size": 8,
        "max_metadata_tokens": 4,
    }
    return TGQFormerConfig(**(values | changes))


def make_catalog(groups: int = 40, size: int = 3) -> Catalog:
    return Catalog.from_items(
        [
            Item(f"i{g}-{v}", f"{g}-{v}.png", None, None, f"c{g % 4}", {"gender": "ab"[v % 2]}, None, f"g{g}", 1)
            for g in range(groups)
            for v in range(size)
        ]
    )


class SyntheticStore:
    """The part of FeatureStore that training reads, filled from a seeded generator."""

    def __init__(
        self, catalog: Catalog, config: TGQFormerConfig, *, invalid: Iterable[int] = (), seed: int = 0
    ) -> None:
        self.catalog, self.config = catalog, config
        self.invalid = {row: ("truncated", "") for row in invalid}
        self.valid = np.array([row not in self.invalid for row in range(len(catalog))])
        rng = np.random.default_rng(0)
        _, group = np.unique([item.group_id for item in catalog.items], return_inverse=True)
        shared = rng.normal(size=(group.max() + 1, WIDTH))
        noise = rng.normal(size=(len(catalog), LENGTH, WIDTH))
        self.visual = torch.tensor(shared[group][:, None] + 0.7 * noise, dtype=torch.float32)
        words = {name: rng.normal(size=TEXT) for name in ("c0", "c1", "c2", "c3", "a", "b")}
        self.text = torch.tensor(
            np.array([[words[item.category], words[item.attributes["gender"]]] for item in catalog.items]),
            dtype=torch.float32,
        )
        self.dropped: list[float] = []
        self.global_image = self.visual.mean(dim=1).numpy()
        self.has_image = np.ones(len(catalog), dtype=bool)
        self.pictures = PictureArrays({"visual": self.visual.numpy(), "global": self.global_image}, key="synthetic")

    def whitened(self, whitening: Whitening, cache_dir: Any = None) -> SyntheticStore:
        store = copy.copy(self)
        store.pictures = whitened_pictures(self.pictures, whitening, cache_dir)
        store.visual = torch.from_numpy(np.array(store.pictures.visual)).view(torch.bfloat16)
        store.global_image = np.array(store.pictures.global_image, dtype=np.float32)
        return store

    def for_connector(self, connector: str) -> SyntheticStore:
        return self

    def draw_keep(self, count: int, rng: np.random.Generator) -> np.ndarray:
        keep = rng.random((count, 2)) >= self.config.field_dropout
        self.dropped.append(1.0 - keep.mean())
        return keep

    def __len__(self) -> int:
        return len(self.catalog)

    def require_valid(self, rows: Sequence[int]) -> None:
        assert not set(rows) & set(self.invalid)

    def inputs(
        self,
        indices: Sequence[int],
        *,
        processor: Any = None,
        drop_fields: np.random.Generator | None = None,
        keep: np.ndarray | None = None,
        metadata_from: np.ndarray | None = None,
        views: ChosenViews | None = None,
    ) -> dict[str, Any]:
        rows = np.asarray(indices)
        if keep is None:
            keep = np.ones((len(rows), 2), dtype=bool)
            if drop_fields is not None:
                keep = self.draw_keep(len(rows), drop_fields)
        visual, image = self.visual[rows].clone(), torch.from_numpy(self.global_image[rows])
        if views is not None:
            seen = np.flatnonzero(views.rows >= 0)
            visual[seen], image[seen] = read_pictures(views.source, views.rows[seen])
        return {
            "features": FrozenFeatures(
                visual,
                image,
                self.text[rows if metadata_from is None else metadata_from],
                torch.from_numpy(keep),
                torch.tensor([[1, 2]]).expand(len(rows), 2) * torch.from_numpy(keep),
                whitened=bool(self.pictures.whitening),
            )
        }
