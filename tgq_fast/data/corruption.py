"""Corruptions for robustness studies: promotional overlays with their mask, background swap, bad metadata."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tgq_fast.arguments import checked
from tgq_fast.data.items import COLUMNS, Item
from tgq_fast.errors import ArgumentError

__all__ = [
    "AREAS",
    "IMAGE_KINDS",
    "METADATA_KINDS",
    "OVERLAY_KINDS",
    "background_mask",
    "corrupt_image",
    "corrupt_metadata",
    "item_seed",
    "useful_text",
]

OverlayKind = Literal["badge", "text_strip", "border", "collage"]
ImageKind = Literal["badge", "text_strip", "border", "collage", "background"]
MetadataKind = Literal["wrong", "partial", "empty"]
OVERLAY_KINDS: tuple[OverlayKind, ...] = ("badge", "text_strip", "border", "collage")
IMAGE_KINDS: tuple[ImageKind, ...] = (*OVERLAY_KINDS, "background")
METADATA_KINDS: tuple[MetadataKind, ...] = ("wrong", "partial", "empty")
AREAS = (0.05, 0.15, 0.30, 0.50)
"""Shares of the picture that the evaluation protocol covers."""

PHRASES = (
    "SALE",
    "-30%",
    "NEW",
    "BEST SELLER",
    "FREE SHIPPING",
    "2 FOR 1",
    "HOT DEAL",
    "LAST CHANCE",
    "-50%",
    "TOP RATED",
    "ONLY 9.99",
    "LIMITED",
)
_INKS = (
    ((208, 32, 40), (255, 255, 255)),
    ((255, 214, 10), (30, 30, 30)),
    ((24, 110, 60), (255, 255, 255)),
    ((20, 60, 150), (255, 255, 255)),
    ((20, 20, 22), (255, 214, 10)),
    ((235, 90, 20), (255, 255, 255)),
)


def item_seed(seed: int, item_id: str) -> int:
    """Seed of one item's corruption: depends on the run's seed and the id only, never on the order of work."""
    return (seed * 0x9E3779B1 + zlib.crc32(item_id.encode())) & 0xFFFFFFFF


def useful_text(item: Item, fields: Sequence[str] = ("brand", "material", "category", "title")) -> str | None:
    """Overlay text that tells something true about the item: its first present field, or None."""
    for name in fields:
        value = item.field(name)
        if value is not None:
            return value[:24].upper()
    return None


@checked
def corrupt_image(
    image: Image.Image,
    kind: ImageKind,
    area: float,
    seed: int,
    *,
    text: str | None = None,
    others: Sequence[Image.Image] = (),
) -> tuple[Image.Image, NDArray[np.bool_]]:
    """Lay a promotional overlay over a picture, or swap its background.

    Args:
        image: RGB picture of H × W pixels; left unchanged.
        kind: "badge", "text_strip", "border", "collage" or "background".
        area: share of the picture that the overlay covers, in (0, 0.9]. The mask meets it within a row or column of
            pixels. "background" covers whatever is background and ignores it.
        seed: the same seed gives the same pixels.
        text: overlay text; None draws a promotional phrase that says nothing about the product. See `useful_text`.
        others: pictures for the tiles of a collage; without them the tiles are crops of the picture itself.

    Returns:
        the corrupted RGB picture and [H, W] bool, True where pixels belong to the overlay (or the new background).

    Raises:
        ArgumentError: unknown kind or area out of range.
    """
    if kind not in IMAGE_KINDS:
        raise ArgumentError("kind", repr(kind), "one of " + ", ".join(IMAGE_KINDS))
    if kind != "background" and not 0 < area <= 0.9:
        raise ArgumentError("area", area, "a share in (0, 0.9]")
    rng = np.random.default_rng([seed & 0xFFFFFFFF, IMAGE_KINDS.index(kind)])
    image = image.convert("RGB")
    if kind == "background":
        return _swap_background(image, rng)
    phrase = text if text is not None else PHRASES[int(rng.integers(len(PHRASES)))]
    overlay = Image.new("RGB", image.size)
    mask = Image.new("L", image.size, 0)
    if kind == "badge":
        _badge(overlay, mask, area, phrase, rng)
    elif kind == "text_strip":
        _strip(overlay, mask, area, phrase, rng)
    elif kind == "border":
        _border(overlay, mask, area, phrase, rng)
    else:
        _collage(overlay, mask, area, image, others, rng)
    return Image.composite(overlay, image, mask), np.asarray(mask) > 0


@checked
def corrupt_metadata(
    item: Item,
    kind: MetadataKind,
    *,
    seed: int,
    donors: Sequence[Item] = (),
    fields: Sequence[str] | None = None,
) -> Item:
    """Damage the metadata of an item; id, picture, group and row stay.

    Args:
        item: left unchanged.
        kind: "empty" removes every field, "partial" removes each with probability ½ and at least one, "wrong" takes
            each present field from a random donor that has another value (a field no donor can falsify is removed).
        seed: the same seed and id give the same result.
        donors: items to take wrong values from, usually the whole catalogue.
        fields: columns and attributes to touch; None: all.

    Raises:
        ArgumentError: unknown kind, or "wrong" without donors.
    """
    if kind not in METADATA_KINDS:
        raise ArgumentError("kind", repr(kind), "one of " + ", ".join(METADATA_KINDS))
    if kind == "wrong" and not donors:
        raise ArgumentError("donors", "none", "items to take wrong values from")
    rng = np.random.default_rng([item_seed(seed, item.id), METADATA_KINDS.index(kind)])
    names = [name for name in (*COLUMNS, *item.attributes) if item.field(name) is not None]
    names = [name for name in dict.fromkeys(names) if fields is None or name in fields]
    changes: dict[str, Item | None] = {}
    if kind == "partial":
        gone = rng.random(len(names)) < 0.5
        if names and not gone.any():
            gone[int(rng.integers(len(names)))] = True
        changes = {name: None for name, drop in zip(names, gone, strict=True) if drop}
    else:
        for name in names:
            changes[name] = _liar(item, name, donors, rng) if kind == "wrong" else None
    columns: dict[str, Any] = {
        name: None if donor is None else getattr(donor, name) for name, donor in changes.items() if name in COLUMNS
    }
    attributes = dict(item.attributes)
    for name, donor in changes.items():
        if name not in COLUMNS:
            if donor is None:
                del attributes[name]
            else:
                attributes[name] = donor.attributes[name]
    return replace(item, attributes=attributes, **columns)


def _liar(item: Item, name: str, donors: Sequence[Item], rng: np.random.Generator) -> Item | None:
    truth = item.field(name)
    for i in rng.integers(len(donors), size=16):  # a few draws settle nearly every field without a pass over all
        if (value := donors[int(i)].field(name)) is not None and value != truth:
            return donors[int(i)]
    start = int(rng.integers(len(donors)))
    for i in range(start, start + len(donors)):
        donor = donors[i % len(donors)]
        if (value := donor.field(name)) is not None and value != truth:
            return donor
    return None


def _font(height: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(6.0, height))


def _write(
    overlay: Image.Image, box: tuple[float, float, float, float], phrase: str, ink: tuple[int, int, int]
) -> None:
    """Text as large as fits, in the middle of the box; nothing where the box is too small to read."""
    x0, y0, x1, y1 = box
    height = (y1 - y0) * 0.7
    if height < 6 or x1 - x0 < 8:
        return
    draw = ImageDraw.Draw(overlay)
    font = _font(height)
    width = draw.textlength(phrase, font=font)
    if width > (x1 - x0) * 0.92:
        font = _font(height * (x1 - x0) * 0.92 / width)
    draw.text(
        ((x0 + x1) / 2, (y0 + y1) / 2),
        phrase,
        fill=ink,
        font=font,
        anchor="mm" if isinstance(font, ImageFont.FreeTypeFont) else None,
    )


def _inks(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return _INKS[int(rng.integers(len(_INKS)))]


def _badge(overlay: Image.Image, mask: Image.Image, area: float, phrase: str, rng: np.random.Generator) -> None:
    """Disc, starburst or rectangle near a corner; it moves inwards as far as it must to show its whole area."""
    width, height = overlay.size
    paper, ink = _inks(rng)
    overlay.paste(paper, (0, 0, width, height))
    shape = int(rng.integers(3))
    total = area * width * height
    right, low = bool(rng.integers(2)), bool(rng.integers(2))
    radius = float(np.sqrt(total / np.pi))
    if shape < 2 and 2 * radius * 1.1 < min(width, height):
        x = width - radius * 1.12 if right else radius * 1.12
        y = height - radius * 1.12 if low else radius * 1.12
        draw = ImageDraw.Draw(mask)
        if shape == 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        else:  # spikes between 0.88 r' and 1.0 r': a polygon of alternating radii has area n·sin(π/n)·r1·r2
            spikes = 16
            outer = float(np.sqrt(total / (spikes * np.sin(np.pi / spikes) * 0.86)))
            x = width - outer if right else outer
            y = height - outer if low else outer
            angles = np.arange(2 * spikes) * np.pi / spikes
            radii = np.where(np.arange(2 * spikes) % 2 == 0, outer, 0.86 * outer)
            draw.polygon([(x + r * np.cos(t), y + r * np.sin(t)) for r, t in zip(radii, angles, strict=True)], fill=255)
        _write(overlay, (x - radius * 0.85, y - radius * 0.4, x + radius * 0.85, y + radius * 0.4), phrase, ink)
        return
    w = min(width, max(1, round(np.sqrt(total * 1.6))))
    h = min(height, max(1, round(total / w)))
    w = min(width, max(1, round(total / h)))
    x0 = width - w if right else 0
    y0 = height - h if low else 0
    mask.paste(255, (x0, y0, x0 + w, y0 + h))
    band = min(h, w / 2)
    _write(overlay, (x0, y0 + (h - band) / 2, x0 + w, y0 + (h + band) / 2), phrase, ink)


def _strip(overlay: Image.Image, mask: Image.Image, area: float, phrase: str, rng: np.random.Generator) -> None:
    """Full-width band at the top, in the lower third or at the bottom."""
    width, height = overlay.size
    paper, ink = _inks(rng)
    overlay.paste(paper, (0, 0, width, height))
    tall = max(1, round(area * height))
    y0 = round((height - tall) * (0.0, 0.7, 1.0)[int(rng.integers(3))])
    mask.paste(255, (0, y0, width, y0 + tall))
    band = min(tall, width / 4)
    _write(overlay, (0, y0 + (tall - band) / 2, width, y0 + (tall + band) / 2), phrase, ink)


def _border(overlay: Image.Image, mask: Image.Image, area: float, phrase: str, rng: np.random.Generator) -> None:
    """Frame of one thickness t, where 1 − (1 − 2t/W)(1 − 2t/H) is the area; its bottom bar carries the text."""
    width, height = overlay.size
    paper, ink = _inks(rng)
    overlay.paste(paper, (0, 0, width, height))
    half = (width + height) / 4
    exact = half - float(np.sqrt(half * half - area * width * height / 4))
    t = max(1, round(exact))
    mask.paste(255, (0, 0, width, height))
    mask.paste(0, (t, t, max(t, width - t), max(t, height - t)))
    # what rounding t lost or gained goes to the bottom bar
    inner = max(1, width - 2 * t)
    rest = round((area * width * height - (width * height - inner * max(0, height - 2 * t))) / inner)
    if rest > 0:
        mask.paste(255, (t, height - t - rest, width - t, height - t))
    elif rest < 0 and t + rest > 0:
        mask.paste(0, (t, height - t, width - t, height - t - rest))
    _write(overlay, (t, height - t, width - t, height), phrase, ink)


def _collage(
    overlay: Image.Image,
    mask: Image.Image,
    area: float,
    image: Image.Image,
    others: Sequence[Image.Image],
    rng: np.random.Generator,
) -> None:
    """Column or row of square-ish tiles along one side, as sellers paste detail shots and further products."""
    width, height = overlay.size
    side = int(rng.integers(4))  # left, right, top, bottom
    along, across = (height, width) if side < 2 else (width, height)
    thick = max(1, round(area * across))
    count = max(1, round(along / max(thick, along / 5)))
    edges = [round(i * along / count) for i in range(count + 1)]
    offset = across - thick if side in (1, 3) else 0
    for start, end in pairwise(edges):
        box = (offset, start, offset + thick, end) if side < 2 else (start, offset, end, offset + thick)
        w, h = box[2] - box[0], box[3] - box[1]
        if others:
            tile = others[int(rng.integers(len(others)))].convert("RGB").resize((w, h))
        else:
            zoom = float(rng.uniform(0.3, 0.6))
            x, y = float(rng.uniform(0, 1 - zoom)) * width, float(rng.uniform(0, 1 - zoom)) * height
            tile = image.resize((w, h), box=(x, y, x + zoom * width, y + zoom * height))
        overlay.paste(tile, box[:2])
        ImageDraw.Draw(overlay).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=(255, 255, 255))
        mask.paste(255, box)


def background_mask(image: Image.Image, tolerance: float = 28.0) -> NDArray[np.bool_]:
    """Guess the background: pixels near a border colour and connected to the border.

    Good for studio shots on an even ground; on a cluttered scene it finds only what joins the border evenly.

    Args:
        image: RGB of H × W pixels.
        tolerance: Euclidean RGB distance between neighbours on the ground's local colour.

    Returns:
        [H, W] bool.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    height, width = pixels.shape[:2]
    # Four corner colours interpolated over the picture follow the usual soft vignette of a studio ground.
    k = max(1, min(height, width) // 12)
    tl, tr, bl, br = (
        np.median(p.reshape(-1, 3), axis=0)
        for p in (pixels[:k, :k], pixels[:k, -k:], pixels[-k:, :k], pixels[-k:, -k:])
    )
    v = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    u = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    ground = (tl * (1 - u) + tr * u) * (1 - v) + (bl * (1 - u) + br * u) * v
    near = np.linalg.norm(pixels - ground, axis=-1) < tolerance
    near |= np.linalg.norm(pixels - np.median(rim, axis=0), axis=-1) < tolerance
    reached = np.zeros_like(near)
    reached[[0, -1]] = near[[0, -1]]
    reached[:, [0, -1]] = near[:, [0, -1]]
    count = -1
    while count != (count := int(reached.sum())):
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        reached = grown & near
    return reached


def _swap_background(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, NDArray[np.bool_]]:
    width, height = image.size
    mask = background_mask(image)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    top, low = rng.uniform(20, 235, 3), rng.uniform(20, 235, 3)
    scene = top * (1 - y) + low * y + 0 * x
    for _ in range(int(rng.integers(3, 9))):  # soft blobs, as of things out of focus
        cx, cy, r = rng.random(), rng.random(), rng.uniform(0.08, 0.3)
        weight = np.clip(1.5 - ((x - cx) ** 2 + (y - cy) ** 2) / r**2, 0, 1)
        scene = scene * (1 - weight) + rng.uniform(0, 255, 3) * weight
    new = Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8))
    return Image.composite(new, image, Image.fromarray((mask * 255).astype(np.uint8))), mask
