"""Verbs over catalogues: what they say, refuse and import."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_world import World, call

from tgq_fast.app import intake
from tgq_fast.data import Catalog, write_demo_catalog
from tgq_fast.errors import CatalogError


def test_control_characters_of_a_catalogue_do_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x9b31mcolor\u202e"
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"id": "a", "title": "t", evil: "x"}) + "\n")
    for options in ((), ("--json",)):
        result = call("validate", tmp_path, "--no-images", *options)
        shown = result.stdout + result.stderr
        assert not set(shown) & set("\x1b\x07\x9b\u202e") and "color" in shown
    assert evil in json.loads(result.stdout)["warnings"][0]  # JSON says it exactly


def test_validate_says_what_to_do_next(tmp_path: Path) -> None:
    shop = write_demo_catalog(tmp_path / "a shop", groups=10, variants=3, image_size=40)
    result = call("validate", shop, "--no-images")
    assert "30 of 30 items have a picture; 10 group(s)" in result.stderr.replace("\n", " ")
    assert "these fields would guide: category" in result.stderr and "pairs: train" in result.stderr
    assert f"tgq-fast train '{shop}' --out runs/first" in result.stderr.replace("\n", "")
    rows = [json.loads(line) for line in (shop / "metadata.jsonl").read_text().splitlines()]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "metadata.jsonl").write_text("".join(json.dumps({"id": row["id"]}) + "\n" for row in rows))
    said = json.loads(call("validate", alone, "--json").stdout)["next_steps"]
    assert any("group_id" in line and "pairs.jsonl" in line for line in said) and not any(
        "next:" in line for line in said
    )


def test_embedding_does_not_stop_at_pairs(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "target": "nobody"}\n')
    assert len(intake.load_catalog(tmp_path, "raise", pairs=False)) == 2
    with pytest.raises(CatalogError, match="nobody"):
        intake.load_catalog(tmp_path, "raise")


def test_import_of_a_table_by_map(tmp_path: Path) -> None:
    shop = write_demo_catalog(tmp_path / "shop", groups=2, variants=2, image_size=40)
    files = sorted(path.name for path in (shop / "images").iterdir())
    lines = ["Nr;Bild;Name, lang;Preis"] + [f"{n};{name};N{n};1.0{n}9,50 €" for n, name in enumerate(files)]
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="cp1252")
    options = ("--map", 'id=nr,file_name=Bild,"title=Name, lang"', "--map", "price=Preis", "--images", shop / "images")
    found = json.loads(
        call("import", "table", tmp_path / "t.csv", "--out", tmp_path / "out", *options, "--json").stdout
    )
    assert found["items"] == 4 and "cp1252 text parted by semicolons" in " ".join(found["notes"])
    item = Catalog.load(tmp_path / "out").items[3]
    assert (item.id, item.title, item.price) == ("3", "N3", 1039.5)
    table = call("import", "table", tmp_path / "t.csv", "--out", tmp_path / "again", *options)
    assert "skipped" not in table.stdout and "items" in table.stdout  # nothing is said about nothing
    assert f"tgq-fast embed {tmp_path / 'again'} --zero-shot whitened" in table.stderr.replace("\n", "")
    assert "train on its groups" not in table.stderr
    for wrong in (("--pictures", "some"), ("--delimiter", "ab"), ("--map", "id")):
        call("import", "table", tmp_path / "t.csv", "--out", tmp_path / "no", *wrong, code=2)
    call("import", "grocery", tmp_path, "--out", tmp_path / "no", "--map", "id=a", code=2)


def test_validate_lists_problems_with_rows_and_exits_3(world: World, tmp_path: Path) -> None:
    good = json.loads(call("validate", world.catalog, "--json").stdout)
    assert good["ok"] and good["items"] == 30 and "category" in good["suggested_fields"]
    broken = write_demo_catalog(tmp_path / "broken", groups=2, variants=2, image_size=32)
    with open(broken / "metadata.jsonl", "a") as file:
        file.write('{"id": 7\n')
    next((broken / "images").iterdir()).write_bytes(b"no picture")
    result = call("validate", broken, "--json", "--rejects", tmp_path / "rejects.jsonl", code=3)
    found = json.loads(result.stdout)
    assert not found["ok"] and found["problems"][0].startswith("row 5") and len(found["image_problems"]) == 1
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 2
    assert "row 5" in call("validate", broken, "--no-images", code=3).stderr


def test_broken_catalogue_stops_training_unless_skipped(world: World, tmp_path: Path) -> None:
    broken = write_demo_catalog(tmp_path / "broken", groups=6, variants=3, image_size=32)
    next((broken / "images").iterdir()).write_bytes(b"no picture")
    common = (*world.options, "--fields", "category", "--batch-size", 2)
    result = call("train", broken, "--out", tmp_path / "run", *common, code=3)
    assert "item demo-" in result.stderr
    call("train", broken, "--out", tmp_path / "skipped", *common, "--on-error", "skip")
    pool = tmp_path / "pool"
    arguments = ("embed", broken, "--model", tmp_path / "skipped", "--out", pool, "--on-error", "skip", "--json")
    assert json.loads(call(*arguments).stdout)["rejected"] == 1
    call("evaluate", broken, "--model", tmp_path / "skipped", "--pool", pool, "--on-error", "skip")


def test_import_turns_a_download_into_a_catalogue(tmp_path: Path) -> None:
    from PIL import Image

    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    header = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName\n"
    rows = [f"{n},Men,Apparel,Topwear,Shirts,Blue,Fall,2011,Casual,Acme Men Blue Shirt {n}\n" for n in (1, 2)]
    (source / "styles.csv").write_text(header + "".join(rows))
    for number in (1, 2):
        Image.new("RGB", (60, 80), (number * 90, 20, 20)).save(source / "images" / f"{number}.jpg")
    result = json.loads(call("import", "fashion", source, "--out", tmp_path / "c", "--copy", "--json").stdout)
    assert result["items"] == 2
    assert call("validate", tmp_path / "c").exit_code == 0
