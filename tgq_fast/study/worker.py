"""One job of a study in one process: train, embed, evaluate under every condition, ask the model where it looks.

    python -m tgq_fast.study.worker STUDY FOLDER

A job's folder holds the run, the exact rank of every positive under every condition, and last of all `result.json`;
what is there is not done again.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tgq_fast import workflow
from tgq_fast.data import Catalog
from tgq_fast.data.conditions import CLEAN, Condition
from tgq_fast.evaluation import Evaluation
from tgq_fast.io.files import check_own, make_folder, read_regular, storage_errors, write_atomic
from tgq_fast.io.identity import package_identity, sha256_file
from tgq_fast.io.json_text import read_json
from tgq_fast.io.sealed import seal, unseal
from tgq_fast.models import TGQFormerConfig, match_budget
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.views import ViewStore, training_views
from tgq_fast.study.plan import Job, Plan, fold_catalog, folds_of
from tgq_fast.workflow.embeddings import Conditions, Floor, embed_model, evaluate_under, floors
from tgq_fast.workflow.probes import probe_model

if TYPE_CHECKING:
    from tgq_fast.models import TGQFormerModel

__all__ = ["Setting", "check_job", "finished", "run_job"]

PLAN, RUNS, RESULT, JOB, LOG = "plan.json", "runs", "result.json", "job.json", "log.txt"


class Setting:
    """What the jobs of a study share, opened in each process: the catalogue and its frozen features.

    Args:
        plan: of the study.
        cache: folder of frozen features.
        verify: check the checksums of cached features; the first process does, its workers trust it.
        say: gets lines for the person watching.
    """

    def __init__(
        self,
        plan: Plan,
        cache: Path | None,
        *,
        verify: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.plan, self.cache, self.verify, self.say = plan, cache, verify, say
        self.catalog = Catalog.load(plan.catalog, policy="skip")
        self.config = workflow.make_config(
            self.catalog, preset=plan.preset, fields=plan.fields, overrides=dict(plan.overrides)
        )
        self.towers = workflow.load_towers(self.config)
        self.store = FeatureStore.open_or_build(
            self.catalog, *self.towers, self.config, cache, on_error="skip", verify=verify
        )
        self._opened: dict[tuple[str, bytes], ViewStore] = {}
        self.folds = folds_of(self.catalog, plan.folds, plan.seed) if len(plan.recipes) > 1 else None

    @functools.cached_property
    def views(self) -> ViewStore | None:
        """Training views, shared by all jobs."""
        recipe = self.plan.recipe()
        if recipe is None:
            return None
        return training_views(
            self.catalog,
            self.towers[0],
            recipe,
            folds=self.folds,
            cache_dir=self.cache,
            progress=self._progress("training views"),
            verify=self.verify,
        )

    def conditions(self, catalog: Catalog) -> Conditions:
        """Features of a catalogue with these items under the study's conditions."""
        return Conditions(
            catalog,
            self.towers,
            self.store,
            cache_dir=self.cache,
            seed=self.plan.seed,
            opened=self._opened,
            progress=self._progress("corrupted pictures"),
            verify=self.verify,
        )

    def _progress(self, what: str) -> Callable[[int, int], None]:
        last = [time.monotonic()]

        def progress(done: int, total: int) -> None:
            if time.monotonic() - last[0] > 30 or done == total:
                last[0] = time.monotonic()
                self.say(f"{what}: {done} of {total}")

        return progress

    def config_of(self, job: Job) -> TGQFormerConfig:
        """Configuration of a job; other connectors get as many trainable parameters as the main one would have."""
        plan = self.plan
        config = workflow.make_config(
            self.catalog, preset=plan.preset, fields=plan.fields, overrides=dict(job.overrides)
        )
        if job.connector == "tgq":
            return config
        if plan.match:  # whatever sizes were set: a study compares at one budget
            return match_budget(config, job.connector)
        return TGQFormerConfig.from_dict(config.to_dict() | {"connector": job.connector})


def finished(folder: Path, wanted: Plan) -> dict[str, Any] | None:
    """The result of a job; None where it is not there, lacks a condition or is damaged, and is to be done again."""
    try:
        result = unseal(read_json(read_regular(folder / RESULT)))
        for row in result["rows"].values():
            ranks = sha256_file(folder / row["ranks"])
            if not set(wanted.conditions) <= set(row["conditions"]) or row.get("sha256", ranks) != ranks:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return result


def check_job(folder: Path) -> None:
    """StorageError where something else stands in the place of a job's files."""
    check_own(folder, (RESULT, JOB, LOG, *(path.name for path in folder.glob("*.npz"))), ("run",))


def run_job(setting: Setting, job: Job, folder: Path) -> None:
    """Do what is left of a job."""
    make_folder(folder)
    catalog = setting.catalog
    if job.stage == "fold":
        assert setting.folds is not None
        catalog = fold_catalog(catalog, setting.folds, job.fold)
    conditions = setting.conditions(catalog)
    begin = time.monotonic()
    result: dict[str, Any] = {"job": asdict(job), "package": package_identity(), "rows": {}}
    if job.stage == "floor":
        for floor in floors(setting.store, setting.config):
            result["rows"][floor.name] = _evaluate(setting, conditions, floor, folder, floor.name)
    else:
        facts = _train(setting, job, catalog, folder / "run")
        model = workflow.open_run(folder / "run")
        result |= facts
        result["rows"][job.name] = _evaluate(setting, conditions, model, folder, "ranks")
        if job.stage == "final":
            result["probes"] = probe_model(conditions, model, setting.plan.parsed(), seed=setting.plan.seed)
    result["seconds"] = round(time.monotonic() - begin, 1)
    write_atomic(folder / RESULT, (json.dumps(seal(result), indent=1) + "\n").encode())


def _train(setting: Setting, job: Job, catalog: Catalog, out: Path) -> dict[str, Any]:
    from tgq_fast.training import train

    plan, config = setting.plan, setting.config_of(job)
    begin = time.monotonic()
    done = train(
        catalog,
        config,
        out=out,
        epochs=plan.epochs or workflow.default_epochs(catalog, plan.batch_size),
        seed=job.seed,
        batch_size=plan.batch_size,
        lr=plan.lr,
        bf16=plan.bf16,
        validations=plan.validations,
        resume=(out / "run.json").exists(),
        on_error="skip",
        cache_dir=setting.cache,
        towers=setting.towers,
        store=setting.store,
        views=setting.views if config.view_share else None,
        keep="trained",
    )
    found = done.manifest["result"]
    return {
        "training": {
            "seconds": round(time.monotonic() - begin, 1),
            "steps": done.steps,
            "best_step": done.best_step,
            "trainable_parameters": found["trainable_parameters"],
        },
        "config": {
            name: value for name, value in config.to_dict().items() if isinstance(value, (int, float, str, list))
        },
    }


def _evaluate(
    setting: Setting, conditions: Conditions, embedder: TGQFormerModel | Floor, folder: Path, name: str
) -> dict[str, Any]:
    """Metrics and ranks under every condition; each corrupted catalogue is embedded once."""

    def embed(condition: Condition) -> torch.Tensor:
        store = conditions.store(condition)
        return embedder(store) if isinstance(embedder, Floor) else embed_model(embedder, store)

    vectors: dict[Condition, torch.Tensor] = {}
    found: dict[str, Evaluation] = {}
    for condition in setting.plan.parsed():
        alike = replace(condition, side="both")
        for wanted in (CLEAN, alike):
            if wanted not in vectors:
                vectors[wanted] = embed(wanted)
        found[str(condition)], _, _ = evaluate_under(
            conditions,
            embedder,
            condition,
            clean=vectors[CLEAN],
            changed=vectors[alike],
            ks=setting.plan.ks,
            samples=0,
        )
    arrays = {f"rank/{text}": evaluation.rank for text, evaluation in found.items()}
    first = next(iter(found.values()))
    file = "".join(c if c.isalnum() else "-" for c in name) + ".npz"
    _save(folder / file, {**arrays, "query": first.query, "target": first.target, "weight": first.weight})
    return {
        "ranks": file,
        "sha256": sha256_file(folder / file),
        "pool_size": first.pool_size,
        "conditions": {
            text: {name: metric.value for name, metric in evaluation.metrics.items()}
            for text, evaluation in found.items()
        },
    }


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz file that appears atomically."""
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def prepare(setting: Setting, conditions: list[Condition]) -> None:
    """Compute everything that the jobs share, before they start."""
    shared = setting.conditions(setting.catalog)
    for condition in conditions:
        if condition.kind != "clean":
            shared.store(condition)
    _ = setting.views


def main(arguments: list[str]) -> int:
    """One job of the study in a folder."""
    study, name, cache = Path(arguments[0]), arguments[1], arguments[2] if len(arguments) > 2 else None
    plan = Plan.from_json(study / PLAN)
    folder = study / RUNS / name
    job = Job(**read_json(read_regular(folder / JOB)))
    with storage_errors(folder):
        setting = Setting(plan, None if cache is None else Path(cache), verify=False)
        run_job(setting, job, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
