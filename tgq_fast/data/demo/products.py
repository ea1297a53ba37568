"""Twelve parametric products. A style fixes shape, pattern and emblem; a palette fixes the colourway."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from tgq_fast.data.demo.canvas import Canvas, darker, draw_emblem, lighter, mix, texture
from tgq_fast.data.demo.styles import Palette, Style

__all__ = ["KINDS", "draw_product"]


def _bag(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    top, w0, w1 = 0.36 + 0.1 * s.a, 0.2 + 0.12 * s.b, 0.27 + 0.12 * s.c
    strap = darker(p.main, 0.25)
    reach = 0.16 + 0.12 * s.d
    c.arc(0.5, top + 0.02, w0 * 0.7, reach, 180, 360, 0.03, strap)
    if s.detail == 1:
        c.arc(0.5, top + 0.02, w0 * 0.45, reach * 0.75, 180, 360, 0.022, darker(strap))
    c.polygon([(0.5 - w0, top), (0.5 + w0, top), (0.5 + w1, 0.84), (0.5 - w1, 0.84)], fill)
    c.box(0.5 - w1 - 0.005, 0.81, 0.5 + w1 + 0.005, 0.87, 0.02, darker(p.main, 0.35))
    if s.detail == 0:
        flap = top + 0.2 + 0.1 * s.a
        c.polygon(
            [
                (0.5 - w0 - 0.01, top - 0.01),
                (0.5 + w0 + 0.01, top - 0.01),
                (0.5 + w0 * 0.9, flap),
                (0.5 - w0 * 0.9, flap),
            ],
            mix(p.main, p.second, 0.5),
        )
        c.box(0.46, flap - 0.04, 0.54, flap + 0.03, 0.01, p.metal)
    elif s.detail == 2:
        c.box(0.5 - w0 * 0.75, 0.6, 0.5 + w0 * 0.75, 0.78, 0.02, p.second)
    draw_emblem(c, s.emblem, 0.5, 0.68, 0.075, p.accent)


def _backpack(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    w, top = 0.22 + 0.08 * s.a, 0.18 + 0.06 * s.b
    c.arc(0.5, top + 0.02, 0.08, 0.08, 180, 360, 0.025, darker(p.main))
    for side in (-1, 1):
        c.line(
            [(0.5 + side * w * 0.8, top + 0.1), (0.5 + side * (w + 0.07), 0.5), (0.5 + side * w * 0.9, 0.8)],
            0.045,
            p.second,
        )
    c.box(0.5 - w, top, 0.5 + w, 0.88, 0.08 + 0.1 * s.c, fill)
    pocket = 0.54 + 0.1 * s.d
    c.box(0.5 - w * 0.78, pocket, 0.5 + w * 0.78, 0.84, 0.04, mix(p.main, p.second, 0.75))
    c.line([(0.5 - w * 0.7, pocket + 0.05), (0.5 + w * 0.7, pocket + 0.05)], 0.012, p.metal)
    if s.detail:
        c.line([(0.5 - w * 0.9, 0.36 + 0.05 * s.detail), (0.5 + w * 0.9, 0.36 + 0.05 * s.detail)], 0.014, p.metal)
    draw_emblem(c, s.emblem, 0.5, (pocket + 0.07 + 0.84) / 2 if s.detail else 0.4, 0.065, p.accent)


def _sneaker(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    collar, sole = 0.34 - 0.1 * s.a, 0.05 + 0.05 * s.b
    body = [
        (0.12, 0.66),
        (0.13, collar + 0.1),
        (0.18, collar),
        (0.36, collar + 0.02),
        (0.46, 0.45),
        (0.62, 0.52 + 0.03 * s.c),
        (0.82, 0.57),
        (0.91, 0.68),
        (0.5, 0.7),
    ]
    c.polygon(body, fill, smooth=True)
    c.polygon([(0.7, 0.55), (0.84, 0.58), (0.92, 0.69), (0.68, 0.7)], p.second, smooth=True)
    c.box(0.1, 0.68, 0.93, 0.68 + sole, sole / 2, lighter(p.second, 0.7) if s.detail else darker(p.main, 0.5))
    if s.detail == 2:
        c.box(0.1, 0.68 + sole * 0.6, 0.93, 0.7 + sole, sole / 3, p.accent)
    for i in range(3 + s.detail):
        x = 0.4 + i * 0.055
        c.line([(x, 0.47 + i * 0.018), (x + 0.06, 0.42 + i * 0.03)], 0.014, lighter(p.accent, 0.6))
    if s.d > 0.5:
        c.line([(0.34, 0.66), (0.5, 0.52), (0.58, 0.54)], 0.035, p.accent)
    c.ellipse(0.25, collar + 0.01, 0.09, 0.025, darker(p.main, 0.55))
    draw_emblem(c, s.emblem, 0.26, 0.55, 0.06, p.accent)


def _boot(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    top, w, heel = 0.16 + 0.16 * s.a, 0.13 + 0.05 * s.b, 0.04 + 0.08 * s.c
    c.polygon(
        [(0.3, top), (0.3 + 2 * w, top), (0.32 + 2 * w, 0.56), (0.7, 0.6), (0.84, 0.7), (0.84, 0.76), (0.29, 0.76)],
        fill,
    )
    c.ellipse(0.77, 0.7, 0.09, 0.07, fill if s.detail else p.second)
    c.box(0.28, 0.75, 0.86, 0.79, 0.015, darker(p.main, 0.55))
    c.box(0.28, 0.76, 0.42, 0.79 + heel, 0.01, darker(p.main, 0.6))
    c.box(0.29, top - 0.02, 0.31 + 2 * w, top + 0.03 + 0.05 * s.d, 0.02, p.second)
    if s.detail == 1:
        c.box(0.29, 0.52, 0.33 + 2 * w, 0.56, 0.01, darker(p.second))
        c.box(0.38, 0.51, 0.46, 0.57, 0.008, p.metal)
    elif s.detail == 2:
        for i in range(5):
            y = top + 0.1 + i * (0.5 - top) / 5
            c.line([(0.3 + w * 1.3, y), (0.3 + w * 1.9, y + 0.02)], 0.013, lighter(p.accent))
    draw_emblem(c, s.emblem, 0.3 + w, (top + 0.56) / 2 + 0.03, 0.06, p.accent)


def _bottle(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    w, neck, shoulder = 0.1 + 0.08 * s.a, 0.04 + 0.03 * s.b, 0.3 + 0.12 * s.c
    c.polygon(
        [
            (0.5 - neck, 0.16),
            (0.5 + neck, 0.16),
            (0.5 + neck, shoulder - 0.06),
            (0.5 + w, shoulder + 0.04),
            (0.5 + w, 0.88),
            (0.5 - w, 0.88),
            (0.5 - w, shoulder + 0.04),
            (0.5 - neck, shoulder - 0.06),
        ],
        fill,
    )
    c.box(0.5 - w, 0.84, 0.5 + w, 0.9, 0.03, darker(p.main, 0.2))
    cap = 0.07 + 0.06 * s.d
    c.box(0.5 - neck * 1.35, 0.18 - cap, 0.5 + neck * 1.35, 0.19, 0.012, p.metal if s.detail else p.accent)
    if s.detail == 1:
        c.arc(0.5, 0.18 - cap, neck * 1.2, 0.05, 180, 360, 0.016, p.metal)
    if s.detail == 2:
        c.box(0.5 - w, 0.5, 0.5 + w, 0.74, 0.0, lighter(p.second, 0.55))
    draw_emblem(c, s.emblem, 0.5, 0.62, min(0.075, w * 0.8), p.accent)
    c.box(0.5 - w * 0.75, shoulder + 0.08, 0.5 - w * 0.55, 0.8, 0.01, lighter(p.main, 0.55))


def _mug(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    w, h, taper = 0.2 + 0.07 * s.a, 0.34 + 0.2 * s.b, 0.06 * s.c
    top = 0.84 - h
    c.arc(0.5 + w, (top + 0.84) / 2, 0.11 + 0.04 * s.d, h * 0.32, -110, 110, 0.04, darker(p.main, 0.15))
    c.polygon([(0.46 - w, top), (0.46 + w, top), (0.46 + w - taper, 0.83), (0.46 - w + taper, 0.83)], fill)
    c.ellipse(0.46, 0.83, w - taper, 0.03, fill)
    c.ellipse(0.46, top, w, 0.045, lighter(p.main, 0.45))
    c.ellipse(0.46, top + 0.006, w * 0.88, 0.034, (92, 58, 36) if s.detail == 0 else darker(p.main, 0.45))
    if s.detail == 2:
        c.box(0.46 - w + taper, 0.76, 0.46 + w - taper, 0.8, 0.0, p.second)
    draw_emblem(c, s.emblem, 0.46, top + h * 0.52, 0.09, p.accent)


def _lamp(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    t, b, low = 0.08 + 0.12 * s.a, 0.2 + 0.1 * s.b, 0.42 + 0.08 * s.c
    stem = p.metal if s.detail != 1 else darker(p.second)
    if s.detail == 2:
        c.polygon(
            [(0.5, low), (0.58 + 0.05 * s.d, 0.66), (0.5, 0.84), (0.42 - 0.05 * s.d, 0.66)], p.second, smooth=True
        )
    else:
        c.line([(0.5, low), (0.5, 0.86)], 0.022 + 0.02 * s.d, stem)
    c.ellipse(0.5, 0.87, 0.12 + 0.05 * s.d, 0.03, darker(stem, 0.15))
    if s.detail == 1:
        for y in (0.58, 0.68, 0.78):
            c.ellipse(0.5, y, 0.05, 0.045, p.second)
    c.polygon([(0.5 - t, 0.14), (0.5 + t, 0.14), (0.5 + b, low), (0.5 - b, low)], fill)
    c.line([(0.5 - b, low), (0.5 + b, low)], 0.014, p.accent)
    draw_emblem(c, s.emblem, 0.5, 0.31, 0.065, p.accent)


def _chair(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    w, top, seat = 0.18 + 0.06 * s.a, 0.14 + 0.12 * s.b, 0.54 + 0.06 * s.c
    leg, splay = darker(p.second, 0.2), 0.07 * s.d
    for side in (-1, 1):
        c.line([(0.5 + side * w * 0.9, seat), (0.5 + side * (w * 0.9 + splay), 0.9)], 0.03, leg)
        c.line([(0.5 + side * w * 0.55, seat), (0.5 + side * (w * 0.55 + splay * 0.5), 0.83)], 0.024, darker(leg, 0.3))
    if s.detail == 0:
        c.box(0.5 - w, top, 0.5 + w, seat - 0.02, 0.05, fill)
    elif s.detail == 1:
        for i in range(4):
            x = 0.5 - w + i * 2 * w / 3
            c.line([(x, top + 0.04), (x, seat)], 0.026, leg)
        c.box(0.5 - w - 0.02, top, 0.5 + w + 0.02, top + 0.12, 0.03, fill)
    else:
        c.ellipse(0.5, (top + seat) / 2, w, (seat - top) / 2, fill)
    c.box(0.5 - w - 0.04, seat - 0.03, 0.5 + w + 0.04, seat + 0.05, 0.03, fill if s.detail else p.main)
    draw_emblem(
        c, s.emblem, 0.5, (top + seat) / 2 if s.detail != 1 else top + 0.06, 0.06 if s.detail != 1 else 0.045, p.accent
    )


def _shirt(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    w, sleeve, hem = 0.18 + 0.05 * s.a, 0.14 + 0.26 * s.b, 0.8 + 0.08 * s.c
    for side in (-1, 1):
        x = 0.5 + side * w
        c.polygon(
            [
                (x - side * 0.05, 0.2),
                (x + side * (0.05 + 0.3 * sleeve), 0.26 + sleeve * 0.9),
                (x + side * (0.05 + 0.3 * sleeve) - side * 0.11, 0.3 + sleeve * 0.9),
                (x - side * 0.02, 0.42),
            ],
            fill if s.detail != 2 else p.second,
        )
    c.polygon(
        [(0.5 - w, 0.2), (0.5 - 0.08, 0.16), (0.5 + 0.08, 0.16), (0.5 + w, 0.2), (0.5 + w, hem), (0.5 - w, hem)], fill
    )
    if s.detail == 1:
        c.polygon([(0.42, 0.15), (0.58, 0.15), (0.5, 0.3 + 0.05 * s.d)], darker(p.main, 0.6))
        c.line([(0.42, 0.16), (0.5, 0.3 + 0.05 * s.d), (0.58, 0.16)], 0.02, p.second)
    else:
        c.ellipse(0.5, 0.16, 0.085, 0.05 + 0.03 * s.d, darker(p.main, 0.55))
        c.arc(0.5, 0.16, 0.095, 0.06 + 0.03 * s.d, 0, 180, 0.018, p.second)
    if s.thin:
        c.box(0.5 - w, hem - 0.03, 0.5 + w, hem, 0.0, p.second)
    draw_emblem(
        c,
        s.emblem,
        0.5 if s.d < 0.6 else 0.5 + w * 0.5,
        0.48 if s.d < 0.6 else 0.36,
        0.1 if s.d < 0.6 else 0.05,
        p.accent,
    )


def _watch(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    r, w = 0.16 + 0.05 * s.a, 0.08 + 0.04 * s.b
    c.box(0.5 - w, 0.06, 0.5 + w, 0.94, 0.04, fill)
    for y in (0.8, 0.84, 0.88):
        c.ellipse(0.5, y, 0.008, 0.008, darker(p.main, 0.6))
    face = lighter(p.second, 0.6) if s.c < 0.5 else darker(p.second, 0.6)
    c.box(0.5 + r - 0.01, 0.47, 0.5 + r + 0.035, 0.53, 0.01, p.metal)
    if s.detail == 1:
        c.box(0.5 - r, 0.5 - r * 1.1, 0.5 + r, 0.5 + r * 1.1, 0.05, p.metal)
        c.box(0.53 - r, 0.53 - r * 1.1, 0.47 + r, 0.47 + r * 1.1, 0.03, face)
    else:
        c.ellipse(0.5, 0.5, r, r, p.metal)
        c.ellipse(0.5, 0.5, r - 0.025 - 0.015 * s.detail, r - 0.025 - 0.015 * s.detail, face)
    marks = (4, 12, 8)[s.detail]
    for i in range(marks):
        t = 2 * np.pi * i / marks
        c.ellipse(0.5 + (r - 0.05) * float(np.sin(t)), 0.5 - (r - 0.05) * float(np.cos(t)), 0.01, 0.01, p.accent)
    if s.d > 0.6:
        c.ellipse(0.5, 0.5 + r * 0.4, r * 0.22, r * 0.22, mix(face, p.accent, 0.5))
    draw_emblem(c, s.emblem, 0.5, 0.5 - r * 0.42, 0.03, p.accent)
    t = s.d * 6.28
    c.line([(0.5, 0.5), (0.5 + r * 0.6 * float(np.sin(t)), 0.5 - r * 0.6 * float(np.cos(t)))], 0.012, p.accent)
    c.line([(0.5, 0.5), (0.5 + r * 0.4, 0.46)], 0.016, p.accent)


def _sunglasses(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    rx, ry, gap = 0.14 + 0.04 * s.a, 0.09 + 0.06 * s.b, 0.17 + 0.03 * s.c
    lens = mix(darker(p.second, 0.45), p.accent, 0.3 * s.d)
    for side in (-1, 1):
        x = 0.5 + side * gap
        c.line(
            [(x + side * rx * 0.95, 0.46), (x + side * (rx + 0.06), 0.42), (x + side * (rx + 0.06), 0.6)], 0.026, p.main
        )
        if s.detail == 0:
            c.ellipse(x, 0.5, rx, ry, fill)
            c.ellipse(x, 0.5, rx - 0.025, ry - 0.025, lens)
        elif s.detail == 1:
            c.box(x - rx, 0.5 - ry, x + rx, 0.5 + ry, 0.04, fill)
            c.box(x - rx + 0.025, 0.525 - ry, x + rx - 0.025, 0.475 + ry, 0.025, lens)
        else:
            c.polygon(
                [
                    (x - rx, 0.5 - ry),
                    (x + rx, 0.5 - ry),
                    (x + rx * 0.6, 0.5 + ry * 1.2),
                    (x - rx * 0.6, 0.5 + ry * 1.2),
                ],
                fill,
                smooth=True,
            )
            c.polygon(
                [
                    (x - rx * 0.8, 0.52 - ry),
                    (x + rx * 0.8, 0.52 - ry),
                    (x + rx * 0.45, 0.48 + ry),
                    (x - rx * 0.45, 0.48 + ry),
                ],
                lens,
                smooth=True,
            )
        c.line([(x - rx * 0.4, 0.5 - ry * 0.4), (x - rx * 0.1, 0.5 - ry * 0.55)], 0.014, lighter(lens, 0.6))
        draw_emblem(c, s.emblem, x + side * rx * 0.55, 0.5 - ry * 0.05, 0.03, p.accent)
    c.arc(0.5, 0.5, gap - rx + 0.04, 0.06, 200, 340, 0.024, p.metal if s.thin else p.main)


def _cap(c: Canvas, s: Style, p: Palette, fill: Image.Image) -> None:
    h, w = 0.26 + 0.12 * s.a, 0.24 + 0.05 * s.b
    base = 0.6
    c.polygon(
        [
            (0.44 - w, base),
            (0.45 - w, base - h * 0.6),
            (0.44, base - h),
            (0.43 + w, base - h * 0.6),
            (0.44 + w, base),
            (0.44, base + 0.04),
        ],
        fill,
        smooth=True,
    )
    brim = 0.16 + 0.1 * s.c
    c.polygon(
        [
            (0.44 + w * 0.2, base - 0.04),
            (0.44 + w, base - 0.05),
            (0.44 + w + brim, base + 0.05),
            (0.42 + w + brim, base + 0.09),
            (0.44 + w * 0.3, base + 0.04),
        ],
        p.second if s.detail else darker(p.main, 0.2),
        smooth=True,
    )
    c.ellipse(0.44, base - h * 1.03, 0.025, 0.018, p.accent)
    if s.detail != 1:
        for k in (-0.5, 0.35):
            c.line(
                [(0.44, base - h), (0.44 + k * w, base - h * 0.5), (0.44 + k * w * 1.15, base)],
                0.008,
                darker(p.main, 0.35),
            )
    if s.d > 0.5:
        c.line([(0.45 - w, base - 0.02), (0.42 + w, base - 0.02)], 0.03, p.second)
    draw_emblem(c, s.emblem, 0.48, base - h * 0.48, 0.075, p.accent)


_PAINTERS: dict[str, Callable[[Canvas, Style, Palette, Image.Image], None]] = {
    "handbag": _bag,
    "backpack": _backpack,
    "sneaker": _sneaker,
    "boot": _boot,
    "bottle": _bottle,
    "mug": _mug,
    "lamp": _lamp,
    "chair": _chair,
    "t-shirt": _shirt,
    "watch": _watch,
    "sunglasses": _sunglasses,
    "cap": _cap,
}
KINDS = tuple(_PAINTERS)


def draw_product(style: Style, palette: Palette, size: int) -> Image.Image:
    """RGBA [size, size] picture of a product on a transparent ground, not yet shaded."""
    canvas = Canvas(size)
    fill = texture(style.pattern, size, palette.main, palette.second, scale=style.period, thin=style.thin)
    _PAINTERS[style.kind](canvas, style, palette, fill)
    return canvas.image
