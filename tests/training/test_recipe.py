"""The recipe's training: averaged weights, parameter groups, views, unreliable metadata, the verdict over the floor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from synthetic import LENGTH, SyntheticStore, make_catalog, make_config
from test_train import ARGUMENTS, run

from tgq_fast.data import Catalog
from tgq_fast.errors import ArgumentError
from tgq_fast.evaluation import evaluate
from tgq_fast.models import TGQFormerModel
from tgq_fast.models.pictures import PictureArrays
from tgq_fast.models.whitening import paired_rows
from tgq_fast.pool import zero_shot_embeddings
from tgq_fast.pool.embed import RAW_FLOOR, WHITENED_FLOOR
from tgq_fast.training import PairCollator, finish, train
from tgq_fast.training.averaging import WeightAverage
from tgq_fast.training.trainer import decayed_parameters
from tgq_fast.training.verdict import judge

RECIPE: dict[str, Any] = {
    "whitening": 8,
    "norm": "pre",
    "text_in_layers": False,
    "guide": True,
    "hidden_dropout_prob": 0.0,
    "direct_size": 4,
    "ema": 0.9,
    "mask_weight": 0.1,
    "view_share": 0.5,
}


class Views:
    """Two views of every item: noise that still shows the product in its first token."""

    whitening, key = "", "views of a test"

    def __init__(self, store: SyntheticStore) -> None:
        rng = np.random.default_rng(1)
        self.visual = rng.normal(size=(2 * len(store), LENGTH, store.visual.shape[2])).astype(np.float32)
        self.visual[:, 0] = np.repeat(store.visual[:, 0].numpy(), 2, axis=0)
        self.global_image = self.raw_image = self.visual.mean(axis=1)
        self.shares = np.zeros((2 * len(store), 2, LENGTH), np.float16)
        self.shares[:, 0, 0] = 1

    def draw(self, rows: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
        return np.where(rng.random(len(rows)) < share, 2 * rows + rng.integers(2, size=len(rows)), -1)


def recipe_run(out: Path, **changes: Any) -> Any:
    catalog = make_catalog(60)
    config = make_config(**{**RECIPE, **changes.pop("config", {})})
    store: Any = SyntheticStore(catalog, config)
    views: Any = Views(store) if changes.pop("with_views", True) else None
    return train(catalog, config, out=out, **{**ARGUMENTS, "store": store, "views": views, "cache_dir": out, **changes})


def test_average_follows_the_weights() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    average = WeightAverage(layer, 0.5)
    expected = 0.0
    for step in range(1, 30):
        layer.weight.data.fill_(float(step))
        average.update(step)
        decay = min(0.5, step / (9 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.values["weight"].item() == pytest.approx(expected)
    with average.applied():
        assert layer.weight.item() == pytest.approx(expected)
    assert layer.weight.item() == 29


def test_decay_is_for_the_weights_of_layers_alone() -> None:
    model = TGQFormerModel(make_config(**RECIPE))
    decayed = set(decayed_parameters(model))
    names = {name for name, _ in model.trainable_parameters()}
    assert {"connector.encoder.layer.0.crossattention.attention.key.weight", "direct.projection.weight"} <= decayed
    for word in (
        "bias",
        "norm",
        "query_tokens",
        "anchor_tokens",
        "null_tokens",
        "embeddings",
        "guide_scale",
        "readouts",
        "saliency",
    ):
        assert not [name for name in decayed if word in name.lower()], word
        assert [name for name in names if word in name.lower()], word


def test_recipe_trains_resumes_to_the_same_bits_and_keeps_the_average(tmp_path: Path) -> None:
    whole = recipe_run(tmp_path / "whole", checkpoint_steps=4)

    class Stop(Exception):
        pass

    def interrupt(event: Any) -> None:
        if event["event"] == "step" and event["step"] == 6:
            raise Stop

    with pytest.raises(Stop):
        recipe_run(tmp_path / "parts", checkpoint_steps=4, on_event=interrupt)
    checkpoint = tmp_path / "parts" / "checkpoints" / "checkpoint-4"
    raw, kept = load_file(checkpoint / "training_weights.safetensors"), load_file(checkpoint / "model.safetensors")
    assert raw.keys() <= kept.keys() and not torch.equal(raw["logit_scale"], kept["logit_scale"])
    resumed = recipe_run(tmp_path / "parts", checkpoint_steps=4, resume=True)
    assert resumed.resumed_from == 4
    model = (whole.path / "model.safetensors").read_bytes()
    assert (resumed.path / "model.safetensors").read_bytes() == model
    log = [json.loads(line) for line in (whole.path / "training_log.jsonl").read_text().splitlines()]
    assert {"loss/mask", "loss/alignment", "loss/item"} <= next(entry for entry in log if "loss" in entry).keys()
    other = recipe_run(tmp_path / "plain", config={"ema": 0.0})
    assert (other.path / "model.safetensors").read_bytes() != model


def test_saved_run_embeds_as_validation_did(tmp_path: Path) -> None:
    result = recipe_run(tmp_path / "run", epochs=6)
    catalog = make_catalog(60)
    store: Any = SyntheticStore(catalog, make_config(**RECIPE))
    model = TGQFormerModel.from_pretrained(result.path)
    found = evaluate(catalog, model.encode(catalog, features=store), ks=(10,), split="validation", samples=0)["HR@10"]
    assert found == pytest.approx(result.best_metric, abs=0.05)  # validation reads whitened tokens in bf16


def test_collator_draws_views_and_their_shares() -> None:
    catalog = make_catalog(60)
    config = make_config(view_share=0.5)
    store: Any = SyntheticStore(catalog, config)
    views: Any = Views(store)
    collate = PairCollator(store, catalog.components(), seed=0, views=views, pictures=views)
    pairs = [(row, row + 1) for row in range(0, 80, 2)]
    inputs, again = collate(pairs), collate(pairs)
    features = inputs["features"]
    rows = np.array(pairs).reshape(-1)
    own = (features.visual_tokens == store.visual[rows]).all(dim=2).all(dim=1)
    assert 0.3 < own.float().mean() < 0.7
    assert (features.product_share[own] == 1).all()
    assert (features.product_share[~own] == torch.tensor([1.0] + [0.0] * (LENGTH - 1))).all()
    assert torch.equal(again["features"].visual_tokens, features.visual_tokens)
    other = collate([(row, row + 2) for row in range(0, 80, 4)])["features"]
    assert other.visual_tokens.shape[0] == 40


def test_collator_makes_metadata_unreliable() -> None:
    catalog = make_catalog(60)
    shares = {"wrong_metadata": 0.2, "partial_metadata": 0.2, "missing_metadata": 0.2, "field_dropout": 0.0}
    config = make_config(**shares)
    store: Any = SyntheticStore(catalog, config)
    collate = PairCollator(store, catalog.components(), seed=0)
    features = collate([(row, row + 1) for row in range(0, 180, 2)])["features"]
    own = (features.metadata_tokens == store.text[:180]).all(dim=2).all(dim=1)
    assert own[features.trusted].all() and 0.7 < features.trusted.float().mean() < 0.9
    assert not own[~features.trusted].all()  # some draw the same metadata by chance
    missing = ~features.metadata_mask.any(dim=1)
    assert 0.15 < missing.float().mean() < 0.4  # a fifth, and the partial ones that lost every field


def test_wrong_metadata_is_no_positive_of_the_alignment() -> None:
    model = TGQFormerModel(make_config(**RECIPE)).train()
    catalog = make_catalog(8)
    store: Any = SyntheticStore(catalog, model.config)
    features = store.inputs(range(0, 24, 3))["features"]
    features.trusted = torch.tensor([True] * 7 + [False])
    logits = model(features).connector.alignment_logits
    hidden = torch.isinf(logits)
    assert hidden[7, :7].all() and hidden[:7, 7].all() and not hidden[7, 7]


def test_validations_pictures_raise_the_second_looks_threshold_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[int]] = []

    def record(model: TGQFormerModel, store: Any, rows: NDArray[np.int64]) -> float:
        asked.append(set(rows.tolist()))
        return len(asked) / 10

    monkeypatch.setattr(finish, "calibrate", record)
    result = recipe_run(tmp_path / "run", epochs=1, config={"direct_size": 0}, with_views=False)
    pairs = {split: make_catalog(60).split_pairs(split) for split in ("train", "validation", "test")}
    rows = {split: {*found.query.tolist(), *found.target.tolist()} for split, found in pairs.items()}
    assert asked[0] == rows["train"] and asked[1] == rows["validation"]
    assert not (asked[0] | asked[1]) & rows["test"]
    assert result.manifest["result"]["second_look"] == 0.2


def test_paired_rows_have_a_picture_that_can_be_read() -> None:
    items = [dataclasses.replace(item) for item in make_catalog(60).items]
    every = paired_rows(Catalog.from_items(items), "validation", np.ones(len(items), dtype=bool)).tolist()
    items[every[0]] = dataclasses.replace(items[every[0]], file_name=None)
    valid = np.arange(len(items)) != every[2]
    found = paired_rows(Catalog.from_items(items), "validation", valid).tolist()
    assert len(every) > 3 and found == [row for row in every if row not in (every[0], every[2])]


@pytest.mark.parametrize("keep", ["best", "trained"])
def test_a_floor_that_is_better_is_kept(tmp_path: Path, keep: str) -> None:
    result = recipe_run(tmp_path / "run", epochs=1, lr=1e-9, keep=keep, config={"direct_size": 0}, with_views=False)
    verdict = result.manifest["result"]["verdict"]
    assert verdict["keep"].startswith("zero-shot") and "did not help" in verdict["words"]
    assert set(verdict["floors"]) == {RAW_FLOOR, WHITENED_FLOOR}
    catalog = make_catalog(60)
    store: Any = SyntheticStore(catalog, make_config(**RECIPE))
    model = TGQFormerModel.from_pretrained(result.path)
    if keep == "trained":
        assert model.config.connector == "tgq" and not (result.path / "trained").exists()
        return
    assert model.config.connector == "zero-shot"
    embedded = model.encode(catalog, features=store)
    if verdict["keep"] == RAW_FLOOR:
        torch.testing.assert_close(embedded, zero_shot_embeddings(catalog, store), atol=1e-5, rtol=0)
    assert TGQFormerModel.from_pretrained(result.path / "trained").config.connector == "tgq"


def test_verdict_says_when_training_helped() -> None:
    catalog = make_catalog(60)
    store: Any = SyntheticStore(catalog, make_config())
    good = evaluate(catalog, zero_shot_embeddings(catalog, store), split="validation", samples=0)
    noise = evaluate(catalog, torch.randn(len(catalog), 4), split="validation", samples=0)
    helped = judge(good, {RAW_FLOOR: noise})
    assert helped.keep == "trained" and helped.words.startswith("Training helped")
    assert all(low > 0 for _, low, _ in helped.differences.values())
    lost = judge(noise, {RAW_FLOOR: good, WHITENED_FLOOR: noise})
    assert lost.keep == RAW_FLOOR and "fields" in lost.words
    same = judge(good, {RAW_FLOOR: good})
    assert same.keep == "trained" and "within chance" in same.words


def test_views_of_another_whitening_are_refused() -> None:
    catalog = make_catalog(4)
    store: Any = SyntheticStore(catalog, make_config())
    assert isinstance(store.pictures, PictureArrays)
    with pytest.raises(ArgumentError, match="keep"):
        run(Path("unused"), keep="worst")
