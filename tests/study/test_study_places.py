"""Where a study is written: full and read-only disks, things in the way, links and modes; a rerun goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hostile_places import full_from, put, read_only, temporaries, untouched
from small_study import small_plan

from tgq_fast.errors import CheckpointError, StorageError
from tgq_fast.study import engine, worker
from tgq_fast.study.engine import StudyError, run_study
from tgq_fast.study.plan import Plan

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes of POSIX")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("shop")
    return small_plan(
        root, connectors=("mlp",), conditions=("clean", "scene:4:query"), views={"per_item": 1}, match=False
    )


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed study, its cache beside it."""
    root = tmp_path_factory.mktemp("whole")
    run_study(plan, root / "study", cache=root / "cache")
    return root / "study"


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "study"))


def figures(out: Path) -> Any:
    """Without times and the checksum over them."""
    found = json.loads((out / "study.json").read_text())
    for row in found["rows"].values():
        row["facts"].pop("seconds", None)
    return found["rows"], found["conditions"], found["test"]


def test_a_full_disk_is_told_and_the_study_goes_on(plan: Plan, whole: Path, tmp_path: Path) -> None:
    """Full again and again: each time at the next of its files, of the cache and of the run in it."""
    out, cache = tmp_path / "study", tmp_path / "cache"
    files = [("plan.json", 1), ("journal.jsonl", 1), ("manifest.json", 1), ("choice.json", 1), ("manifest.json", 2)]
    files += [("zero-shot-image.npz", 1), ("run/run.json", 1), ("run/model.safetensors", 1), ("/ranks.npz", 1)]
    files += [("/result.json", 1), ("study.json", 1), ("report.html", 1)]
    for name, nth in files:
        with full_from(name, nth), pytest.raises(StorageError, match=rf"{name}: .*No space left.*run the same") as told:
            run_study(plan, out, cache=cache)
        assert told.value.errno == errno.ENOSPC and not temporaries(tmp_path)
    run_study(plan, out, cache=cache)
    assert figures(out) == figures(whole) and (out / "report.html").read_bytes()


def test_a_worker_that_finds_the_disk_full_says_so(
    plan: Plan, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job = plan.finals({"mlp": "default"})[-1]
    folder = study / "runs" / plan.folder(job)
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    monkeypatch.setattr(worker, "Setting", full)
    with pytest.raises(StorageError, match=rf"{folder}: .*No space left.*run the same"):
        worker.main([str(study), folder.name, str(tmp_path / "cache")])


def test_a_read_only_disk_is_told_before_any_work(plan: Plan, study: Path, tmp_path: Path) -> None:
    said: list[str] = []
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    for out in (tmp_path / "new", study):
        with read_only(), pytest.raises(StorageError, match=rf"{out}.*Read-only.*can be written to"):
            run_study(plan, out, cache=tmp_path / "cache", say=said.append)
    assert not said and not (tmp_path / "new").exists() and not (tmp_path / "cache").exists()
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_what_stands_in_the_place_of_its_files_is_told_before_any_work(
    plan: Plan, whole: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "Setting", lambda *_, **__: pytest.fail("work was begun"))
    cases = [(name, kind) for name in ("plan.json", "choice.json", "study.json", "report.html", ".lock")
             for kind in ("pipe", "folder") if (name, kind) != (".lock", "pipe")]  # fmt: skip
    cases += [("runs", kind) for kind in ("pipe", "file", "link")] + [(".lock", "link")]
    for name, kind in cases:
        put(study / name, kind)
        with pytest.raises(StorageError, match=rf"{name}: cannot be written: .*;"):
            run_study(plan, study)
        assert untouched(study / name, kind), (name, kind)
        shutil.rmtree(study)
        shutil.copytree(whole, study)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_stands_in_the_place_of_a_jobs_files_is_told_before_it(
    plan: Plan, whole: Path, study: Path, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "prepare", lambda *_: pytest.fail("work was begun"))
    cache = whole.parent / "cache"
    (job,) = (folder.name for folder in (study / "runs").iterdir() if folder.name.startswith("mlp"))
    cases = [
        (name, kind) for name in ("result.json", "ranks.npz", "job.json", "log.txt") for kind in ("pipe", "folder")
    ]
    for name, kind in [*cases, ("run", "pipe"), ("run", "file"), ("", "file"), ("", "pipe")]:
        (study / "runs" / job / "result.json").unlink()
        place = study / "runs" / job / name
        put(place, kind)
        with pytest.raises(StorageError, match=rf"{job}.*{name}: cannot be written: .*;"):
            run_study(plan, study, cache=cache, jobs=jobs)
        assert untouched(place, kind), (name, kind)
        shutil.rmtree(study)
        shutil.copytree(whole, study)


def test_a_process_that_cannot_be_started_is_no_fault_of_the_disk(
    plan: Plan, whole: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (result,) = (path for path in (study / "runs").glob("mlp*/result.json"))
    result.unlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda _: None)
    with pytest.raises(StudyError, match=r"mlp.*could not be started.*fewer jobs"):
        run_study(plan, study, cache=whole.parent / "cache", jobs=2)


@pytest.mark.parametrize("name", ["plan.json", "study.json", "report.html", "runs"])
def test_files_of_these_names_that_are_no_studys_are_left_alone(plan: Plan, tmp_path: Path, name: str) -> None:
    for kind in ("folder",) if name == "runs" else ("file", "link"):
        put(tmp_path / kind / name, kind)
        with pytest.raises(CheckpointError, match=rf"other files \({name}\); choose an empty folder"):
            run_study(plan, tmp_path / kind)
        assert untouched(tmp_path / kind / name, kind)


@pytest.mark.parametrize("kind", ["pipe", "file", "link", "below"])
def test_an_output_or_cache_that_is_no_folder_is_left_alone(plan: Plan, tmp_path: Path, kind: str) -> None:
    place, shown = tmp_path / "place", "file" if kind == "below" else kind
    put(place, shown)
    given = place / "below" if kind == "below" else place
    for out, cache in ((given, tmp_path / "cache"), (tmp_path / "study", given)):
        with pytest.raises(StorageError, match=r"place.*cannot be written: .*choose another path"):
            run_study(plan, out, cache=cache)
        assert untouched(place, shown)


def test_links_stay_links_and_modes_stay_modes_and_temporary_files_are_swept(
    plan: Plan, whole: Path, study: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("study")
    left = study / ".study.json.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 3600,) * 2)
    names = ("plan.json", "study.json", "report.html")
    for name in names:
        (study / name).rename(tmp_path / name)
        (tmp_path / name).chmod(0o600)
        (study / name).symlink_to(tmp_path / name)
    run_study(plan, tmp_path / "link", cache=whole.parent / "cache")
    assert figures(study) == figures(whole) and not left.exists()
    for name in names:
        assert (study / name).is_symlink() and stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        assert (tmp_path / name).stat().st_mtime > (whole / name).stat().st_mtime
