"""Training runs in a folder: they learn, resume bit for bit after kill -9, and refuse what is not theirs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import SyntheticStore, make_catalog, make_config

from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.evaluation import evaluate
from tgq_fast.models import TGQFormerModel
from tgq_fast.pool import embed_catalog
from tgq_fast.training import TrainResult, train
from tgq_fast.training.folder import read_manifest
from tgq_fast.training.trainer import last_complete_checkpoint, seal_checkpoint

ARGUMENTS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 1e-2, "log_steps": 2, "seed": 5, "keep": "trained"}


def run(out: Path, *, groups: int = 60, **changes: Any) -> TrainResult:
    torch.set_num_threads(1)
    catalog = make_catalog(groups)
    config = changes.pop("config", make_config())
    store: Any = SyntheticStore(catalog, config, invalid=changes.pop("invalid", ()))
    return train(catalog, config, out=out, **({"store": store} | ARGUMENTS | changes))


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    return run(tmp_path_factory.mktemp("runs") / "whole", checkpoint_steps=4).path


def test_run_learns_and_leaves_a_complete_folder(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    result = run(tmp_path / "run", epochs=24, on_event=lambda event: events.append(dict(event)))
    catalog = make_catalog(60)
    store: Any = SyntheticStore(catalog, make_config())
    model = TGQFormerModel.from_pretrained(result.path)
    after = evaluate(catalog, model.encode(catalog, features=store), ks=(10,))["H@10"]
    before = evaluate(catalog, TGQFormerModel(make_config()).encode(catalog, features=store), ks=(10,))["H@10"]
    assert after > before + 0.1
    assert {p.name for p in result.path.iterdir()} == {
        ".lock",
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "run.json",
        "tgq_former.py",
        "training_log.jsonl",
    }
    manifest = read_manifest(result.path)
    assert manifest == result.manifest and manifest["status"] == "finished"
    assert manifest["arguments"]["seed"] == 5 and manifest["catalog"]["digest"] == catalog.digest()
    assert {"torch", "transformers", "tgq_fast version", "tgq_fast commit"} <= manifest["versions"].keys()
    log = log_of(result.path)
    losses = [entry for entry in log if "loss" in entry]
    assert {"loss/item", "loss/visual", "loss/redundancy", "loss/alignment", "learning_rate"} <= losses[0].keys()
    assert losses[-1]["loss/item"] < losses[0]["loss/item"]
    validation = {entry["step"]: entry["eval/HR@10"] for entry in log if "eval/HR@10" in entry}
    assert len(validation) == 6 and max(validation) == result.steps  # about six times, and at the end
    assert result.best_metric == max(validation.values()) == validation[result.best_step]
    kinds = {event["event"] for event in events}
    assert kinds == {"floor", "start", "step", "log", "evaluation", "checkpoint", "end"}
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, result.steps + 1))


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(0.9, 0.1), (0.1, 0.9), (0.1, 0.2)], 0),
        ([(0.9, 0.3), (0.9, 0.2), (0.9, 0.3)], 0),
        ([(0.9, 0.3), (0.9, 0.5), (0.9, 0.4)], 1),  # all mates found from the first on, but ranked higher later
    ],
)
def test_best_checkpoint_is_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[tuple[float, float]], best: int
) -> None:
    """The model must be the one of the best validation by HR@10, then MRR."""
    from tgq_fast.training import trainer as module

    values = iter([*found, found[best]])
    states: list[dict[str, torch.Tensor]] = []

    class Fake:
        metrics: dict[str, Any]

    def evaluation(*_: Any, **__: Any) -> Any:
        fake = Fake()
        given = zip(("HR@10", "MRR"), next(values), strict=True)
        fake.metrics = {name: type("M", (), {"value": value})() for name, value in given}
        return fake

    original = module.TGQTrainer.evaluate

    def spy(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        states.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(module, "evaluate", evaluation)
    monkeypatch.setattr("tgq_fast.training.finish.judge", lambda *_: None)
    monkeypatch.setattr(module.TGQTrainer, "evaluate", spy)
    result = run(tmp_path / "run")
    loaded = TGQFormerModel.from_pretrained(result.path).state_dict()
    assert len(states) == 3 and result.best_step * 3 == result.steps * (best + 1)
    assert result.best_metric == found[best][0]
    for number, state in enumerate(states):
        assert all(torch.equal(loaded[name], value) for name, value in state.items()) == (number == best)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path, finished: Path) -> None:
    weights = (finished / "model.safetensors").read_bytes()
    assert (run(tmp_path / "same").path / "model.safetensors").read_bytes() == weights
    assert (run(tmp_path / "other", seed=6).path / "model.safetensors").read_bytes() != weights


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_and_random_numbers(tmp_path: Path, finished: Path, mode: Any) -> None:
    before = random.getstate(), torch.get_rng_state()
    with mode():
        assert (run(tmp_path / "run").path / "model.safetensors").read_bytes() == (
            finished / "model.safetensors"
        ).read_bytes()
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


# Each line of standard input is "folder moment"; a forked trainer resumes the folder and kills itself at that moment:
# at a step, inside a checkpoint ("torn"), or when the model is saved and run.json does not know yet ("end").
KILLER = """
import os, signal, sys
from pathlib import Path
import torch
from test_train import run
from tgq_fast.io.identity import package_identity
from tgq_fast.training import finish, trainer

torch.set_num_threads(1)
package_identity()
write = finish.write_manifest

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def end(folder, manifest):
    if manifest["status"] == "finished":
        die()
    write(folder, manifest)

for line in sys.stdin:
    folder, moment = line.split()
    child = os.fork()
    if not child:
        if moment == "torn":
            trainer.seal_checkpoint = die
        if moment == "end":
            finish.write_manifest = end
        step = int(moment) if moment.isdigit() else -1
        run(Path(folder), resume=True, checkpoint_steps=4, on_event=lambda e: e.get("step") == step and die())
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_resume_to_the_same_weights(tmp_path: Path, finished: Path) -> None:
    moments = {"early": ["2"], "often": ["6", "torn", "13"], "end": ["end"]}
    lines = [f"{tmp_path}/{name} {moment}" for name, each in moments.items() for moment in each]
    lines += [f"{tmp_path}/{name} never" for name in moments]
    ran = subprocess.run(
        [sys.executable, "-c", KILLER],
        input="\n".join(lines),
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )
    codes = [int(code) for code in ran.stdout.split()]
    assert codes == [-signal.SIGKILL] * 5 + [0] * 3, ran.stderr[-2000:]
    steps = [entry["step"] for entry in log_of(finished)]
    for name in moments:
        folder = tmp_path / name
        assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes(), name
        assert [entry["step"] for entry in log_of(folder)] == steps, name
        manifest = json.loads((folder / "run.json").read_text())
        assert manifest["result"] == json.loads((finished / "run.json").read_text())["result"]


def test_finished_run_is_returned_or_refused(finished: Path) -> None:
    before = (finished / "run.json").stat().st_mtime_ns
    (finished / "checkpoints").mkdir()  # as a kill leaves them after run.json was written
    (finished / "checkpoints" / "state").write_text("")
    again = run(finished, resume=True)
    assert not (finished / "checkpoints").exists()
    assert again.steps == again.resumed_from > 0 and (finished / "run.json").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="already holds a finished run"):
        run(finished)
    with pytest.raises(CheckpointError, match=r"lr was 0\.01, now 0\.1"):
        run(finished, resume=True, lr=0.1)
    with pytest.raises(CheckpointError, match=r"config\.gate_alpha"):
        run(finished, resume=True, config=make_config(gate_alpha=0.5))
    with pytest.raises(CheckpointError, match=r"catalog\.digest"):
        run(finished, resume=True, groups=61)


def test_folder_is_refused_before_features_and_stays_free_when_they_fail(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Features(Exception):
        pass

    def fail(*_: Any, **__: Any) -> None:
        raise Features

    class Tower:  # of another width than the finished run's
        width = global_width = num_tokens = 16

    monkeypatch.setattr("tgq_fast.training.run.FeatureStore.open_or_build", fail)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    for occupied in (tmp_path / "photos", finished):
        with pytest.raises(CheckpointError):
            run(occupied, store=None, towers=(Tower(), Tower()))
    for _ in range(2):
        with pytest.raises(Features):
            run(tmp_path / "free", store=None, towers=(Tower(), Tower()))


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"cat\.png"):
        run(tmp_path / "photos")
    folder = run(tmp_path / "run", epochs=1).path
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(CheckpointError, match="SHA-256"):
        run(folder, epochs=1, resume=True)
    (folder / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a run"):
        run(folder, resume=True)


def test_damaged_checkpoint_is_refused_and_torn_one_removed(tmp_path: Path) -> None:
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
    seal_checkpoint(tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert not (tmp_path / "checkpoint-8").exists()
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(CheckpointError, match="SHA-256"):
        last_complete_checkpoint(tmp_path)
    assert last_complete_checkpoint(tmp_path / "none") is None


def test_two_trainers_in_one_folder(tmp_path: Path) -> None:
    def intrude(event: Any) -> None:
        if event["event"] == "step":
            with pytest.raises(CheckpointError, match="another process"):
                run(tmp_path / "run", resume=True)

    run(tmp_path / "run", epochs=1, max_steps=1, on_event=intrude)


def test_items_without_pictures_are_left_out_of_training_and_score_nothing(tmp_path: Path) -> None:
    catalog = make_catalog(60)
    train_pairs, validation = catalog.split_pairs("train"), catalog.split_pairs("validation")
    lost = {int(train_pairs.query[0]), int(validation.query[0])}
    result = run(tmp_path / "run", epochs=1, invalid=lost)
    assert result.best_metric is not None and result.best_metric < 1


def test_a_long_run_is_validated_as_often_as_asked(tmp_path: Path) -> None:
    for asked in (1, 2):
        result = run(tmp_path / f"run{asked}", epochs=4, validations=asked)
        found = [entry["step"] for entry in log_of(result.path) if "eval/HR@10" in entry]
        assert len(found) == asked and found[-1] == result.steps


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup": 1.0},
        {"log_steps": 0},
        {"validations": 0},
    ],
)
def test_bad_arguments(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(changes))):
        run(tmp_path / "run", **changes)


def test_too_large_batches_are_lowered_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run(tmp_path / "run", batch_size=10_000, epochs=1)
    used = result.manifest["result"]["batch_size"]
    assert 30 < used < 10_000 and f"batches of {used} pairs" in caplog.text


@pytest.mark.parametrize("connector", ["qformer", "mlp", "text-only", "image-only"])
def test_other_connectors_train(tmp_path: Path, connector: str) -> None:
    result = run(tmp_path / "run", epochs=1, config=make_config(connector=connector))
    assert torch.isfinite(torch.tensor([entry["loss"] for entry in log_of(result.path) if "loss" in entry])).all()


def test_bf16(tmp_path: Path) -> None:
    result = run(tmp_path / "run", epochs=1, bf16=True)
    assert result.manifest["arguments"]["bf16"] is True
    assert TGQFormerModel.from_pretrained(result.path).logit_scale.dtype == torch.float32


def test_trained_model_fills_a_pool(tmp_path: Path, finished: Path) -> None:
    catalog = make_catalog(60)
    store: Any = SyntheticStore(catalog, make_config())
    model = TGQFormerModel.from_pretrained(finished)
    report = embed_catalog(catalog, model, tmp_path / "pool", features=store, shard_size=64)
    assert report.embedded == 180 and report.shards == 3
