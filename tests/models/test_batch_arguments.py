"""What a batch is asked for besides its rows: odd values are typed errors, before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch

from tgq_fast.data import Catalog
from tgq_fast.errors import ArgumentError
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.pictures import ChosenViews, PictureArrays
from tgq_fast.models.towers import load_text_tower, load_vision_tower

Call = Callable[..., Any]


@pytest.fixture
def store(catalog: Catalog, vit: Path, llama: Path, tmp_path: Path) -> FeatureStore:
    config = tiny.tiny_config(vit, llama)
    return FeatureStore.open_or_build(
        catalog, load_vision_tower(str(vit)), load_text_tower(str(llama)), config, tmp_path
    )


def calls(store: FeatureStore) -> tuple[Call, Call]:
    return store.batch, store.inputs


def test_odd_fields_to_keep_are_typed_errors(store: FeatureStore) -> None:
    fields = len(store.config.fields)
    odd = [
        True,
        [True] * fields,
        np.ones((2, fields + 1), bool),
        np.ones((1, fields), bool),  # would be taken for every row
        np.ones((2, 1), bool),  # would be taken for every field
        np.ones((2, fields)),
        np.ones((2, fields), int),
        "all",
        object(),
        [[True], [True, False, True]],
        torch.ones(2, fields, dtype=torch.bool, device="meta"),
    ]
    for call in calls(store):
        for keep in odd:
            with pytest.raises(ArgumentError, match=r"^keep: "):
                call([0, 1], keep=keep)
        for generator in (0, True, np.random.RandomState(0), torch.Generator(), "seed"):
            with pytest.raises(ArgumentError, match=r"^drop_fields: "):
                call([0, 1], drop_fields=generator)
            with pytest.raises(ArgumentError, match=r"^drop_fields: "):
                call([0, 1], keep=np.ones((2, fields), bool), drop_fields=generator)
        for given in ([0], [0, 1, 2]):
            with pytest.raises(ArgumentError, match=r"^metadata_from: "):
                call([0, 1], metadata_from=given)
    none = np.zeros((2, fields), bool)
    for keep in (none, none.tolist(), torch.from_numpy(none)):
        assert not store.batch([0, 1], keep=keep).metadata_mask.any()  # type: ignore[arg-type]


def test_odd_views_are_typed_errors(store: FeatureStore) -> None:
    own = store.pictures
    last = len(own.visual) - 1
    narrow = PictureArrays({"visual": own.visual[..., :-1], "global": own.global_image}, key="narrow")
    short = PictureArrays({"visual": own.visual[:, :-1], "global": own.global_image}, key="short")
    flat = PictureArrays({"visual": own.visual, "global": own.global_image[:, :-1]}, key="flat")
    counts = PictureArrays({"visual": own.visual.astype(np.int16), "global": own.global_image}, key="counts")
    rows = np.array([0, -1])
    odd: list[Any] = [rows, own, "clean", ChosenViews(None, rows)]  # type: ignore[arg-type]
    odd += [ChosenViews(source, rows) for source in (narrow, short, flat, counts)]
    odd += [ChosenViews(own, given) for given in (rows[:1], rows[None], rows * 1.0, rows > 0, [0, -1], None)]  # type: ignore[arg-type]
    odd += [ChosenViews(own, np.array(given)) for given in ([0, -2], [last + 1, 0], [-(2**40), 0])]
    for call in calls(store):
        for views in odd:
            with pytest.raises(ArgumentError, match=r"^views: "):
                call([0, 1], views=views)
    good = store.batch([0, 1], views=ChosenViews(own, np.array([last, -1])))
    assert torch.equal(good.visual_tokens, store.batch([last, 1]).visual_tokens)
    assert store.batch([], views=ChosenViews(own, np.array([], np.int64))).visual_tokens.shape[0] == 0
