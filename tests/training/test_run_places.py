"""Where a run is written: full and read-only disks, things in the way, links and modes; a rerun goes on to the same."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from hostile_places import Full, full_from, no_file_above, put, read_only, temporaries, untouched
from synthetic import SyntheticStore, make_catalog, make_config

from tgq_fast.errors import CheckpointError, StorageError
from tgq_fast.training import TrainResult, folder, train

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes of POSIX")


def run(out: Path, **changes: Any) -> TrainResult:
    catalog, config = make_catalog(60), make_config()
    store: Any = SyntheticStore(catalog, config)
    given: dict[str, Any] = {"batch_size": 8, "max_steps": 2, "checkpoint_steps": 1, "log_steps": 1, "keep": "trained"}
    return train(catalog, config, out=out, **({"store": store, "bf16": False} | given | changes))


def result_of(out: Path) -> tuple[bytes, ...]:
    return tuple((out / name).read_bytes() for name in ("model.safetensors", "config.json", "training_log.jsonl"))


def files_of(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ...]:
    """What an undisturbed run leaves."""
    left = result_of(run(tmp_path_factory.mktemp("whole") / "run").path)
    assert b"eval/HR@10" in left[-1]
    return left


@pytest.fixture(scope="module")
def first_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted at its first checkpoint."""

    def stop(event: Any) -> None:
        if event["event"] == "checkpoint":
            raise KeyboardInterrupt

    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        run(out, on_event=stop)
    return out


@pytest.fixture
def stopped(first_half: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(first_half, tmp_path / "run"))


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path: Path, whole: tuple[bytes, ...]) -> None:
    """Full again and again: each time at the next of its files."""
    out = tmp_path / "run"
    last = [("run.json", 1), ("training_log.jsonl", 1), ("checkpoint-1/model.safetensors", 1)]
    last += [("checkpoint-2/complete.json", 1), ("run/model.safetensors", 1), ("run/config.json", 1), ("run.json", 2)]
    for name, nth in last:
        with full_from(name, nth), pytest.raises(StorageError, match=rf"{name}: .*No space left.*run the same") as told:
            run(out, resume=True)
        assert told.value.errno == errno.ENOSPC and not temporaries(out)
    run(out, resume=True)
    assert result_of(out) == whole and not (out / "checkpoints").exists()


def test_a_run_stopped_after_its_last_step_trains_no_further(tmp_path: Path, whole: tuple[bytes, ...]) -> None:
    """Its last step is within an epoch."""
    steps: list[Any] = []
    with full_from("run/model.safetensors"), pytest.raises(StorageError):
        run(tmp_path / "run")
    done = run(tmp_path / "run", resume=True, on_event=lambda e: steps.append(e) if e["event"] == "step" else None)
    assert not steps and done.steps == done.resumed_from == 2 and result_of(tmp_path / "run") == whole


def test_a_log_line_of_which_the_disk_takes_a_part(
    tmp_path: Path, whole: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def opened(path: Path, mode: str, **options: Any) -> Any:
        written.append(1)
        file = open(path, mode, **options)  # noqa: SIM115 (closed by whom it is given to)
        return Full(file, 20) if len(written) > 2 else file

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(folder, "open", opened, raising=False)
        with pytest.raises(StorageError, match=r"run.*No space left"):
            run(out)
    run(out, resume=True)
    assert result_of(out) == whole


def test_an_optimiser_state_that_the_disk_does_not_take(tmp_path: Path, whole: tuple[bytes, ...]) -> None:
    """It is written by torch.save, which keeps no errno."""
    out = tmp_path / "run"
    with no_file_above(40_000), pytest.raises(StorageError, match=r"torch\.save could not write"):
        run(out)
    assert (out / "checkpoints" / "checkpoint-1" / "optimizer.pt").stat().st_size <= 40_000
    run(out, resume=True)
    assert result_of(out) == whole


def test_a_read_only_disk_is_told_before_training(tmp_path: Path, stopped: Path, whole: tuple[bytes, ...]) -> None:
    events: list[Any] = []
    before = files_of(stopped)
    for out in (tmp_path / "new", stopped):
        with read_only(), pytest.raises(StorageError, match=rf"{out}.*Read-only.*can be written to"):
            run(out, resume=True, on_event=events.append)
    assert not events and not (tmp_path / "new").exists() and files_of(stopped) == before
    run(stopped, resume=True)
    assert result_of(stopped) == whole


FILES = ("run.json", "training_log.jsonl", "rejects.jsonl", "config.json", "model.safetensors")


def test_what_stands_in_the_place_of_its_files_is_told_before_training(
    stopped: Path, first_half: Path, whole: tuple[bytes, ...]
) -> None:
    events: list[Any] = []
    cases = [(name, kind, "cannot be written: .*;") for name in FILES for kind in ("pipe", "folder")]
    cases += [("checkpoints", kind, "cannot be written: .* in the way") for kind in ("pipe", "file", "link")]
    cases += [("checkpoints/checkpoint-7", kind, "no folder, .*move it") for kind in ("pipe", "file", "link")]
    cases += [(".lock", "link", "cannot be written: .* in the way")]
    for name, kind, told in cases:
        put(stopped / name, kind)
        with pytest.raises((StorageError, CheckpointError), match=rf"{name}: {told}"):
            run(stopped, resume=True, on_event=events.append)
        assert not events and untouched(stopped / name, kind)
        shutil.rmtree(stopped)
        shutil.copytree(first_half, stopped)
    put(stopped / "checkpoints" / "checkpoint-of-mine", "file")
    run(stopped, resume=True)
    assert result_of(stopped) == whole


@pytest.mark.parametrize("kind", ["pipe", "file", "link", "below"])
def test_an_output_that_is_no_folder_is_left_alone(tmp_path: Path, kind: str) -> None:
    out, shown = tmp_path / "run", "file" if kind == "below" else kind
    put(out, shown)
    with pytest.raises(StorageError, match=r"run.*cannot be written: .*choose another path"):
        run(out / "below" if kind == "below" else out)
    assert untouched(out, shown)


def test_links_stay_links_and_modes_stay_modes(tmp_path: Path, first_half: Path, whole: tuple[bytes, ...]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to("elsewhere")
    out = tmp_path / "run"
    shutil.copytree(first_half, out, dirs_exist_ok=True)
    names = ("run.json", "training_log.jsonl")
    for name in names:
        (out / name).rename(tmp_path / name)
        (tmp_path / name).chmod(0o600)
        (out / name).symlink_to(tmp_path / name)
    run(out, resume=True)
    assert out.is_symlink() and result_of(tmp_path / "elsewhere") == whole
    for name in names:
        assert (out / name).is_symlink() and stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_what_a_killed_writer_left_is_no_foreign_file_and_is_swept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / ".run.json.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 3600,) * 2)
    run(tmp_path / "run")
    assert not temporaries(tmp_path)
