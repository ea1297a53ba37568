"""Photographing a product: angle, light, ground, things lying around, and promotional overlays on top."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from tgq_fast.data.corruption import OVERLAY_KINDS, corrupt_image
from tgq_fast.data.demo.canvas import shaded
from tgq_fast.data.demo.products import KINDS, draw_product
from tgq_fast.data.demo.styles import Palette, Style, random_palette, random_style

__all__ = ["Shot", "photograph"]


@dataclass(frozen=True, slots=True)
class Shot:
    """How a picture was made: ground, whether there is clutter, and the overlay kinds."""

    ground: str
    clutter: int
    overlays: tuple[str, ...]


def photograph(
    style: Style, palette: Palette, rng: np.random.Generator, size: int, useful: str | None = None
) -> tuple[Image.Image, Shot]:
    """One RGB picture [size, size] of a product.

    Args:
        style, palette: the product.
        rng: everything about the photo; independent of the product, so that overlays and ground say nothing about it.
        size: side in pixels; drawing happens at twice that.
        useful: true text about the product that one overlay in four carries instead of a slogan.
    """
    big = 2 * size
    ground = ("studio", "colour", "table", "room")[int(rng.choice(4, p=[0.22, 0.2, 0.22, 0.36]))]
    scene = _ground(ground, size, rng).resize((big, big), Image.Resampling.BILINEAR)
    clutter = int(rng.integers(1, 4)) if ground == "room" else int(rng.integers(0, 3))
    light = float(rng.uniform(-1, 1))
    x, y = float(rng.uniform(0.36, 0.64)), float(rng.uniform(0.42, 0.6))
    for _ in range(clutter):
        kinds = [kind for kind in KINDS if kind != style.kind]
        kind = kinds[int(rng.integers(len(kinds)))]
        other = draw_product(random_style(kind, rng), random_palette(rng), size)
        away = float(rng.uniform(0, 2 * math.pi))
        spot = (x + 0.4 * math.cos(away), y + 0.36 * math.sin(away))
        _place(scene, shaded(other, light), spot, float(rng.uniform(0.35, 0.6)), rng)
    layer = shaded(draw_product(style, palette, big), light)
    _place(scene, layer, (x, y), float(rng.uniform(0.6, 0.95)), rng)
    image = _expose(scene.resize((size, size), Image.Resampling.BOX), rng)
    overlays: list[str] = []
    for _ in range(int(rng.choice(3, p=[0.35, 0.45, 0.2]))):
        overlay = OVERLAY_KINDS[int(rng.integers(len(OVERLAY_KINDS)))]
        area = float(rng.uniform(0.04, 0.22))
        text = useful if useful is not None and rng.random() < 0.25 else None
        image, _ = corrupt_image(image, overlay, area, int(rng.integers(1 << 31)), text=text)
        overlays.append(overlay)
    return image, Shot(ground, clutter, tuple(overlays))


def _ground(kind: str, size: int, rng: np.random.Generator) -> Image.Image:
    y = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    x = np.linspace(0, 1, size, dtype=np.float32)[None, :, None]
    if kind == "studio":
        base = rng.uniform(236, 255) + np.zeros(3)
        pixels = base - 14 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    elif kind == "colour":
        top, low = rng.uniform(120, 250, 3), rng.uniform(120, 250, 3)
        pixels = top * (1 - y) + low * y + 0 * x
    else:
        wall = rng.uniform(150, 240, 3)
        wood = np.array([150, 105, 70]) * rng.uniform(0.7, 1.4)
        horizon = rng.uniform(0.58, 0.72)
        grain = 9 * np.sin(60 * y + 6 * np.sin(5 * x + rng.uniform(0, 6)))
        pixels = np.where(y < horizon, wall * (1.04 - 0.12 * y) + 0 * x, wood * (0.8 + 0.3 * y) + grain)
        if kind == "room":
            for _ in range(int(rng.integers(2, 5))):
                x0, w = rng.uniform(0, 0.9), rng.uniform(0.06, 0.25)
                y0 = rng.uniform(0, 0.4)
                inside = (x > x0) & (x < x0 + w) & (y > y0) & (y < horizon)
                pixels = np.where(inside, rng.uniform(60, 230, 3) * (1.05 - 0.2 * y), pixels)
    return Image.fromarray(np.clip(np.broadcast_to(pixels, (size, size, 3)), 0, 255).astype(np.uint8))


def _place(
    scene: Image.Image, layer: Image.Image, spot: tuple[float, float], scale: float, rng: np.random.Generator
) -> None:
    """Paste a product layer, turned, sheared and scaled, with a soft shadow."""
    big = scene.size[0]
    turn = math.radians(float(rng.normal(0, 10)))
    squeeze = float(rng.uniform(0.72, 1.0)) * (-1 if rng.random() < 0.3 else 1)
    shear = float(rng.uniform(-0.18, 0.18))
    # forward map: centred layer → shear and squeeze → rotation → scale; the inverse goes to PIL
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    forward = rotation @ np.array([[squeeze, shear], [0.0, 1.0]]) * (scale * big / layer.size[0])
    inverse = np.linalg.inv(forward)
    centre = np.array([layer.size[0] / 2] * 2)
    offset = centre - inverse @ (np.array(spot) * big)
    data = (inverse[0, 0], inverse[0, 1], offset[0], inverse[1, 0], inverse[1, 1], offset[1])
    placed = layer.transform((big, big), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    alpha = placed.getchannel("A")
    small = alpha.resize((big // 8, big // 8), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(big / 8 * 0.02))
    soft = ImageChops.offset(small, 1, max(1, big // 8 // 32)).resize((big, big), Image.Resampling.BILINEAR)
    if (box := soft.getbbox()) is not None:
        scene.paste((30, 26, 24), box, soft.crop(box).point([v * 0.38 for v in range(256)]))
    if (box := alpha.getbbox()) is not None:
        scene.paste(placed.crop(box), box, alpha.crop(box))


def _expose(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Exposure, white balance and sensor noise."""
    gain = rng.uniform(0.86, 1.1) * (1 + rng.uniform(-0.05, 0.05, 3))
    pixels = np.asarray(image, np.float32) * gain
    noise = rng.standard_normal((*pixels.shape[:2], 1), dtype=np.float32) * rng.uniform(1, 4)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
