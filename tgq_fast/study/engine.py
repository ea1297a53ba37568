"""Run a study: shared features first, trials on folds, the choice, final runs, and the figures.

plan.json         what was asked for
choice.json       which recipe each connector got on the folds, and after how many trials; written before any final run
runs/JOB/         one job each (see `tgq_fast.study.worker`); a killed study goes on with the jobs that are not finished
study.json        every figure
report.html       the same as a page
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from tgq_fast.defaults import own_randomness, plain_tensors
from tgq_fast.errors import CheckpointError, TGQError
from tgq_fast.io.files import check_own, locked, make_folder, storage_errors, write_atomic, writing
from tgq_fast.io.identity import package_identity
from tgq_fast.io.sealed import seal
from tgq_fast.study.page import write_page
from tgq_fast.study.plan import Job, Plan
from tgq_fast.study.results import Row, read_row, summarise
from tgq_fast.study.worker import JOB, LOG, PLAN, RUNS, Setting, check_job, finished, prepare, run_job

__all__ = ["StudyError", "run_study"]

CHOICE, STUDY, PAGE = "choice.json", "study.json", "report.html"
Say = Callable[[str], None]


class StudyError(TGQError):
    """A job of a study failed; says which, and where its log is."""


@plain_tensors()
def run_study(
    plan: Plan, out: Path, *, jobs: int = 1, cache: Path | None = None, say: Say = lambda line: None
) -> dict[str, Any]:
    """Do what is left of a study in a folder and write its figures.

    Args:
        plan: what to run. A folder that holds another plan's study keeps what both share: a job's folder is named after
            everything that decides its figures.
        out: the study's folder.
        jobs: processes that train at a time; the CPU's threads are divided among them. 1: this process does it all.
        cache: folder of frozen features.
        say: gets lines for the person watching.

    Returns:
        The content of study.json.

    Raises:
        StudyError: a job failed.
        CheckpointError: another process works in the folder, or it holds files of these names that are no study's.
        StorageError: the folder cannot be written to, or its disk is full.
    """
    with own_randomness(), storage_errors(out), locked(make_folder(out) / ".lock", wait=False) as mine:
        if not mine:
            raise CheckpointError(f"{out}: another process works on the study in this folder")
        _refuse_others(out)
        write_atomic(out / PLAN, _json(plan.to_json()))
        setting = Setting(plan, cache, say=say)
        trials = plan.trials()
        runner = _Runner(setting, out, jobs, cache, say)
        chosen = {connector: next(iter(plan.recipes)) for connector in plan.connectors}
        choice: dict[str, Any] = {"metric": plan.select, "trials": {}, "chosen": chosen}
        if trials:
            runner.run(trials)
            choice = _choose(plan, trials, out)
        write_atomic(out / CHOICE, _json(choice))
        finals = plan.finals(choice["chosen"])
        runner.run(finals)
        study = _summary(plan, setting, finals, choice, out)
        write_atomic(out / STUDY, _json(seal(json.loads(_json(study)))))
        write_page(study, out / PAGE)
        return study


def _refuse_others(out: Path) -> None:
    """Nothing is written over what is no study's, and no place is found out only at the end to take no file."""
    check_own(out, (PLAN, CHOICE, STUDY, PAGE), (RUNS,))
    ours = (out / RUNS).is_dir() and (out / PLAN).exists()
    if not ours:  # or a study that was stopped before its first job
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            Plan.from_json(out / PLAN)
            ours = True
    taken = [name for name in (PLAN, CHOICE, STUDY, PAGE, RUNS) if os.path.lexists(out / name)]
    if taken and not ours:
        raise CheckpointError(f"{out}: holds other files ({', '.join(taken)}); choose an empty folder")


class _Runner:
    """Does jobs that are not finished, in this process or in several."""

    def __init__(self, setting: Setting, out: Path, jobs: int, cache: Path | None, say: Say) -> None:
        self.setting, self.out, self.jobs, self.cache, self.say = setting, out, jobs, cache, say
        self._prepared = False

    def run(self, jobs: Sequence[Job]) -> None:
        plan = self.setting.plan
        todo = [job for job in jobs if finished(self.folder(job), plan) is None]
        self.say(f"{len(jobs) - len(todo)} of {len(jobs)} jobs are finished")
        if not todo:
            return
        for job in todo:
            check_job(self.folder(job))
        if not self._prepared:
            prepare(self.setting, plan.parsed())
            self._prepared = True
        if self.jobs > 1:
            self._in_processes(todo)
            return
        for number, job in enumerate(todo, start=1):
            begin = time.monotonic()
            run_job(self.setting, job, self.folder(job))
            self.say(f"{number} of {len(todo)}: {self.folder(job).name}, {time.monotonic() - begin:.0f} s")

    def folder(self, job: Job) -> Path:
        return self.out / RUNS / self.setting.plan.folder(job)

    def _in_processes(self, todo: Sequence[Job]) -> None:
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        waiting, running = list(todo), dict[subprocess.Popen[bytes], tuple[Path, float]]()
        done = 0
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    job = waiting.pop(0)
                    folder = make_folder(self.folder(job))
                    write_atomic(folder / JOB, _json(asdict(job)))
                    command = [sys.executable, "-m", "tgq_fast.study.worker", str(self.out), folder.name]
                    command += [] if self.cache is None else [str(self.cache)]
                    with writing(folder / LOG):
                        log = (folder / LOG).open("wb")
                    try:
                        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                    except OSError as error:
                        raise StudyError(
                            f"{folder.name}: its process could not be started ({error}); try fewer jobs"
                        ) from error
                    finally:
                        log.close()
                    running[process] = (folder, time.monotonic())
                for process in [process for process in running if process.poll() is not None]:
                    folder, begin = running.pop(process)
                    if process.returncode:
                        why = _why(process.returncode, (folder / LOG).read_text(errors="replace"))
                        raise StudyError(f"{folder.name}: failed ({why}); its log is {folder / LOG}")
                    done += 1
                    self.say(f"{done} of {len(todo)}: {folder.name}, {time.monotonic() - begin:.0f} s")
                time.sleep(0.2)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def _choose(plan: Plan, trials: Sequence[Job], out: Path) -> dict[str, Any]:
    """Per connector the recipe with the best mean over folds and conditions; the first listed wins a tie."""
    scores: dict[str, dict[str, list[float]]] = {}
    for job in trials:
        result = finished(out / RUNS / plan.folder(job), plan)
        assert result is not None  # the runner has just seen to it
        (row,) = result["rows"].values()
        value = float(np.mean([row["conditions"][text][plan.select] for text in plan.conditions]))
        scores.setdefault(job.connector, {}).setdefault(job.recipe, []).append(value)
    chosen, told = {}, {}
    for connector, by_recipe in scores.items():
        chosen[connector] = max(by_recipe, key=lambda name: float(np.mean(by_recipe[name])))
        told[connector] = {
            name: {"mean": float(np.mean(v)), "deviation": float(np.std(v)), "folds": v}
            for name, v in by_recipe.items()
        }
    return {"metric": plan.select, "trials": told, "chosen": chosen}


def _why(code: int, log: str) -> str:
    """Why a worker ended, as far as its exit status and its log tell."""
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    lines = log.strip().splitlines()
    return lines[-1] if lines else f"exit status {code} and an empty log: the disk may be full"


def _summary(plan: Plan, setting: Setting, jobs: Sequence[Job], choice: dict[str, Any], out: Path) -> dict[str, Any]:
    components = setting.catalog.components()
    files: dict[str, list[Path]] = {}
    facts: dict[str, dict[str, Any]] = {}
    probes: dict[str, list[dict[str, Any]]] = {}
    commits: set[str] = set()
    pool_size = 0
    for job in jobs:
        folder = out / RUNS / plan.folder(job)
        result = finished(folder, plan)
        assert result is not None
        commits.add(result["package"]["commit"])
        for name, row in result["rows"].items():
            files.setdefault(name, []).append(folder / row["ranks"])
            pool_size = row["pool_size"]
            told = facts.setdefault(name, {"stage": job.stage})
            if job.stage == "final":
                training = result["training"]
                told |= {"connector": job.connector, "recipe": job.recipe, "trials": len(plan.recipes)}
                told |= {"parameters": training["trainable_parameters"], "steps": training["steps"]}
                told.setdefault("seconds", []).append(training["seconds"])
                told["ablation"] = job.name if job.name != job.connector else None
                if result.get("probes"):
                    probes.setdefault(name, []).append(result["probes"])
    rows = [read_row(name, paths, plan.ks, components, facts[name]) for name, paths in files.items()]
    ordered: list[Row] = sorted(rows, key=lambda row: _place(row, plan))
    pairs = setting.catalog.split_pairs("test", every=True)
    catalogue = setting.catalog.root.resolve().name
    return {
        "catalogue": catalogue,
        # The figures may be published: where the catalogue lay on this machine stays in plan.json.
        "plan": plan.to_json() | {"catalog": catalogue},
        "package": package_identity() | {"date": date.today().isoformat(), "commits of the runs": sorted(commits)},
        "test": {
            "queries": len(np.unique(pairs.query)),
            "pairs": len(pairs),
            "groups": len(np.unique(components[pairs.query])),
            "pool": pool_size,
        },
        "choice": choice,
        **summarise(ordered, plan.connectors[0], seed=plan.seed),
        "probes": {name: _average(found) for name, found in probes.items()},
    }


def _place(row: Row, plan: Plan) -> tuple[int, int]:
    """Connectors in the order asked for, then ablations, then floors."""
    if row.name in plan.connectors:
        return 0, list(plan.connectors).index(row.name)
    return (2, 0) if row.facts["stage"] == "floor" else (1, 0)


def _average(found: Sequence[Any]) -> Any:
    """Means over seeds of equally nested numbers."""
    first = found[0]
    if isinstance(first, dict):
        return {key: _average([one[key] for one in found if key in one]) for key in first}
    return float(np.mean(found)) if isinstance(first, float) else first


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, default=str) + "\n").encode()
