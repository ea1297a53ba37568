"""Named conditions of a robustness study: what is done to pictures or metadata, how strongly, and on which side.

    clean
    overlay:0.3:both            badge or text strip over 30 % of the picture, of queries and pool
    border:0.2:query            one kind of overlay: badge, text_strip, border, collage
    background:1:pool           another background
    scene:4:query               the product among three others of other categories, and the metadata says which
    closeup:4:query             the product's part of such a scene, enlarged: what a second look at it shows
    metadata:wrong:0.5:query    wrong, partial or empty metadata for a share of the items

Source: protocol, docs/method.md; the grammar is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgq_fast.data.corruption import IMAGE_KINDS, METADATA_KINDS, corrupt_image, item_seed
from tgq_fast.data.items import Item
from tgq_fast.data.scenes import close_up_image, compose_scene, crop_image, scene_donors
from tgq_fast.errors import ArgumentError

__all__ = ["CLEAN", "Condition", "Picturer", "parse_conditions"]

Side = Literal["query", "pool", "both"]
SIDES: tuple[str, ...] = get_args(Side)
PICTURE_KINDS = ("overlay", *IMAGE_KINDS, "scene", "crop", "closeup")
_OVERLAY = ("badge", "text_strip")  # what "overlay" draws from
_DRAW = 5  # tells the generator of this choice from the others of one seed


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        kind: "clean", one of `PICTURE_KINDS`, or "metadata".
        amount: covered share of the area; number of products of a scene; share that is left of a crop; share of the
            items whose metadata is damaged.
        side: whether queries, pool or both are corrupted.
        damage: "wrong", "partial" or "empty" (metadata only).
    """

    kind: str
    amount: float = 0.0
    side: Side = "both"
    damage: str = ""

    def __str__(self) -> str:
        if self.kind == "clean":
            return "clean"
        parts = (self.kind, self.damage, f"{self.amount:g}", self.side)
        return ":".join(part for part in parts if part)

    @property
    def pictures(self) -> bool:
        """Whether pictures are what is corrupted."""
        return self.kind in PICTURE_KINDS

    def on(self, side: Literal["query", "pool"]) -> bool:
        """Whether this side is corrupted."""
        return self.kind != "clean" and self.side in (side, "both")

    @property
    def words(self) -> str:
        """What is done and to what, for a reader who does not know the grammar."""
        whom = {"query": "queries only", "pool": "pool only", "both": "queries and pool"}[self.side]
        if self.kind == "clean":
            return "pictures and metadata as they are"
        if self.kind == "metadata":
            return f"{self.damage} metadata for {self.amount:.0%} of the items, {whom}"
        what = {
            "overlay": f"badge or text strip over {self.amount:.0%} of the picture",
            "background": "another background",
            "scene": f"the product in one picture with {self.amount - 1:.0f} of other categories",
            "crop": f"{self.amount:.0%} of the picture is left",
            "closeup": f"the product's part of one picture with {self.amount - 1:.0f} of other categories, enlarged",
        }.get(self.kind, f"{self.kind.replace('_', ' ')} over {self.amount:.0%} of the picture")
        return f"{what}, {whom}"

    @classmethod
    def parse(cls, text: str) -> Condition:
        """From its text.

        Raises:
            ArgumentError: with the grammar.
        """

        def wrong(expected: str) -> ArgumentError:
            return ArgumentError(
                "condition",
                repr(text),
                expected,
                "For example overlay:0.3:both, scene:4:query, metadata:wrong:0.5:pool.",
            )

        kind, *rest = text.strip().split(":")
        if kind == "clean" and not rest:
            return CLEAN
        damage = ""
        if kind == "metadata":
            if not rest or rest[0] not in METADATA_KINDS:
                raise wrong("metadata:KIND:SHARE[:SIDE] with KIND one of " + ", ".join(METADATA_KINDS))
            damage = rest.pop(0)
        elif kind not in PICTURE_KINDS:
            raise wrong("clean, metadata, or one of " + ", ".join(PICTURE_KINDS))
        if not 1 <= len(rest) <= 2 or (len(rest) == 2 and rest[1] not in SIDES):
            raise wrong("KIND:AMOUNT[:SIDE] with SIDE one of " + ", ".join(SIDES))
        try:
            amount = float(rest[0])
        except ValueError:
            raise wrong("a number as AMOUNT") from None
        if kind in ("scene", "closeup"):
            if amount != int(amount) or not 2 <= amount <= 16:
                raise wrong("scene:N with 2 to 16 products")
        elif not 0 < amount <= (0.9 if kind in ("overlay", *IMAGE_KINDS) and kind != "background" else 1.0):
            raise wrong("a share above 0 and at most 0.9 (1 for background, crop and metadata)")
        return cls(kind, amount, rest[1] if len(rest) == 2 else "both", damage)  # type: ignore[arg-type]


CLEAN = Condition("clean")


def parse_conditions(text: str | Sequence[str]) -> list[Condition]:
    """Several conditions, from a list or a text with commas between; each once, in order."""
    parts = text.split(",") if isinstance(text, str) else list(text)
    return list(dict.fromkeys(Condition.parse(part) for part in parts if part.strip()))


class Picturer:
    """Makes corrupted pictures of a catalogue's items, each a function of (condition, seed, item id) alone.

    Args:
        items: of the catalogue.
        load: row → its picture, or None where there is none to be had.
        donors: [n] rows whose pictures may stand in scenes and collages; training takes training items only.
        seed: of the whole corruption.
    """

    def __init__(
        self,
        items: Sequence[Item],
        load: Callable[[int], Image.Image | None],
        *,
        donors: NDArray[np.int64],
        seed: int,
    ) -> None:
        self.items, self.load, self.donors, self.seed = items, load, donors, seed
        self._categories = [item.category for item in items]

    def __call__(self, row: int, condition: Condition) -> tuple[Image.Image, NDArray[np.bool_]] | None:
        """The corrupted picture and [H, W] bool, True where it does not show the item; None without a picture."""
        image = self.load(row)
        if image is None:
            return None
        kind, amount = condition.kind, condition.amount
        seed = item_seed(self.seed, self.items[row].id)
        if kind == "crop":
            return crop_image(image, amount, seed)
        if kind in ("scene", "closeup"):
            scene, mask = compose_scene(image, self._pictures(row, int(amount) - 1, seed), seed)
            return (scene, mask) if kind == "scene" else close_up_image(scene, mask, seed)
        if kind == "overlay":
            kind = _OVERLAY[int(np.random.default_rng([seed, _DRAW]).integers(len(_OVERLAY)))]
        if kind not in IMAGE_KINDS:
            return image, np.zeros((image.height, image.width), dtype=bool)
        others = self._pictures(row, 3, seed) if kind == "collage" else []
        chosen: Any = kind
        return corrupt_image(image, chosen, amount, seed, others=others)

    def _pictures(self, row: int, count: int, seed: int) -> list[Image.Image]:
        rows = scene_donors(row, self._categories, self.donors, count, seed)
        return [picture for other in rows if (picture := self.load(other)) is not None]
