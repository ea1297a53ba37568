"""What belongs to the caller stays as it was; what belongs to the model is checked: modes, dtypes, pickles, towers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from transformers import AutoModel

from tgq_fast.data.catalog import Catalog
from tgq_fast.data.images import load_image
from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.models import TGQFormerConfig, TGQFormerModel, TGQFormerProcessor, load_text_tower, load_vision_tower
from tgq_fast.models.card import read_run
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.hub import hub_load
from tgq_fast.pool import ItemPool, embed_catalog, model_digest


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_every_part_keeps_its_mode(saved: Path, catalog: Catalog) -> None:
    model = TGQFormerModel.from_pretrained(saved).train()
    model.connector.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    model.encode(catalog.items[:2], root=catalog.root)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_default_dtype_changes_nothing(saved: Path, catalog: Catalog, double: None) -> None:
    odd = TGQFormerModel.from_pretrained(saved)
    given = odd.encode(catalog, root=catalog.root)
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)
    expected = TGQFormerModel.from_pretrained(saved).encode(catalog, root=catalog.root)
    assert given.dtype == torch.float32 and torch.equal(given, expected)
    assert {p.dtype for p in odd.parameters()} == {torch.float32}


def test_autocast_changes_nothing(saved: Path, catalog: Catalog) -> None:
    """An item has one embedding, with the dtype of the model's weights."""
    model = TGQFormerModel.from_pretrained(saved)
    expected = model.encode(catalog, root=catalog.root)
    with torch.autocast("cpu", torch.bfloat16):
        given = model.encode(catalog, root=catalog.root)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(given, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_towers_are_the_same_whatever_the_default_dtype(vit: Path, llama: Path, dtype: torch.dtype) -> None:
    keys = load_vision_tower(str(vit)).key, load_text_tower(str(llama)).key
    torch.set_default_dtype(dtype)
    try:
        assert (load_vision_tower(str(vit)).key, load_text_tower(str(llama)).key) == keys
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device_changes_nothing(saved: Path, catalog: Catalog, tmp_path: Path) -> None:
    """ "meta" stands for any device that is not the CPU: what is made there by accident has no values."""
    expected = TGQFormerModel.from_pretrained(saved).encode(catalog, root=catalog.root)
    torch.set_default_device("meta")
    try:
        model = TGQFormerModel.from_pretrained(saved)
        given = model.encode(catalog, root=catalog.root)
        store = FeatureStore.open_or_build(
            catalog, model.vision_tower, model.text_tower, model.config, tmp_path / "cache"
        )
        cached = model.encode(catalog, features=store)
        embed_catalog(catalog, model, tmp_path / "pool")
        with ItemPool.open(tmp_path / "pool") as pool:
            hits = pool.search(given[:3], 2, exclude_ids=catalog.ids[:3])
            torch.testing.assert_close(pool.get(catalog.ids[:2]), given[:2])
        with ItemPool.open(tmp_path / "pool", mode="a") as pool:
            pool.upsert(catalog.ids[:2], given[:2])
            pool.delete(catalog.ids[:1])
            pool.compact()
            pool.verify()
            rows = pool.embeddings()
    finally:
        torch.set_default_device(None)
    assert torch.equal(given, expected) and len(rows) == len(expected) - 1
    torch.testing.assert_close(cached, expected)
    assert {t.device.type for t in (given, hits.scores, rows)} == {"cpu"}


def test_dtype_by_name(saved: Path) -> None:
    for loader in (TGQFormerModel, AutoModel):
        for name in ("bfloat16", "float16"):
            loaded = loader.from_pretrained(saved, dtype=name)
            assert loaded.dtype == getattr(torch, name)
        assert loader.from_pretrained(saved, dtype="auto").dtype == torch.float32
    for wrong in ("int8", "nonsense", 3):
        with pytest.raises(ArgumentError, match="dtype"):
            TGQFormerModel.from_pretrained(saved, dtype=wrong)


def test_model_that_has_encoded_is_pickled(saved: Path, catalog: Catalog) -> None:
    model = TGQFormerModel.from_pretrained(saved)
    expected = model.encode(catalog.items[:3], root=catalog.root)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.encode(catalog.items[:3], root=catalog.root), expected)
    for part in (model.processor, model.extractor, model.vision_tower, model.text_tower):  # used, so all is loaded
        assert type(pickle.loads(pickle.dumps(part))) is type(part)
    with model.encoding():
        pickle.dumps(model)


def test_code_of_a_model_folder_is_never_run(tmp_path: Path) -> None:
    folder = tiny.save_vit(tmp_path / "vit")
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(CheckpointError, match="code of its own"):
        load_vision_tower(str(folder))
    assert not (tmp_path / "ran").exists()
    seen = {}
    hub_load(lambda name, **options: seen.update(options), "x", "y")
    assert seen == {"trust_remote_code": False}


def test_other_tower_weights_under_the_same_name_are_refused(tmp_path: Path, llama: Path, catalog: Catalog) -> None:
    folder = tiny.save_vit(tmp_path / "vit", seed=0)
    model = TGQFormerModel.from_config_with_towers(tiny.tiny_config(folder, llama))
    model.save_pretrained(tmp_path / "run")
    tiny.save_vit(tmp_path / "vit", seed=1)
    loaded = TGQFormerModel.from_pretrained(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"vision tower .* tower_digests=None"):
        loaded.encode(catalog.items[:1], root=catalog.root)
    with pytest.raises(CheckpointError, match="vision tower"):
        loaded.set_towers(load_vision_tower(str(folder)), load_text_tower(str(llama)))
    free = TGQFormerModel.from_pretrained(tmp_path / "run", tower_digests=None)
    assert free.encode(catalog.items[:1], root=catalog.root).shape == (1, 16)
    other = TGQFormerModel.from_config_with_towers(tiny.tiny_config(folder, llama))
    other.load_state_dict(model.state_dict())
    assert model_digest(other) != model_digest(model)  # so that a pool of the one is refused with the other


def test_another_tokenizer_under_the_same_name_is_refused(vit: Path, tmp_path: Path, catalog: Catalog) -> None:
    folder = tiny.save_llama(tmp_path / "llama")
    model = TGQFormerModel.from_config_with_towers(tiny.tiny_config(vit, folder))
    model.save_pretrained(tmp_path / "run")
    file = folder / "tokenizer.json"
    before = file.read_text()
    words = json.loads(before)
    vocabulary = words["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match=r"tokenizer is not that .* tower_digests=None"):
        TGQFormerModel.from_pretrained(tmp_path / "run").encode(catalog.items[:1], root=catalog.root)
    TGQFormerModel.from_pretrained(tmp_path / "run", tower_digests=None).encode(catalog.items[:1], root=catalog.root)
    file.write_text(before)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["checksum"], config["tower_digests"]["tokenizer"]  # as an earlier version wrote it
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    file.write_text(json.dumps(words))
    TGQFormerModel.from_pretrained(tmp_path / "run").encode(catalog.items[:1], root=catalog.root)


def test_a_model_loaded_under_inference_mode_trains(saved: Path, catalog: Catalog) -> None:
    with torch.inference_mode():
        model = TGQFormerModel.from_pretrained(saved)
        model.encode(catalog.items[:2], root=catalog.root)
    model.train()
    picture = load_image(catalog.picture(catalog.items[0]), "a")
    features = model.extractor.features(model.processor([picture] * 2, [{"category": "shoe"}, {"category": "hat"}]))
    model(features=features, positives=torch.tensor([1, 0])).loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "run.json"])
def test_json_nested_without_end_is_a_typed_error(saved: Path, tmp_path: Path, file: str) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text("[" * 100_000)
    loaders = {"config.json": TGQFormerModel, "processor_config.json": TGQFormerProcessor}
    with pytest.raises(CheckpointError):
        loaders[file].from_pretrained(tmp_path) if file in loaders else read_run(tmp_path)


def test_fields_of_later_versions_leave_old_digests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TGQFormerConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16)
    torch.manual_seed(0)
    model = TGQFormerModel(config)
    digest = model_digest(model)
    assert all(hasattr(config, name) for name in TGQFormerConfig.later_fields)
    for name in TGQFormerConfig.later_fields:  # as a version without these fields wrote them
        delattr(model.config, name)
    assert model_digest(model) == digest


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_act", "nonsense"), ("num_attention_heads", 0), ("norm", "middle"), ("whitening", -1)]
)
def test_odd_configurations_are_refused_on_load(saved: Path, tmp_path: Path, name: str, value: object) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    del values["checksum"]  # a change that is meant
    (tmp_path / "config.json").write_text(json.dumps(values | {name: value}))
    with pytest.raises(CheckpointError, match=name):
        TGQFormerModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changed", "fine"),
    [
        ({}, True),
        ({"AutoModel": "owner/name--tgq_former.TGQFormerModel"}, True),  # as transformers has it from the hub
        ({"AutoModel": "tgq_formes.TGQFormerModel"}, False),
        ({"AutoModel": "owner/name--other.TGQFormerModel"}, False),
        ({"AutoModelForCausalLM": "tgq_former.TGQFormerModel"}, False),
    ],
)
def test_the_code_that_a_sealed_configuration_names_is_this_packages(
    saved: Path, tmp_path: Path, changed: dict[str, str], fine: bool
) -> None:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    values["auto_map"] |= changed
    (tmp_path / "config.json").write_text(json.dumps(values))
    if fine:
        assert TGQFormerModel.from_pretrained(tmp_path).config.fields == list(tiny.FIELDS)
        return
    for load in (TGQFormerModel.from_pretrained, TGQFormerConfig.from_pretrained):
        with pytest.raises(CheckpointError, match="auto_map"):
            load(tmp_path)


def test_a_guiding_value_beside_the_columns_of_a_row_counts(saved: Path, catalog: Catalog) -> None:
    """`fields`, the processor and a row of a catalogue read it alike."""
    model = TGQFormerModel.from_pretrained(saved)
    picture = load_image(catalog.picture(catalog.items[0]), "a")
    values = {"category": "shoe", "colour": "red"}
    expected = model.encode([picture], fields=[values])
    assert not torch.equal(expected, model.encode([picture], fields=[{"category": "shoe"}]))
    for row in (values, {"category": "shoe", "attributes": {"colour": "red"}}, values | {"attributes": {"colour": ""}}):
        assert torch.equal(model.encode([{"image": picture, **row}]), expected)
    for odd in (None, float("nan"), ["red"], np.array(["red"]), np.str_("red")):
        given = model.encode([{"image": picture, "category": "shoe", "colour": odd}])
        assert torch.equal(given, model.encode([picture], fields=[{"category": "shoe", "colour": odd}])), odd
    for image in (None, float("nan"), np.float32("nan")):
        assert torch.equal(model.encode([{"image": image, **values}]), model.encode([values]))
    with pytest.raises(ArgumentError, match="'colour' is given twice"):
        model.encode([{"image": picture, **values, "attributes": {"colour": "blue"}}])
    with pytest.raises(ArgumentError, match="'photo_url' looks like a picture"):
        model.encode([{"id": "a", "photo_url": "x.jpg"}])
