"""Tiny models and a tiny catalogue, saved once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as tiny
import torch

from tgq_fast.data.catalog import Catalog
from tgq_fast.models import TGQFormerModel


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return Catalog.load(tiny.write_catalog(tmp_path_factory.mktemp("catalog") / "c"))


@pytest.fixture(scope="module")
def saved(vit: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's model in a folder, with what embeddings hang on: whitening and a guide."""
    torch.manual_seed(0)
    model = TGQFormerModel.from_config_with_towers(tiny.tiny_config(vit, llama, whitening=8, norm="pre", guide=True))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder
