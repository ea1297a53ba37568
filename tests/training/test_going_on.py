"""Runs that start from another one's weights, and logs that go to TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import SyntheticStore, make_catalog, make_config

from tgq_fast.errors import ArgumentError, CheckpointError, DependencyError
from tgq_fast.models import TGQFormerModel
from tgq_fast.models.configuration import seal_config
from tgq_fast.training import TrainResult, train
from tgq_fast.training.warm import warm_start

ARGUMENTS: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "log_steps": 2, "seed": 5, "keep": "trained"}
CONFIG = make_config(whitening=8)


def run(out: Path, *, groups: int = 60, **changes: Any) -> TrainResult:
    torch.set_num_threads(1)
    catalog = make_catalog(groups)
    config = changes.pop("config", CONFIG)
    store: Any = SyntheticStore(catalog, config)
    return train(catalog, config, out=out, **({"store": store} | ARGUMENTS | changes))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("first") / "run").path


def apart(a: Path, b: Path) -> float:
    """Largest difference of two runs' parameters and whitening; statistics of the gates' inputs go on being taken."""
    one, other = (TGQFormerModel.from_pretrained(folder) for folder in (a, b))
    names = {name for name, _ in one.named_parameters()} | {n for n in one.state_dict() if n.startswith("whitening.")}
    held = other.state_dict()
    return max((one.state_dict()[name].double() - held[name].double()).abs().max().item() for name in names)


def test_a_run_starts_from_the_weights_and_whitening_of_another(
    tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind, original = [], SyntheticStore.whitened

    def spy(self: Any, whitening: Any, *rest: Any) -> Any:
        behind.append({f"whitening.{name}": value.clone() for name, value in whitening.state_dict().items()})
        return original(self, whitening, *rest)

    monkeypatch.setattr(SyntheticStore, "whitened", spy)
    still = run(tmp_path / "still", init_from=first, config=warm_start(first).config, lr=1e-12, groups=30, seed=9)
    assert apart(still.path, first) < 1e-8
    held = warm_start(first).state  # the catalogue is another, and so would be a whitening fitted to it
    assert behind and all(torch.equal(held[name], value) for name, value in behind[0].items())
    assert apart(run(tmp_path / "fresh", lr=1e-12, groups=30, seed=9).path, first) > 1e-2
    longer = run(tmp_path / "longer", init_from=first, config=warm_start(first).config)
    assert apart(longer.path, first) > 1e-4
    assert longer.manifest["arguments"]["init_from"] == warm_start(first).digest


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, first: Path) -> None:
    with pytest.raises(CheckpointError, match="fields"):
        run(tmp_path / "a", init_from=first, config=make_config(whitening=8, fields=("category",)))
    with pytest.raises(CheckpointError, match="do not fit the configuration"):
        run(tmp_path / "b", init_from=first, config=make_config(whitening=8, hidden_size=32))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(tmp_path / "c", init_from=tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    values = json.loads((copy / "config.json").read_text()) | {"tower_digests": {"vision": "float32:aa"}}
    (copy / "config.json").write_text(json.dumps(seal_config(values)))
    with pytest.raises(CheckpointError, match="another vision tower"):
        run(tmp_path / "d", init_from=copy, config=make_config(whitening=8, tower_digests={"vision": "float32:bb"}))


def test_a_run_that_kept_the_frozen_feature_is_started_from_what_it_trained(tmp_path: Path, first: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(first, kept / "trained")
    assert warm_start(kept).digest == warm_start(first).digest
    values = json.loads((first / "config.json").read_text()) | {"connector": "zero-shot"}
    (tmp_path / "floor").mkdir()
    (tmp_path / "floor" / "config.json").write_text(json.dumps(seal_config(values)))
    with pytest.raises(CheckpointError, match="no trained weights"):
        warm_start(tmp_path / "floor")


def test_more_epochs_for_a_finished_run_say_how(first: Path) -> None:
    with pytest.raises(CheckpointError, match=r"epochs was 2, now 4.*--init-from"):
        run(first, epochs=4, resume=True)


def test_tensorboard_has_losses_and_validation(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tmp_path / "run", report_to="tensorboard")
    found = EventAccumulator(str(result.path / "tensorboard")).Reload()
    names = found.Tags()["scalars"]
    assert {"train/loss", "train/loss/item", "eval/HR@10"} <= set(names)
    assert max(point.value for point in found.Scalars("eval/HR@10")) == pytest.approx(result.best_metric, abs=1e-6)


def test_wandb_writes_offline_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    result = run(tmp_path / "run", report_to=["wandb"])
    (written,) = result.path.glob("wandb/offline-run-*/run-*.wandb")
    data = written.read_bytes()
    assert b"eval/HR@10" in data and b"train/loss" in data


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "train"), ("wandb", "wandb")])
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *rest: None if asked == name else original(asked))
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(DependencyError, match=rf"tgq-fast\[{extra}\]"):
        run(tmp_path / "run", report_to=name)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArgumentError, match="report_to"):
        run(tmp_path / "run", report_to="mlflow")
