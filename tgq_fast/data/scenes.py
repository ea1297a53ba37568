"""Pictures of several products: a grid in which one is meant and only the metadata says which; and crops.

Source: ours, after what shops show daily (a complete look, a set, a group shot).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgq_fast.errors import ArgumentError

__all__ = ["close_up_image", "compose_scene", "crop_image", "scene_donors"]

_SCENE, _DONORS, _CROP, _CLOSE_UP = 77, 6, 7, 11  # tell the generators of one seed apart


def compose_scene(
    image: Image.Image, others: Sequence[Image.Image], seed: int
) -> tuple[Image.Image, NDArray[np.bool_]]:
    """One picture in the size of the first, a grid of it and the others on white; each keeps its aspect.

    The grid of n pictures has ⌈√n⌉ columns and ⌈n / columns⌉ rows, so four pictures stand 2 × 2. The meant product's
    cell is drawn uniformly; the others fill the remaining cells in order.

    Args:
        image: RGB picture of the product that is meant, H × W pixels.
        others: RGB pictures of further products.
        seed: the same seed gives the same place.

    Returns:
        the RGB scene and [H, W] bool, True outside the meant product's cell: what does not belong to it, as the mask of
        `corrupt_image` marks what covers it.

    Raises:
        ArgumentError: a picture has fewer pixels than the grid has cells.
    """
    count = 1 + len(others)
    width, height = image.size
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    if width < columns or height < rows:
        raise ArgumentError("image", f"{width} x {height} pixels", f"at least {columns} x {rows}, one per cell")
    cell = int(np.random.default_rng([seed & 0xFFFFFFFF, _SCENE]).integers(count))
    pictures = list(others)
    pictures.insert(cell, image)
    scene = Image.new("RGB", (width, height), (255, 255, 255))
    mask = np.ones((height, width), dtype=bool)
    xs = [round(i * width / columns) for i in range(columns + 1)]
    ys = [round(i * height / rows) for i in range(rows + 1)]
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        wide, high = xs[column + 1] - xs[column], ys[row + 1] - ys[row]
        scale = min(wide / picture.width, high / picture.height)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        place = xs[column] + (wide - size[0]) // 2, ys[row] + (high - size[1]) // 2
        scene.paste(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), place)
        if number == cell:
            mask[ys[row] : ys[row + 1], xs[column] : xs[column + 1]] = False
    return scene, mask


def scene_donors(
    row: int, categories: Sequence[str | None], pool: NDArray[np.int64], count: int, seed: int
) -> list[int]:
    """Rows of `count` items whose categories differ from the item's and from each other.

    Where the pool has fewer such categories, some of the item's other categories occur twice; where it has only the
    item's own, the scene has no other product.

    Args:
        row: the item that is meant.
        categories: of every row; an item without one is of a category of its own kind, None.
        pool: [n] rows to draw from.
        count: products beside the meant one.
        seed: the same seed gives the same rows.
    """
    rng = np.random.default_rng([seed & 0xFFFFFFFF, _DONORS])
    seen, found = {categories[row]}, list[int]()
    for _ in range(32 * count):  # a few draws settle nearly every scene without a pass over the pool
        if len(found) == count or not len(pool):
            break
        drawn = int(pool[int(rng.integers(len(pool)))])
        if categories[drawn] not in seen:
            seen.add(categories[drawn])
            found.append(drawn)
    if len(found) < count:
        others = [int(i) for i in pool if categories[int(i)] != categories[row]]
        missing = count - len(found)
        found += [others[int(i)] for i in rng.integers(len(others), size=missing)] if others else []
    return found


def crop_image(image: Image.Image, share: float, seed: int) -> tuple[Image.Image, NDArray[np.bool_]]:
    """A part of the picture, enlarged to its size, and in half of the cases mirrored.

    Args:
        image: RGB picture of H × W pixels.
        share: of the area that is left, in (0, 1].
        seed: the same seed gives the same part.

    Returns:
        the RGB picture and [H, W] bool, all False: nothing in it is foreign.

    Raises:
        ArgumentError: share out of range.
    """
    if not 0 < share <= 1:
        raise ArgumentError("share", share, "a share in (0, 1]")
    rng = np.random.default_rng([seed & 0xFFFFFFFF, _CROP])
    width, height = image.size
    wide, high = max(1, round(width * math.sqrt(share))), max(1, round(height * math.sqrt(share)))
    x, y = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
    part = image.convert("RGB").resize(image.size, Image.Resampling.BICUBIC, box=(x, y, x + wide, y + high))
    if rng.integers(2):
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return part, np.zeros((height, width), dtype=bool)


def close_up_image(
    image: Image.Image, mask: NDArray[np.bool_], seed: int, slack: float = 0.12
) -> tuple[Image.Image, NDArray[np.bool_]]:
    """A close-up of what a mask leaves, as a second look at a scene would take it: enlarged to the picture's size.

    Args:
        image: RGB scene of H x W pixels.
        mask: [H, W] bool, True outside the meant product.
        seed: the same seed gives the same frame; each of its sides lies up to `slack` of the product's cell outside, or
            a third of that inside.

    Returns:
        the RGB close-up and its mask.
    """
    rng = np.random.default_rng([seed & 0xFFFFFFFF, _CLOSE_UP])
    ys, xs = np.flatnonzero(~mask.all(axis=1)), np.flatnonzero(~mask.all(axis=0))
    left, right, top, bottom = int(xs[0]), int(xs[-1]) + 1, int(ys[0]), int(ys[-1]) + 1
    wide, high = right - left, bottom - top
    moved = rng.uniform(-slack / 3, slack, size=4) * (wide, high, wide, high)
    box = (
        max(0.0, left - moved[0]),
        max(0.0, top - moved[1]),
        min(float(image.width), right + moved[2]),
        min(float(image.height), bottom + moved[3]),
    )
    close = image.convert("RGB").resize(image.size, Image.Resampling.BICUBIC, box=box)
    part = Image.fromarray((mask * 255).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST, box=box)
    return close, np.asarray(part) > 127
