"""The command line end to end on a miniature catalogue with tiny random towers, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from typer.testing import CliRunner

from tgq_fast import cli, console, intake, workflow
from tgq_fast.cli_pools import assignments
from tgq_fast.data import Catalog, write_demo_catalog
from tgq_fast.errors import ArgumentError, CatalogError
from tgq_fast.models import CONNECTORS
from tgq_fast.retrieval import ItemPool

SMALL = ("hidden_size=16", "num_attention_heads=2", "num_hidden_layers=1", "intermediate_size=24", "embedding_size=8")
SMALL += ("direct_size=2",)


def call(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


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


def test_training_without_pairs_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    monkeypatch.setattr(workflow, "load_towers", lambda *_: pytest.fail("towers were loaded"))
    result = call("train", tmp_path, "--out", tmp_path / "run", code=3)
    assert "no training pairs" in result.stderr and "group_id" in result.stderr and "pairs.jsonl" in result.stderr
    assert not (tmp_path / "run").exists()


def test_embedding_does_not_stop_at_pairs(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "target": "nobody"}\n')
    assert len(intake.load_catalog(tmp_path, "raise", pairs=False)) == 2
    with pytest.raises(CatalogError, match="nobody"):
        intake.load_catalog(tmp_path, "raise")


def test_names_with_commas_and_equals_signs() -> None:
    assert cli._names('category,"size, EU", "a ""b"""') == ["category", "size, EU", 'a "b"']
    assert assignments(['"a=b"=c=d', "x=y=z"], "--field") == {"a=b": "c=d", "x": "y=z"}
    with pytest.raises(ArgumentError, match='"a=b"=value'):
        assignments(["nothing"], "--field")


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
    for wrong in (("--pictures", "some"), ("--delimiter", "ab"), ("--map", "id")):
        call("import", "table", tmp_path / "t.csv", "--out", tmp_path / "no", *wrong, code=2)
    call("import", "grocery", tmp_path, "--out", tmp_path / "no", "--map", "id=a", code=2)


def test_what_the_disk_says_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(intake, "validate_catalog", full)
    result = call("validate", tmp_path, "--json", code=2)
    assert "No space left" in result.stderr and "free some space" in result.stderr
    assert json.loads(result.stdout)["error"]["type"] == "StorageError"


@dataclass
class World:
    """Folders of one run through the verbs."""

    catalog: Path
    run: Path
    other: Path
    pool: Path
    options: tuple[object, ...]
    trained: dict[str, Any]
    embedded: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("cli")
    patch = pytest.MonkeyPatch()
    patch.setenv("TGQ_CACHE", str(root / "cache"))
    clip = tiny_models.save_clip(root / "clip")
    catalog = write_demo_catalog(root / "shop", groups=10, variants=3, image_size=40)
    common = (
        "--vision",
        clip,
        "--text",
        "dual_encoder",
        "--epochs",
        1,
        "--batch-size",
        4,
        "--fields",
        "category,material",
        "--keep",
        "trained",
    )
    common += tuple(part for entry in SMALL for part in ("--set", entry))
    first = call("train", catalog, "--out", root / "tgq", *common, "--seed", 3, "--json")
    call("train", catalog, "--out", root / "qformer", *common, "--connector", "qformer", "--no-match-budget")
    second = call("embed", catalog, "--model", root / "tgq", "--out", root / "pool", "--shard-size", 7, "--json")
    documents = [json.loads(result.stdout) for result in (first, second)]
    yield World(catalog, root / "tgq", root / "qformer", root / "pool", common, *documents)
    patch.undo()


def test_train_says_what_it_did(world: World) -> None:
    assert world.trained["fields"] == ["category", "material"]
    assert world.trained["seed"] == 3 and world.trained["epochs"] == 1
    assert (world.run / "model.safetensors").is_file() and (world.run / "training_log.jsonl").is_file()


def test_a_finished_run_is_not_overwritten(world: World) -> None:
    before = (world.run / "model.safetensors").read_bytes()
    result = call("train", world.catalog, "--out", world.run, *world.options, "--seed", 3, code=2)
    assert "already holds" in result.stderr
    assert (world.run / "model.safetensors").read_bytes() == before


def test_embed_holds_every_item_and_runs_again_without_work(world: World) -> None:
    assert world.embedded["embedded"] == world.embedded["items"] == 30
    files = {path.name: path.read_bytes() for path in world.pool.iterdir()}
    again = json.loads(
        call("embed", world.catalog, "--model", world.run, "--out", world.pool, "--shard-size", 7, "--json").stdout
    )
    assert again["resumed"] == 30
    assert {path.name: path.read_bytes() for path in world.pool.iterdir()} == files


def test_embed_without_training_makes_a_pool_to_search(world: World, tmp_path: Path) -> None:
    clip = world.options[world.options.index("--vision") + 1]
    for kind in ("raw", "whitened"):
        common = ("--zero-shot", kind, "--vision", clip, "--out", tmp_path / kind, "--json")
        document = json.loads(call("embed", world.catalog, *common).stdout)
        assert document["embedded"] == 30
        catalog = Catalog.load(world.catalog)
        found = json.loads(call("search", tmp_path / kind, "--item", catalog.ids[0], "-k", 3, "--json").stdout)
        assert len(found["hits"]) == 3
    pools = [ItemPool.open(tmp_path / kind) for kind in ("raw", "whitened")]
    assert pools[0].manifest.model != pools[1].manifest.model
    for arguments in ((), ("--zero-shot", "raw", "--model", world.run)):
        assert "--model" in call("embed", world.catalog, "--out", tmp_path / "no", *arguments, code=2).stderr


def test_search_by_item_leaves_the_item_out_and_names_products(world: World) -> None:
    catalog = Catalog.load(world.catalog)
    document = json.loads(call("search", world.pool, "--item", catalog.ids[4], "-k", 5, "--json").stdout)
    hits = document["hits"]
    assert len(hits) == 5 and catalog.ids[4] not in [hit["id"] for hit in hits]
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    first = catalog.items[catalog.index(hits[0]["id"])]
    assert (hits[0]["title"], hits[0]["brand"]) == (first.title, first.brand)
    assert Path(hits[0]["file"]) == catalog.image_path(first).resolve()
    shown = call("search", world.pool, "--item", catalog.ids[4], "-k", 3).stdout
    assert hits[0]["id"] in shown


def test_search_of_several_items_under_conditions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog.load(world.catalog)
    monkeypatch.setattr(Catalog, "load", None)  # what embed kept beside the pool is enough
    items = [item.id for item in catalog.items if item.category is not None][4:10:5]
    arguments = [part for item in items for part in ("--item", item)]
    arguments += ["--where", "category = same", "--per-group", "1"]
    document = json.loads(call("search", world.pool, *arguments, "-k", 50, "--json").stdout)
    for item, query in zip(items, document["queries"], strict=True):
        own = catalog.items[catalog.index(item)]
        wanted = {o.group_id for o in catalog.items if o.category == own.category and o.id != item}
        found = [catalog.items[catalog.index(hit["id"])] for hit in query["hits"]]
        assert query["query"] == item and {hit.group_id for hit in found} == wanted and len(found) == len(wanted)
        assert all(hit["category"] == own.category for hit in query["hits"])
    assert items[1] in call("search", world.pool, *arguments).stdout
    nothing = call("search", world.pool, "--item", items[0], "--where", "price < 0")
    assert "no item meets" in nothing.stderr


def test_related_items_negatives_and_duplicates(world: World, tmp_path: Path) -> None:
    catalog = Catalog.load(world.catalog)
    group = {item.id: item.group_id for item in catalog.items}
    arguments = ("neighbours", world.pool, "--out", tmp_path / "related.csv", "-k", 3, "--where", "category = same")
    report = json.loads(call(*arguments, "--json").stdout)
    lines = (tmp_path / "related.csv").read_text().splitlines()
    assert len(lines) == report["rows"] + 1 and report["items"] == len(catalog)
    assert call(*arguments[:4], "--where", "flavour = same", code=2)
    arguments = ("mine-negatives", world.pool, "--catalog", world.catalog, "--out", tmp_path / "n.jsonl", "-k", 4)
    call(*arguments, "--skip", 1)
    rows = [json.loads(line) for line in (tmp_path / "n.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * len(catalog) and {row["rank"] for row in rows} == {2, 3, 4, 5}
    assert all(group[row["item"]] != group[row["neighbour"]] for row in rows)
    out = tmp_path / "d.csv"
    found = json.loads(call("duplicates", world.pool, "--threshold", -2, "--out", out, "--json").stdout)
    assert len(found["groups"]) == 1 and found["duplicates"] == len(catalog) == len(out.read_text().splitlines()) - 1
    assert "0 of" in call("duplicates", world.pool, "--threshold", 2).stdout
    table = tmp_path / "stock.csv"
    table.write_text("id,in_stock\n" + "".join(f"{item},{n % 2}\n" for n, item in enumerate(catalog.ids)))
    arguments = ("search", world.pool, "--item", catalog.ids[0], "--where", "in_stock = 1", "--table", table, "-k", 99)
    hits = json.loads(call(*arguments, "--json").stdout)["hits"]
    assert {hit["id"] for hit in hits} == set(catalog.ids[1::2])


def test_search_by_picture_finds_the_same_picture(world: World) -> None:
    item = Catalog.load(world.catalog).items[7]
    fields = [
        part for name in ("category", "material") if (v := item.field(name)) for part in ("--field", f"{name}={v}")
    ]
    arguments = ("search", world.pool, "--image", world.catalog / str(item.file_name), *fields, "--model", world.run)
    (hit,) = json.loads(call(*arguments, "-k", 1, "--json").stdout)["hits"]
    assert hit["id"] == item.id and hit["score"] == pytest.approx(1.0, abs=1e-3)


def test_evaluate_writes_the_same_numbers_to_file_and_stdout(world: World, tmp_path: Path) -> None:
    arguments = ("evaluate", world.catalog, "--model", world.run, "--k", "1,5", "--json")
    shown = call(*arguments, tmp_path / "e.json", "--pool", world.pool).stdout
    filed = json.loads((tmp_path / "e.json").read_text())
    printed = json.loads(call(*arguments, "-").stdout)
    assert filed == printed
    assert set(filed) == {"catalogue", "model", "tgq", workflow.FLOOR, f"{workflow.FLOOR}, whitened"}
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
    assert workflow.FLOOR not in alone and "tgq" in alone
    asked = json.loads(call(*arguments, "--cache", cache, "--floor").stdout)
    assert workflow.FLOOR in asked and asked["tgq"] == alone["tgq"]
    assert json.loads(call(*arguments, "--cache", cache).stdout) == asked  # cached now
    assert workflow.FLOOR not in json.loads(call(*arguments, "--cache", cache, "--no-floor").stdout)


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
    floor = found[workflow.FLOOR]["metrics"]["MRR"]["value"]
    assert found[f"{workflow.FLOOR} · {asked[0]}"]["metrics"]["MRR"]["value"] == floor
    assert found[f"{workflow.FLOOR} · {asked[1]}"]["metrics"]["MRR"]["value"] < floor
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
    assert page.count(f"<strong>{workflow.FLOOR}</strong>") == 3  # its neighbours, too
    value = summary["runs"]["tgq"]["metrics"]["H@5"]["value"]
    assert f"{value:.3f}" in page and "✗ miss" in page
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "CATALOG", "--out", "RUN", "--fields", "flavour"), "flavour"),
        (("train", "CATALOG", "--out", "RUN", "--connector", "tqg"), "tqg"),
        (("train", "CATALOG", "--out", "RUN", "--set", "hidden_sise=8"), "hidden_sise"),
        (("train", "CATALOG", "--out", "RUN", "--set", "hidden_size"), "name=value"),
        (("train", "CATALOG", "--out", "RUN", "--set", "connector=mlp"), "have options"),
        (("train", "CATALOG", "--out", "RUN", "--vision", "/no/such/tower"), "/no/such/tower"),
        (("embed", "CATALOG", "--model", "/no/run", "--out", "POOL"), "no such run folder"),
        (("search", "/no/pool", "--item", "x"), "/no/pool"),
        (("search", "POOLED"), "--item ID or --image FILE"),
        (("search", "POOLED", "--item", "a", "--image", "b"), "--item ID or --image FILE"),
        (("search", "POOLED", "--item", "nobody"), "nobody"),
        (("search", "POOLED", "--item", "demo-0001", "--field", "category=mug"), "--field"),
        (("search", "POOLED", "--image", "x.jpg"), "--model"),
        (("search", "POOLED", "--image", "x.jpg", "--where", "category = same"), "--item instead"),
        (("search", "POOLED", "--item", "demo-0001", "--where", "flavour = red"), "flavour"),
        (("neighbours", "POOLED", "--out", "x.xlsx"), ".parquet"),
        (("duplicates", "POOLED", "--threshold", "nan"), "threshold"),
        (("evaluate", "CATALOG", "--model", "TRAINED", "--k", "ten"), "1,10,100"),
        (("evaluate", "CATALOG", "--model", "TRAINED", "--split", "tset"), "tset"),
        (("report", "CATALOG", "--model", "TRAINED", "--pool", "p", "--pool", "q", "--out", "r.html"), "2 pools"),
        (("import", "etsy", "CATALOG", "--out", "x"), "etsy"),
    ],
)
def test_wrong_input_is_one_clear_message_and_exit_2(
    world: World, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"CATALOG": world.catalog, "RUN": tmp_path / "run", "POOL": tmp_path / "pool"}
    places |= {"POOLED": world.pool, "TRAINED": world.run}
    result = call(*(places.get(argument, argument) for argument in arguments), code=2)
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_errors_under_json_are_one_document(world: World) -> None:
    result = call("search", world.pool, "--item", "nobody", "--json", code=2)
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "ArgumentError" and error["exit_code"] == 2 and "nobody" in error["message"]


def test_picture_that_is_none_exits_3(world: World, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    call("search", world.pool, "--image", tmp_path / "x.jpg", "--model", world.run, code=3)


def test_corrupt_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "run"
    shutil.copytree(world.run, damaged)
    weights = damaged / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0xFF
    weights.write_bytes(bytes(data))
    assert "error:" in call("evaluate", world.catalog, "--model", damaged, code=2).stderr


def test_unexpected_errors_and_interrupts_have_their_codes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(intake, "load_catalog", explode)
    result = call("embed", world.catalog, "--model", world.run, "--out", "p", code=1)
    assert "boom" in result.stderr and "--debug" in result.stderr and "Traceback" not in result.stderr
    assert "Traceback" in call("--debug", "embed", world.catalog, "--model", world.run, "--out", "p", code=1).stderr
    monkeypatch.setattr(intake, "load_catalog", interrupt)
    told = call("embed", world.catalog, "--model", world.run, "--out", "p", code=130).stderr
    assert "interrupted" in told and "--resume" not in told
    told = call("train", world.catalog, "--out", "r", code=130).stderr
    assert "interrupted" in told and "with --resume" in told  # without it that folder is refused


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


def test_every_verb_has_help_with_an_example() -> None:
    pools = ("search", "neighbours", "duplicates", "mine-negatives")
    for verb in ("validate", "train", "embed", *pools, "evaluate", "report", "import", "tune", "connectors", "doctor"):
        assert f"tgq-fast {verb}" in " ".join(call(verb, "--help").stdout.split())


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = "import sys; from tgq_fast import cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tune_without_a_gpu_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("tune", "--out", tmp_path / "tiles", code=2)
    assert "no CUDA device" in result.stderr.replace("\n", " ") and not (tmp_path / "tiles").exists()


def test_tune_prints_what_was_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgq_fast.ops import tuning

    def run(out: Path, *, only: str, budget_s: float) -> dict:
        return {"table": out / "gpu.json", "gpu": "a gpu", "timed": {f"{only} 16": budget_s}}

    monkeypatch.setattr(tuning, "tune", run)
    options = ("tune", "--out", tmp_path, "--only", "fused*", "--budget-s", "5")
    assert json.loads(call(*options, "--json").stdout)["timed"] == {"fused* 16": 5.0}
    assert "fused* 16" in call(*options).stdout


def test_connectors_are_listed_at_one_budget() -> None:
    rows = {row["connector"]: row for row in json.loads(call("connectors", "--json").stdout)}
    budget = rows["tgq"]["parameters"]
    assert list(rows) == list(CONNECTORS) and not rows["text-only"]["macs"]
    assert all(abs(row["parameters"] / budget - 1) <= 0.01 for name, row in rows.items() if name != "text-only")
    assert "perceiver" in call("connectors").stdout
    more = json.loads(call("connectors", "--json", "--set", "num_visual_tokens=196").stdout)
    assert all(row["macs"] > rows[row["connector"]]["macs"] for row in more if row["connector"] != "text-only")
    call("connectors", "--set", "width=3", code=2)


def test_doctor_reports_backends_with_reasons() -> None:
    document = json.loads(call("doctor", "--json").stdout)
    backends = {check["name"]: check for check in document["backends"]}
    assert document["ok"] and backends["torch"]["ok"]
    assert all(check["detail"] for check in backends.values())
    assert "torch" in call("doctor").stdout


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


def test_exit_codes_are_documented() -> None:
    text = " ".join(call("--help").stdout.split())
    for code in (
        console.EXIT_OK,
        console.EXIT_INTERNAL,
        console.EXIT_USAGE,
        console.EXIT_DATA,
        console.EXIT_INTERRUPTED,
    ):
        assert f"{code} " in text


def test_ranks_above_zero_say_nothing_but_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tgq_fast import console

    def say() -> tuple[str, str]:
        console.note("a note")
        console.table("title", ("a",), [("b",)])
        console.print_json({"a": 1})
        with console.progress("working") as advance:
            advance(1, 2)
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    loud = say()
    assert "a note" in loud[1] and "title" in loud[0] and '"a": 1' in loud[0] and "working" in loud[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert say()[0] == loud[0]
    monkeypatch.setenv("RANK", "1")
    assert say() == ("", "")
    assert "no such" in call("embed", "/no/where", "--model", "/no/run", "--out", "/no/pool", code=3).stderr
