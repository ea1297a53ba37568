"""Drawing in unit coordinates: shapes filled with a colour or a texture, and the textures themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

__all__ = ["Canvas", "Color", "Point", "darker", "emblem_points", "lighter", "mix", "shaded", "texture"]

Color = tuple[int, int, int]
Point = tuple[float, float]
Fill = Color | Image.Image


def mix(a: Color, b: Color, share: float) -> Color:
    """`share` of b, the rest of a."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def darker(color: Color, share: float = 0.3) -> Color:
    """Towards black."""
    return mix(color, (0, 0, 0), share)


def lighter(color: Color, share: float = 0.4) -> Color:
    """Towards white."""
    return mix(color, (255, 255, 255), share)


class Canvas:
    """Transparent square layer; coordinates run from 0 to 1, y downwards.

    Args:
        size: side in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.image = Image.new("RGBA", (size, size), (0, 0, 0, 0))

    def _paste(self, mask: Image.Image, fill: Fill) -> None:
        box = mask.getbbox()
        if box is None:
            return
        # Only the shape's own box: most of the drawing time goes into pasting.
        paint = fill.crop(box) if isinstance(fill, Image.Image) else (*fill, 255)
        self.image.paste(paint, box, mask.crop(box))

    def _mask(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        mask = Image.new("L", (self.size, self.size), 0)
        return mask, ImageDraw.Draw(mask)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.size, y * self.size) for x, y in points]

    def polygon(self, points: Sequence[Point], fill: Fill, *, smooth: bool = False) -> None:
        """Closed polygon, or the closed Catmull-Rom curve through the points."""
        mask, draw = self._mask()
        draw.polygon(self._pixels(spline(points) if smooth else points), fill=255)
        self._paste(mask, fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Fill) -> None:
        """Filled ellipse around (x, y)."""
        mask, draw = self._mask()
        s = self.size
        draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=255)
        self._paste(mask, fill)

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float, fill: Fill) -> None:
        """Elliptic arc from `start` to `end` degrees, clockwise from three o'clock."""
        mask, draw = self._mask()
        s = self.size
        box = ((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s)
        draw.arc(box, start, end, fill=255, width=max(1, round(width * s)))
        self._paste(mask, fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, radius: float, fill: Fill) -> None:
        """Rounded rectangle."""
        mask, draw = self._mask()
        s = self.size
        draw.rounded_rectangle((x0 * s, y0 * s, x1 * s, y1 * s), radius * s, fill=255)
        self._paste(mask, fill)

    def line(self, points: Sequence[Point], width: float, fill: Fill) -> None:
        """Open line with round ends and joints."""
        mask, draw = self._mask()
        pixels = self._pixels(points)
        thick = max(1, round(width * self.size))
        draw.line(pixels, fill=255, width=thick, joint="curve")
        half = thick / 2
        for x, y in (pixels[0], pixels[-1]):
            draw.ellipse((x - half, y - half, x + half, y + half), fill=255)
        self._paste(mask, fill)


def spline(points: Sequence[Point], steps: int = 8) -> list[Point]:
    """Closed Catmull-Rom curve through `points`."""
    n = len(points)
    curve: list[Point] = []
    for i in range(n):
        p0, p1, p2, p3 = (points[(i + k - 1) % n] for k in range(4))
        for step in range(steps):
            t = step / steps
            x, y = (
                0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
                for a, b, c, d in zip(p0, p1, p2, p3, strict=True)
            )
            curve.append((x, y))
    return curve


EMBLEMS = ("none", "star", "triangle", "disc", "ring", "heart", "bars", "diamond")
PATTERNS = ("plain", "stripes", "columns", "diagonal", "dots", "checks", "block", "chevron")


def emblem_points(kind: str, x: float, y: float, r: float) -> list[Point]:
    """Outline of an emblem of radius r around (x, y); empty for the round ones and for "none"."""
    if kind == "star":
        return [
            (
                x + r * (1 if i % 2 == 0 else 0.42) * math.sin(i * math.pi / 5),
                y - r * (1 if i % 2 == 0 else 0.42) * math.cos(i * math.pi / 5),
            )
            for i in range(10)
        ]
    if kind == "triangle":
        return [(x, y - r), (x + 0.95 * r, y + 0.75 * r), (x - 0.95 * r, y + 0.75 * r)]
    if kind == "diamond":
        return [(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)]
    if kind == "heart":
        angles = [i * 2 * math.pi / 24 for i in range(24)]
        return [
            (
                x + r * math.sin(t) ** 3,
                y - r * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
            )
            for t in angles
        ]
    return []


def draw_emblem(canvas: Canvas, kind: str, x: float, y: float, r: float, color: Color) -> None:
    """Draw an emblem of `EMBLEMS`."""
    points = emblem_points(kind, x, y, r)
    if points:
        canvas.polygon(points, color)
    elif kind == "disc":
        canvas.ellipse(x, y, r * 0.85, r * 0.85, color)
    elif kind == "ring":
        canvas.arc(x, y, r, r, 0, 360, r * 0.38, color)
    elif kind == "bars":
        for i in (-1, 0, 1):
            canvas.box(x + (i * 0.62 - 0.2) * r, y - r * 0.9, x + (i * 0.62 + 0.2) * r, y + r * 0.9, 0.0, color)


@lru_cache(64)
def _pattern_mask(kind: str, size: int, period: int, thin: bool) -> Image.Image:
    """[size, size] L: where the second colour shows."""
    y, x = np.mgrid[0:size, 0:size]
    duty = 0.3 if thin else 0.5
    if kind == "stripes":
        on = (y % period) < duty * period
    elif kind == "columns":
        on = (x % period) < duty * period
    elif kind == "diagonal":
        on = ((x + y) % period) < duty * period
    elif kind == "dots":
        row = y // period
        dx = (x + (row % 2) * period // 2) % period - period / 2
        dy = y % period - period / 2
        on = dx * dx + dy * dy < (duty * 0.62 * period) ** 2
    elif kind == "checks":
        on = ((x // period) + (y // period)) % 2 == 0
    elif kind == "block":
        on = y > (0.46 if thin else 0.58) * size
    elif kind == "chevron":
        on = ((y + np.abs((x % (2 * period)) - period)) % period) < duty * period
    else:
        on = np.zeros((size, size), bool)
    return Image.fromarray((on * 255).astype(np.uint8))


def texture(kind: str, size: int, first: Color, second: Color, *, scale: float, thin: bool) -> Image.Image:
    """RGB fill of a pattern of `PATTERNS`; `scale` is its period as a share of the side."""
    image = Image.new("RGB", (size, size), first)
    if kind != "plain":
        image.paste(second, (0, 0, size, size), _pattern_mask(kind, size, max(4, round(scale * size)), thin))
    return image


def shaded(layer: Image.Image, light: float) -> Image.Image:
    """Give a flat layer volume: darker towards its outline, lit from the left (light < 0) or right (light > 0)."""
    size = layer.size[0]
    alpha = layer.getchannel("A")
    small = alpha.resize((size // 4, size // 4), Image.Resampling.BOX)
    inside = small.filter(ImageFilter.GaussianBlur(size / 4 * 0.035)).resize((size, size), Image.Resampling.BILINEAR)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    side = 1 + 0.16 * light * ramp[None, :] - 0.1 * ramp[:, None]
    shade = (0.55 + 0.45 * np.asarray(inside, np.float32) / 255) * side
    level = Image.fromarray(np.clip(shade * 215, 0, 255).astype(np.uint8))
    channels = [ImageChops.multiply(layer.getchannel(name), level) for name in "RGB"]
    lit = [channel.point(lambda v: min(255, round(v * 1.18))) for channel in channels]
    return Image.merge("RGBA", (*lit, alpha))
