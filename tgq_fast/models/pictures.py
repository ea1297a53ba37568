"""Frozen features of pictures as arrays: of a catalogue's own, or of corrupted views of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ChosenViews", "PictureArrays", "PictureFeatures", "read_pictures"]


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
