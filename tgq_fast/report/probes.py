"""Ask a trained model where its queries look and how its gates react: to agreement, overlays and damaged metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from tgq_fast.data import Item
from tgq_fast.data.corruption import AREAS, corrupt_image, item_seed
from tgq_fast.models.token_grid import token_grid
from tgq_fast.models.zoo import connector_spec
from tgq_fast.report import figures
from tgq_fast.report.content import AttentionMap, GateStudy
from tgq_fast.workflow.probes import connect, gate_means

if TYPE_CHECKING:
    from tgq_fast.models import FeatureStore, TGQFormerModel

__all__ = ["attention_maps", "gate_study"]

_CLEAN, _CORRUPTED = 600, 64  # sampled items: for the histograms, and under each overlay and metadata condition
_BATCH = 64


class PictureSource(Protocol):
    """Where pictures come from; None when one cannot be read."""

    def load(self, item: Item) -> Image.Image | None: ...


def attention_maps(
    model: TGQFormerModel, store: FeatureStore, rows: Sequence[int], pictures: PictureSource
) -> tuple[list[AttentionMap], str]:
    """Maps of the main run's queries over some items; with a reason when there are none."""
    config = model.config
    if not connector_spec(config.connector).is_hybrid:
        return [], f"No attention maps: connector {config.connector} has no anchored and exploratory streams."
    grid = token_grid(config.num_visual_tokens)
    if grid is None:
        return [], f"No attention maps: {config.num_visual_tokens} visual tokens form no square grid."
    if not rows:
        return [], ""
    side, leading = grid
    weights = connect(model, store.batch(rows), attention=True).attention
    if weights is None:
        return [], "No attention maps: the connector returned no attention."
    maps = weights[:, :, leading:].float().cpu().numpy().reshape(len(rows), -1, side, side)  # [B, N, h, w]
    first = config.num_anchored_queries
    shown = []
    for row, queries in zip(rows, maps):
        item = store.catalog.items[row]
        image = pictures.load(item)
        if image is None:
            continue
        square = _letterbox(image)
        streams = [part.mean(axis=0) if len(part) else None for part in (queries[:first], queries[first:])]
        labels = [f"A{i + 1}" if i < first else f"E{i + 1 - first}" for i in range(len(queries))]
        shown.append(
            AttentionMap(
                item_id=item.id,
                title=item.title or item.category or item.id,
                guide=" · ".join(f"{n}: {v}" for n in config.fields if (v := item.field(n))) or "no metadata",
                picture=figures.data_uri(square),
                anchored=None if streams[0] is None else figures.attention_overlay(square, streams[0]),
                exploratory=None if streams[1] is None else figures.attention_overlay(square, streams[1]),
                queries=[
                    (label, figures.attention_overlay(square, weight, side=96))
                    for label, weight in zip(labels, queries)
                ],
                peaks=(_peak(streams[0]), _peak(streams[1])),
                overlap=None if streams[0] is None or streams[1] is None else _cosine(streams[0], streams[1]),
            )
        )
    return shown, ""


def _letterbox(image: Image.Image) -> Image.Image:
    """Square picture, as the vision towers see it."""
    side = max(image.size)
    return ImageOps.pad(image, (side, side), color=(255, 255, 255))


def _peak(weights: np.ndarray | None) -> float:
    """Greatest weight in multiples of even attention over the grid; 0 without a map."""
    return 0.0 if weights is None or not weights.sum() else float(weights.max() * weights.size / weights.sum())


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    scale = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float((left * right).sum() / scale) if scale else 0.0


def gate_study(
    name: str,
    model: TGQFormerModel,
    store: FeatureStore,
    rows: np.ndarray,
    pictures: PictureSource,
    *,
    seed: int = 0,
) -> GateStudy | None:
    """Gates of sampled items, clean and corrupted; None for a model without gates.

    Args:
        rows: catalogue rows with usable pictures, in sampled order.
    """
    if not connector_spec(model.config.connector).is_hybrid or model.config.gate == "none" or not len(rows):
        return None
    clean = _gates(model, store, rows[:_CLEAN])
    few = [int(row) for row in rows[:_CORRUPTED]]
    wrong = np.random.default_rng(seed).permutation(store.valid.nonzero()[0])[: len(few)]
    fields = len(model.config.fields)
    metadata: dict[str, dict[str, np.ndarray]] = {}
    if fields:
        conditions = {
            "true": _gates(model, store, few),
            "none": _gates(model, store, few, keep=np.zeros((len(few), fields), bool)),
            "wrong": _gates(model, store, few[: len(wrong)], metadata_from=wrong),
        }
        metadata = {s: {c: g[s] for c, g in conditions.items()} for s in ("anchored", "exploratory") if s in clean}
    return GateStudy(
        run=name,
        agreement=clean["agreement"],
        anchored=clean.get("anchored"),
        exploratory=clean.get("exploratory"),
        overlay_levels=(0.0, *AREAS),
        overlay=_overlay_gates(model, store, few, pictures, seed),
        metadata=metadata,
    )


def _gates(
    model: TGQFormerModel,
    store: FeatureStore,
    rows: Sequence[int] | np.ndarray,
    *,
    keep: np.ndarray | None = None,
    metadata_from: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """agreement and mean gates [n] of some rows."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        part = slice(start, start + _BATCH)
        features = store.batch(
            np.asarray(rows[part]),
            keep=None if keep is None else keep[part],
            metadata_from=None if metadata_from is None else metadata_from[part],
        )
        parts.append(gate_means(connect(model, features)))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


@torch.inference_mode()
def _overlay_gates(
    model: TGQFormerModel, store: FeatureStore, rows: Sequence[int], pictures: PictureSource, seed: int
) -> dict[str, list[np.ndarray]]:
    """Mean gates per overlay level, over the items whose pictures can be read."""
    vision = model.vision_tower
    loaded = [(row, image) for row in rows if (image := pictures.load(store.catalog.items[row])) is not None]
    if not loaded:
        return {}
    base = store.batch([row for row, _ in loaded])
    levels: dict[str, list[np.ndarray]] = {}
    for area in (0.0, *AREAS):
        images = [
            corrupt_image(image, "badge", area, item_seed(seed, store.catalog.items[row].id))[0] if area else image
            for row, image in loaded
        ]
        tokens, pooled = [], []
        for start in range(0, len(images), 32):
            visual, global_image = vision(vision.image_processor(images[start : start + 32]))
            tokens.append(visual.float())
            pooled.append(global_image.float())
        base.visual_tokens, base.global_image = torch.cat(tokens), torch.cat(pooled)
        for stream, gates in gate_means(connect(model, base)).items():
            if stream != "agreement":
                levels.setdefault(stream, []).append(gates)
    return levels
