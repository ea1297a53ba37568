"""Verbs over runs: train, evaluate, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_world import World, call

from tgq_fast import workflow
from tgq_fast.data import Catalog, write_demo_catalog
from tgq_fast.errors import ArgumentError
from tgq_fast.pool.embed import RAW_FLOOR, WHITENED_FLOOR
from tgq_fast.workflow import opening


def test_training_without_pairs_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    monkeypatch.setattr(opening, "_towers", lambda *_: pytest.fail("towers were loaded"))
    result = call("train", tmp_path, "--out", tmp_path / "run", code=3)
    assert "no training pairs" in result.stderr and "group_id" in result.stderr and "pairs.jsonl" in result.stderr
    assert not (tmp_path / "run").exists()


def test_train_says_what_it_did(world: World) -> None:
    assert world.trained["fields"] == ["category", "material"]
    assert world.trained["seed"] == 3 and world.trained["epochs"] == 1
    assert (world.run / "model.safetensors").is_file() and (world.run / "training_log.jsonl").is_file()


def test_a_finished_run_is_not_overwritten(world: World) -> None:
    before = (world.run / "model.safetensors").read_bytes()
    result = call("train", world.catalog, "--out", world.run, *world.options, "--seed", 3, code=2)
    assert "already holds" in result.stderr
    assert (world.run / "model.safetensors").read_bytes() == before


def test_evaluate_writes_the_same_numbers_to_file_and_stdout(world: World, tmp_path: Path) -> None:
    arguments = ("evaluate", world.catalog, "--model", world.run, "--k", "1,5", "--json")
    shown = call(*arguments, tmp_path / "e.json", "--pool", world.pool).stdout
    filed = json.loads((tmp_path / "e.json").read_text())
    printed = json.loads(call(*arguments, "-").stdout)
    assert filed == printed
    assert (
        json.loads(call(*arguments, "--no-floor", "--samples", 10).stdout)["tgq"]["queries"] == filed["tgq"]["queries"]
    )
    assert set(filed) == {"catalogue", "model", "tgq", RAW_FLOOR, WHITENED_FLOOR}
    metric = filed["tgq"]["metrics"]["H@5"]
    assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
    assert f"{metric['value']:.3f}" in shown and "H@5" in shown


def test_evaluate_of_a_pool_reads_no_picture(world: World, tmp_path: Path) -> None:
    """Floors beside a pool need the frozen features of every item: they are there if cached or asked for."""
    arguments = ("evaluate", world.catalog, "--model", world.run, "--pool", world.pool, "--json", "-")
    cache = tmp_path / "cache"
    result = call(*arguments, "--cache", cache)
    assert not (cache / "features").exists() and "--floor" in result.stderr
    alone = json.loads(result.stdout)
    assert RAW_FLOOR not in alone and "tgq" in alone
    asked = json.loads(call(*arguments, "--cache", cache, "--floor").stdout)
    assert RAW_FLOOR in asked and asked["tgq"] == alone["tgq"]
    assert json.loads(call(*arguments, "--cache", cache).stdout) == asked  # cached now
    assert RAW_FLOOR not in json.loads(call(*arguments, "--cache", cache, "--no-floor").stdout)


def test_several_processes_evaluate_a_pool_as_one_does(world: World, tmp_path: Path) -> None:
    """Processes that hold its shards, and two ranks of torchrun, of which one writes the file."""
    common = ("evaluate", world.catalog, "--model", world.run, "--pool", world.pool, "--k", "1,5")
    one = json.loads(call(*common, "--no-floor", "--json", "-").stdout)
    assert json.loads(call(*common, "--workers", 2, "--json", "-").stdout) == one
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "tgq_fast", *map(str, common)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([*command, "--engine", "torchrun", "--json", str(tmp_path / "two.json")],
                         capture_output=True, text=True, timeout=300, env=environment)  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert ran.stderr.count("wrote") == 1


def test_ray_actors_evaluate_a_pool_as_one_process_does(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    common = ("evaluate", world.catalog, "--model", world.run, "--pool", world.pool, "--k", "1,5", "--json", "-")
    one = json.loads(call(*common, "--no-floor").stdout)
    assert json.loads(call(*common, "--engine", "ray", "--workers", 2, "--cpus", 0.5).stdout) == one


def test_several_processes_share_a_pool_and_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("evaluate", world.catalog, "--model", world.run, "--workers", 2)
    pool = ("--pool", world.pool)
    for options in ((), (*pool, "--floor"), (*pool, "--corrupt", "overlay:0.3:both")):
        assert "a pool alone" in call(*common, *options, code=2).stderr
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "torchrun -m tgq_fast" in call(*common, *pool, "--engine", "torchrun", code=2).stderr


def test_evaluate_refuses_the_pool_of_another_model(world: World) -> None:
    result = call("evaluate", world.catalog, "--model", world.other, "--pool", world.pool, code=2)
    assert "another model" in result.stderr


def test_evaluate_takes_conditions(world: World) -> None:
    asked = ("metadata:empty:1:query", "scene:4:both")
    options = [part for text in asked for part in ("--corrupt", text)]
    document = json.loads(call("evaluate", world.catalog, "--model", world.run, *options, "--json", "-").stdout)
    found = {name: result for name, result in document.items() if isinstance(result, dict)}
    assert {f"tgq · {text}" for text in asked} < set(found) and len(found) == 9
    assert len({result["pool_size"] for result in found.values()}) == 1
    floor = found[RAW_FLOOR]["metrics"]["MRR"]["value"]
    assert found[f"{RAW_FLOOR} · {asked[0]}"]["metrics"]["MRR"]["value"] == floor
    assert found[f"{RAW_FLOOR} · {asked[1]}"]["metrics"]["MRR"]["value"] < floor
    wrong = call("evaluate", world.catalog, "--model", world.run, "--corrupt", "fog:1", code=2)
    assert "scene:4:query" in wrong.stderr


def test_report_refuses_the_pool_of_another_model(world: World, tmp_path: Path) -> None:
    arguments = ("report", world.catalog, "--model", world.other, "--pool", world.pool, "--out", tmp_path / "r.html")
    assert "another model" in call(*arguments, code=2).stderr
    assert not (tmp_path / "r.html").exists()


def test_report_and_evaluate_agree_about_refused_items(world: World, tmp_path: Path) -> None:
    broken = write_demo_catalog(tmp_path / "broken", groups=10, variants=3, image_size=40)
    next(iter(sorted((broken / "images").iterdir()))).write_bytes(b"no picture")
    pool = tmp_path / "pool"
    call("embed", broken, "--model", world.run, "--out", pool, "--on-error", "skip")
    common = (broken, "--model", world.run, "--on-error", "skip")
    found = [json.loads(call("evaluate", *common, *extra, "--json", "-").stdout) for extra in ((), ("--pool", pool))]
    report = ("report", *common, "--pool", pool, "--out", tmp_path / "r.html", "--examples", 2, "--json")
    found.append(json.loads(call(*report).stdout)["runs"])
    assert [document["tgq"]["pool_size"] for document in found] == [29, 29, 29]
    assert found[0]["tgq"] == found[1]["tgq"] == found[2]["tgq"]


def test_report_compares_runs_in_one_file(world: World, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    arguments = ("report", world.catalog, "--model", world.run, "--model", world.other, "--k", "1,5", "--examples", 3)
    summary = json.loads(call(*arguments, "--out", out, "--json").stdout)
    page = out.read_text(encoding="utf-8")
    assert summary["bytes"] == len(page.encode()) and summary["gates"] and summary["attention_maps"] > 0
    assert set(summary["runs"]) == {"tgq", "qformer"} and summary["verdict"][0] in page
    assert page.count(f"<strong>{RAW_FLOOR}</strong>") == 3  # its neighbours, too
    value = summary["runs"]["tgq"]["metrics"]["H@5"]["value"]
    assert f"{value:.3f}" in page and "tgq-fast report" in page and "--model" in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page


def test_report_of_a_run_without_streams_says_so(world: World, tmp_path: Path) -> None:
    arguments = (
        "report",
        world.catalog,
        "--model",
        world.other,
        "--out",
        tmp_path / "r.html",
        "--examples",
        1,
        "--json",
    )
    summary = json.loads(call(*arguments).stdout)
    assert not summary["gates"] and summary["attention_maps"] == 0
    assert any("no anchored and exploratory streams" in note for note in summary["notes"])


def test_corrupt_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "run"
    shutil.copytree(world.run, damaged)
    weights = damaged / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0xFF
    weights.write_bytes(bytes(data))
    assert "error:" in call("evaluate", world.catalog, "--model", damaged, code=2).stderr


def test_default_epochs_follow_the_number_of_items(world: World) -> None:
    catalog = Catalog.load(world.catalog)
    items = workflow.steps_per_epoch(catalog, 1)
    assert workflow.default_epochs(catalog, 64) == 40
    assert workflow.default_epochs(catalog, 1) == max(4, round(300 / items))
    assert workflow.steps_per_epoch(catalog, 10**6) == 1
    assert items == len(set().union(*(side.tolist() for side in _train(catalog))))


def _train(catalog: Catalog) -> tuple[Any, Any]:
    pairs = catalog.split_pairs("train")
    return pairs.query, pairs.target


def test_default_fields_are_chosen_and_unknown_presets_refused(world: World) -> None:
    catalog = Catalog.load(world.catalog)
    vision = str(world.run.parent / "clip")
    overrides = {"vision_tower": vision, "text_tower": "dual_encoder"}
    config = workflow.make_config(catalog, preset="tiny", overrides=overrides)
    assert "category" in config.fields and not {"title", "brand", "price"} & set(config.fields)
    assert config.visual_width == 24 and config.num_visual_tokens == 17
    other = workflow.make_config(catalog, preset="tiny", connector="qformer", overrides=overrides)
    assert other.intermediate_size != config.intermediate_size  # same budget, other width
    with pytest.raises(ArgumentError, match="preset"):
        workflow.make_config(catalog, preset="huge")
