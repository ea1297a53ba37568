"""The verb end to end on a miniature catalogue with tiny random towers: resumes, chooses on folds, compares fairly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from typer.testing import CliRunner

from tgq_fast.app import cli
from tgq_fast.data import Catalog, write_demo_catalog
from tgq_fast.io.sealed import unseal
from tgq_fast.workflow.probes import stream_mass

SMALL = ("hidden_size=16", "num_attention_heads=2", "intermediate_size=24")
SMALL += ("embedding_size=8", "direct_size=4", "whitening=6")
CONDITIONS = "scene:4:both,badge:0.3:query,metadata:wrong:0.5:pool"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_catalog(tmp_path_factory.mktemp("study") / "shop", groups=18, variants=3, image_size=40)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    clip = tiny_models.save_clip(tmp_path_factory.mktemp("clip"))
    given = ["--connectors", "tgq,mlp", "--seeds", "1", "--folds", "2", "--epochs", "1", "--batch-size", "4"]
    given += ["--fields", "category,material", "--corruptions", CONDITIONS, "--views", "2", "--ablations", "gates"]
    given += ["--recipe", "plain:", "--recipe", "still:view_share=0.0,ema=0.0"]
    for entry in (*SMALL, f"vision_tower={clip}", "text_tower=dual_encoder"):
        given += ["--set", entry]
    return given


def call(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def study(shop: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed once, by SIGKILL in the middle of its jobs, and then went on in two processes."""
    out = tmp_path_factory.mktemp("out") / "study"
    command = ["study", str(shop), "--out", str(out), "--cache", str(out.parent / "cache"), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-m", "tgq_fast", *command], env=environment, stderr=subprocess.PIPE)
    while process.poll() is None and len(list(out.glob("runs/*/result.json"))) < 9:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()
    assert not (out / "study.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    call(*command, "--jobs", 2)
    assert before and all(path.stat().st_mtime_ns == when for path, when in before.items())  # not done again
    return out


def test_a_killed_study_ends_like_an_uninterrupted_one(
    study: Path, shop: Path, options: list[str], tmp_path: Path
) -> None:
    """And has nothing to do when it is called again."""
    command = ("--cache", study.parent / "cache", *options)
    call("study", shop, "--out", tmp_path / "whole", *command)
    # Without the checksum, which is of the times, too.
    found, whole = (unseal(json.loads((folder / "study.json").read_text())) for folder in (study, tmp_path / "whole"))
    for document in (found, whole):
        document.pop("package")  # a source checkout's commit may move meanwhile
        for row in document["rows"].values():
            row["facts"].pop("seconds", None)
    assert found == whole
    again = call("study", shop, "--out", study, *command)
    assert "0 of" not in again.stderr and again.stderr.count("jobs are finished") == 2


def test_every_figure_is_there(study: Path) -> None:
    found = json.loads((study / "study.json").read_text())
    assert set(found["rows"]) == {"tgq", "mlp", "without gates", "zero-shot image", "zero-shot image, whitened"}
    assert found["conditions"] == ["clean", *CONDITIONS.split(",")]
    for row in found["rows"].values():
        for text in found["conditions"]:
            cell = row["metrics"][text]["HR@10"]
            assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1
    parameters = [found["rows"][name]["facts"]["parameters"] for name in ("tgq", "mlp")]
    assert abs(parameters[0] / parameters[1] - 1) < 0.05
    assert found["test"]["pool"] == 54
    assert found["plan"]["catalog"] == found["catalogue"]  # not where it lay on this machine
    page = (study / "report.html").read_text()
    assert "http://" not in page and found["main"] in page and "without gates" in page and "scene:4:both" in page


def test_choices_come_from_the_folds(study: Path) -> None:
    choice = json.loads((study / "choice.json").read_text())
    found = json.loads((study / "study.json").read_text())
    assert set(choice["trials"]) == {"tgq", "mlp"}
    for connector, recipes in choice["trials"].items():
        assert set(recipes) == {"plain", "still"} and all(len(r["folds"]) == 2 for r in recipes.values())
        best = max(recipes, key=lambda name: recipes[name]["mean"])
        assert choice["chosen"][connector] == best == found["rows"][connector]["facts"]["recipe"]
        assert found["rows"][connector]["facts"]["trials"] == 2


def test_probes_name_streams_and_conditions(study: Path) -> None:
    found = json.loads((study / "study.json").read_text())["probes"]["tgq"]
    scene = found["attention"]["scene:4:both"]
    assert scene["area"]["item"] == pytest.approx(0.25, abs=0.01)
    for stream in ("anchored", "exploratory"):
        assert 0 < scene[stream]["item"] < 1 and 0 < scene[stream]["foreign"] < 1
    assert {"clean", "scene:4", "badge:0.05", "metadata:wrong:0.5", "metadata:empty:1"} <= set(found["gates"])


def test_an_unchanged_condition_leaves_the_floor_of_metadata_alone(study: Path) -> None:
    """Damaged metadata cannot touch the frozen image feature; a scene must."""
    rows = json.loads((study / "study.json").read_text())["rows"]["zero-shot image"]["metrics"]
    assert rows["metadata:wrong:0.5:pool"]["MRR"]["value"] == rows["clean"]["MRR"]["value"]
    assert rows["scene:4:both"]["MRR"]["value"] < rows["clean"]["MRR"]["value"]


def test_no_run_whitens_by_what_it_is_tested_on(study: Path, shop: Path) -> None:
    """The whitening of the final run is the one that items outside validation and test give."""
    from tgq_fast import TGQFormerModel, workflow
    from tgq_fast.models.whitening import fit_whitening, whitening_rows

    catalog = Catalog.load(shop)
    (run,) = study.glob("runs/tgq-seed0-*/run")
    model = TGQFormerModel.from_pretrained(run)
    store = workflow.open_store(catalog, model.config, cache=study.parent / "cache", on_error="raise")
    rows = whitening_rows(catalog, store.valid, model.config.whitening)
    held = np.concatenate(
        [getattr(catalog.split_pairs(s), end) for s in ("validation", "test") for end in ("query", "target")]
    )
    assert not np.isin(rows, held).any()
    expected, _ = fit_whitening(store.pictures, rows, model.config)
    assert model.whitening is not None
    for name, value in expected.state_dict().items():
        assert np.array_equal(value.numpy(), model.whitening.state_dict()[name].numpy())


def test_a_failing_job_is_named(shop: Path, options: list[str], tmp_path: Path) -> None:
    wrong = [*options, "--set", "hidden_act=nonsense"]
    assert "hidden_act" in call("study", shop, "--out", tmp_path / "s", *wrong, code=2).stderr


def test_mass_goes_to_the_stream_it_belongs_to() -> None:
    attention = np.zeros((1, 3, 4))
    attention[0, 0, 0] = attention[0, 1, 1] = attention[0, 2, 3] = 1.0
    shares = np.array([[[1.0, 0.5, 0.0, 0.0], [0.0, 0.5, 1.0, 0.25]]])
    found = stream_mass(attention, shares, 2)
    assert found["anchored"][0] == [0.75] and found["anchored"][1] == [0.25]
    assert found["exploratory"][0] == [0.0] and found["exploratory"][1] == [0.25]
    assert set(stream_mass(attention, shares, 3)) == {"anchored"}
