"""Outputs that are files of an input are refused before any work begins, and nothing is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_world import SMALL, World, call
from hostile_places import put, untouched

from tgq_fast.app.targets import refuse_inputs
from tgq_fast.errors import ArgumentError


def state(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_no_verb_writes_over_what_it_reads(world: World, tmp_path: Path) -> None:
    catalog, run, pool = world.catalog, world.run, world.pool
    link = tmp_path / "innocent.html"
    link.symlink_to(catalog / "metadata.jsonl")
    prices = tmp_path / "prices.csv"
    prices.write_text("id,price\n")
    picture = next((catalog / "images").iterdir())
    report = ("report", catalog, "--model", run, "--out")
    evaluate = ("evaluate", catalog, "--model", run, "--pool", pool, "--json")
    neighbours = ("neighbours", pool, "--out")
    calls: list[tuple[object, ...]] = [
        (*report, catalog / "metadata.jsonl"),
        (*report, link),
        (*report, catalog / "pairs.jsonl"),  # is none yet, and would be one
        (*report, catalog / "images" / ".." / "metadata.csv"),
        (*report, picture),
        (*report, run / "run.json"),
        ("report", catalog / "metadata.jsonl", "--model", run, "--pool", pool, "--out", pool / "manifest.json"),
        (*evaluate, run / "config.json"),
        (*evaluate, run / "model.safetensors"),
        (*evaluate, pool / "shard-000000.safetensors"),
        (*evaluate, pool / "commit-00000009.json"),
        (*evaluate, catalog / "metadata.jsonl"),
        ("validate", catalog, "--rejects", catalog / "metadata.jsonl"),
        (*neighbours, pool / "items.parquet"),
        (*neighbours, prices, "--table", prices),
        (*neighbours, catalog / "metadata.csv", "--catalog", catalog),
        ("duplicates", pool, "--out", pool / "rejects.jsonl"),
        ("mine-negatives", pool, "--catalog", catalog, "--out", catalog / "pairs.jsonl"),
    ]
    before = state(catalog, run, pool, tmp_path)
    for given in calls:
        told = " ".join(call(*given, code=2).stderr.split())
        assert "which is read" in told and "Name another file" in told, (given, told)
    assert state(catalog, run, pool, tmp_path) == before


@pytest.mark.parametrize(
    "name", ["report.html", "rejects.jsonl", "neighbours.parquet", "duplicates.csv", "result.json"]
)
def test_other_files_of_an_input_may_be_written_again(world: World, name: str) -> None:
    for folder in (world.catalog, world.run, world.pool):
        if (folder, name) not in ((world.run, "rejects.jsonl"), (world.pool, "rejects.jsonl")):
            out = folder / name
            there = out.exists()
            out.touch()
            try:
                refuse_inputs({"catalog": world.catalog, "model": [world.run], "pool": world.pool, "out": out})
            finally:
                if not there:
                    out.unlink()
    refuse_inputs({"catalog": world.catalog, "as_json": Path("-"), "out": world.catalog, "rejects": None})


def test_parts_of_a_table_and_hard_links_are_inputs(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    for number in range(2):
        (tmp_path / "shop" / f"part-{number}.parquet").touch()
    os.link(tmp_path / "shop" / "part-1.parquet", tmp_path / "x.parquet")
    for out in (tmp_path / "shop" / "part-1.parquet", tmp_path / "x.parquet"):
        with pytest.raises(ArgumentError, match=r"^out: got"):
            refuse_inputs({"catalog": tmp_path / "shop", "table": str(tmp_path / "x.parquet"), "out": out})
    refuse_inputs({"catalog": tmp_path / "shop", "out": tmp_path / "shop" / "report.html"})


@pytest.mark.parametrize("verb", ["train", "study"])
def test_an_output_folder_that_cannot_be_one_is_told_before_any_work(
    world: World, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr("tgq_fast.models.views.training_views", lambda *_, **__: begun.append("views"))
    monkeypatch.setattr(
        "tgq_fast.models.features.FeatureStore.open_or_build", lambda *_, **__: begun.append("features")
    )
    options = [part for part in SMALL for part in ("--set", part)] if verb == "study" else world.options
    for kind in ("pipe", "file", "link"):
        put(tmp_path / kind, kind)
        told = call(verb, world.catalog, "--out", tmp_path / kind, *options, "--json", code=2)
        assert f"{tmp_path / kind}" in told.stderr and "choose another path" in told.stderr
        assert json.loads(told.stdout)["error"]["type"] == "StorageError"
        assert untouched(tmp_path / kind, kind) and not begun
