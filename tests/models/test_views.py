"""Views: features of the pictures that the conditions make, resumable, keyed by content, drawn evenly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image

from tgq_fast.data import Catalog, load_image
from tgq_fast.data.conditions import CLEAN, Condition, Picturer
from tgq_fast.errors import ArgumentError
from tgq_fast.models import features
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.token_grid import token_grid, token_shares
from tgq_fast.models.towers import VisionTower, load_image_processor, load_text_tower, load_vision_tower
from tgq_fast.models.views import ViewRecipe, ViewStore


@pytest.fixture(scope="module")
def vision(vit: Path) -> VisionTower:
    return load_vision_tower(str(vit))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 3)


def test_clean_views_are_the_features_of_the_cache(
    catalog: Catalog, vision: VisionTower, vit: Path, llama: Path, tmp_path: Path
) -> None:
    config = tiny.tiny_config(vit, llama)
    store = FeatureStore.open_or_build(catalog, vision, load_text_tower(str(llama)), config, tmp_path)
    rows = [4, 1, 7]
    views = ViewStore.open_or_build(catalog, vision, rows, CLEAN, cache_dir=tmp_path)
    assert len(views) == 3 and views.valid.all() and views.first.tolist().count(-1) == len(catalog) - 3
    torch.testing.assert_close(
        torch.from_numpy(views.visual[views.first[rows]]), torch.from_numpy(store.visual[rows]), rtol=2e-3, atol=2e-3
    )


def test_views_are_the_tower_of_the_corrupted_pictures(catalog: Catalog, vision: VisionTower, tmp_path: Path) -> None:
    condition = Condition("badge", 0.3)
    views = ViewStore.open_or_build(catalog, vision, range(len(catalog)), condition, seed=5, cache_dir=tmp_path)
    items = catalog.items
    made = Picturer(
        items,
        lambda row: load_image(catalog.image_path(items[row]), items[row].id),
        donors=np.arange(len(items)),
        seed=5 * 1009,
    )
    for row in (0, 6):
        found = made(row, condition)
        assert found is not None
        tokens, pooled = vision(vision.image_processor([found[0]]))
        torch.testing.assert_close(torch.from_numpy(views.visual[row]).float(), tokens[0], rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(torch.from_numpy(views.global_image[row]).float(), pooled[0], rtol=5e-3, atol=5e-3)
        own, foreign = views.shares[row].astype(np.float32)
        assert abs(foreign[1:].mean() - 0.3) < 0.08 and abs(own[1:].mean() - 0.7) < 0.08
        assert own[0] == foreign[0] == 0  # the class token has no place


def test_order_of_rows_changes_nothing_and_the_recipe_everything(
    catalog: Catalog, vision: VisionTower, tmp_path: Path
) -> None:
    recipe = ViewRecipe(per_item=3, seed=1)
    first = ViewStore.open_or_build(catalog, vision, [5, 2, 8], recipe, cache_dir=tmp_path / "a")
    again = ViewStore.open_or_build(catalog, vision, [8, 5, 2], recipe, cache_dir=tmp_path / "b")
    assert first.key == again.key and np.array_equal(first.visual, again.visual)
    more = ViewStore.open_or_build(catalog, vision, [8, 5, 2, 9], recipe, cache_dir=tmp_path / "b")
    for row in (5, 2, 8):  # further items change no view of the others
        own, other = (s.visual[s.first[row] : s.first[row] + 3] for s in (first, more))
        np.testing.assert_allclose(own.astype(np.float32), other.astype(np.float32), atol=4e-3)
    keys = {
        ViewStore.open_or_build(catalog, vision, [5, 2, 8], other, cache_dir=tmp_path / "c").key
        for other in (recipe, replace(recipe, seed=2), replace(recipe, area=(0.1, 0.2)), replace(recipe, per_item=2))
    }
    assert len(keys) == 4


def test_recipe_draws_kinds_by_weight_and_areas_in_range() -> None:
    recipe = ViewRecipe({"badge": 1.0, "scene": 3.0, "crop": 0.0, "background": 1.0}, area=(0.2, 0.4), per_item=5)
    found = [c for n in range(400) for c in recipe.conditions(f"i{n}")]
    share = sum(c.kind == "scene" for c in found) / len(found)
    assert abs(share - 0.6) < 0.05 and not any(c.kind == "crop" for c in found)
    areas = [c.amount for c in found if c.kind == "badge"]
    assert 0.2 <= min(areas) < 0.22 and max(areas) > 0.38 and max(areas) <= 0.4
    assert recipe.conditions("i3") == recipe.conditions("i3") != recipe.conditions("i4")


@pytest.mark.parametrize(
    "changes",
    [
        {"kinds": {"hat": 1.0}},
        {"kinds": {}},
        {"kinds": {"badge": 0.0}},
        {"kinds": {"badge": -1.0, "crop": 2.0}},
        {"area": (0.0, 0.4)},
        {"area": (0.5, 0.4)},
        {"crop": (0.5, 1.1)},
        {"per_item": 0},
        {"products": 1},
    ],
)
def test_an_odd_recipe_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        ViewRecipe(**changes)  # type: ignore[arg-type]


def test_views_are_drawn_evenly_and_only_where_they_are_usable(vision: VisionTower, tmp_path: Path) -> None:
    folder = tiny.write_catalog(tmp_path / "c")
    (folder / "images" / "2.png").write_bytes(b"not a picture")
    catalog = Catalog.load(folder)
    broken = [row for row, item in enumerate(catalog.items) if item.file_name and item.file_name.endswith("/2.png")]
    views = ViewStore.open_or_build(
        catalog, vision, range(8), ViewRecipe(per_item=2), cache_dir=tmp_path, groups=np.arange(len(catalog)) % 2
    )
    assert not views.valid[views.first[broken[0]]]
    rng = np.random.default_rng(0)
    rows = np.tile(np.arange(len(catalog)), 500)
    chosen = views.draw(rows, 0.4, rng)
    assert (chosen[rows == broken[0]] == -1).all() and (chosen[rows >= 8] == -1).all()
    fine = (rows < 8) & (rows != broken[0]) & np.array([i.file_name is not None for i in catalog.items])[rows]
    assert abs((chosen[fine] >= 0).mean() - 0.4) < 0.04
    taken = chosen[fine & (chosen >= 0)]
    assert (taken // 2 == np.searchsorted(np.arange(8), rows[fine & (chosen >= 0)])).all()
    assert 0.4 < (taken % 2).mean() < 0.6
    assert (views.draw(rows, 0.0, rng) == -1).all()


def test_tiny_pictures_and_a_lone_category_still_give_views(vision: VisionTower, tmp_path: Path) -> None:
    folder = tiny.write_catalog(tmp_path / "c")
    for name, size in (("0.png", (8, 8)), ("1.png", (8, 60)), ("3.png", (4000, 8))):
        Image.new("RGB", size, (200, 10, 10)).save(folder / "images" / name)
    catalog = Catalog.load(folder)
    lone = Catalog.from_items([replace(item, category="x") for item in catalog.items], root=catalog.root)
    for shop in (catalog, lone):
        views = ViewStore.open_or_build(shop, vision, range(5), Condition("scene", 9.0), cache_dir=tmp_path / "v")
        assert np.isfinite(views.visual).all() and views.valid[:4].all()


def test_scenes_of_one_fold_show_no_other_fold(vision: VisionTower, tmp_path: Path) -> None:
    """Changing another fold's pictures changes no view."""
    folder = tiny.write_catalog(tmp_path / "c")
    catalog = Catalog.load(folder)
    labels = np.arange(len(catalog)) % 2
    mine = np.flatnonzero(labels == 0)
    recipe = ViewRecipe({"scene": 1.0, "collage": 1.0}, per_item=3)
    before = ViewStore.open_or_build(catalog, vision, mine, recipe, groups=labels, cache_dir=tmp_path / "a")
    for row in np.flatnonzero(labels == 1).tolist():
        if (name := catalog.items[row].file_name) is not None:
            Image.new("RGB", (30, 30), (1, 2, 3)).save(folder / name)
    after = ViewStore.open_or_build(catalog, vision, mine, recipe, groups=labels, cache_dir=tmp_path / "b")
    assert before.key != after.key and np.array_equal(before.visual, after.visual)
    mixed = ViewStore.open_or_build(catalog, vision, mine, recipe, cache_dir=tmp_path / "b")
    assert not np.array_equal(mixed.visual, after.visual)


def test_a_killed_build_goes_on_to_the_same_bytes(
    catalog: Catalog, vit: Path, vision: VisionTower, tmp_path: Path
) -> None:
    script = f"""
import os, signal
from tgq_fast.data import Catalog
from tgq_fast.models import features
from tgq_fast.models.towers import load_vision_tower
from tgq_fast.models.views import ViewRecipe, ViewStore
features.CHUNK = 3
def die(done, total):
    if done >= 6:
        os.kill(os.getpid(), signal.SIGKILL)
ViewStore.open_or_build(Catalog.load({str(catalog.root)!r}), load_vision_tower({str(vit)!r}), range(6),
                        ViewRecipe(per_item=2), cache_dir={str(tmp_path / "killed")!r}, progress=die)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    steps: list[int] = []
    options = {"recipe": ViewRecipe(per_item=2)}
    killed = ViewStore.open_or_build(
        catalog, vision, range(6), **options, cache_dir=tmp_path / "killed", progress=lambda done, _: steps.append(done)
    )
    whole = ViewStore.open_or_build(catalog, vision, range(6), **options, cache_dir=tmp_path / "whole")
    assert steps == [9, 12]
    assert np.array_equal(killed.visual, whole.visual) and np.array_equal(killed.shares, whole.shares)


@pytest.mark.parametrize(("length", "grid"), [(49, (7, 0)), (197, (14, 1)), (201, (14, 5)), (3, None), (1, None)])
def test_token_grid(length: int, grid: tuple[int, int] | None) -> None:
    assert token_grid(length) == grid


def test_shares_follow_the_letterbox() -> None:
    """A wide picture whose left half is foreign: halves in the middle rows, nothing in the margin."""
    process, _ = load_image_processor("efficientnet-lite0")
    mask = np.zeros((112, 224), bool)
    mask[:, :112] = True
    own, foreign = token_shares(mask, process, 16).astype(np.float32).reshape(2, 4, 4)
    assert (foreign[1:3, :2] > 0.97).all() and (own[1:3, 2:] > 0.97).all()
    assert (foreign[1:3, 2:] < 0.03).all() and (own[1:3, :2] < 0.03).all()
    assert not own[[0, 3]].any() and not foreign[[0, 3]].any()
    assert not token_shares(mask, process, 3).any()
