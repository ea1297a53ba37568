"""The second look: which part of a picture is seen again, what is seen, and that every way to encode does it alike."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image

from tgq_fast.data.catalog import Catalog
from tgq_fast.data.conditions import Condition
from tgq_fast.data.items import Item
from tgq_fast.errors import ArgumentError
from tgq_fast.models import TGQFormerConfig, TGQFormerModel
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.second_look import SecondLook, calibrate, close_up, windows
from tgq_fast.serve.explain import explain
from tgq_fast.workflow.embeddings import Conditions

QUADRANTS = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)]


class TestWindows:
    @pytest.mark.parametrize(("length", "leading"), [(49, 0), (16, 0), (17, 1), (257, 1)])
    def test_each_covers_a_quarter_of_the_picture(self, length: int, leading: int) -> None:
        found = windows(length)
        assert found is not None
        boxes, cover = found
        assert cover.shape == (len(boxes), length) and not cover[:, :leading].any()
        assert torch.allclose(cover.sum(dim=1), torch.tensor((length - leading) / 4), atol=1e-5)
        assert {tuple(box[:2]) for box in boxes} >= set(QUADRANTS)

    def test_cells_are_where_the_boxes_are(self) -> None:
        found = windows(16)
        assert found is not None
        for box, cover in zip(*found, strict=True):
            ys, xs = np.divmod(np.flatnonzero(cover.numpy() > 0.99), 4)
            assert (xs / 4 >= box[0]).all() and ((xs + 1) / 4 <= box[2]).all()
            assert (ys / 4 >= box[1]).all() and ((ys + 1) / 4 <= box[3]).all()

    def test_no_grid_no_windows(self) -> None:
        assert windows(3) is None


class TestCloseUp:
    def test_the_part_fills_the_picture(self) -> None:
        pixels = torch.zeros(4, 3, 16, 24)
        for number, (left, top) in enumerate(QUADRANTS):
            x, y = int(left * 24), int(top * 16)
            pixels[number, :, y : y + 8, x : x + 12] = number + 1.0
        boxes = np.array([(x, y, x + 0.5, y + 0.5) for x, y in QUADRANTS])
        close = close_up(pixels, boxes)
        assert close.shape == pixels.shape
        for number in range(4):
            assert torch.equal(close[number], torch.full((3, 16, 24), number + 1.0))

    def test_it_is_an_enlargement(self) -> None:
        ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
        close = close_up(ramp, np.array([(0.25, 0.25, 0.75, 0.75)]))[0, 0, 0]
        assert (close.diff() > 0).all()
        assert close[0].item() == pytest.approx(8 / 31, abs=0.01) and close[-1].item() == pytest.approx(
            23 / 31, abs=0.01
        )

    def test_values_stay_in_range(self) -> None:
        noisy = torch.rand(2, 3, 32, 32).round()
        close = close_up(noisy, np.array([(0.0, 0.0, 0.5, 0.5)] * 2))
        assert close.min() >= 0 and close.max() <= 1


class Planted(torch.nn.Module):
    """A guide that means one quadrant, surely."""

    def __init__(self, quadrant: int | None, like: Any) -> None:
        super().__init__()
        self.quadrant, self.like = quadrant, like

    def patch_agreement(self, features: Any) -> Any:
        found = self.like.patch_agreement(features)
        guide = torch.zeros(found.guide.shape)
        if self.quadrant is not None:
            left, top = QUADRANTS[self.quadrant]
            cells = guide[:, 1:].view(-1, 4, 4)
            cells[:, int(4 * top) : int(4 * top) + 2, int(4 * left) : int(4 * left) + 2] = 9.0
        real = 1 if features.visual_mask is None else features.visual_mask  # as PatchAgreement's own
        found.guide = guide * features.has_metadata[:, None] * real
        return found

    def forward(self, features: Any) -> Any:
        return self.like(features)


Make = Callable[..., TGQFormerModel]


@pytest.fixture
def planted(vit: Path, llama: Path) -> Make:
    def make(quadrant: int | None, **overrides: Any) -> TGQFormerModel:
        torch.manual_seed(0)
        options = {"whitening": 8, "norm": "pre", "guide": True, "second_look": 0.8, **overrides}
        model = TGQFormerModel.from_config_with_towers(tiny.tiny_config(vit, llama, **options)).eval()
        if options["guide"]:
            model.connector.alignment = Planted(quadrant, model.connector.alignment)
        return model

    return make


def four(colours: list[tuple[int, int, int]]) -> Image.Image:
    picture, half = Image.new("RGB", (tiny.SIZE, tiny.SIZE)), tiny.SIZE // 2
    for colour, (left, top) in zip(colours, QUADRANTS, strict=True):
        picture.paste(Image.new("RGB", (half, half), colour), (int(left * tiny.SIZE), int(top * tiny.SIZE)))
    return picture


COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
FIELDS = {"category": "shoe"}


@pytest.mark.parametrize("quadrant", range(4))
def test_the_model_sees_what_the_guide_means(planted: Make, quadrant: int) -> None:
    looked = planted(quadrant).encode(four(COLOURS), fields=FIELDS)
    once = planted(quadrant, second_look=0.0)
    alone = Image.new("RGB", (tiny.SIZE, tiny.SIZE), COLOURS[quadrant])
    whole, close = (once.encode(picture, fields=FIELDS) for picture in (four(COLOURS), alone))
    assert torch.allclose(looked, torch.nn.functional.normalize(whole + close, dim=0), atol=1e-5)
    assert not torch.allclose(whole, close, atol=1e-2)


@pytest.mark.parametrize("case", ["unsure", "no metadata", "no guide", "training's own features"])
def test_one_look_is_enough(planted: Make, catalog: Catalog, tmp_path: Path, case: str) -> None:
    quadrant, guide = None if case == "unsure" else 2, case != "no guide"
    model, once = planted(quadrant, guide=guide), planted(quadrant, guide=guide, second_look=0.0)
    fields: dict[str, str] = {} if case == "no metadata" else FIELDS
    if case == "training's own features":
        store = FeatureStore.open_or_build(catalog, model.vision_tower, model.text_tower, model.config, tmp_path)
        store = store.whitened(model.whitening, tmp_path)
        assert torch.equal(model.encode(catalog, features=store), once.encode(catalog, features=store))
        return
    assert torch.equal(model.encode(four(COLOURS), fields=fields), once.encode(four(COLOURS), fields=fields))


def test_every_way_in_gives_the_same_embedding(planted: Make, catalog: Catalog, tmp_path: Path) -> None:
    model = planted(1)
    expected = model.encode(catalog)
    store = FeatureStore.open_or_build(catalog, model.vision_tower, model.text_tower, model.config, tmp_path)
    assert torch.equal(model.encode(catalog, features=store), expected)
    prepare = model.preparation()
    pixels = [i.file_name and prepare(catalog.picture(i), i.id) for i in catalog.items]
    assert torch.equal(model.encode(catalog, pixels=pixels), expected)
    pictures = [Image.open(catalog.image_path(item)).convert("RGB") for item in catalog.items[:3]]
    with torch.no_grad():
        output = model(**model.processor(pictures, list(catalog.items[:3])))
    assert torch.allclose(output.embedding, expected[:3], atol=1e-5)
    assert not torch.allclose(planted(1, second_look=0.0).encode(catalog), expected, atol=1e-3)


def test_the_page_shows_what_is_looked_at_again(planted: Make) -> None:
    item = Item(id="a", category="shoe")
    told = explain(planted(2), item, four(COLOURS))
    shown = Image.open(io.BytesIO(base64.b64decode(told["close_up"].partition(",")[2])))
    middle = np.array(shown.getpixel((shown.width // 2, shown.height // 2)))
    assert np.abs(middle - COLOURS[2]).max() < 16
    assert "close_up" not in explain(planted(None), item, four(COLOURS))


def test_an_item_without_a_picture_stays_without(planted: Make) -> None:
    rows = [{"category": "shoe"}, {"image": four(COLOURS), "category": "shoe"}]
    found = planted(3).encode(rows)
    assert torch.allclose(found[0], planted(3, second_look=0.0).encode(rows)[0], atol=1e-6)
    alone = planted(3).encode([{"image": four(COLOURS), "category": "shoe"}])[0]
    assert torch.allclose(found[1], alone, atol=1e-5)


def test_under_a_condition_the_corrupted_picture_is_seen_again(planted: Make, catalog: Catalog, tmp_path: Path) -> None:
    model = planted(0)
    towers = model.vision_tower, model.text_tower
    store = FeatureStore.open_or_build(catalog, *towers, model.config, tmp_path)
    conditions = Conditions(catalog, towers, store, cache_dir=tmp_path)
    scene = conditions.store(Condition.parse("scene:4"))
    seen = model.encode(catalog, features=scene)
    rows: list[dict[str, Any]] = []
    for row, item in enumerate(catalog.items):
        told = {name: value for name in ("category", "colour") if (value := item.field(name)) is not None}
        rows.append(told if item.file_name is None else {**told, "image": scene.image(row)})
    expected = model.encode(rows)
    assert torch.allclose(seen, expected, atol=1e-3)  # features of both passed through fp16
    assert not torch.allclose(seen, model.encode(catalog), atol=1e-2)


@pytest.mark.parametrize(("quadrant", "least"), [(None, 0.8), (1, 0.9996)])
def test_a_catalogues_own_pictures_are_looked_at_once(
    planted: Make, catalog: Catalog, tmp_path: Path, quadrant: int | None, least: float
) -> None:
    model, once = planted(quadrant), planted(quadrant, second_look=0.0)
    store = FeatureStore.open_or_build(catalog, model.vision_tower, model.text_tower, model.config, tmp_path)
    rows = np.flatnonzero(store.valid)
    assert calibrate(model, store, rows) == least == model.config.second_look
    assert torch.equal(model.encode(catalog, features=store), once.encode(catalog, features=store))
    assert calibrate(once, store, rows) == 0


def test_a_threshold_lies_where_one_in_a_hundred_is_above(planted: Make, catalog: Catalog, tmp_path: Path) -> None:
    model = planted(None, second_look=0.26)
    store = FeatureStore.open_or_build(catalog, model.vision_tower, model.text_tower, model.config, tmp_path)
    guides = torch.zeros(200, model.config.num_visual_tokens)
    guides[:, 1] = torch.linspace(0, 6, 200)  # one token, surer and surer
    masses = SecondLook(model).largest(guides)[0]
    rows, given = np.resize(np.flatnonzero(store.valid), 200), iter(guides)
    model.connector.agreement_of = lambda features: SimpleNamespace(
        guide=torch.stack([next(given) for _ in features.visual_tokens])
    )
    threshold = calibrate(model, store, rows)
    assert (masses > threshold).sum() == 2 and threshold > 0.9


@pytest.mark.parametrize("least", [0.25, 0.1, 1.0, -0.5])
def test_bad_thresholds(least: float) -> None:
    with pytest.raises(ArgumentError, match="second_look"):
        TGQFormerConfig(second_look=least)
