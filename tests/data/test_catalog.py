"""Loading and checking whole catalogues."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tgq_fast.data import Catalog, Item, RejectLog, load_image, validate_images
from tgq_fast.data.pairs import SPLITS, components, group_pairs, split_of_components
from tgq_fast.errors import ArgumentError, CatalogError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "file_name": "a.jpg", "title": "A", "attributes": {"gender": "Men"}, "group_id": "g"},
    {"id": "b", "file_name": "b.jpg", "brand": "B", "price": 3, "group_id": "g"},
    {"id": "c", "file_name": "c.jpg", "attributes": {"gender": "Women", "year": 2011}},
    {"id": "d", "title": "text only"},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_the_three_formats_give_the_same_catalogue(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("jsonl", "csv", "flat", "parquet")]
    for folder in folders:
        folder.mkdir()
    jsonl(folders[0] / "metadata.jsonl", ROWS)
    columns = ["file_name", "id", "title", "brand", "price", "group_id"]
    for folder, names in ((folders[1], ["attributes"]), (folders[2], ["attributes.gender", "attributes.year"])):
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns + names)
            for row in ROWS:
                given = row.get("attributes", {})
                tail = [json.dumps(given)] if len(names) == 1 else [given.get("gender"), given.get("year")]
                writer.writerow([row.get(name) for name in columns] + tail)
    table = {name: [row.get(name) for row in ROWS] for name in columns}
    table["attributes"] = [json.dumps(row.get("attributes", {})) for row in ROWS]
    pq.write_table(pa.table(table), folders[3] / "metadata.parquet")
    loaded = [Catalog.load(folder) for folder in folders]
    for catalog in loaded[1:]:
        assert catalog.items == loaded[0].items
        assert catalog.digest() == loaded[0].digest()
    assert Catalog.load(folders[0] / "metadata.jsonl").items == loaded[0].items
    catalog = loaded[0]
    assert catalog.field_names() == ["title", "brand", "price", "gender", "year"]
    assert catalog.index("c") == 2 and "c" in catalog and "x" not in catalog and len(catalog) == 4
    assert catalog.image_path(catalog.items[0]) == folders[0] / "a.jpg"
    assert catalog.report.missing["title"] == 2 and catalog.report.missing["gender"] == 2 and catalog.report.ok
    with pytest.raises(ArgumentError, match="item_id"):
        catalog.index("nobody")
    with pytest.raises(ArgumentError, match="file_name"):
        catalog.image_path(catalog.items[3])
    with pytest.raises(ArgumentError, match="policy"):
        Catalog.load(folders[0], policy="ignore")  # type: ignore[arg-type]


def test_problems_carry_row_numbers_and_follow_the_policy(tmp_path: Path) -> None:
    rows = [ROWS[0], "{broken", {"id": "b", "title": [3]}, ROWS[2], {"id": "c"}, {"id": "c\u0301"}, {"id": "\u0107"}, 5]
    jsonl(tmp_path / "metadata.jsonl", rows)
    jsonl(
        tmp_path / "pairs.jsonl",
        [{"query": "a", "target": "c"}, {"query": "a", "target": "b"}, {"query": "a", "target": "zz"}],
    )
    with pytest.raises(CatalogError) as error:
        Catalog.load(tmp_path)
    starts = [p.split(":")[0] for p in error.value.problems]
    assert starts == ["row 2", "row 3", "row 5", "row 7", "row 8", "pairs row 3"]
    catalog = Catalog.load(tmp_path, policy="skip")
    assert catalog.ids == ["a", "c", "\u0107"]
    assert [item.row for item in catalog.items] == [1, 4, 6]
    assert not catalog.report.ok and catalog.report.problem_count == 6 and catalog.report.rows == 8
    # the pair of the refused item b goes quietly with it, the unknown id zz is a problem of its own
    assert "'zz'" in catalog.report.problems[-1] and "1 pair(s) name an item" in " ".join(catalog.report.warnings)
    assert catalog.pairs is not None and len(catalog.pairs) == 1
    assert json.loads(json.dumps(catalog.report.to_dict()))["ok"] is False
    log = RejectLog(tmp_path / "rejects.jsonl")
    log.add_report(catalog.report)
    assert [entry.row for entry in log] == [2, 3, 5, 7, 8, 3]


def test_cut_titles_and_unknown_columns_are_warnings_not_problems(tmp_path: Path) -> None:
    jsonl(tmp_path / "metadata.jsonl", [{"id": "a", "title": "x" * 1_000_000, "colour": "red"}])
    report = Catalog.load(tmp_path).report
    assert report.ok and report.warning_count == 2
    assert report.warnings[0].startswith("row 1: title has 1000000") and "colour" in report.warnings[1]


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_in_columns_of_other_names_are_used(tmp_path: Path) -> None:
    for number, (column, value) in enumerate(
        [
            ("image", "a.png"),
            ("Image", "a.png"),
            ("file_names", ["a.png", "b.png"]),
            ("images", [{"path": "a.png", "bytes": None}]),
            ("image", {"path": "a.png"}),
            ("FileName", "a.png"),
            ("File Name", "a.png"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        jsonl(folder / "metadata.jsonl", [{"ID": "x", "Title": "T", "Group ID": 7, column: value}])
        catalog = Catalog.load(folder)
        assert catalog.items[0].to_dict() == {"id": "x", "file_name": "a.png", "title": "T", "group_id": "7"}, column
        assert bool(catalog.report.warnings) == (column == "file_names")  # the second picture is not used


def test_picture_columns_that_nobody_reads_are_an_error(tmp_path: Path) -> None:
    rows = [{"id": str(n), "main_pic": f"https://shop/{n}.jpg?w=9"} for n in range(3)]
    jsonl(tmp_path / "metadata.jsonl", rows)
    for policy in ("raise", "skip"):
        with pytest.raises(CatalogError, match="main_pic hold pictures, but no item has a file_name"):
            Catalog.load(tmp_path, policy=policy)  # type: ignore[arg-type]
    jsonl(tmp_path / "metadata.jsonl", [{**row, "file_name": "x.png"} for row in rows])
    assert any("main_pic hold pictures that are not used" in w for w in Catalog.load(tmp_path).report.warnings)
    jsonl(tmp_path / "metadata.jsonl", [{"id": "a", "image": "https://shop/a.jpg"}])
    with pytest.raises(CatalogError, match="web address"):
        Catalog.load(tmp_path)


def write_embedded(folder: Path, rows: int = 7, **columns: Any) -> list[bytes]:
    """A catalogue of Parquet with pictures in row groups of 3; the bytes."""
    data = [picture(colour) for colour in ("red", "green", "blue", "white", "black", "cyan", "pink")[:rows]]
    table = {
        "id": [f"i{n}" for n in range(rows)],
        "label": ["x"] * rows,
        "image": [{"bytes": d, "path": f"{n}.png"} for n, d in enumerate(data)],
        **columns,
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "metadata.parquet", row_group_size=3)
    return data


def test_pictures_in_parquet_are_read_where_they_lie(tmp_path: Path) -> None:
    data = write_embedded(tmp_path / "c")
    catalog = Catalog.load(tmp_path / "c")
    assert [catalog.picture(item).open().read() for item in catalog.items] == data
    assert [catalog.picture(item).open().read() for item in reversed(catalog.items)] == data[::-1]
    assert not list(validate_images(catalog, workers=3))
    assert str(catalog.image_path(catalog.items[4])).endswith("metadata.parquet#5")
    part = pickle.loads(pickle.dumps(catalog.part(catalog.items[5:])))
    assert np.asarray(load_image(part.picture(part.items[0]), "x")).reshape(-1, 3)[0].tolist() == [0, 255, 255]
    # files beside the table, gaps, and rows that are refused keep their places
    images = [{"bytes": data[0], "path": None}, {"bytes": None, "path": "b.png"}, None]
    images.append({"bytes": data[3], "path": None})
    write_embedded(tmp_path / "d", 4, id=["a", "b", "c", "a"], image=images)
    mixed = Catalog.load(tmp_path / "d", policy="skip")
    assert [item.file_name for item in mixed.items] == ["metadata.parquet#1", "b.png", None]
    # a folder of parts, as the hub has them
    for number in range(2):
        write_embedded(tmp_path / "hub" / "x", 3, id=[f"{number}-{n}" for n in range(3)])
        (tmp_path / "hub" / "data").mkdir(exist_ok=True)
        (tmp_path / "hub" / "x" / "metadata.parquet").rename(tmp_path / "hub" / "data" / f"train-{number:05d}.parquet")
    parts = Catalog.load(tmp_path / "hub")
    assert parts.ids == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"] and parts.root == tmp_path / "hub"
    assert [parts.picture(item).open().read() for item in parts.items] == data[:3] * 2
    assert parts.items[-1].file_name == "data/train-00001.parquet#3"


def test_damaged_pictures_in_parquet_are_image_errors(tmp_path: Path) -> None:
    data = [picture(), b"\x89PNG nonsense", picture()[:40]]
    write_embedded(tmp_path, 3, image=[{"bytes": d, "path": None} for d in data])
    catalog = Catalog.load(tmp_path)
    assert [p.item_id for p in validate_images(catalog)] == ["i1", "i2"]
    file = tmp_path / "metadata.parquet"
    for harm in (lambda: file.write_bytes(file.read_bytes()[:100]), file.unlink):
        harm()
        fresh = pickle.loads(pickle.dumps(catalog.part(catalog.items)))
        assert all(p.reason in ("unreadable", "missing") and not p.lasting for p in validate_images(fresh))
        assert len(list(validate_images(fresh))) == 3


def test_several_tables_of_one_name_are_refused(tmp_path: Path) -> None:
    write_embedded(tmp_path)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "a.parquet").write_bytes((tmp_path / "metadata.parquet").read_bytes())
    with pytest.raises(CatalogError, match="several metadata"):
        Catalog.load(tmp_path)


def test_every_refused_row_is_listed_and_pairs_go_with_their_items(tmp_path: Path) -> None:
    bad = [{"id": f"bad{n}", "price": -1} for n in range(1500)]
    jsonl(tmp_path / "metadata.jsonl", [{"id": f"ok{n}"} for n in range(3)] + bad)
    jsonl(tmp_path / "pairs.jsonl", [{"query": "ok0", "target": f"bad{n}"} for n in range(1500)])
    report = Catalog.load(tmp_path, policy="skip").report
    assert report.problem_count == 1500 and len(report.problems) == 1000 == len(report.to_dict()["rejected"])
    log = RejectLog(tmp_path / "rejects.jsonl")
    log.add_report(report)
    log.add_report(report)  # a run that is started again lists nothing twice
    assert [entry.item_id for entry in log] == [f"bad{n}" for n in range(1500)]
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 1500


@pytest.mark.parametrize(
    ("pair", "word"),
    [
        ({"query": "a"}, "target"),
        ({"query": "a", "target": "a"}, "same item"),
        ({"query": "a", "target": "b", "split": "dev2"}, "split"),
        ({"query": "a", "target": "b", "split": 1}, "split"),
        ({"query": "a", "target": "b", "weight": 0}, "weight"),
        ({"query": "a", "target": "b", "weight": "nan"}, "weight"),
        ({"query": "a", "target": "b", "weight": True}, "weight"),
        ({"query": 1.5, "target": "b"}, "query"),
        ({"query": ["a"], "target": "b"}, "query"),
    ],
)
def test_bad_pairs(tmp_path: Path, pair: dict, word: str) -> None:
    jsonl(tmp_path / "metadata.jsonl", ROWS)
    jsonl(tmp_path / "pairs.jsonl", [{"query": "a", "target": "b"}, pair])
    with pytest.raises(CatalogError, match=rf"pairs row 2: .*{word}"):
        Catalog.load(tmp_path)


def test_pairs_of_every_format_and_split_alias(tmp_path: Path) -> None:
    jsonl(tmp_path / "metadata.jsonl", ROWS)
    (tmp_path / "pairs.csv").write_text("query,target,split,weight\na,b,train,2\nb,a,VAL,\nc,d,test,0.5\nc,d,test,9\n")
    catalog = Catalog.load(tmp_path)
    assert catalog.pairs is not None and len(catalog.pairs) == 3  # the repeated pair is left out, with a warning
    assert any("repeat" in w for w in catalog.report.warnings)
    train, validation, test = (catalog.split_pairs(s) for s in ("train", "validation", "test"))
    assert (train.query.tolist(), train.target.tolist(), train.weight.tolist()) == ([0], [1], [2.0])
    assert (validation.query.tolist(), test.query.tolist(), test.weight.tolist()) == ([1], [2], [0.5])
    assert train.query.dtype == np.int64 and train.weight.dtype == np.float32
    # a and b are in train and in validation: leakage is reported
    assert catalog.report.leakage == {"items_in_several_splits": 2, "groups_in_several_splits": 1}
    assert any("several splits" in w for w in catalog.report.warnings) and catalog.report.ok
    with pytest.raises(ArgumentError, match="split"):
        catalog.split_pairs("dev")


def test_pairs_find_items_by_normal_form_and_by_number(tmp_path: Path) -> None:
    jsonl(tmp_path / "metadata.jsonl", [{"id": "caf\u00e9"}, {"id": 12}, {"id": " x "}])
    jsonl(tmp_path / "pairs.jsonl", [{"query": "cafe\u0301", "target": 12}, {"query": "12", "target": " x"}])
    pairs = Catalog.load(tmp_path).pairs
    assert pairs is not None and (pairs.query.tolist(), pairs.target.tolist()) == ([0, 1], [1, 2])


def test_pairs_from_groups_and_split_by_component(tmp_path: Path) -> None:
    rows = [{"id": f"i{i}", "group_id": f"g{i // 3}"} for i in range(600)]
    jsonl(tmp_path / "metadata.jsonl", rows)
    catalog = Catalog.load(tmp_path)
    parts = {split: catalog.split_pairs(split) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 600 * 2
    assert 0.7 < len(parts["train"]) / 1200 < 0.9 and len(parts["validation"]) and len(parts["test"])
    label = catalog.components()
    for split, pairs in parts.items():
        assert (label[pairs.query] == label[pairs.target]).all()
        for other, more in parts.items():
            assert split == other or not set(pairs.query.tolist()) & set(more.query.tolist())
    assert catalog.report.leakage["items_in_several_splits"] == 0
    # more products do not move the old ones to another split
    jsonl(tmp_path / "metadata.jsonl", [{"id": "new", "group_id": "other"}, {"id": "new2", "group_id": "other"}, *rows])
    later = Catalog.load(tmp_path)
    before = {(catalog.ids[q], catalog.ids[t]) for q, t in zip(parts["test"].query, parts["test"].target, strict=True)}
    pairs = later.split_pairs("test")
    after = {(later.ids[q], later.ids[t]) for q, t in zip(pairs.query, pairs.target, strict=True)}
    assert before <= after


def test_huge_groups_stay_linear(tmp_path: Path) -> None:
    query, target = group_pairs(np.array([0] * 500 + [-1]))
    assert len(query) == 500 * 32 and np.bincount(query).max() == 32 and np.bincount(target).max() == 32
    assert (query != target).all()
    query, target = group_pairs(np.zeros(80, np.int64), every=True)  # a ranking needs every mate
    assert len(set(zip(query.tolist(), target.tolist()))) == len(query) == 80 * 79
    query, target = group_pairs(np.zeros(3000, np.int64), every=True)
    assert len(query) <= 1 << 20 and set(np.bincount(query)) == {0, 2999}
    jsonl(tmp_path / "metadata.jsonl", [{"id": i, "group_id": "g"} for i in range(40)])
    catalog = Catalog.load(tmp_path)
    sizes = {every: sum(len(catalog.split_pairs(s, every=every)) for s in SPLITS) for every in (False, True)}
    assert sizes == {False: 40 * 32, True: 40 * 39}


@given(
    st.lists(st.none() | st.sampled_from("abcde"), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=12),
)
def test_components_are_the_finest_partition_that_joins_groups_and_pairs(groups: list, edges: list) -> None:
    n = len(groups)
    edges = [(q % n, t % n) for q, t in edges]
    query, target = (np.array([e[k] for e in edges], np.int64) for k in (0, 1))
    label = components(np.array([-1 if g is None else ord(g) for g in groups], np.int64), query, target)
    reach = np.eye(n, dtype=bool)
    for i in range(n):
        for j in range(n):
            reach[i, j] |= groups[i] is not None and groups[i] == groups[j]
    for q, t in edges:
        reach[q, t] = reach[t, q] = True
    for k in range(n):
        reach |= reach[:, k : k + 1] & reach[k : k + 1]
    assert (reach == (label[:, None] == label[None])).all()
    assert label[0] == 0 and label.max() == len(set(label.tolist())) - 1
    names = [f"{'é' * (i % 3)}{i}" for i in range(n)]
    codes = split_of_components(label, pa.array(names, pa.large_string())).tolist()
    for k in set(label.tolist()):
        mine = [i for i in range(n) if label[i] == k]
        least = hashlib.sha256(min(names[i] for i in mine).encode()).digest()[:8]
        share = int.from_bytes(least, "big") / 2.0**64
        code = -1 if len(mine) == 1 else 0 if share < 0.8 else 1 if share < 0.9 else 2
        assert [codes[i] for i in mine] == [code] * len(mine)


def test_digest_sees_rows_pairs_and_order(tmp_path: Path) -> None:
    digests = set()
    for i, rows in enumerate(([*ROWS], [*ROWS[::-1]], [{**ROWS[0], "title": "Z"}, *ROWS[1:]])):
        (tmp_path / str(i)).mkdir()
        jsonl(tmp_path / str(i) / "metadata.jsonl", rows)
        digests.add(Catalog.load(tmp_path / str(i)).digest())
    jsonl(tmp_path / "0" / "pairs.jsonl", [{"query": "a", "target": "b"}])
    digests.add(Catalog.load(tmp_path / "0").digest())
    assert len(digests) == 4


def test_what_is_no_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="no such"):
        Catalog.load(tmp_path / "absent")
    with pytest.raises(CatalogError, match=r"no metadata\.jsonl"):
        Catalog.load(tmp_path)
    jsonl(tmp_path / "metadata.jsonl", [])
    with pytest.raises(CatalogError, match="no rows"):
        Catalog.load(tmp_path)
    jsonl(tmp_path / "metadata.jsonl", ["nonsense"])
    with pytest.raises(CatalogError, match="row 1"):
        Catalog.load(tmp_path, policy="skip")
    (tmp_path / "metadata.csv").write_text("id\na\n")
    with pytest.raises(CatalogError, match="several metadata"):
        Catalog.load(tmp_path)


def test_items_in_memory() -> None:
    catalog = Catalog.from_items([Item("a", group_id="g"), Item("b", group_id="g")])
    assert catalog.index("b") == 1 and sum(len(catalog.split_pairs(s)) for s in ("train", "validation", "test")) == 2
    with pytest.raises(CatalogError, match="'a'"):
        Catalog.from_items([Item("a"), Item("a")])


def test_problem_lists_are_bounded_and_counts_are_not(tmp_path: Path) -> None:
    jsonl(tmp_path / "metadata.jsonl", [{"id": "a"}] + ["x"] * 3_000)
    report = Catalog.load(tmp_path, policy="skip").report
    assert report.problem_count == 3_000 and len(report.problems) == 1_000


@pytest.mark.parametrize(("name", "items", "pairs"), [("fashion", 9_572, 33_204), ("grocery", 1_296, 9_720)])
def test_real_catalogues_have_no_problems(shared_data: Path, name: str, items: int, pairs: int) -> None:
    start = time.process_time()
    catalog = Catalog.load(shared_data / name)
    seconds = time.process_time() - start
    assert (len(catalog), catalog.report.pairs) == (items, pairs)
    assert catalog.report.ok and catalog.report.problems == []
    assert seconds < 20, "loading must stay linear"
    if name == "fashion":
        assert catalog.report.leakage == {"items_in_several_splits": 0, "groups_in_several_splits": 0}
        assert catalog.report.splits["test"]["queries"] == 1_239
