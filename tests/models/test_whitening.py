"""Whitened features: fitted without labels, deterministic, stored with the model, the same from cache and model."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from connector_inputs import random_features, small_config

from tgq_fast.data import Catalog
from tgq_fast.errors import ArgumentError
from tgq_fast.models import FrozenFeatures, TGQFormerConfig, TGQFormerModel
from tgq_fast.models.pictures import PictureArrays
from tgq_fast.models.whitening import (
    Whitening,
    fit_whitening,
    shrinkage_of_few,
    whitened_pictures,
    whitening_rows,
)


def pictures(count: int = 300, width: int = 24, length: int = 5) -> PictureArrays:
    """Tokens whose pooled features have a few strong directions and a large mean."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(width, width)) * np.geomspace(10, 0.1, width)
    pooled = rng.normal(size=(count, 1, width)) @ mixing + 50
    visual = (pooled + rng.normal(size=(count, length, width))).astype(np.float32)
    return PictureArrays({"visual": visual, "global": visual.mean(axis=1)[:, :20]}, key="test")


def config(**changes: object) -> TGQFormerConfig:
    return small_config(**{"whitening": 8, "norm": "pre", "text_in_layers": False, **changes})


@pytest.mark.parametrize(
    ("pairs", "components", "expected"),
    [
        ("0-1 train, 2-3 test", 2, [4, 5, 6, 7]),  # of no pair, enough of them
        ("0-1 train, 2-3 test", 3, [0, 1, 4, 5, 6, 7]),  # too few: with those that training sees
        ("0-1 train, 2-3 test, 1-3 validation", 3, [0, 1, 4, 5, 6, 7]),
        ("0-1 train, 2-3 train, 4-1 test, 5-3 test, 6-0 test, 7-2 test", 4, [0, 1, 2, 3]),  # all of some test pair
    ],
)
def test_a_whitening_is_fitted_to_what_training_sees(
    tmp_path: Path, pairs: str, components: int, expected: list[int]
) -> None:
    lines = [json.dumps({"id": str(row), "file_name": f"{row}.png"}) for row in range(9)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    split = [re.fullmatch(r"(\d)-(\d) (\w+)", pair) for pair in pairs.split(", ")]
    entries = [json.dumps({"query": m[1], "target": m[2], "split": m[3]}) for m in split if m is not None]
    (tmp_path / "pairs.jsonl").write_text("\n".join(entries))
    catalog = Catalog.load(tmp_path)
    valid = np.arange(9) < 8  # the last one's picture cannot be used
    assert whitening_rows(catalog, valid, components).tolist() == expected


def test_pooled_features_of_the_fitted_rows_are_white() -> None:
    source = pictures()
    whitening, fitted = fit_whitening(source, range(300), config(whitening_shrinkage=0.0))
    assert fitted.token_width == fitted.image_width == 8
    white = whitening.tokens(torch.from_numpy(source.visual)).mean(dim=1).double()
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(8).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.T.cov(), torch.eye(8).double(), atol=1e-3, rtol=0)


def test_few_items_are_not_whitened_to_equal_distances() -> None:
    rng = np.random.default_rng(0)
    mixing = np.geomspace(10, 0.1, 128)
    features = np.repeat(rng.normal(size=(60, 128)) * mixing, 2, axis=0) + 0.3 * rng.normal(size=(120, 128)) * mixing
    source = PictureArrays({"visual": features[:, None].astype(np.float32), "global": features}, key="few")

    def first(shrinkage: float) -> float:
        """Share of the items whose mate comes first."""
        wide = config(visual_width=128, global_width=128, whitening=128, whitening_shrinkage=shrinkage)
        whitening, _ = fit_whitening(source, range(120), wide)
        vectors = torch.nn.functional.normalize(whitening.image(torch.from_numpy(features).float()), dim=1)
        scores = (vectors @ vectors.T).fill_diagonal_(-9)
        return float((scores.argmax(dim=1) == torch.arange(120) ^ 1).double().mean())

    assert shrinkage_of_few(120, 60, 0.1) == shrinkage_of_few(10_000, 512, 0.1) == 0.1
    assert shrinkage_of_few(120, 96, 0.1) == 3.2 and shrinkage_of_few(120, 512, 0.1) == 4.0
    assert first(0.0) < 0.6 and first(shrinkage_of_few(120, 128, 0.1)) > 0.95


def test_components_are_those_of_numpy_in_fp64() -> None:
    source = pictures()
    whitening, _ = fit_whitening(source, range(100), config())
    pooled = source.visual[:100].astype(np.float64).mean(axis=1)
    values, vectors = np.linalg.eigh(np.cov(pooled.T))
    expected = (vectors / np.sqrt(values + 0.1 * values.mean()))[:, ::-1][:, :8].T
    found = whitening.tokens.components.double().numpy()
    signs = np.sign((found * expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, signs * expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whitening.tokens.mean.numpy(), pooled.mean(axis=0), rtol=1e-6)


def test_rows_that_are_not_asked_for_have_no_say() -> None:
    source = pictures()
    first, _ = fit_whitening(source, range(200), config())
    source.visual[200:] = 1e4
    again, _ = fit_whitening(source, range(200), config())
    other, _ = fit_whitening(source, range(201), config())
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.allclose(first.tokens.mean, other.tokens.mean)


def test_too_few_items(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, fitted = fit_whitening(pictures(), range(6), config())
    assert fitted.whitening == 5 and "6 training pictures have no more than 5 directions" in caplog.text
    with pytest.raises(ArgumentError, match="at least 2"):
        fit_whitening(pictures(), [3], config())


def test_whitened_copy_is_what_the_module_gives(tmp_path: Path) -> None:
    source = pictures(700)
    whitening, _ = fit_whitening(source, range(300), config())
    copy = whitened_pictures(source, whitening, tmp_path)
    tokens = torch.from_numpy(np.array(copy.visual)).view(torch.bfloat16)
    torch.testing.assert_close(tokens, whitening.tokens(torch.from_numpy(source.visual)).bfloat16())
    assert copy.key != source.key and copy.whitening and not source.whitening
    np.testing.assert_array_equal(copy.raw_image, source.global_image)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")}
    whitened_pictures(source, whitening, tmp_path)
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")}  # computed once
    other, _ = fit_whitening(source, range(299), config())
    assert whitened_pictures(source, other, tmp_path).key != copy.key


def test_model_whitens_raw_features_and_takes_whitened_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TGQFormerModel(config()).eval()
    assert isinstance(model.whitening, Whitening)
    source = pictures(50)
    fitted, _ = fit_whitening(source, range(50), config())
    model.whitening.load_state_dict(fitted.state_dict())
    raw = random_features()
    white = model.whitening(raw)
    assert white.whitened and white.visual_tokens.shape == (5, 9, 8)
    with torch.no_grad():
        assert torch.equal(model(raw).embedding, model(white).embedding)
    model.save_pretrained(tmp_path)
    again = TGQFormerModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(raw).embedding, model(raw).embedding)
    assert not [name for name, _ in model.trainable_parameters() if "whitening" in name]


def test_an_item_without_a_picture_stays_zero() -> None:
    model = Whitening(config())
    features = random_features()
    features.visual_mask = torch.ones(5, 9, dtype=torch.bool)
    features.visual_mask[2] = False
    model.tokens.mean.fill_(3.0)
    model.image.mean.fill_(3.0)
    white: FrozenFeatures = model(features)
    assert not white.visual_tokens[2].any() and not white.global_image[2].any()
    assert white.visual_tokens[1].any()
