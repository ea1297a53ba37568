"""Overlays cover the area they promise, where the mask says; metadata corruption does what its name says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tgq_fast.data import Item, corrupt_image, corrupt_metadata, item_seed, useful_text
from tgq_fast.data.corruption import AREAS, IMAGE_KINDS, METADATA_KINDS, OVERLAY_KINDS, background_mask
from tgq_fast.errors import ArgumentError


def photo(width: int = 224, height: int = 224) -> Image.Image:
    """A dark disc on a light ground."""
    y, x = np.mgrid[0:height, 0:width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) * 0.3) ** 2
    return Image.fromarray(np.where(disc[..., None], [90, 40, 40], [240, 240, 238]).astype(np.uint8))


@pytest.mark.parametrize("kind", OVERLAY_KINDS)
@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("size", [(224, 224), (160, 300), (301, 97)])
def test_overlays_cover_their_area_and_touch_nothing_else(kind: str, area: float, size: tuple[int, int]) -> None:
    image = photo(*size)
    before = np.asarray(image).copy()
    for seed in range(6):
        corrupted, mask = corrupt_image(image, kind, area, seed)  # type: ignore[arg-type]
        assert mask.shape == (size[1], size[0]) and mask.dtype == bool and corrupted.size == size
        assert abs(mask.mean() - area) <= 1.2 / min(size) + 0.003
        after = np.asarray(corrupted)
        assert np.array_equal(after[~mask], before[~mask])
        if kind != "collage":
            assert (after[mask] != before[mask]).any(-1).mean() > 0.9
    assert np.array_equal(np.asarray(image), before)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_the_seed_decides(kind: str) -> None:
    pixels = [np.asarray(corrupt_image(photo(), kind, 0.15, seed)[0]) for seed in (1, 1, 2, 3, 4)]  # type: ignore[arg-type]
    assert np.array_equal(pixels[0], pixels[1])
    assert any(not np.array_equal(pixels[0], other) for other in pixels[2:])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(IMAGE_KINDS), st.floats(0.001, 0.9), st.integers(0, 2**40), st.integers(8, 120), st.integers(8, 120)
)
def test_any_size_area_and_seed_work(kind: str, area: float, seed: int, width: int, height: int) -> None:
    corrupted, mask = corrupt_image(photo(width, height), kind, area, seed)  # type: ignore[arg-type]
    assert corrupted.size == (width, height) and mask.shape == (height, width)


def test_text_is_drawn_and_useful_text_is_about_the_item() -> None:
    blank, mask = corrupt_image(photo(), "text_strip", 0.15, 0, text="")
    written, same = corrupt_image(photo(), "text_strip", 0.15, 0, text="LEATHER")
    assert np.array_equal(mask, same)
    assert (np.asarray(blank) != np.asarray(written)).any(-1).sum() > 100
    item = Item("a", category="bag", attributes={"material": "leather"})
    assert (
        useful_text(item) == "LEATHER" and useful_text(item, ("category",)) == "BAG" and useful_text(Item("b")) is None
    )


def test_collage_takes_tiles_from_others() -> None:
    green = Image.new("RGB", (50, 50), (0, 255, 0))
    corrupted, mask = corrupt_image(photo(), "collage", 0.3, 0, others=[green])
    tiles = np.asarray(corrupted)[mask]
    assert (tiles == (0, 255, 0)).all(-1).mean() > 0.8


def test_background_swap_keeps_the_product() -> None:
    image = photo()
    disc = np.asarray(image)[..., 0] < 128
    assert np.array_equal(background_mask(image), ~disc)
    corrupted, mask = corrupt_image(image, "background", 0.0, 3)
    assert np.array_equal(mask, ~disc)
    assert np.array_equal(np.asarray(corrupted)[disc], np.asarray(image)[disc])
    assert (np.asarray(corrupted)[mask] != np.asarray(image)[mask]).any(-1).mean() > 0.9


def test_an_enclosed_patch_of_ground_colour_is_not_background() -> None:
    pixels = np.asarray(photo()).copy()
    pixels[102:122, 102:122] = (240, 240, 238)
    assert not background_mask(Image.fromarray(pixels))[102:122, 102:122].any()


DONORS = [
    Item(
        str(i),
        title=f"t{i}",
        brand=f"b{i % 3}",
        category="c",
        attributes={"k": f"v{i}", "only": "x"},
        price=i,
        group_id=f"g{i}",
    )
    for i in range(30)
]


def test_metadata_corruptions() -> None:
    item = DONORS[4]
    empty = corrupt_metadata(item, "empty", seed=0)
    assert (empty.title, empty.brand, empty.category, empty.price, dict(empty.attributes)) == (
        None,
        None,
        None,
        None,
        {},
    )
    for seed in range(20):
        partial = corrupt_metadata(item, "partial", seed=seed)
        names = ("title", "brand", "category", "price", "k", "only")
        values = [partial.field(name) for name in names]
        assert None in values and all(v in (None, item.field(n)) for v, n in zip(values, names, strict=True))
        wrong = corrupt_metadata(item, "wrong", seed=seed, donors=DONORS)
        for name in ("title", "brand", "price", "k"):
            assert wrong.field(name) is not None and wrong.field(name) != item.field(name)
        # every donor has the same category and attribute: nothing false can be said, so the field goes
        assert wrong.category is None and "only" not in wrong.attributes
        for changed in (empty, partial, wrong):
            assert (changed.id, changed.file_name, changed.group_id, changed.row) == (
                item.id,
                item.file_name,
                item.group_id,
                item.row,
            )
    assert corrupt_metadata(item, "wrong", seed=3, donors=DONORS) == corrupt_metadata(
        item, "wrong", seed=3, donors=DONORS
    )
    assert len({corrupt_metadata(item, "wrong", seed=s, donors=DONORS).title for s in range(20)}) > 3
    assert item == DONORS[4] and item.attributes["k"] == "v4"


def test_only_named_fields_are_touched() -> None:
    changed = corrupt_metadata(DONORS[0], "empty", seed=0, fields=["brand", "k"])
    assert changed.brand is None and "k" not in changed.attributes
    assert changed.title == "t0" and changed.attributes == {"only": "x"}


def test_an_item_without_metadata_stays_as_it_is() -> None:
    for kind in METADATA_KINDS:
        assert corrupt_metadata(Item("a"), kind, seed=0, donors=DONORS) == Item("a")


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="kind"):
        corrupt_image(photo(), "glitter", 0.1, 0)  # type: ignore[arg-type]
    for area in (0.0, -1.0, 0.95, float("nan")):
        with pytest.raises(ArgumentError, match="area"):
            corrupt_image(photo(), "badge", area, 0)
    with pytest.raises(ArgumentError, match="kind"):
        corrupt_metadata(DONORS[0], "rude", seed=0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="donors"):
        corrupt_metadata(DONORS[0], "wrong", seed=0)


def test_item_seeds_differ_by_item_and_run() -> None:
    assert len({item_seed(s, f"item-{i}") for s in range(5) for i in range(200)}) == 1_000
    assert item_seed(0, "a") == item_seed(0, "a")
