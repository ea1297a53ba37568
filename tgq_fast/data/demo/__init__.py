"""The embedded default catalogue: several hundred products drawn by the program, so that a demo needs no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tgq_fast.arguments import checked
from tgq_fast.data.demo.products import KINDS
from tgq_fast.data.demo.scene import photograph
from tgq_fast.data.demo.styles import COLORS, Palette, Style, random_palette, random_style, sibling_style
from tgq_fast.errors import ArgumentError
from tgq_fast.io.files import make_folder, storage_errors, write_atomic

__all__ = ["write_demo_catalog"]

BRANDS = ("Alder & Co", "Bellweather", "Corvane", "Dunmore", "Elkhorn", "Fairlight")
SERIES = ("Aria", "Basin", "Cove", "Dune", "Echo", "Fjord", "Glade", "Harbor", "Isle", "Juno")
DEPARTMENTS: dict[str, tuple[str, tuple[str, str]]] = {
    "handbag": ("Accessories", ("leather", "canvas")),
    "backpack": ("Accessories", ("canvas", "nylon")),
    "sneaker": ("Footwear", ("mesh", "suede")),
    "boot": ("Footwear", ("leather", "suede")),
    "bottle": ("Home", ("steel", "glass")),
    "mug": ("Home", ("ceramic", "enamel")),
    "lamp": ("Home", ("linen", "metal")),
    "chair": ("Home", ("oak", "metal")),
    "t-shirt": ("Apparel", ("cotton", "linen")),
    "watch": ("Accessories", ("steel", "leather")),
    "sunglasses": ("Accessories", ("acetate", "metal")),
    "cap": ("Apparel", ("cotton", "wool")),
}
WORN = frozenset(kind for kind, (department, _) in DEPARTMENTS.items() if department != "Home")
SEASONS = ("spring", "summer", "autumn", "winter")
GENDERS = ("women", "men", "unisex")
USAGES = ("casual", "work", "outdoor", "party")
SPLIT_SHARES = (0.6, 0.1)
"""Shares of groups in train and validation; the rest is test, large enough for intervals that say something."""


@checked
def write_demo_catalog(
    out: str | Path, *, groups: int = 120, variants: int = 4, seed: int = 0, image_size: int = 224
) -> Path:
    """Draw the demo catalogue: metadata.jsonl, pairs.jsonl and images/.

    A group is one product style seen as several variants: other colourways, other photos. Overlays, ground and clutter
    are drawn independently of the group; brand, category and attributes are shared by many groups and partly missing,
    so that neither metadata nor the background finds the group.

    Args:
        out: folder to create; an earlier demo catalogue there is replaced file by file.
        groups, variants: number of styles and of items per style (at least 2 variants make pairs).
        seed: the same seed gives the same bytes with the same Pillow and numpy.
        image_size: side of the square JPEG pictures in pixels.

    Returns:
        the folder, ready for `Catalog.load`.

    Raises:
        ArgumentError: a size is out of range.
    """
    for name, value, low in (("groups", groups, 1), ("variants", variants, 1), ("image_size", image_size, 32)):
        if value < low:
            raise ArgumentError(name, value, f"at least {low}")
    folder = Path(out)
    make_folder(folder / "images")
    # Neither order nor id may tell which items belong together.
    places = np.random.default_rng([seed, 3]).permutation(groups * variants).tolist()
    ids = [f"demo-{place:04d}" for place in places]
    rows: dict[int, bytes] = {}
    styles: list[Style] = []
    for group in range(groups):
        rng = np.random.default_rng([seed, 1, group])
        style = random_style(KINDS[group % len(KINDS)], rng)
        earlier = styles[group % len(KINDS) :: len(KINDS)]
        if earlier and rng.random() < 0.5:
            style = sibling_style(earlier[int(rng.integers(len(earlier)))], rng)
        styles.append(style)
        facts = _facts(style, rng)
        base = random_palette(rng)
        for variant in range(variants):
            rng = np.random.default_rng([seed, 2, group, variant])
            # every other variant keeps the group's colour, the others are colourways of their own
            palette = random_palette(rng, base.name) if variant % 2 == 0 else _other_palette(base, rng)
            row = _metadata(style, palette, facts, rng)
            useful = str(facts["material"]).upper() if rng.random() < 0.5 else str(facts["brand"]).upper()
            image, _ = photograph(style, palette, rng, image_size, useful)
            number = group * variants + variant
            file_name = f"images/{ids[number]}.jpg"
            with storage_errors(folder / file_name):
                image.save(folder / file_name, "JPEG", quality=90)
            named = {"id": ids[number], "file_name": file_name, **row, "group_id": f"style-{group:03d}"}
            rows[places[number]] = _line(named)
    write_atomic(folder / "pairs.jsonl", b"".join(_pair_lines(ids, groups, variants, seed)))
    write_atomic(folder / "metadata.jsonl", b"".join(rows[place] for place in sorted(rows)))
    return folder


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _other_palette(base: Palette, rng: np.random.Generator) -> Palette:
    names = [name for name in COLORS if name != base.name]
    return random_palette(rng, names[int(rng.integers(len(names)))])


def _facts(style: Style, rng: np.random.Generator) -> dict[str, str | float]:
    """What is true of every variant of a style. Few values each, so that many styles share them."""
    department, materials = DEPARTMENTS[style.kind]
    return {
        # a brand keeps to some kinds: half of the six sell each
        "brand": BRANDS[(2 * int(rng.integers(3)) + KINDS.index(style.kind)) % len(BRANDS)],
        "category": style.kind,
        "department": department,
        "series": SERIES[int(rng.integers(len(SERIES)))],
        "material": materials[int(rng.integers(2))],
        "gender": GENDERS[int(rng.choice(3, p=[0.2, 0.2, 0.6]))] if style.kind in WORN else "",
        "price": float(np.round(rng.uniform(1, 12)) * 10),
    }


def _metadata(
    style: Style, palette: Palette, facts: dict[str, str | float], rng: np.random.Generator
) -> dict[str, Any]:
    """One item's row: what its seller bothered to fill in."""
    careless = rng.random() < 0.05  # no metadata at all
    words = [facts["brand"], palette.name.title(), str(facts["material"]).title(), style.kind.title()]
    if rng.random() < 0.3:
        words.insert(1, facts["series"])
    keep = (rng.random(9) > (0.1, 0.2, 0.1, 0.3, 0.3, 0.35, 0.35, 0.3, 0.25)) & (not careless)
    # season and usage are the seller's opinion of one item, and gender is often left at its neutral value
    attributes = {
        "department": facts["department"],
        "material": facts["material"],
        "colour": palette.name,
        "season": SEASONS[int(rng.integers(4))],
        "gender": "unisex" if facts["gender"] and rng.random() < 0.4 else facts["gender"],
        "usage": USAGES[int(rng.integers(4))],
    }
    kept = {name: value for (name, value), has in zip(attributes.items(), keep[3:9], strict=True) if has and value}
    row: dict[str, Any] = {}
    if keep[0]:
        row["title"] = " ".join(str(word) for word in words)
    if keep[1]:
        row["brand"] = facts["brand"]
    if keep[2]:
        row["category"] = facts["category"]
    row["attributes"] = kept
    if not careless and rng.random() > 0.3:
        row["price"] = round(float(facts["price"]) * float(rng.choice([0.7, 0.8, 0.9, 1.0])) - 0.01, 2)
    return row


def _pair_lines(ids: list[str], groups: int, variants: int, seed: int) -> list[bytes]:
    """Ordered pairs within each group; whole groups go to one split."""
    shuffled = np.random.default_rng([seed, 4]).permutation(groups).tolist()
    train, validation = (round(share * groups) for share in SPLIT_SHARES)
    lines: list[bytes] = []
    for rank, group in enumerate(shuffled):
        split = "train" if rank < train else "validation" if rank < train + validation else "test"
        members = ids[group * variants : (group + 1) * variants]
        lines.extend(
            _line({"query": query, "target": target, "split": split})
            for query in members
            for target in members
            if query != target
        )
    return lines
