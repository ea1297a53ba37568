"""Scenes, crops and named conditions: the masks are right, the places even, and everything depends on the id alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tgq_fast.data import Item
from tgq_fast.data.conditions import CLEAN, Condition, Picturer, parse_conditions
from tgq_fast.data.corruption import item_seed
from tgq_fast.data.scenes import close_up_image, compose_scene, crop_image, scene_donors
from tgq_fast.errors import ArgumentError

RED, GREEN = (250, 0, 0), (0, 250, 0)


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


@given(st.integers(0, 8), st.integers(3, 70), st.integers(3, 70), st.integers(0, 2**32 - 1), st.integers(1, 90))
def test_scene_shows_the_product_in_its_cell_and_nowhere_else(
    others: int, width: int, height: int, seed: int, odd: int
) -> None:
    """Also when the others have other shapes; the mask's complement is exactly the meant cell."""
    image = plain(RED, (width, height))
    scene, mask = compose_scene(image, [plain(GREEN, (odd, 7))] * others, seed)
    pixels = np.asarray(scene).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 60)
    assert scene.size == image.size and mask.shape == (height, width)
    assert red.any() and not (red & mask).any()
    inside = ~mask
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a rectangle
    side = int(np.ceil(np.sqrt(others + 1)))
    lines = int(np.ceil((others + 1) / side))
    assert abs(inside.sum() - width * height / (side * lines)) <= width / side + height / lines + 1


def test_every_cell_is_drawn_about_equally_often() -> None:
    places = np.zeros(4, int)
    for seed in range(400):
        mask = compose_scene(plain(RED), [plain(GREEN)] * 3, seed)[1]
        row, column = np.argwhere(~mask)[0]
        places[2 * (row // 32) + column // 32] += 1
    assert places.sum() == 400 and places.min() > 70


def test_scene_needs_a_pixel_per_cell() -> None:
    with pytest.raises(ArgumentError, match="one per cell"):
        compose_scene(plain(RED, (1, 9)), [plain(GREEN)] * 3, 0)


def test_donors_are_of_distinct_other_categories_as_far_as_there_are_any() -> None:
    categories = ["a", "b", "b", "c", None, "d", "a"]
    pool = np.arange(7)
    for seed in range(50):
        rows = scene_donors(0, categories, pool, 3, seed)
        found = [categories[row] for row in rows]
        assert len(set(found)) == 3 and "a" not in found
    assert len(scene_donors(0, categories, pool, 6, 0)) == 6  # four other categories only: some twice
    assert scene_donors(0, ["a", "a", "a"], np.arange(3), 3, 0) == []
    assert scene_donors(0, categories, np.empty(0, np.int64), 3, 0) == []
    assert set(scene_donors(0, categories, np.array([1, 2]), 3, 1)) <= {1, 2}


def test_crop_keeps_the_size_and_shows_a_part() -> None:
    wide = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (50, 1, 3))
    image = Image.fromarray(wide)
    part, mask = crop_image(image, 0.25, 3)
    values = np.asarray(part)[..., 0].astype(int)
    assert part.size == image.size and not mask.any()
    assert 40 <= np.ptp(values) <= 56  # half of the width, up to the filter's overshoot
    assert crop_image(image, 1.0, 4)[0].tobytes() in (
        image.tobytes(),
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes(),
    )
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ArgumentError, match="share"):
            crop_image(image, share, 0)


def test_close_up_frames_the_product_of_a_scene() -> None:
    red = plain((200, 0, 0)).resize((60, 40))
    others = [plain((0, 200, 0)), plain((0, 0, 200)), plain((200, 200, 0))]
    frames = set()
    for seed in range(24):
        scene, mask = compose_scene(red, others, seed)
        close, rest = close_up_image(scene, mask, seed)
        assert close.size == scene.size and rest.shape == mask.shape
        shown = 1 - rest.mean()
        assert 0.6 < shown <= 1.0, shown  # the frame is about the product's cell
        pixels = np.asarray(close).astype(int)
        is_red = (pixels[..., 0] > 150) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)
        assert (is_red & ~rest).sum() > 0.9 * is_red.sum() > 0
        assert is_red.mean() > 0.5  # in the scene it is at most a quarter
        frames.add(close.tobytes())
        assert close.tobytes() == close_up_image(scene, mask, seed)[0].tobytes()
    assert len(frames) > 12


@pytest.mark.parametrize(
    "text",
    [
        "clean",
        "overlay:0.3:both",
        "badge:0.05:query",
        "scene:4:pool",
        "metadata:wrong:0.5:query",
        "crop:0.6:both",
        "closeup:4:both",
        "background:1:both",
    ],
)
def test_a_condition_is_read_as_it_is_written(text: str) -> None:
    condition = Condition.parse(text)
    assert str(condition) == text and Condition.parse(str(condition)) == condition
    assert condition.on("query") == (text != "clean" and not text.endswith(":pool"))
    assert condition.on("pool") == (text != "clean" and not text.endswith(":query"))


def test_side_may_be_left_out_and_lists_keep_order() -> None:
    found = parse_conditions("scene:4, clean ,overlay:0.3:query,scene:4:both,")
    assert found == [Condition("scene", 4.0, "both"), CLEAN, Condition("overlay", 0.3, "query")]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "dirty",
            "overlay",
            "overlay:0:both",
            "overlay:0.95:both",
            "overlay:x",
            "overlay:0.3:left",
            "overlay:nan",
        ),
        *("scene:1", "scene:2.5", "scene:99", "metadata:0.5", "metadata:wrong", "metadata:wrong:2", "clean:1"),
        "badge:0.3:query:x",
    ],
)
def test_a_bad_condition_says_what_is_expected(text: str) -> None:
    with pytest.raises(ArgumentError, match="expected"):
        Condition.parse(text)


def shop(count: int = 12) -> list[Item]:
    return [Item(f"i{n}", category="abcd"[n % 4]) for n in range(count)]


def test_pictures_depend_on_seed_and_id_alone() -> None:
    items = shop()
    pictures = [plain((20 * n, 255 - 20 * n, 7)) for n in range(len(items))]
    make = Picturer(items, pictures.__getitem__, donors=np.arange(len(items)), seed=3)
    for condition in parse_conditions("overlay:0.3,border:0.2,collage:0.3,scene:4,closeup:4,crop:0.5,background:1"):
        first = make(5, condition)
        for row in (3, 1, 5):
            again = make(row, condition)
        assert first is not None and again is not None and first[0].tobytes() == again[0].tobytes()
        assert (first[1] == again[1]).all()
    other = Picturer(items, pictures.__getitem__, donors=np.arange(len(items)), seed=4)
    scenes = [maker(5, Condition("scene", 4)) for maker in (make, other)]
    assert scenes[0] is not None and scenes[1] is not None and scenes[0][0].tobytes() != scenes[1][0].tobytes()
    renamed = [replace(item, id=f"x{item.id}") for item in items]
    third = Picturer(renamed, pictures.__getitem__, donors=np.arange(len(items)), seed=3)(5, Condition("scene", 4))
    assert third is not None and third[0].tobytes() != scenes[0][0].tobytes()


def test_scenes_of_training_show_training_items_only() -> None:
    items = shop(40)
    training = np.arange(0, 40, 3)
    seen: set[int] = set()

    def load(row: int) -> Image.Image:
        seen.add(row)
        return plain(RED)

    make = Picturer(items, load, donors=training, seed=0)
    for row in training.tolist():
        make(row, Condition("scene", 4))
        make(row, Condition("collage", 0.3))
    assert seen <= set(training.tolist())


def test_overlay_draws_both_kinds_over_about_the_area() -> None:
    items = shop(40)
    make = Picturer(items, lambda row: plain(RED, (96, 96)), donors=np.arange(40), seed=1)
    wide = 0
    for row in range(40):
        found = make(row, Condition("overlay", 0.3))
        assert found is not None
        assert abs(found[1].mean() - 0.3) < 0.05
        wide += bool(found[1].any(axis=0).all())
    assert 8 <= wide <= 32  # strips are as wide as the picture, badges are not


def test_without_a_picture_there_is_nothing_to_corrupt() -> None:
    items = shop()
    make = Picturer(items, lambda row: None if row % 2 else plain(RED), donors=np.arange(12), seed=0)
    assert make(1, Condition("scene", 4)) is None
    found = make(0, Condition("scene", 4))  # donors without a picture leave fewer cells
    assert found is not None and found[0].size == (64, 64)
    assert make(2, CLEAN)[0].tobytes() == plain(RED).tobytes()  # type: ignore[index]


def test_seed_of_an_item_is_stable() -> None:
    assert item_seed(1, "a") != item_seed(2, "a") != item_seed(1, "b")
