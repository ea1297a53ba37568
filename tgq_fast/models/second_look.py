"""A second look: where the guide is sure which part of a picture the metadata means, the tower sees that part again.

The guide scores every visual token of the first look. Where a window of half the picture's side holds enough of the
scores' softmax, the window is enlarged to the tower's input, and the item's embedding is the mean of what both looks
give: metadata then steers what the frozen tower sees, not only what the queries read of it. A picture that shows one
product is looked at once.

Source: ours; glance and focus, Wang et al. 2020 (there a policy is learned, and no text takes part).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from tgq_fast.models.outputs import FrozenFeatures
from tgq_fast.models.readers import ReaderOutput
from tgq_fast.models.side_by_side import side_by_side
from tgq_fast.models.token_grid import token_grid

if TYPE_CHECKING:
    from tgq_fast.models.features import FeatureStore
    from tgq_fast.models.modeling import TGQFormerModel

__all__ = ["Pixels", "SecondLook", "both_looks", "calibrate", "close_up", "windows"]

_SIDE = 0.5  # of a window, of the picture's side
_STEPS = 5  # places of a window along each side
_SAMPLE = 2048  # pictures at least that a threshold is calibrated on, where there are so many

Pixels = Callable[[NDArray[np.int64]], Tensor]
"""Positions in a batch → [b, 3, H, W] what the tower saw of these items' pictures."""


@functools.lru_cache
def windows(length: int) -> tuple[NDArray[np.float64], Tensor] | None:
    """Windows that may be looked at again; None for tokens that form no square grid.

    Args:
        length: L visual tokens, in a square grid after any leading ones.

    Returns:
        [W, 4] left, top, right, bottom as shares of the side, and [W, L] fp32 the share of each token's cell that lies
        in each window.
    """
    grid = token_grid(length)
    if grid is None:
        return None
    side, leading = grid
    starts = np.linspace(0, 1 - _SIDE, _STEPS)
    edges = np.arange(side + 1) / side
    ends = np.minimum(edges[1:], starts[:, None] + _SIDE)
    along = np.clip(ends - np.maximum(edges[:-1], starts[:, None]), 0, None) * side  # [S, side]
    boxes = np.array([(x, y, x + _SIDE, y + _SIDE) for y in starts for x in starts])
    cover = np.zeros((len(boxes), length))
    cover[:, leading:] = np.einsum("yi,xj->yxij", along, along).reshape(len(boxes), -1)
    return boxes, torch.from_numpy(cover).float()


def close_up(pixels: Tensor, boxes: NDArray[np.float64]) -> Tensor:
    """Parts of pictures, enlarged to the size of the whole (bicubic).

    Args:
        pixels: [B, 3, H, W] as a tower takes them.
        boxes: [B, 4] left, top, right, bottom as shares of width and height.

    Returns:
        [B, 3, H, W] in the pixels' dtype, within the range of each picture's own values.
    """
    height, width = pixels.shape[-2:]

    def one(number: int) -> Tensor:
        box = boxes[number]
        left, top = (math.floor(share * size) for share, size in zip(box[:2], (width, height), strict=True))
        right, bottom = (math.ceil(share * size) for share, size in zip(box[2:], (width, height), strict=True))
        part = pixels[number : number + 1, :, top:bottom, left:right]
        close = interpolate(part.float(), size=(height, width), mode="bicubic", align_corners=False)
        return close[0].clamp(part.min(), part.max())

    out = torch.empty_like(pixels)
    for number, close in enumerate(side_by_side(one, range(len(boxes)))):
        out[number] = close
    return out


class SecondLook:
    """What :meth:`TGQFormerModel.encode` does to each batch before the model reads it.

    Args:
        model: with `config.second_look`, a guide, and a tower whose tokens form a grid; of others nothing changes.

    Attributes:
        active: whether pictures are looked at again at all.
        boxes: [W, 4] of :func:`windows`, where there are any.
    """

    def __init__(self, model: TGQFormerModel) -> None:
        self._model, self._least = model, model.config.second_look
        found = windows(model.config.num_visual_tokens)
        self.active = bool(self._least and found is not None and getattr(model.connector, "guides", False))
        if found is not None:
            self.boxes, self._cover = found

    def choose(self, guide: Tensor) -> tuple[Tensor, Tensor]:
        """Which pictures are looked at again, and where; needs :attr:`active`.

        Args:
            guide: [B, L] of :class:`~tgq_fast.models.embeddings.PatchAgreement`. Of an item without a picture or
                metadata it is zero: no window then holds more than its area.

        Returns:
            [B] bool, and [B] int64 index of a window.
        """
        most, which = self.largest(guide)
        return most >= self._least, which

    def largest(self, guide: Tensor) -> tuple[Tensor, Tensor]:
        """[B] share of the guide's softmax in the window that holds most of it, and [B] int64 index of that window."""
        return (guide.softmax(dim=1) @ self._cover.to(guide.device).T).max(dim=1)

    def __call__(self, features: FrozenFeatures, pixels: Pixels | None) -> FrozenFeatures:
        """Features with close-ups where one is called for.

        Args:
            features: of B items, on any device.
            pixels: how to get at what the tower saw; None: the features stay as they are.
        """
        if not self.active or pixels is None:
            return features
        features, guide = self.glance(features)
        sure, which = self.choose(guide)
        rows = sure.nonzero()[:, 0]
        if not len(rows):
            return features
        close = close_up(pixels(rows.cpu().numpy()), self.boxes[which[rows].cpu().numpy()])
        tokens, image = (value.to(guide.device) for value in self._model.extractor.look(close))
        return dataclasses.replace(features, close_rows=rows, close_tokens=tokens, close_image=image)

    def glance(self, features: FrozenFeatures) -> tuple[FrozenFeatures, Tensor]:
        """Features as the model's connector takes them, and the guide [B, L] over their tokens."""
        model = self._model
        connector: Any = model.connector
        features = features.to(model.logit_scale.device)
        if model.whitening is not None:
            features = model.whitening(features)
        return features, connector.agreement_of(features).guide


@torch.inference_mode()
def calibrate(model: TGQFormerModel, store: FeatureStore, rows: NDArray[np.int64]) -> float:
    """Raise a trained model's threshold until it looks again at one in a hundred of a catalogue's own pictures.

    Training and validation look once, at stored features: so what validation found holds for what the model embeds.

    Args:
        model: in evaluation mode; `config.second_look` is replaced. 0 stays 0.
        store: features, whitened or not.
        rows: of items with a picture: of training, then of validation; none of test.

    Returns:
        The threshold that the model has now; 0 where only 1 would do.
    """
    look = SecondLook(model)
    if look.active and len(rows):
        rows = rows[:: max(1, len(rows) // _SAMPLE)]
        batches = (store.batch(part) for part in np.array_split(rows, math.ceil(len(rows) / 64)))
        shares = torch.cat([look.largest(look.glance(batch)[1])[0].double().cpu() for batch in batches])
        least = math.ceil(max(model.config.second_look, float(np.quantile(shares.numpy(), 0.99))) * 1e4) / 1e4
        model.config.second_look = least if least < 1 else 0.0
    return float(model.config.second_look)


def both_looks(first: ReaderOutput, close: ReaderOutput, rows: Tensor) -> ReaderOutput:
    """The mean of what both looks gave, as unit vectors.

    Args:
        first: of B items.
        close: of the C close-ups.
        rows: [C] whose they are.
    """

    def mean(whole: Tensor, part: Tensor) -> Tensor:
        return whole.index_copy(0, rows, normalize(whole[rows] + part, dim=-1))

    return ReaderOutput(mean(first.embedding, close.embedding), mean(first.visual_embedding, close.visual_embedding))
