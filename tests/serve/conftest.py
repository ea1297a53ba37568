"""A shop over two small pools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from serve_shop import write_pool

from tgq_fast.data import Catalog, write_demo_catalog

if TYPE_CHECKING:  # the tests are skipped where the packages of the server are not installed
    from tgq_fast.serve import Shop


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return Catalog.load(
        write_demo_catalog(tmp_path_factory.mktemp("serve") / "shop", groups=8, variants=3, image_size=48)
    )


@pytest.fixture
def shop(catalog: Catalog, tmp_path: Path) -> Shop:
    from tgq_fast.serve import ServedPool, Shop

    for seed, name in enumerate(("one", "two")):
        write_pool(tmp_path / name, list(catalog.ids), seed)
    return Shop([ServedPool(tmp_path / "one"), ServedPool(tmp_path / "two")], catalog=catalog)


@pytest.fixture
def client(shop: Shop) -> Any:
    from starlette.testclient import TestClient

    from tgq_fast.serve import create_app
    from tgq_fast.serve.app import Limits

    with TestClient(create_app(shop, Limits(reload_seconds=0.02))) as opened:
        yield opened
