"""A small study of the embedded catalogue with its real towers, and faults planted in the method that it must show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tgq_fast import TGQFormerModel, errors
from tgq_fast.app import cli
from tgq_fast.data import Catalog, write_demo_catalog
from tgq_fast.models import backbones
from tgq_fast.models.connector import TGQFormerConnector
from tgq_fast.models.embeddings import PatchAgreement

CONDITIONS = "scene:4:both,metadata:wrong:0.5:query"
# Exploratory queries that take no guide must not change with the metadata. 64 components: few items to fit them on.
OPTIONS = ("--corruptions", CONDITIONS, "--seeds", "1", "--batch-size", "32", "--views", "3")
SETTINGS = ("guide_explore=false", "whitening=64", "direct_size=32", "embedding_size=128", "view_share=0.7")
SCENE = "scene:4:both"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        for name in ("efficientnet-lite0", "minilm"):
            backbones.backbone_dir(name)
    except errors.DependencyError as error:
        pytest.skip(str(error))
    return write_demo_catalog(tmp_path_factory.mktemp("planted") / "shop", groups=60, variants=3, image_size=160)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def study(shop: Path, out: Path, cache: Path, *, connectors: str = "tgq", epochs: int) -> dict[str, Any]:
    command = ["study", str(shop), "--out", str(out), "--cache", str(cache), *OPTIONS]
    command += ["--connectors", connectors, "--epochs", str(epochs)]
    for setting in SETTINGS:
        command += ["--set", setting]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    found: dict[str, Any] = json.loads((out / "study.json").read_text())
    return found


@pytest.fixture(scope="module")
def sound(shop: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("sound") / "study"
    yield out, study(shop, out, cache, connectors="tgq,mlp", epochs=16)


def guide_finds_the_product(found: dict[str, Any]) -> None:
    """Anchored queries look at the product that the metadata names, beyond its share of a scene."""
    scene = found["probes"]["tgq"]["attention"][SCENE]
    assert scene["anchored"]["item"] > 1.07 * scene["area"]["item"], scene


def streams_are_what_they_are_called(found: dict[str, Any]) -> None:
    """The exploratory gate knows nothing of the metadata, the anchored gate does."""
    gates = found["probes"]["tgq"]["gates"]
    clean, empty = gates["clean"], gates["metadata:empty:1"]
    assert empty["exploratory"] == pytest.approx(clean["exploratory"], abs=1e-6)
    assert abs(empty["anchored"] - clean["anchored"]) > 1e-4


def whitens_by_what_is_not_tested(run: Path, shop: Path, cache: Path) -> None:
    """The mean that the run subtracts is that of items outside validation and test, not that of all."""
    from tgq_fast import workflow
    from tgq_fast.models.whitening import fit_whitening

    catalog = Catalog.load(shop)
    model = TGQFormerModel.from_pretrained(run)
    store = workflow.open_store(catalog, model.config, cache=cache, on_error="raise")
    held = np.zeros(len(catalog), dtype=bool)
    for split in ("validation", "test"):
        pairs = catalog.split_pairs(split, every=True)
        held[pairs.query] = held[pairs.target] = True
    expected, _ = fit_whitening(store.pictures, np.flatnonzero(store.valid & ~held), model.config)
    assert model.whitening is not None
    for name, value in expected.state_dict().items():
        np.testing.assert_allclose(model.whitening.state_dict()[name].numpy(), value.numpy(), rtol=1e-5, atol=1e-6)


def test_a_sound_study_passes_every_check(sound: tuple[Path, dict[str, Any]], shop: Path, cache: Path) -> None:
    out, found = sound
    guide_finds_the_product(found)
    streams_are_what_they_are_called(found)
    (run,) = out.glob("runs/tgq-seed0-*/run")
    whitens_by_what_is_not_tested(run, shop, cache)
    floor = found["rows"]["zero-shot image, whitened"]["metrics"]
    for name in ("tgq", "mlp"):  # training pays where pictures show several products
        assert found["rows"][name]["metrics"][SCENE]["MRR"]["value"] > floor[SCENE]["MRR"]["value"]


def test_a_guide_of_the_wrong_sign_is_seen(
    shop: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PatchAgreement.__init__

    def wrong(self: PatchAgreement, *given: Any) -> None:
        plain(self, *given)
        self.guide = -self.guide

    monkeypatch.setattr(PatchAgreement, "__init__", wrong)
    found = study(shop, tmp_path / "study", cache, epochs=16)
    with pytest.raises(AssertionError):
        guide_finds_the_product(found)
    streams_are_what_they_are_called(found)


def test_swapped_streams_are_seen(shop: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TGQFormerConnector.forward

    def swapped(self: TGQFormerConnector, *given: Any, **more: Any) -> Any:
        output = plain(self, *given, **more)
        output.anchored_gate, output.exploratory_gate = output.exploratory_gate, output.anchored_gate
        return output

    monkeypatch.setattr(TGQFormerConnector, "forward", swapped)
    found = study(shop, tmp_path / "study", cache, epochs=1)
    with pytest.raises(AssertionError):
        streams_are_what_they_are_called(found)


def test_whitening_by_the_test_items_is_seen(
    shop: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tgq_fast.training import run as training

    def everything(catalog: Catalog, valid: np.ndarray, components: int) -> np.ndarray:
        return np.flatnonzero(valid)

    monkeypatch.setattr(training, "whitening_rows", everything)
    study(shop, tmp_path / "study", cache, epochs=1)
    (run,) = (tmp_path / "study").glob("runs/tgq-seed0-*/run")
    with pytest.raises(AssertionError):
        whitens_by_what_is_not_tested(run, shop, cache)
