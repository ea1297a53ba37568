"""The assembled model: losses, controls, encoding, checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel

from tgq_fast import reference
from tgq_fast.data.catalog import Catalog
from tgq_fast.data.images import load_image
from tgq_fast.data.rejects import RejectLog
from tgq_fast.errors import ArgumentError, CheckpointError, ImageError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.modeling import TGQFormerModel
from tgq_fast.models.outputs import TGQFormerOutput
from tgq_fast.models.towers import TextTower, VisionTower, load_text_tower, load_vision_tower
from tgq_fast.models.zoo import CONNECTORS

POSITIVES = torch.tensor([3, 4, 5, 0, 1, 2])


@pytest.fixture(scope="module")
def towers(vit: Path, llama: Path) -> tuple[VisionTower, TextTower]:
    return load_vision_tower(str(vit)), load_text_tower(str(llama))


@pytest.fixture(scope="module")
def store(
    towers: tuple[VisionTower, TextTower],
    vit: Path,
    llama: Path,
    catalog: Catalog,
    tmp_path_factory: pytest.TempPathFactory,
) -> FeatureStore:
    return FeatureStore.open_or_build(catalog, *towers, tiny.tiny_config(vit, llama), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def build(towers: tuple[VisionTower, TextTower], vit: Path, llama: Path):  # type: ignore[no-untyped-def]
    def make(**overrides: object) -> TGQFormerModel:
        torch.manual_seed(0)
        config = tiny.tiny_config(vit, llama, **overrides)
        return TGQFormerModel.from_config_with_towers(config, vision=towers[0], text=towers[1])

    return make


def run(model: TGQFormerModel, store: FeatureStore, rows: list[int], **kwargs: object) -> TGQFormerOutput:
    output = model(**store.inputs(rows, processor=model.processor), **kwargs)
    assert isinstance(output, TGQFormerOutput)
    return output


def test_configuration_takes_the_towers_sizes(build) -> None:  # type: ignore[no-untyped-def]
    config = build().config
    assert (config.visual_width, config.num_visual_tokens, config.text_width) == (24, 17, 32)
    with pytest.raises(ArgumentError, match="agreement"):
        build(agreement="dual_encoder")


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("llm", [False, True])
def test_every_connector_trains(build, store: FeatureStore, llama: Path, connector: str, llm: bool) -> None:  # type: ignore[no-untyped-def]
    model = build(connector=connector, llm=str(llama) if llm else None, lora_rank=2).train()
    output = run(model, store, list(range(6)), positives=POSITIVES)
    assert output.loss is not None and output.losses is not None
    output.loss.backward()
    without = {n for n, p in model.trainable_parameters() if p.grad is None or not p.grad.isfinite().all()}
    # Text-only has no picture to project (LLM) and no visual loss; the adapters before the readout of a causal LLM's
    # last layers all take part.
    allowed = {"reader.readout.visual.weight"} if connector == "text-only" else set()
    allowed |= {n for n in without if n.startswith("reader.project")} if connector == "text-only" else set()
    assert without <= allowed
    assert output.embedding.shape == (6, 16) and output.embedding.dtype == torch.float32
    torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(6))
    expected = {"item", "visual"} if connector != "text-only" else {"item"}
    expected |= {"redundancy"} if CONNECTORS[connector].is_hybrid else set()
    expected |= {"alignment"} if CONNECTORS[connector].is_hybrid and model.config.gate != "none" else set()
    assert set(output.losses) == expected


def test_loss_is_the_weighted_sum_of_the_definitions(build, store: FeatureStore) -> None:  # type: ignore[no-untyped-def]
    model = build(redundancy_weight=0.7, alignment_weight=0.3, visual_loss_weight=0.2, hidden_dropout_prob=0.0).train()
    positives = torch.tensor([3, -1, 5, 0, 1, 2])  # row 1 is no anchor
    groups = torch.tensor([0, 1, 2, 0, 1, 0])
    output = run(model, store, list(range(6)), positives=positives, groups=groups)
    rows = torch.tensor([0, 2, 3, 4, 5])
    scale = model.logit_scale
    item, visual = (
        reference.info_nce(e, positives[rows], scale, groups=groups, rows=rows)
        for e in (output.embedding, output.visual_embedding)
    )
    connected = output.connector
    redundancy = reference.redundancy_loss(connected.anchored_mean, connected.exploratory_mean)
    logits, answer = connected.alignment_logits, torch.arange(6)
    alignment = (cross_entropy(logits, answer) + cross_entropy(logits.T, answer)) / 2
    torch.testing.assert_close(output.loss, 0.8 * item + 0.2 * visual + 0.7 * redundancy + 0.3 * alignment)
    assert output.losses["item"].requires_grad is False
    torch.testing.assert_close(output.losses["item"], item.detach())


def test_controls_see_one_side_only(build, store: FeatureStore) -> None:  # type: ignore[no-untyped-def]
    rows, other = [0, 1, 2, 6], [1, 0, 7, 8]
    changed = {
        "metadata": store.batch(rows, metadata_from=other),
        "image": store.batch(other, metadata_from=rows),
    }
    for connector, ignored in (("image-only", "metadata"), ("text-only", "image")):
        model = build(connector=connector).eval()
        with torch.no_grad():
            base = model(store.batch(rows)).embedding
            for what, features in changed.items():
                same = torch.allclose(model(features).embedding, base, atol=1e-6)
                assert same == (what == ignored), (connector, what)


def test_item_without_metadata_or_picture_is_finite(build, store: FeatureStore) -> None:  # type: ignore[no-untyped-def]
    model = build().train()
    output = run(model, store, [4, 5], positives=torch.tensor([1, 0]))
    output.loss.backward()
    assert output.embedding.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_freeze_and_unfreeze(build, llama: Path) -> None:  # type: ignore[no-untyped-def]
    model = build(llm=str(llama), lora_rank=2)
    before = [n for n, _ in model.trainable_parameters()]
    assert not any(n.startswith("reader.llm.") and "lora_" not in n for n in before)
    assert not any("tower" in n for n in model.state_dict())
    model.freeze()
    assert not list(model.trainable_parameters())
    model.unfreeze()
    assert [n for n, _ in model.trainable_parameters()] == before


# ---------------------------------------------------------------- encode


def test_encode_accepts_every_form_of_item(build, catalog: Catalog) -> None:  # type: ignore[no-untyped-def]
    model = build().train()
    expected = model.encode(catalog, batch_size=4)
    assert model.training and expected.shape == (len(catalog), 16) and expected.dtype == torch.float32
    assert torch.equal(expected, model.encode(catalog, batch_size=4))
    assert torch.equal(expected, model.encode(list(catalog.items), root=catalog.root, batch_size=4))
    rows = [item.to_dict() for item in catalog.items]
    assert torch.equal(expected, model.encode(rows, root=catalog.root, batch_size=4))
    item = catalog.items[1]
    fields = {"category": item.category, "colour": item.attributes["colour"]}
    path = catalog.image_path(item)
    picture = load_image(path, item.id)
    for single in (
        model.encode(picture, fields=fields),
        model.encode(path, fields=fields),
        model.encode({"image": picture, "category": item.category, "attributes": {"colour": fields["colour"]}}),
        model.encode([picture], fields=[fields])[0],
    ):
        assert single.shape == (16,)
        torch.testing.assert_close(single, expected[1], atol=1e-5, rtol=1e-4)
    as_array = model.encode(catalog, batch_size=4, convert_to_numpy=True, show_progress_bar=True)
    assert isinstance(as_array, np.ndarray) and np.array_equal(as_array, expected.numpy())
    assert model.encode([]).shape == (0, 16)
    clear = Image.new("RGBA", (20, 20), (9, 9, 9, 0))  # transparency is laid on white, as for files
    assert torch.equal(model.encode(clear), model.encode(Image.new("RGB", (20, 20), "white")))


def test_encode_reads_cached_features(build, catalog: Catalog, store: FeatureStore, llama: Path) -> None:  # type: ignore[no-untyped-def]
    model = build(llm=str(llama))
    direct = model.encode(catalog)
    torch.testing.assert_close(model.encode(catalog, features=store), direct, atol=1e-4, rtol=1e-3)
    some = [catalog.items[i] for i in (7, 2)]
    torch.testing.assert_close(model.encode(some, features=store), direct[[7, 2]], atol=1e-4, rtol=1e-3)


def test_encode_policies(build, catalog: Catalog, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = build()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    items = [Image.new("RGB", (20, 20)), bad, Image.new("L", (20, 30))]
    with pytest.raises(ImageError, match=r"bad\.png"):
        model.encode(items)
    log = RejectLog(tmp_path / "rejects.jsonl")
    out = model.encode(items, on_error="skip", rejects=log)
    assert out.isnan().all(dim=1).tolist() == [False, True, False] and len(log) == 1
    assert model.encode([bad], on_error="skip").isnan().all()


@pytest.mark.parametrize(
    ("items", "kwargs", "match"),
    [
        ([3.5], {}, "items"),
        ([{"image": 3}], {}, "image"),
        ([{"id": "a", "price": "cheap"}], {}, "price"),
        ([{"id": "a"}], {"fields": {"colour": "red"}}, "fields"),
        ([Image.new("RGB", (9, 9))], {"fields": [{}, {}]}, "fields"),
        ([Image.new("RGB", (9, 9))], {"fields": {"color": "red"}}, "category, colour"),
        ([], {"batch_size": 0}, "batch_size"),
        ([], {"on_error": "ignore"}, "on_error"),
    ],
)
def test_encode_refuses_bad_arguments(build, items: list[object], kwargs: dict[str, object], match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=match):
        build().encode(items, **kwargs)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("llm", [False, True])
def test_saved_model_comes_back(
    build, catalog: Catalog, store: FeatureStore, llama: Path, tmp_path: Path, llm: bool
) -> None:  # type: ignore[no-untyped-def]
    model = build(llm=str(llama) if llm else None, lora_rank=2, late_fusion=True).train()
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    run(model, store, list(range(6)))  # moves the running statistics of s
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tgq_former.py",
    ]
    names = set(model.saved_state())
    assert not any("base_layer" in n or "embed_tokens" in n for n in names)
    expected = model.encode(catalog, features=store)
    for loaded in (TGQFormerModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, TGQFormerModel) and not loaded.training
        assert torch.equal(loaded.encode(catalog, features=store), expected)
        assert [n for n, _ in loaded.trainable_parameters()] == [n for n, _ in model.trainable_parameters()]
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TGQFormerConfig)
    # Towers are loaded by name only when pictures come.
    fresh = TGQFormerModel.from_pretrained(tmp_path)
    assert fresh._towers == (None, None)
    torch.testing.assert_close(fresh.encode(catalog), expected, atol=1e-4, rtol=1e-3)
    again = tmp_path / "again"
    fresh.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_towers_can_be_moved(build, tmp_path: Path, vit: Path) -> None:  # type: ignore[no-untyped-def]
    build().save_pretrained(tmp_path)
    loaded = TGQFormerModel.from_pretrained(tmp_path, vision_tower="/elsewhere/vit")
    assert loaded.config.vision_tower == "/elsewhere/vit"
    with pytest.raises(CheckpointError, match="/elsewhere/vit"):
        loaded.encode(Image.new("RGB", (9, 9)))
    wide = tiny.save_clip(tmp_path / "clip")
    with pytest.raises(ArgumentError, match="global_width"):
        TGQFormerModel.from_pretrained(tmp_path, vision_tower=str(wide)).encode(Image.new("RGB", (9, 9)))


def damage(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    data = weights.read_bytes()
    values = json.loads(config.read_text())
    del values["checksum"]  # changes that are meant
    match what:
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "truncated":
            weights.write_bytes(data[:-100])
        case "bit flip":
            weights.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
        case "pickle":
            weights.write_bytes(pickle.dumps({"a": 1}))
        case "foreign weights":
            from safetensors.torch import save_file

            save_file({"a": torch.zeros(1)}, weights, metadata={"format": "pt"})
        case "foreign config":
            config.write_text(json.dumps({"model_type": "bert"}))
        case "config is no JSON":
            config.write_text("{")
        case "config is a list":
            config.write_text("[]")
        case "bad field":
            config.write_text(json.dumps({**values, "connector": "magic"}))
        case "changed by mistake":
            config.write_text(config.read_text().replace("colour", "colonr"))
        case "wrong type":
            config.write_text(json.dumps({**values, "hidden_size": "wide"}))
        case "other size":
            config.write_text(json.dumps({**values, "embedding_size": 24}))
        case "other connector":
            config.write_text(json.dumps({**values, "connector": "mlp"}))


@pytest.mark.parametrize(
    "what",
    [
        "no weights",
        "no config",
        "truncated",
        "bit flip",
        "pickle",
        "foreign weights",
        "foreign config",
        "config is no JSON",
        "config is a list",
        "bad field",
        "changed by mistake",
        "wrong type",
        "other size",
        "other connector",
    ],
)
def test_damaged_or_foreign_checkpoints_are_refused(build, tmp_path: Path, what: str) -> None:  # type: ignore[no-untyped-def]
    build().save_pretrained(tmp_path)
    TGQFormerModel.from_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(CheckpointError):
        TGQFormerModel.from_pretrained(tmp_path)


def test_hub_names_are_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="local folder"):
        TGQFormerModel.from_pretrained(tmp_path / "nothing")


def test_weights_are_packed_once_for_a_run(
    build, store: FeatureStore, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """Around many calls, and by embedding into a pool; an item's bits do not depend on how the run is cut."""
    from tgq_fast.models import inference
    from tgq_fast.pool.embed import embed_catalog

    model, packs = build(), []
    original = inference.packed

    def packed(module):  # type: ignore[no-untyped-def]
        packs.append(module is model.connector)
        return original(module)

    monkeypatch.setattr(inference, "packed", packed)
    with model.encoding():
        whole = model.encode(catalog, features=store, batch_size=4)
        cut = [model.encode(Catalog.from_items(catalog.items[i : i + 1], root=catalog.root), features=store)
               for i in range(len(catalog))]  # fmt: skip
    assert sum(packs) == 1
    torch.testing.assert_close(torch.cat(cut), whole)
    packs.clear()
    embed_catalog(catalog, model, tmp_path / "pool", batch_size=1, features=store)
    assert sum(packs) == 1
    assert inference.running(model.connector) is model.connector
