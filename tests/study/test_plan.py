"""Folds by group, the catalogue of a trial, ablations, and folders that name what decides a job's figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgq_fast.data import Catalog, Item
from tgq_fast.errors import ArgumentError
from tgq_fast.models import TGQFormerConfig, configuration
from tgq_fast.study.plan import ABLATIONS, Plan, fold_catalog, folds_of


def shop(groups: int = 60, size: int = 3) -> Catalog:
    lone = [Item(f"lone{i}", category="c") for i in range(10)]
    return Catalog.from_items([Item(f"{g}-{v}", group_id=f"g{g}") for g in range(groups) for v in range(size)] + lone)


def plan(**changes: Any) -> Plan:
    return Plan(**({"catalog": "shop", "digest": "d", "fields": ["category"]} | changes))


def test_folds_are_whole_groups_and_leave_the_test_split_out() -> None:
    catalog = shop()
    folds = folds_of(catalog, 4, seed=3)
    labels = catalog.components()
    for label in np.unique(labels):
        assert len(np.unique(folds[labels == label])) == 1
    test = catalog.split_pairs("test")
    assert (folds[test.query] == -1).all() and (folds[-10:] == -1).all()
    train = catalog.split_pairs("train")
    assert (folds[train.query] >= 0).all()
    sizes = np.bincount(folds[folds >= 0])
    assert len(sizes) == 4 and sizes.max() - sizes.min() <= 3
    assert not np.array_equal(folds, folds_of(catalog, 4, seed=4))
    with pytest.raises(ArgumentError, match="groups of train"):
        folds_of(shop(6), 50)


def test_a_trial_trains_on_the_other_folds_and_sees_no_test_pair() -> None:
    catalog = shop()
    folds = folds_of(catalog, 4)
    real = catalog.split_pairs("test", every=True)
    held = set(zip(real.query.tolist(), real.target.tolist()))
    everything = []
    for fold in range(4):
        trial = fold_catalog(catalog, folds, fold)
        train, test = trial.split_pairs("train"), trial.split_pairs("test", every=True)
        assert (folds[test.query] == fold).all() and (folds[test.target] == fold).all()
        assert (folds[train.query] != fold).all() and (folds[train.target] != fold).all()
        assert not len(trial.split_pairs("validation")) and len(trial) == len(catalog)
        for part in (train, test):
            assert not held & set(zip(part.query.tolist(), part.target.tolist()))
        everything += test.query.tolist()
        assert np.array_equal(trial.components(), catalog.components())
    expected = [catalog.split_pairs(split, every=True).query for split in ("train", "validation")]
    assert sorted(everything) == sorted(np.concatenate(expected).tolist())


def test_ablations_change_what_they_name_and_keep_the_number_of_tokens() -> None:
    made = plan(ablations=list(ABLATIONS), seeds=1, connectors=["tgq", "mlp"])
    jobs = {job.name: job for job in made.finals({"tgq": "default", "mlp": "default"})}
    full = TGQFormerConfig.preset("tiny", **jobs["tgq"].overrides)
    for name in ABLATIONS:
        config = TGQFormerConfig.preset("tiny", **jobs[f"without {name}"].overrides)
        assert config.num_queries == full.num_queries
    assert TGQFormerConfig.preset("tiny", **jobs["without anchored"].overrides).num_anchored_queries == 0
    assert TGQFormerConfig.preset("tiny", **jobs["without gates"].overrides).gate == "none"
    assert jobs["floors"].stage == "floor" and len(jobs) == 3 + len(ABLATIONS)


def test_trials_are_the_same_for_every_connector() -> None:
    made = plan(connectors=["tgq", "mlp"], recipes={"a": {}, "b": {"ema": 0.0}}, folds=3)
    jobs = made.trials()
    assert len(jobs) == 2 * 2 * 3
    tried = {c: sorted((j.recipe, j.fold) for j in jobs if j.connector == c) for c in ("tgq", "mlp")}
    assert tried["tgq"] == tried["mlp"]
    assert plan().trials() == []


def test_a_folder_names_what_decides_the_figures() -> None:
    made = plan(conditions=["clean"])
    (job,) = [j for j in made.finals({c: "default" for c in made.connectors}) if j.connector == "mlp" and j.seed == 1]
    same = replace(made, conditions=["clean", "scene:4:both"], seeds=9, connectors=["mlp", "tgq"])
    assert same.folder(job) == made.folder(job)
    others = [
        replace(made, **change)
        for change in ({"lr": 2e-3}, {"digest": "e"}, {"views": None}, {"epochs": 2}, {"seed": 1})
    ]
    folders = {made.folder(job), *(other.folder(job) for other in others)}
    folders |= {
        made.folder(replace(job, **change))
        for change in ({"seed": 2}, {"overrides": {"ema": 0.0}}, {"connector": "tgq"})
    }
    assert len(folders) == 9


def test_a_preset_that_says_something_else_is_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan()
    (job, *_) = made.finals({c: "default" for c in made.connectors})
    before = made.folder(job)
    monkeypatch.setitem(configuration.PRESETS, "tiny", {**configuration.PRESETS["tiny"], "hidden_size": 128})
    assert made.folder(job) != before


def test_a_plan_survives_json(tmp_path: Path) -> None:
    made = plan(recipes={"a": {"guide": True}, "b": {}}, views={"area": (0.1, 0.2), "kinds": {"badge": 1.0}})
    (tmp_path / "plan.json").write_text(json.dumps(made.to_json()))
    again = Plan.from_json(tmp_path / "plan.json")
    assert again.to_json() == made.to_json() and again.recipe() == made.recipe()
    assert [again.folder(j) for j in again.trials()] == [made.folder(j) for j in made.trials()]


@pytest.mark.parametrize(
    "changes",
    [
        {"connectors": ["tqg"]},
        {"connectors": []},
        {"ablations": ["hat"]},
        {"ablations": ["guide"], "connectors": ["mlp", "tgq"]},
        {"seeds": 0},
        {"folds": 1},
        {"recipes": {}},
        {"select": "H@7"},
        {"conditions": ["fog:0.1:both"]},
    ],
)
def test_an_impossible_plan_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        plan(**changes)
