"""What identifies a product (style) and a variant of it (palette), and random draws of both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tgq_fast.data.demo.canvas import EMBLEMS, PATTERNS, Color

__all__ = ["COLORS", "Palette", "Style", "random_palette", "random_style", "sibling_style"]

COLORS: dict[str, Color] = {
    "black": (42, 42, 48),
    "white": (236, 234, 228),
    "grey": (140, 144, 150),
    "red": (196, 44, 48),
    "orange": (228, 126, 44),
    "yellow": (238, 200, 66),
    "green": (58, 132, 78),
    "teal": (38, 140, 148),
    "blue": (52, 92, 178),
    "navy": (34, 48, 96),
    "purple": (122, 74, 158),
    "pink": (226, 128, 160),
    "brown": (124, 82, 54),
    "beige": (208, 184, 148),
}
METALS: tuple[Color, ...] = ((188, 190, 196), (196, 160, 92), (70, 72, 78))


@dataclass(frozen=True, slots=True)
class Style:
    """What all variants of a product share: kind, four proportions in [0, 1], a detail choice, pattern and emblem."""

    kind: str
    a: float
    b: float
    c: float
    d: float
    detail: int
    pattern: str
    period: float
    thin: bool
    emblem: str


@dataclass(frozen=True, slots=True)
class Palette:
    """A colourway; `name` is the main colour's."""

    name: str
    main: Color
    second: Color
    accent: Color
    metal: Color


def random_style(kind: str, rng: np.random.Generator) -> Style:
    """A style of one kind."""
    a, b, c, d = (float(v) for v in rng.random(4))
    pattern = PATTERNS[rng.choice(len(PATTERNS), p=[0.3] + [0.1] * (len(PATTERNS) - 1))]
    emblem = EMBLEMS[int(rng.integers(len(EMBLEMS)))]
    period = float(rng.uniform(0.05, 0.13))
    return Style(kind, a, b, c, d, int(rng.integers(3)), pattern, period, bool(rng.integers(2)), emblem)


def sibling_style(style: Style, rng: np.random.Generator) -> Style:
    """A style of the same collection: the same pattern, other proportions, and another emblem or detail."""
    other = random_style(style.kind, rng)
    emblem, detail = (other.emblem, style.detail) if rng.random() < 0.5 else (style.emblem, other.detail)
    if (emblem, detail) == (style.emblem, style.detail):
        emblem = EMBLEMS[(EMBLEMS.index(style.emblem) + 1) % len(EMBLEMS)]
    return replace(other, emblem=emblem, detail=detail, pattern=style.pattern, period=style.period, thin=style.thin)


def random_palette(rng: np.random.Generator, name: str | None = None) -> Palette:
    """A colourway, of the given main colour if any."""
    names = list(COLORS)
    name = name or names[int(rng.integers(len(names)))]
    second, accent = (names[int(i)] for i in rng.choice(len(names), 2, replace=False))
    second = second if second != name else "white" if name != "white" else "navy"
    accent = accent if accent != name else "yellow" if name != "yellow" else "red"
    jitter = rng.uniform(-10, 10, 3)
    main: Color = tuple(int(np.clip(v + j, 0, 255)) for v, j in zip(COLORS[name], jitter, strict=True))  # type: ignore[assignment]
    return Palette(name, main, COLORS[second], COLORS[accent], METALS[int(rng.integers(len(METALS)))])
