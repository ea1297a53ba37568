"""Corrupted pictures of a catalogue's items, as pictures and ready for a tower."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tgq_fast.data.catalog import Catalog
from tgq_fast.data.conditions import Condition, Picturer
from tgq_fast.data.images import load_image
from tgq_fast.errors import ImageError
from tgq_fast.models.token_grid import token_shares
from tgq_fast.models.towers import VisionTower

__all__ = ["PictureMaker"]

_SIDE = 512  # longest side of a picture before it is corrupted; towers read less
_LEAST = 8  # shortest side
_KEPT = 128  # decoded pictures kept in memory: scenes and collages of neighbouring items rarely share more


class PictureMaker:
    """Corrupted pictures of a catalogue, ready for the tower."""

    def __init__(
        self, catalog: Catalog, vision: VisionTower, labels: NDArray[np.int64], seed: int, unread: frozenset[int]
    ) -> None:
        self.catalog, self.vision, self.labels, self.seed, self.unread = catalog, vision, labels, seed, unread
        self.lasting = True  # until a picture cannot be used for a reason that its bytes do not decide
        self._load = functools.lru_cache(maxsize=_KEPT)(self._read)
        self._makers: dict[tuple[int, int], Picturer] = {}

    def _read(self, row: int) -> Image.Image | None:
        item = self.catalog.items[row]
        if item.file_name is None:
            return None
        try:
            image = load_image(self.catalog.picture(item), item.id)
        except ImageError as error:
            self.lasting &= error.lasting or row in self.unread
            return None
        if max(image.size) > _SIDE:
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
        if min(image.size) < _LEAST:  # a grid needs a pixel per cell
            image = image.resize((max(_LEAST, image.width), max(_LEAST, image.height)), Image.Resampling.NEAREST)
        return image

    def picture(self, row: int, number: int, condition: Condition) -> tuple[Image.Image, NDArray[np.bool_]] | None:
        """The corrupted picture and its mask as :class:`Picturer` gives them; None without a picture."""
        label = int(self.labels[row])
        maker = self._makers.get((label, number))
        if maker is None:
            donors = np.flatnonzero(self.labels == label)
            maker = Picturer(self.catalog.items, self._load, donors=donors, seed=self.seed * 1009 + number)
            self._makers[label, number] = maker
        return maker(row, condition)

    def __call__(self, task: tuple[int, int, Condition]) -> tuple[torch.Tensor, NDArray[np.float16]] | None:
        """(row, number of the view, condition) → pixels [3, H, W] and shares [2, L]; None without a picture."""
        made = self.picture(*task)
        if made is None:
            return None
        image, mask = made
        processor = self.vision.image_processor
        return processor([image])[0], token_shares(mask, processor, self.vision.num_tokens)
