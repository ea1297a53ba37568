"""Frozen features of pictures as arrays: of a catalogue's own, or of corrupted views of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgq_fast.data.items import Item
from tgq_fast.errors import NonFiniteError
from tgq_fast.models.towers import VisionTower

__all__ = ["ChosenViews", "PictureArrays", "PictureFeatures", "encode_chunk", "read_pictures"]


class ArrayMapping(Protocol):
    """Arrays by name."""

    def __getitem__(self, name: str) -> NDArray[Any]: ...


class PictureFeatures(Protocol):
    """Frozen features of n pictures, mostly memory-mapped.

    Attributes:
        key: digest of what the features are of; equal keys mean equal features.
        whitening: digest of the whitening that was applied, "" for raw features.
    """

    key: str
    whitening: str

    @property
    def visual(self) -> NDArray[Any]:
        """[n, L, dv] visual tokens: floating, or int16 that holds the bits of bf16."""
        ...

    @property
    def global_image(self) -> NDArray[Any]:
        """[n, dg] pooled image features."""
        ...

    @property
    def raw_image(self) -> NDArray[Any]:
        """[n, dg] pooled image features before any whitening."""
        ...


class PictureArrays:
    """:class:`PictureFeatures` whose arrays are the entries "visual" and "global" of a mapping, such as a
    :class:`~tgq_fast.models.feature_files.ChunkedArray`, which a worker process maps again instead of receiving it.
    """

    def __init__(
        self, arrays: ArrayMapping, *, key: str, whitening: str = "", raw: PictureFeatures | None = None
    ) -> None:
        self._arrays, self._raw = arrays, raw
        self.key, self.whitening = key, whitening

    @property
    def visual(self) -> NDArray[Any]:
        return self._arrays["visual"]

    @property
    def global_image(self) -> NDArray[Any]:
        return self._arrays["global"]

    @property
    def raw_image(self) -> NDArray[Any]:
        return self.global_image if self._raw is None else self._raw.raw_image


@dataclass(frozen=True)
class ChosenViews:
    """Which view stands in for each picture of a batch.

    Attributes:
        source: the views' features.
        rows: [B] row of the source, or -1 where the item's own picture is kept.
    """

    source: PictureFeatures
    rows: NDArray[np.int64]


def read_pictures(source: PictureFeatures, rows: NDArray[np.integer[Any]]) -> tuple[Tensor, Tensor]:
    """Some rows as new tensors: visual tokens [B, L, dv], bf16 where they lie so and else fp32; global image fp32."""
    visual = torch.from_numpy(source.visual[rows])
    visual = visual.view(torch.bfloat16) if visual.dtype == torch.int16 else visual.float()
    return visual, torch.from_numpy(source.global_image[rows]).float()


def encode_chunk(vision: VisionTower, batch: list[Any], items: Sequence[Item]) -> dict[str, NDArray[Any]]:
    """Features of one chunk of pictures as fp16; zeros where the batch holds no pixel values.

    Raises:
        NonFiniteError: the tower gave NaN or infinity.
    """
    visual = np.zeros((len(batch), vision.num_tokens, vision.width), np.float16)
    pooled = np.zeros((len(batch), vision.global_width), np.float16)
    good = [i for i, pixels in enumerate(batch) if isinstance(pixels, Tensor)]
    if good:
        tokens, global_image = vision(torch.stack([batch[i] for i in good]), fill=True)
        visual[good] = tokens.float().half().cpu().numpy()
        pooled[good] = global_image.float().half().cpu().numpy()
        finite = np.isfinite(visual).all(axis=(1, 2)) & np.isfinite(pooled).all(axis=1)
        if not finite.all():
            bad = np.flatnonzero(~finite)
            raise NonFiniteError("vision tower (as fp16)", [items[i].id for i in bad[:20]], len(bad))
    return {"visual": visual, "global": pooled}
