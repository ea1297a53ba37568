"""Verbs over pools: embed, search, neighbours, duplicates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_world import World, call

from tgq_fast.data import Catalog
from tgq_fast.pool import ItemPool


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
    again = call("embed", world.catalog, "--zero-shot", "raw", "--vision", clip, "--out", tmp_path / "raw")
    assert f"tgq-fast serve {tmp_path / 'raw'}" in again.stderr.replace("\n", "")
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


def test_picture_that_is_none_exits_3(world: World, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    call("search", world.pool, "--image", tmp_path / "x.jpg", "--model", world.run, code=3)
