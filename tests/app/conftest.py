"""One run through the verbs, for all tests of the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_models
from cli_world import SMALL, World, call

from tgq_fast.data import write_demo_catalog


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("cli")
    patch = pytest.MonkeyPatch()
    patch.setenv("TGQ_CACHE", str(root / "cache"))
    clip = tiny_models.save_clip(root / "clip")
    catalog = write_demo_catalog(root / "shop", groups=10, variants=3, image_size=40)
    common = (
        "--vision",
        clip,
        "--text",
        "dual_encoder",
        "--epochs",
        1,
        "--batch-size",
        4,
        "--fields",
        "category,material",
        "--keep",
        "trained",
    )
    common += tuple(part for entry in SMALL for part in ("--set", entry))
    first = call("train", catalog, "--out", root / "tgq", *common, "--seed", 3, "--json")
    call("train", catalog, "--out", root / "qformer", *common, "--connector", "qformer", "--no-match-budget")
    second = call("embed", catalog, "--model", root / "tgq", "--out", root / "pool", "--shard-size", 7, "--json")
    documents = [json.loads(result.stdout) for result in (first, second)]
    yield World(catalog, root / "tgq", root / "qformer", root / "pool", common, *documents)
    patch.undo()
