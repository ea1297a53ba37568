"""Features of pictures that another cache holds are copied, bit for bit, and only new pictures go through the tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
from PIL import Image

from tgq_fast.data import Catalog, Item
from tgq_fast.models import features as features_module
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.towers import TextTower, VisionTower, load_text_tower, load_vision_tower

Towers = tuple[VisionTower, TextTower]


@pytest.fixture(scope="module")
def towers(vit: Path, llama: Path) -> Towers:
    return load_vision_tower(str(vit)), load_text_tower(str(llama))


@pytest.fixture(scope="module")
def config(vit: Path, llama: Path) -> TGQFormerConfig:
    return tiny.tiny_config(vit, llama)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    return tmp_path


def catalog_of(shop: Path, *names: object) -> Catalog:
    items = [Item(f"i{at}", None if name is None else f"{name}.png") for at, name in enumerate(names)]
    return Catalog.from_items(items, root=shop)


def build(catalog: Catalog, towers: Towers, config: TGQFormerConfig, cache: Path) -> tuple[FeatureStore, int]:
    """The store, and how many pictures went through the tower."""
    seen = 0

    def count(vision: VisionTower, batch: list[Any], items: Any) -> Any:
        nonlocal seen
        seen += sum(hasattr(pixels, "shape") for pixels in batch)
        return encode(vision, batch, items)

    encode = features_module.encode_chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features_module, "encode_chunk", count)
        patch.setattr(features_module, "CHUNK", 5)
        return FeatureStore.open_or_build(catalog, *towers, config, cache, on_error="skip"), seen


def test_only_new_pictures_are_computed(shop: Path, towers: Towers, config: TGQFormerConfig, tmp_path: Path) -> None:
    first, computed = build(catalog_of(shop, *range(8), None, "broken"), towers, config, tmp_path / "cache")
    assert computed == 8 and list(first.invalid) == [9]
    # other order, new pictures in front and between, one twice, no picture, and one that was refused before
    catalog = catalog_of(shop, 10, 7, None, 3, "broken", 11, 0, 7)
    shared, computed = build(catalog, towers, config, tmp_path / "cache")
    alone, every = build(catalog, towers, config, tmp_path / "alone")
    assert (computed, every) == (2, 6)
    assert np.array_equal(shared.visual, alone.visual) and np.array_equal(shared.global_image, alone.global_image)
    assert shared.visual.any(axis=(1, 2)).tolist() == [True, True, False, True, False, True, True, True]
    assert shared.invalid == alone.invalid and list(shared.invalid) == [4]
    # what was copied can be copied on, from several caches
    _, computed = build(catalog_of(shop, 11, 10, 5, 9), towers, config, tmp_path / "cache")
    assert computed == 1
    assert build(catalog, towers, config, tmp_path / "cache")[1] == 0


@pytest.mark.parametrize("harm", ["features", "contents", "shorter contents", "no manifest"])
def test_a_damaged_cache_gives_nothing_wrong(
    shop: Path, towers: Towers, config: TGQFormerConfig, tmp_path: Path, harm: str
) -> None:
    build(catalog_of(shop, *range(8)), towers, config, tmp_path / "cache")
    folder = next((tmp_path / "cache" / "features").glob("*"))
    if harm == "features":
        file = next(folder.glob("visual.*.bin"))
        data = bytearray(file.read_bytes())
        data[1] ^= 1
        file.write_bytes(data)
    elif harm == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        file = folder / "contents.bin"
        file.write_bytes(b"x" * file.stat().st_size if harm == "contents" else file.read_bytes()[:-1])
    catalog = catalog_of(shop, 7, 2, 1)
    shared, computed = build(catalog, towers, config, tmp_path / "cache")
    alone, _ = build(catalog, towers, config, tmp_path / "alone")
    assert np.array_equal(shared.visual, alone.visual)
    assert computed == (2 if harm == "features" else 3)  # the chunk of rows 5 … 7 is whole


def test_another_tower_shares_nothing(
    shop: Path, towers: Towers, config: TGQFormerConfig, clip: Path, llama: Path, tmp_path: Path
) -> None:
    build(catalog_of(shop, 1, 2), towers, config, tmp_path)
    other = load_vision_tower(str(clip)), load_text_tower(str(llama))
    assert build(catalog_of(shop, 2, 1), other, tiny.tiny_config(clip, llama), tmp_path)[1] == 2
