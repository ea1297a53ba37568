"""Every file of a run, a pool and a cache, damaged: refused with a typed error, or the same answers as before.

`TGQ_FAULTS=full pytest tests/faults` runs the whole campaign instead of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from damage import World, campaign, make_world

from tgq_fast import workflow
from tgq_fast.models import FeatureStore, TGQFormerModel
from tgq_fast.models.processing import TGQFormerProcessor
from tgq_fast.pool import ItemPool, model_digest
from tgq_fast.pool.item_table import facts_of
from tgq_fast.report import collect
from tgq_fast.training.folder import read_log, read_manifest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("faults"))


def use_run(world: World) -> Any:
    model = workflow.open_run(world.run)
    store = FeatureStore.open_or_build(
        world.catalog, *workflow.load_towers(model.config), model.config, world.cache, on_error="raise"
    )
    vectors = model.encode(world.catalog, features=store)
    processor = TGQFormerProcessor.from_pretrained(world.run).config.to_diff_dict()
    manifest = read_manifest(world.run)
    curves = collect.training_curves(read_log(world.run, manifest))
    return (
        vectors.numpy().tobytes(),
        collect.run_facts(manifest, model),
        curves,
        model_digest(model),
        processor,
    )


def use_pool(world: World) -> Any:
    with ItemPool.open(world.pool) as pool:
        pool.verify()
        rows = pool.embeddings()
        found = pool.search(rows[:5].float(), 4)
        facts = facts_of(world.pool, sorted(pool.ids()))
        whose = workflow.catalog_of(world.pool, pool.manifest.source, None)
        known = pool.manifest.model, pool.manifest.source, pool.manifest.complete
        content = pool.content(pool.ids())
        return (
            rows.numpy().tobytes(),
            pool.ids(),
            found.ids,
            found.scores.tolist(),
            facts,
            whose is None,
            known,
            content,
        )


def use_cache(world: World) -> Any:
    model = TGQFormerModel.from_pretrained(world.run)
    model.set_towers(*workflow.load_towers(model.config))
    store = FeatureStore.open_or_build(
        world.catalog, *workflow.load_towers(model.config), model.config, world.cache, on_error="raise"
    )
    return model.encode(world.catalog, features=store).numpy().tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(("part", "use"), [("run", use_run), ("pool", use_pool), ("cache", use_cache)])
def test_damage_is_refused_or_harmless(world: World, part: str, use: Callable[[World], Any]) -> None:
    torch.manual_seed(0)
    folder = getattr(world, part)
    outcomes = campaign(folder, lambda: use(world), seed=11, repairs=part == "cache")
    assert outcomes["refused"] or part == "cache"  # a cache is made again
