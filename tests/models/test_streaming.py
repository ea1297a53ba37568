"""Embedding in one pass: the bits of the cached way, with a model whose pictures are decoded ahead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from PIL import Image

from tgq_fast.data.catalog import Catalog
from tgq_fast.errors import ImageError
from tgq_fast.models import TGQFormerModel
from tgq_fast.models import features as features_module
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.towers import TextTower, VisionTower, load_text_tower, load_vision_tower
from tgq_fast.pool import ItemPool, embed_catalog


@pytest.fixture(scope="module")
def towers(vit: Path, llama: Path) -> tuple[VisionTower, TextTower]:
    return load_vision_tower(str(vit)), load_text_tower(str(llama))


@pytest.fixture(scope="module")
def model(towers: tuple[VisionTower, TextTower], vit: Path, llama: Path) -> TGQFormerModel:
    torch.manual_seed(0)
    config = tiny.tiny_config(vit, llama)
    return TGQFormerModel.from_config_with_towers(config, vision=towers[0], text=towers[1]).eval()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """35 items: batches of several sizes and tails, one without a picture, two of them unusable."""
    folder = tiny.write_catalog(tmp_path_factory.mktemp("shop") / "c", 35)
    (folder / "images" / "2.png").write_bytes(b"no picture")
    (folder / "images" / "20.png").unlink()
    return Catalog.load(folder)


def vectors(pool: Path) -> torch.Tensor:
    return ItemPool.open(pool).embeddings()


@pytest.mark.parametrize("batch_size", [3, 16, 64])
def test_streamed_and_cached_pools_have_the_same_bytes(
    model: TGQFormerModel,
    towers: tuple[VisionTower, TextTower],
    shop: Catalog,
    tmp_path: Path,
    batch_size: int,
) -> None:
    store = FeatureStore.open_or_build(shop, *towers, model.config, tmp_path / "cache", on_error="skip")
    reports = [
        embed_catalog(
            shop, model, tmp_path / name, batch_size=batch_size, shard_size=20, on_error="skip", features=features
        )
        for name, features in (("streamed", None), ("cached", store))
    ]
    assert [(report.embedded, report.rejected) for report in reports] == [(33, 2), (33, 2)]
    files = [p.name for p in (tmp_path / "cached").glob("shard-*")]
    assert len(files) >= 6
    for name in files:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "cached" / name).read_bytes(), name
    with pytest.raises(ImageError, match="i2"):
        embed_catalog(shop, model, tmp_path / "strict")


def test_a_pictures_features_do_not_depend_on_how_many_come_with_it(towers: tuple[VisionTower, TextTower]) -> None:
    """Seen by the numbers of pictures that the tower is run on; their bits differ by number on some processors only."""
    vision, sizes = towers[0], list[int]()
    run = vision._run
    pixels = torch.randn(37, *vision.image_processor([Image.new("RGB", (40, 40))]).shape[1:])
    vision._run = lambda model, part: (sizes.append(len(part)), run(model, part))[1]
    try:
        whole = vision(pixels, fill=True)
        assert sizes == [16, 16, 16] and [len(part) for part in whole] == [37, 37]
        for count in (1, 5, 16, 20):
            cut = vision(pixels[:count], fill=True)
            assert all(torch.equal(a, b[:count]) for a, b in zip(cut, whole, strict=True)), count
        assert set(sizes) == {16}
        sizes.clear()
        vision(pixels[:3])
        assert sizes == [3]  # a query does not wait for others
    finally:
        vision._run = run


def test_the_key_is_that_of_the_picture_that_is_embedded(
    model: TGQFormerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that is replaced while it is worked on is found changed by the next run."""
    catalog = Catalog.load(tiny.write_catalog(tmp_path / "c", 6))
    path = tmp_path / "c" / "images" / "3.png"
    before = vectors_of(catalog, model, tmp_path / "before")
    original = type(model).preparation

    def preparation(self: TGQFormerModel):  # type: ignore[no-untyped-def]
        prepare = original(self)

        def meanwhile(picture, item_id):  # type: ignore[no-untyped-def]
            if item_id == "i3":
                Image.new("RGB", (40, 40), (1, 250, 3)).save(path)
            return prepare(picture, item_id)

        return meanwhile

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "preparation", preparation)
        assert torch.equal(vectors_of(catalog, model, tmp_path / "pool"), before)  # the old picture, and its key
    assert embed_catalog(catalog, model, tmp_path / "pool").changed == 1
    assert not torch.equal(ItemPool.open(tmp_path / "pool").get(["i3"])[0], before[3])


def vectors_of(catalog: Catalog, model: TGQFormerModel, out: Path) -> torch.Tensor:
    embed_catalog(catalog, model, out)
    return vectors(out)


def test_only_a_whole_cache_that_is_there_is_found(
    model: TGQFormerModel, towers: tuple[VisionTower, TextTower], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "CHUNK", 4)
    catalog, cache = Catalog.load(tiny.write_catalog(tmp_path / "c", 10)), tmp_path / "cache"

    def find() -> FeatureStore | None:
        return FeatureStore.find(catalog, *towers, model.config, cache)

    assert find() is None and not cache.exists()
    with pytest.raises(RuntimeError):
        FeatureStore.open_or_build(catalog, *towers, model.config, cache, progress=stop_after_a_chunk)
    before = sorted(os.walk(cache))
    assert find() is None and sorted(os.walk(cache)) == before
    FeatureStore.open_or_build(catalog, *towers, model.config, cache)
    found = find()
    assert found is not None and len(found) == 10
    Image.new("RGB", (40, 40), (9, 9, 200)).save(tmp_path / "c" / "images" / "1.png")
    assert find() is None


def stop_after_a_chunk(done: int, total: int) -> None:
    raise RuntimeError("stopped")
