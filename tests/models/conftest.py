"""Tiny models and a tiny catalogue, saved once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as tiny

from tgq_fast.data.catalog import Catalog


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
