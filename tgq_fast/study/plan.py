"""What a study runs: connectors, ablations, recipes, seeds and folds, as jobs that know their own folder.

Choices are made on folds of the groups of train and validation, each connector among the same recipes; the test split
is read once the choice is written down.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgq_fast.data import Catalog
from tgq_fast.data.conditions import CLEAN, Condition, parse_conditions
from tgq_fast.data.pairs import SPLITS, Pairs
from tgq_fast.errors import ArgumentError
from tgq_fast.io.files import read_regular
from tgq_fast.io.identity import package_identity
from tgq_fast.io.json_text import read_json
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.views import ViewRecipe
from tgq_fast.models.zoo.registry import CONNECTORS

__all__ = ["ABLATIONS", "CONDITIONS", "Job", "Plan", "fold_catalog", "folds_of"]

CONDITIONS = tuple(f"{kind}{side}" for kind in ("overlay:0.3:", "scene:4:") for side in ("query", "pool", "both"))
"""What a study looks at by default, beside "clean"."""

ABLATIONS: dict[str, Mapping[str, Any]] = {
    "guide": {"guide": False, "guide_explore": False, "mask_weight": 0.0, "gate_sees_patches": False},
    "mask loss": {"mask_weight": 0.0},
    "gates": {"gate": "none"},
    "anchored": {"num_anchored_queries": 0},
    "exploratory": {"num_exploratory_queries": 0},
    "redundancy": {"redundancy_weight": 0.0},
    "whitening": {"whitening": 0},
    "views": {"view_share": 0.0},
    "ema": {"ema": 0.0},
    "linear": {"direct_size": 0},
    "second look": {"second_look": 0.0},
}
"""Name → what a run without that part of the main connector sets. The queries that an absent stream gives up go to the
other one."""


@dataclass(frozen=True)
class Job:
    """One model that is trained, embedded and evaluated.

    Attributes:
        name: of its row.
        stage: "fold" (a trial, evaluated on a fold), "final" (evaluated on the test split) or "floor".
        connector: which.
        recipe: name of the recipe it follows.
        overrides: configuration fields on top of the preset.
        seed: of the run.
        fold: which fold is left out, or -1.
    """

    name: str
    stage: str
    connector: str = "tgq"
    recipe: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    fold: int = -1


@dataclass(frozen=True)
class Plan:
    """A whole study.

    Attributes:
        catalog: path of the catalogue.
        digest: of its rows and pairs.
        fields: metadata that may guide.
        preset: sizes and towers.
        overrides: configuration fields of every run.
        connectors: the main one first.
        ablations: names in `ABLATIONS`.
        recipes: name → configuration fields; every connector tries all of them on the folds.
        seeds: seeds of the final runs, from 0.
        folds: K, used when there is more than one recipe.
        conditions: texts; "clean" is always among them.
        epochs, batch_size, lr, bf16, validations: budget of every run; no epochs means the rule of `tgq-fast train`.
        views: what training views are drawn from, or None for none.
        select: metric that chooses the recipe, averaged over conditions and folds.
        ks: cut-offs.
        match: give every connector as many trainable parameters as the main one.
        seed: of folds, corruptions and views.
    """

    catalog: str
    digest: str
    fields: Sequence[str]
    preset: str = "tiny"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    connectors: Sequence[str] = ("tgq", "qformer", "mlp")
    ablations: Sequence[str] = ()
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"default": {}})
    seeds: int = 3
    folds: int = 5
    conditions: Sequence[str] = ("clean", *CONDITIONS)
    epochs: int | None = None
    batch_size: int = 128
    lr: float = 1e-3
    bf16: bool = False
    validations: int = 6
    views: Mapping[str, Any] | None = field(default_factory=dict)
    select: str = "H@100"
    ks: Sequence[int] = (1, 10, 100)
    match: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the plan.

        Raises:
            ArgumentError: an unknown connector, ablation, condition or metric, or too few seeds or folds.
        """
        for what, given, known in (
            ("connectors", self.connectors, CONNECTORS),
            ("ablations", self.ablations, ABLATIONS),
        ):
            if strange := [name for name in given if name not in known]:
                raise ArgumentError(what, ", ".join(strange), "one of " + ", ".join(known))
        if not self.connectors:
            raise ArgumentError("connectors", "none", "at least one, the main one first")
        if self.ablations and self.connectors[0] != "tgq":
            raise ArgumentError("ablations", ", ".join(self.ablations), "tgq as the first connector")
        for what, value, least in (("--seeds", self.seeds, 1), ("--folds", self.folds, 2)):
            if value < least:
                raise ArgumentError(what, value, f"at least {least}")
        if not self.recipes:
            raise ArgumentError("recipe", "none", "at least one")
        cuts = {f"{family}@{k}" for family in ("H", "HR", "Recall", "NDCG") for k in self.ks} | {"MRR"}
        if self.select not in cuts:
            raise ArgumentError("select", repr(self.select), "one of " + ", ".join(sorted(cuts)))
        absent = TGQFormerConfig()
        for name in self.ablations:
            missing = [key for key in ABLATIONS[name] if not hasattr(absent, key)]
            if missing:
                raise ArgumentError("ablations", name, f"parts that this version has ({', '.join(missing)} is not)")
        object.__setattr__(self, "conditions", [str(c) for c in self.parsed()])

    def parsed(self) -> list[Condition]:
        """The conditions, "clean" first."""
        return list(dict.fromkeys([CLEAN, *parse_conditions(self.conditions)]))

    def recipe(self) -> ViewRecipe | None:
        """What training views are drawn from."""
        if self.views is None:
            return None
        given: dict[str, Any] = {"seed": self.seed}
        for name, value in self.views.items():
            given[name] = tuple(value) if isinstance(value, list) else value
        return ViewRecipe(**given)

    def trials(self) -> list[Job]:
        """Runs on the folds, none when there is nothing to choose."""
        if len(self.recipes) < 2:
            return []
        return [
            Job(f"{connector} {recipe}", "fold", connector, recipe, {**self.overrides, **changes}, fold, fold)
            for connector in self.connectors
            for recipe, changes in self.recipes.items()
            for fold in range(self.folds)
        ]

    def finals(self, chosen: Mapping[str, str]) -> list[Job]:
        """Floors, connectors and ablations with their chosen recipes."""
        jobs = [Job("floors", "floor")]
        for seed in range(self.seeds):
            for connector in self.connectors:
                recipe = chosen[connector]
                settings = {**self.overrides, **self.recipes[recipe]}
                jobs.append(Job(connector, "final", connector, recipe, settings, seed))
            main = jobs[-len(self.connectors)]
            jobs += [replace(main, name=f"without {name}", overrides=_without(main, name)) for name in self.ablations]
        return jobs

    def folder(self, job: Job) -> str:
        """Name of a job's folder: what it is, and a digest of everything that decides its figures but conditions."""
        facts = {name: value for name, value in asdict(self).items() if name in _DECIDING}
        facts |= {"job": {k: v for k, v in asdict(job).items() if k not in ("name", "recipe")}}
        facts["version"] = package_identity()["version"]
        # Of the preset, what it says: another state of the package may have other defaults under its name.
        sizes = TGQFormerConfig.preset(self.preset, **{**job.overrides, "connector": job.connector}).to_dict()
        facts["sizes"] = {name: value for name, value in sizes.items() if name != "transformers_version"}
        if job.stage != "fold":
            facts.pop("folds")
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in job.name)
        place = f"fold{job.fold}" if job.stage == "fold" else f"seed{job.seed}"
        return f"{plain}-{place}-{digest}"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_json` reads it."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, path: Path) -> Plan:
        """The plan that a study's folder holds."""
        return cls(**read_json(read_regular(path)))


_DECIDING = (
    "digest",
    "fields",
    "preset",
    "epochs",
    "batch_size",
    "lr",
    "bf16",
    "validations",
    "views",
    "match",
    "seed",
    "ks",
    "folds",
)


def _without(main: Job, name: str) -> dict[str, Any]:
    changes = dict(ABLATIONS[name])
    total = TGQFormerConfig.preset("tiny", **main.overrides).num_queries
    if name == "anchored":
        changes["num_exploratory_queries"] = total
    elif name == "exploratory":
        changes["num_anchored_queries"] = total
    return {**main.overrides, **changes}


def folds_of(catalog: Catalog, count: int, seed: int = 0) -> NDArray[np.int64]:
    """[n] fold of each item of train and validation pairs, -1 for all others.

    Groups (connected components) go in random order to the fold that has the fewest items.

    Raises:
        ArgumentError: fewer groups than folds.
    """
    paired = np.zeros(len(catalog), dtype=bool)
    for split in ("train", "validation"):
        pairs = catalog.split_pairs(split, every=True)
        paired[pairs.query] = paired[pairs.target] = True
    held = catalog.split_pairs("test", every=True)
    labels = catalog.components()
    paired &= ~np.isin(labels, labels[held.items])
    groups, sizes = np.unique(labels[paired], return_counts=True)
    if len(groups) < count:
        raise ArgumentError("folds", count, f"at most the {len(groups)} groups of train and validation")
    fold_of = np.zeros(len(groups), dtype=np.int64)
    load = np.zeros(count, dtype=np.int64)
    for group in np.random.default_rng(seed).permutation(len(groups)):
        fold_of[group] = int(load.argmin())
        load[fold_of[group]] += sizes[group]
    folds = np.full(len(catalog), -1, dtype=np.int64)
    folds[paired] = fold_of[np.searchsorted(groups, labels[paired])]
    return folds


def fold_catalog(catalog: Catalog, folds: NDArray[np.int64], fold: int) -> Catalog:
    """The catalogue of a trial: pairs of one fold are its test pairs, those of the others its training pairs.

    Pairs of the real test split are gone; its items stay candidates like any other.
    """
    parts = [catalog.split_pairs(split, every=True) for split in ("train", "validation")]
    query, target, weight = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("query", "target", "weight")
    )
    kept = (folds[query] >= 0) & (folds[target] >= 0)
    query, target, weight = query[kept], target[kept], weight[kept]
    split = np.where(folds[query] == fold, SPLITS.index("test"), SPLITS.index("train")).astype(np.int8)
    return replace(catalog, pairs=Pairs(query, target, weight, split), _cache={"components": catalog.components()})
