"""Every file of a run, a pool and a cache, damaged: refused with a typed error, or the same answers as before.

`TGQ_FAULTS=full pytest tests/faults` runs the whole campaign instead of a sample.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import FULL, World, faults, files_of, make_world

from tgq_fast import workflow
from tgq_fast.errors import TGQError
from tgq_fast.models import FeatureStore, TGQFormerModel
from tgq_fast.models.processing import TGQFormerProcessor
from tgq_fast.pool import ItemPool, model_digest
from tgq_fast.pool.item_table import facts_of
from tgq_fast.report import collect
from tgq_fast.training.folder import read_log, read_manifest

PER_FILE = 14 if FULL else 3


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


def campaign(world: World, folder: Path, use: Callable[[World], Any], seed: int, whole: Path | None = None) -> Counter:
    right = use(world)
    outcomes: Counter[str] = Counter()
    wrong = []
    for fault in faults(files_of(folder), PER_FILE, seed):
        before = {path: path.read_bytes() for path in files_of(folder)} if use is use_cache else {}
        with fault.planted(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                same = use(world) == right
                outcomes["harmless" if same else "WRONG"] += 1
                if not same:
                    wrong.append(f"{fault}: another answer")
            except TGQError:
                outcomes["refused"] += 1
            except Exception as error:  # the campaign lists them all
                outcomes["UNTYPED"] += 1
                wrong.append(f"{fault}: {type(error).__name__}: {error}"[:300])
        for path in files_of(folder) if before else ():  # a repaired cache has other files
            if path not in before:
                path.unlink()
        for path, data in before.items():
            path.write_bytes(data)
    print(json.dumps({"folder": folder.name, **outcomes}))
    assert not wrong, "\n".join(wrong)
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize(("part", "use"), [("run", use_run), ("pool", use_pool), ("cache", use_cache)])
def test_damage_is_refused_or_harmless(world: World, part: str, use: Callable[[World], Any]) -> None:
    torch.manual_seed(0)
    outcomes = campaign(world, getattr(world, part), use, seed=11)
    assert outcomes["refused"] or part == "cache"  # a cache is made again
