"""The embedded catalogue: deterministic, valid, and neither trivial nor hopeless."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tgq_fast.data import Catalog, validate_images, write_demo_catalog
from tgq_fast.data.demo.canvas import EMBLEMS, PATTERNS
from tgq_fast.data.demo.products import KINDS, draw_product
from tgq_fast.data.demo.scene import photograph
from tgq_fast.data.demo.styles import random_palette, random_style, sibling_style
from tgq_fast.errors import ArgumentError, StorageError


def digest(folder: Path) -> str:
    state = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        state.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return state.hexdigest()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return Catalog.load(write_demo_catalog(tmp_path_factory.mktemp("demo"), groups=48, variants=4, image_size=48))


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="Not a directory"):
        write_demo_catalog(tmp_path / "file" / "demo", groups=1, variants=2, image_size=48)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(StorageError, match="No space"):
        write_demo_catalog(tmp_path / "demo", groups=1, variants=2, image_size=48)


def test_it_is_a_valid_catalogue(demo: Catalog) -> None:
    assert len(demo) == 192 and demo.report.ok and demo.report.warnings == []
    assert list(validate_images(demo)) == []
    assert set(Counter(item.group_id for item in demo.items).values()) == {4}
    assert demo.report.leakage == {"items_in_several_splits": 0, "groups_in_several_splits": 0}
    queries = {split: counts["queries"] for split, counts in demo.report.splits.items()}
    assert queries == {"train": 116, "validation": 20, "test": 56}
    for split in ("train", "validation", "test"):
        pairs = demo.split_pairs(split)
        assert all(
            demo.items[q].group_id == demo.items[t].group_id for q, t in zip(pairs.query, pairs.target, strict=True)
        )


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_demo_catalog(tmp_path / name, groups=4, variants=3, seed=seed, image_size=40)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_metadata_is_partly_missing_and_says_little_about_the_group(demo: Catalog) -> None:
    n = len(demo)
    for name in ("brand", "category", "material", "season", "title", "price"):
        assert 0.02 * n < demo.report.missing[name] < 0.5 * n, name
    assert any(not item.attributes and item.title is None and item.price is None for item in demo.items)
    # within a category, brand and material are shared by several groups
    cells = Counter()
    for group in {item.group_id for item in demo.items}:
        facts = {
            name: next((item.field(name) for item in demo.items if item.group_id == group and item.field(name)), None)
            for name in ("category", "material")
        }
        cells[tuple(facts.values())] += 1
    assert max(cells.values()) >= 3


def test_order_and_ids_hide_the_groups(demo: Catalog) -> None:
    groups = [item.group_id for item in demo.items]
    neighbours = sum(a == b for a, b in pairwise(groups))
    assert neighbours < 12  # 3 expected by chance, 144 if variants lay side by side


def test_overlays_and_ground_say_nothing_about_the_product() -> None:
    style = random_style("mug", np.random.default_rng(0))
    palette = random_palette(np.random.default_rng(0), "red")
    shots = [photograph(style, palette, np.random.default_rng(i), 32)[1] for i in range(120)]
    other = [
        photograph(random_style("lamp", np.random.default_rng(1)), palette, np.random.default_rng(i), 32)[1]
        for i in range(120)
    ]
    share = np.mean([bool(shot.overlays) for shot in shots])
    assert 0.45 < share < 0.85
    assert Counter(s.ground for s in shots) == Counter(s.ground for s in other)
    assert len({kind for shot in shots for kind in shot.overlays}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_styles_differ_and_colourways_do_not_change_the_shape(kind: str) -> None:
    rng = np.random.default_rng(3)
    style = random_style(kind, rng)
    red, blue = (
        np.asarray(draw_product(style, random_palette(np.random.default_rng(0), c), 96)) for c in ("red", "blue")
    )
    assert np.array_equal(red[..., 3], blue[..., 3]) and not np.array_equal(red, blue)
    assert 0.05 < (red[..., 3] > 0).mean() < 0.7
    sibling = sibling_style(style, rng)
    assert sibling.kind == kind and sibling.pattern == style.pattern
    assert (sibling.emblem, sibling.detail) != (style.emblem, style.detail)
    other = np.asarray(draw_product(sibling, random_palette(np.random.default_rng(0), "red"), 96))
    assert not np.array_equal(red, other)


def test_every_pattern_and_emblem_occurs() -> None:
    rng = np.random.default_rng(0)
    styles = [random_style("bottle", rng) for _ in range(300)]
    assert {s.pattern for s in styles} == set(PATTERNS) and {s.emblem for s in styles} == set(EMBLEMS)


def test_bad_sizes(tmp_path: Path) -> None:
    for options in ({"groups": 0}, {"variants": 0}, {"image_size": 8}):
        with pytest.raises(ArgumentError):
            write_demo_catalog(tmp_path, **options)
