"""Small versions of the catalogue's pictures, kept in memory within a bound."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

from PIL import Image

from tgq_fast.data import Catalog, Item, load_image

__all__ = ["SIDES", "Thumbnails"]

SIDES = (160, 320, 640)
"""Sides in pixels that may be asked for: few, so that nobody can fill the memory with sizes."""


class Thumbnails:
    """JPEG thumbnails by item, least recently used out first.

    Args:
        catalog: where the pictures are; only pictures of its items are ever read.
        capacity: bytes to keep.
    """

    def __init__(self, catalog: Catalog, capacity: int = 64 << 20) -> None:
        self.catalog, self.capacity = catalog, capacity
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, item: Item, side: int) -> bytes:
        """JPEG that fits a square of `side` pixels.

        Raises:
            ImageError: the picture cannot be used.
        """
        key = (item.id, side)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        image = load_image(self.catalog.picture(item), item.id)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        data = buffer.getvalue()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = data
                self._bytes += len(data)
            while self._bytes > self.capacity:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return data
