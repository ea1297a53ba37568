"""Whitened features: principal components of the training items' pooled features, each scaled to unit variance.

Raw features of a frozen tower are dominated by a few directions that all products share. Whitening takes no label and
no training; it is a frozen linear map that is fitted once and stored with the model.

Source: ours; whitening of image features before retrieval, Jégou & Chum 2012.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from tgq_fast.data import Catalog
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError
from tgq_fast.models.backbones import cache_root
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.feature_files import ChunkedArray
from tgq_fast.models.hub import module_digest
from tgq_fast.models.outputs import FrozenFeatures
from tgq_fast.models.pictures import PictureArrays, PictureFeatures, read_pictures

__all__ = [
    "PrincipalComponents",
    "Whitening",
    "fit_whitening",
    "paired_rows",
    "shrinkage_of_few",
    "whitened_pictures",
    "whitening_rows",
]

logger = logging.getLogger(__name__)

_CHUNK = 256  # rows read at a time
_FIT_ROWS = 50_000  # items beyond this are left out evenly: the statistics no longer change


class PrincipalComponents(nn.Module):
    """x → (x − mean) V diag(λ + shrinkage · mean λ)^-½: [..., width] → [..., k].

    Before it is fitted it takes the first k channels as they are.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("components", torch.eye(k, width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → [..., k] in the dtype of the buffers."""
        return linear(x.to(self.mean.dtype) - self.mean, self.components)

    @torch.no_grad()
    def fit(self, mean: NDArray[Any], covariance: NDArray[Any], shrinkage: float) -> None:
        """Take the first k eigenvectors of the covariance [width, width] in fp64."""
        values, vectors = np.linalg.eigh(covariance)
        k = self.components.shape[0]
        values, vectors = values[::-1].clip(min=0.0), vectors[:, ::-1][:, :k]
        # LAPACK leaves the sign open: the largest entry of each direction is positive.
        sign = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(k)])
        scaled = vectors * sign / np.sqrt(values[:k] + shrinkage * values.mean() + np.finfo(np.float32).tiny)
        self.mean.copy_(torch.from_numpy(mean))
        self.components.copy_(torch.from_numpy(scaled.T.copy()))


class Whitening(nn.Module):
    """Whitens visual tokens and the global image, each by the statistics of its own pooled feature."""

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.tokens = PrincipalComponents(config.visual_width, config.token_width)
        self.image = PrincipalComponents(config.global_width, config.image_width)

    def train(self, mode: bool = True) -> Whitening:
        """Frozen whatever the model does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, features: FrozenFeatures) -> FrozenFeatures:
        """Raw features → whitened ones; whitened ones are returned as they are. A token that is not real stays zero."""
        if features.whitened:
            return features
        with torch.autocast(features.visual_tokens.device.type, enabled=False):
            tokens, image = self.tokens(features.visual_tokens), self.image(features.global_image)
        if features.visual_mask is not None:
            tokens = tokens * features.visual_mask[..., None]
            image = image * features.visual_mask.any(dim=1, keepdim=True)
        changed = {**vars(features), "visual_tokens": tokens, "global_image": image, "whitened": True}
        return FrozenFeatures(**changed)


def paired_rows(catalog: Catalog, split: str, valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows with a usable picture in a pair of a split, rising."""
    pairs = catalog.split_pairs(split)
    rows = pairs.items
    pictured = [bool(valid[row]) and catalog.items[row].file_name is not None for row in rows.tolist()]
    return rows[np.array(pictured, dtype=bool)]


def whitening_rows(catalog: Catalog, valid: NDArray[np.bool_], components: int) -> NDArray[np.int64]:
    """Rows to fit a whitening of `components` directions to: items with a usable picture that training sees anyway, or
    that are of no validation or test pair.

    Items of no pair at all are preferred while there are at least twice as many as components: training items look
    smaller than others through a whitening that they were fitted to, and the connector would train on that.
    """
    trained, held_out = (np.zeros(len(catalog), dtype=bool) for _ in range(2))
    for split in ("train", "validation", "test"):
        pairs = catalog.split_pairs(split)
        for rows in (pairs.query, pairs.target):
            (trained if split == "train" else held_out)[rows] = True
    usable = valid & np.array([item.file_name is not None for item in catalog.items], dtype=bool)
    alone = np.flatnonzero(usable & ~trained & ~held_out)
    return alone if len(alone) >= 2 * components else np.flatnonzero(usable & (trained | ~held_out))


def shrinkage_of_few(rows: int, components: int, shrinkage: float) -> float:
    """The shrinkage for whitening the very items that a whitening is fitted to, where they are few.

    n items are all equally far from one another in their n - 1 whitened directions, so neighbours would be chance. From
    half as many directions as items on, those that are weaker than the strongest few are therefore left weak: hit
    rates of prefixes of fashion, 120 to 1,000 products, then lie within a few points of the raw features' or above.
    Items that it was not fitted to are not equidistant: training, whose queries are those, gains nothing by it.

    Source: ours.
    """
    share = min(components / max(rows, 1), 1.0)
    return max(shrinkage, 4.0 * share) if share > 0.5 else shrinkage


@plain_defaults()
def fit_whitening(
    source: PictureFeatures,
    rows: Sequence[int] | NDArray[np.integer[Any]],
    config: TGQFormerConfig,
) -> tuple[Whitening, TGQFormerConfig]:
    """Fit a whitening to the pooled features of some items.

    Means and covariances are gathered in fp64 in one pass over the rows (at most 50,000 of them, evenly spread); labels
    play no part, and the same rows give the same bits.

    Args:
        source: raw features.
        rows: the training items; none may belong to what is evaluated.
        config: `whitening` is the number of components wanted, `whitening_shrinkage` regularises.

    Returns:
        The whitening, and the configuration with the number of components that the rows can give.

    Raises:
        ArgumentError: fewer than two rows, or no whitening wanted.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if not config.whitening:
        raise ArgumentError("config.whitening", 0, "a number of components")
    if len(rows) < 2:
        raise ArgumentError(
            "rows", f"{len(rows)} items with a picture", "at least 2 to take a variance of", "Or whitening=0."
        )
    if len(rows) > _FIT_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, _FIT_ROWS).astype(np.int64)]
    width = max(config.visual_width, config.global_width)
    wanted, most = config.whitening, min(width, len(rows) - 1)
    if most < wanted:
        why = f"{len(rows)} training pictures" if most < width else f"features of width {width}"
        logger.warning("whitening=%d: %s have no more than %d directions, all of them are kept", wanted, why, most)
    config = config.with_whitening(min(wanted, most))
    whitening = Whitening(config)
    moments = {part: _Moments() for part in ("tokens", "image")}
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        moments["tokens"].add(np.asarray(source.visual[chunk], dtype=np.float32).mean(axis=1, dtype=np.float64))
        moments["image"].add(np.asarray(source.global_image[chunk], dtype=np.float64))
    for part, found in moments.items():
        getattr(whitening, part).fit(*found.result(), config.whitening_shrinkage)
    return whitening, config


@plain_defaults()
def whitened_pictures(
    source: PictureFeatures, whitening: Whitening, cache_dir: str | Path | None = None
) -> PictureArrays:
    """A whitened copy of a catalogue's or of views' features on disk: tokens in bf16, global images in fp16.

    Computed once per source and whitening; a killed run goes on where its journal ends.

    Args:
        source: raw features.
        whitening: fitted.
        cache_dir: where caches live; None: `$TGQ_CACHE` or ~/.cache/tgq_fast.
    """
    digest = module_digest(whitening, "whitening-1")
    key = hashlib.sha256(f"whitened-1|{source.key}|{digest}|{_CHUNK}".encode()).hexdigest()
    root = Path(cache_dir) if cache_dir is not None else cache_root()
    length, widths = source.visual.shape[1], (len(whitening.tokens.components), len(whitening.image.components))
    array = ChunkedArray(
        root / "whitened" / key[:32],
        {"visual": ("<i2", [length, widths[0]]), "global": ("<f2", [widths[1]])},
        rows=len(source.visual),
        chunk=_CHUNK,
        facts={"source": source.key, "whitening": digest},
    )
    with array.building() as todo, torch.no_grad():
        for number in todo:
            rows = np.arange(number * _CHUNK, min((number + 1) * _CHUNK, len(source.visual)))
            visual, image = read_pictures(source, rows)
            tokens = whitening.tokens(visual).bfloat16().view(torch.int16)
            array.append({"visual": tokens.numpy(), "global": whitening.image(image).half().numpy()}, [])
    return PictureArrays(array, key=key, whitening=digest, raw=source)


class _Moments:
    """Mean and covariance of rows that arrive in chunks, shifted by the first chunk's mean against cancellation."""

    def __init__(self) -> None:
        self.count = 0
        self.shift: NDArray[np.float64] | None = None
        self.total: Any = 0.0
        self.products: Any = 0.0

    def add(self, x: NDArray[np.float64]) -> None:
        if self.shift is None:
            self.shift = x.mean(axis=0)
        x = x - self.shift
        self.count += len(x)
        self.total = self.total + x.sum(axis=0)
        self.products = self.products + x.T @ x

    def result(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        assert self.shift is not None
        mean = self.total / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return self.shift + mean, covariance
