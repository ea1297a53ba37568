"""What must hold for every connector of the zoo, and the list of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from connector_inputs import DV, random_features, randomise, small_config

from tgq_fast.data.catalog import Catalog
from tgq_fast.errors import ArgumentError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.inference import packed_weights
from tgq_fast.models.modeling import TGQFormerModel
from tgq_fast.models.readers import LateFusion, LightReader
from tgq_fast.models.towers import load_text_tower, load_vision_tower
from tgq_fast.models.zoo import CONNECTORS, connector_spec
from tgq_fast.models.zoo.abstractor import cell_grid, patch_grid
from tgq_fast.models.zoo.budget import build_connector, count_parameters

DOCS = Path(__file__).parents[2] / "docs" / "method.md"
WITH_TOKENS = [name for name, spec in CONNECTORS.items() if spec.sees_picture]
NEW = ["perceiver", "c-abstractor", "attention-pool", "mlp", "avgpool"]


# ---------------------------------------------------------------- the list


def test_unknown_connector_is_named() -> None:
    for name in ("clip", None, ["tgq"]):
        with pytest.raises(ArgumentError, match="perceiver"):
            connector_spec(name)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="connector"):
        TGQFormerConfig(connector="clip")


@pytest.mark.parametrize("name", CONNECTORS)
def test_documentation_says_what_the_list_says(name: str) -> None:
    spec = CONNECTORS[name]
    reads = "yes" if spec.reader_sees_metadata else "no"
    assert f"| `{name}` | {spec.summary} [{spec.source}] | {reads} |" in DOCS.read_text()


@pytest.mark.parametrize("name", CONNECTORS)
def test_number_of_tokens(name: str) -> None:
    config = small_config(name)
    tokens = build_connector(config)(random_features()).tokens
    assert tokens.shape == (5, CONNECTORS[name].tokens(config), 32)


def test_what_a_name_fixes_is_fixed_and_undone() -> None:
    assert TGQFormerConfig(connector="ungated", gate="vector").gate == "none"
    fused = small_config("notellm-2")
    assert fused.late_fusion == "image" and fused.with_connector("tgq").late_fusion == "none"
    assert fused.with_connector("tgq", late_fusion="readout").late_fusion == "readout"
    assert small_config(fields=["a"]).with_connector("ungated").fields == ["a"]
    back = TGQFormerConfig.from_dict(small_config("ungated").to_dict())
    assert (back.connector, back.gate) == ("ungated", "none")


def test_older_configurations_name_their_fusion() -> None:
    assert [small_config(late_fusion=old).late_fusion for old in (True, False)] == ["readout", "none"]
    with pytest.raises(ArgumentError, match="late_fusion"):
        small_config(late_fusion="early")


# ---------------------------------------------------------------- masks and places


def garbage(features, mask):  # type: ignore[no-untyped-def]
    """Other values where the mask is off."""
    noise = 50 * torch.randn_like(features.visual_tokens)
    return dataclasses.replace(
        features, visual_mask=mask, visual_tokens=torch.where(mask[..., None], features.visual_tokens, noise)
    )


@pytest.mark.parametrize("name", WITH_TOKENS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_masked_tokens_change_nothing(name: str, norm: str) -> None:
    connector = randomise(build_connector(small_config(name, norm=norm))).eval()
    features = random_features()
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1], mask[2] = False, True
    with torch.no_grad():
        first, second = (connector(garbage(features, mask)).tokens for _ in range(2))
        unmasked = connector(features).tokens
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[2], unmasked[2], rtol=1e-4, atol=1e-5)
    assert (first - unmasked)[mask.any(dim=1) & ~mask.all(dim=1)].abs().max() > 1e-3


@pytest.mark.parametrize("name", WITH_TOKENS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_items_without_picture_are_finite_and_learn(name: str, norm: str) -> None:
    connector = randomise(build_connector(small_config(name, norm=norm))).train()
    features = dataclasses.replace(random_features(), visual_mask=torch.zeros(5, 9, dtype=torch.bool))
    features.visual_tokens = torch.zeros_like(features.visual_tokens)
    tokens = connector(features).tokens
    tokens.square().sum().backward()
    assert tokens.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in connector.parameters())


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_order_of_visual_tokens_counts_where_the_list_says(name: str) -> None:
    connector = randomise(build_connector(small_config(name))).eval()
    features = random_features()
    moved = dataclasses.replace(features, visual_tokens=features.visual_tokens.flip(1))
    with torch.no_grad():
        gap = (connector(features).tokens - connector(moved).tokens).abs().max()
    assert (gap > 1e-3) == CONNECTORS[name].sees_place


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_metadata_counts_where_the_list_says(name: str) -> None:
    connector = randomise(build_connector(small_config(name))).eval()
    features = random_features()
    other = dataclasses.replace(features, metadata_tokens=features.metadata_tokens.flip(0) + 1)
    with torch.no_grad():
        assert torch.equal(connector(features).tokens, connector(other).tokens) != CONNECTORS[name].reads_metadata


# ---------------------------------------------------------------- C-Abstractor's grids


def test_grids() -> None:
    assert [cell_grid(n) for n in (1, 5, 8, 16, 64)] == [(1, 1), (1, 5), (2, 4), (4, 4), (8, 8)]
    assert [patch_grid(n) for n in (49, 196, 197, 257, 261)] == [(7, 0), (14, 0), (14, 1), (16, 1), (16, 5)]
    for length in (1, 3, 60, 198):
        with pytest.raises(ArgumentError, match="square"):
            build_connector(small_config("c-abstractor", num_visual_tokens=length))


def test_abstractor_leaves_out_the_class_token_and_no_patch() -> None:
    connector = randomise(build_connector(small_config("c-abstractor", num_visual_tokens=197))).eval()
    features = random_features(length=197)
    features.visual_tokens.requires_grad_(True)
    connector(features).tokens.square().sum().backward()
    seen = features.visual_tokens.grad.abs().amax(dim=(0, 2)) > 0
    assert not seen[0] and seen[1:].all()
    with pytest.raises(ArgumentError, match="196"):
        connector(random_features(length=196))


# ---------------------------------------------------------------- dtypes, compilation


@pytest.mark.parametrize("name", NEW)
def test_bf16(name: str) -> None:
    connector = build_connector(small_config(name, norm="pre")).eval()
    features = random_features()
    with torch.no_grad():
        exact = connector.double()(features).tokens
        low = connector.bfloat16()(features).tokens
    assert low.dtype == torch.bfloat16 and (low.double() - exact).abs().max() / exact.abs().max() < 0.05


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_as_one_graph(name: str, masked: bool) -> None:
    connector = randomise(build_connector(small_config(name))).eval()
    features = random_features()
    features.visual_mask = torch.rand(5, 9) < 0.7 if masked else None
    torch.compiler.reset()  # the limit of recompilations counts over connectors
    with torch.no_grad():
        compiled = torch.compile(lambda f: connector(f).tokens, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(features), connector(features).tokens, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- NoteLLM-2's late gate


def test_late_gate_is_its_definition() -> None:
    config = small_config("notellm-2")
    fusion = randomise(LateFusion(32, config))
    item, visual, image = torch.randn(4, 32), torch.randn(4, 32), torch.randn(4, config.image_width)
    v = image @ fusion.image.weight.T
    for given, h in zip(fusion.both(item, visual, image), (item, visual), strict=True):
        z = torch.sigmoid(torch.cat((h, v), dim=1) @ fusion.weight.T + fusion.bias)
        torch.testing.assert_close(given, z * v + (1 - z) * h)
    readout = LateFusion(32, small_config(late_fusion="readout"))
    assert readout.image is None and readout.both(item, visual, image)[1] is visual


def test_late_gate_lets_the_frozen_image_into_both_embeddings() -> None:
    features = random_features()
    other = dataclasses.replace(features, global_image=features.global_image + 1)
    tokens = torch.randn(5, 5, 32)
    for name, reaches in (("notellm-2", True), ("qformer", False)):
        reader = LightReader(small_config(name)).eval()
        with torch.no_grad():
            first, second = reader(tokens, features), reader(tokens, other)
        for what in ("embedding", "visual_embedding"):
            assert torch.equal(getattr(first, what), getattr(second, what)) != reaches


def test_late_gate_counts_in_the_budget() -> None:
    config = small_config("notellm-2")
    gate = sum(p.numel() for p in LateFusion(32, config).parameters())
    assert count_parameters(config) == count_parameters(config.with_connector("qformer")) + gate


# ---------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def store(vit: Path, llama: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    towers = load_vision_tower(str(vit)), load_text_tower(str(llama))
    return FeatureStore.open_or_build(catalog, *towers, tiny.tiny_config(vit, llama), tmp_path_factory.mktemp("cache"))


def model_of(store: FeatureStore, **overrides: object) -> TGQFormerModel:
    torch.manual_seed(0)
    return TGQFormerModel(
        TGQFormerConfig.from_dict(
            {**store.config.to_dict(), "visual_width": 24, "global_width": 24, "num_visual_tokens": 17}
            | {"text_width": 32, **overrides}
        )
    )


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_save_and_load_keep_every_bit(name: str, norm: str, store: FeatureStore, tmp_path: Path) -> None:
    model = model_of(store, connector=name, norm=norm).eval()
    randomise(model.connector)
    model.save_pretrained(tmp_path)
    loaded = TGQFormerModel.from_pretrained(tmp_path)
    first, second = (m.encode(store.catalog, features=store) for m in (model, loaded))
    assert torch.equal(first, second) and first.isfinite().all()


def test_shuffled_metadata_reaches_every_consumer(store: FeatureStore) -> None:
    shuffled = store.for_connector("shuffled-metadata")
    count, rows = len(store), list(range(len(store)))
    order = np.random.default_rng(0).permutation(count)
    others = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
    assert all(row != giver for row, giver in others.items()) and sorted(others.values()) == rows
    batch, expected = shuffled.batch(rows), store.batch(rows, metadata_from=[others[row] for row in rows])
    assert torch.equal(batch.metadata_tokens, expected.metadata_tokens)
    assert torch.equal(batch.metadata_mask, expected.metadata_mask)
    assert torch.equal(batch.visual_tokens, store.batch(rows).visual_tokens)
    assert shuffled.batch_strings(rows) == store.batch_strings([others[row] for row in rows])
    # There and back; every other connector sees the metadata as it is.
    assert shuffled.for_connector("shuffled-metadata") is shuffled and store.for_connector("tgq") is store
    assert np.array_equal(shuffled.for_connector("qformer").string_ids, store.string_ids)


def test_shuffled_control_embeds_with_foreign_metadata_only(store: FeatureStore) -> None:
    control = model_of(store, connector="shuffled-metadata").eval()
    randomise(control.connector)
    plain = model_of(store, connector="tgq").eval()
    plain.load_state_dict(control.state_dict())
    given = control.encode(store.catalog, features=store)
    assert torch.equal(given, control.encode(store.catalog, features=store.for_connector("shuffled-metadata")))
    torch.testing.assert_close(given, control.encode(store.catalog, features=store, batch_size=3), rtol=0, atol=1e-5)
    assert (given - plain.encode(store.catalog, features=store)).abs().max() > 1e-3
    with pytest.raises(ArgumentError, match="FeatureStore"):
        control.encode(store.catalog)


def test_width_of_new_connectors_is_the_tokens(store: FeatureStore) -> None:
    for name in NEW:
        with pytest.raises(ArgumentError, match="visual_tokens"):
            build_connector(small_config(name, visual_width=DV + 1))(random_features())


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_tokens(name: str, dtype: torch.dtype) -> None:
    connector = build_connector(small_config(name, norm="pre")).eval()
    features = random_features()
    with torch.no_grad():
        exact = connector.double()(features).tokens
        plain = connector.to(dtype)(features).tokens
        with packed_weights(connector):
            given = connector(features).tokens
    noise = (plain.double() - exact).abs().max()
    assert (given.double() - exact).abs().max() <= 2 * noise + 4 * torch.finfo(dtype).eps * exact.abs().max()
