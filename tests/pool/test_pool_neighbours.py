"""Neighbours under conditions against brute force: the right ones, all of them, in order, whatever the sharding."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.pool import duplicates
from tgq_fast.pool import filters as pool_filters
from tgq_fast.pool import join as pool_join
from tgq_fast.pool import near_duplicates as pool_duplicates
from tgq_fast.pool import neighbour_table as pool_neighbours
from tgq_fast.pool import search as pool_search
from tgq_fast.pool.filters import Condition, parse_where
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.pool.join import PerGroup
from tgq_fast.pool.neighbour_table import neighbours

N, WIDTH = 200, 6
DRAW = np.random.default_rng(0)
ROWS = torch.from_numpy(DRAW.integers(-2, 3, (N, WIDTH))).float()  # many ties
CATEGORY = [None if x == 3 else f"Cat {x}" for x in DRAW.integers(0, 4, N)]
PRICE = [None if x < 1 else float(x) for x in DRAW.integers(0, 40, N)]
STOCK = [(True, False, None)[x] for x in DRAW.integers(0, 3, N)]
GROUP = [None if x > 80 else f"g{x}" for x in DRAW.integers(0, 90, N)]
TABLE = pa.table(
    {
        "id": [f"i{i}" for i in range(N)],
        "category": CATEGORY,
        "price": PRICE,
        "attributes.in_stock": [None if s is None else ("yes" if s else "no") for s in STOCK],
        "group_id": GROUP,
    }
)

# The same conditions as text and as a function of (item, neighbour).
CONDITIONS: dict[str, Callable[[int, int], bool]] = {
    "category = same": lambda q, i: CATEGORY[q] is not None and CATEGORY[q] == CATEGORY[i],
    "in_stock = true": lambda q, i: STOCK[i] is True,
    "price within 30%": lambda q, i: (
        PRICE[q] is not None and PRICE[i] is not None and abs(PRICE[i] - PRICE[q]) <= 0.3 * PRICE[q]
    ),
    "group_id != same": lambda q, i: GROUP[q] is None or GROUP[i] is None or GROUP[q] != GROUP[i],
    "category != same": lambda q, i: CATEGORY[q] is None or CATEGORY[i] is None or CATEGORY[q] != CATEGORY[i],
    "category in 'cat 1'|cat 2": lambda q, i: False,
    "price < 7.5": lambda q, i: PRICE[i] is not None and PRICE[i] < 7.5,
    "category != cat 0": lambda q, i: CATEGORY[i] != "Cat 0",
    "category in cat 0|CAT 2": lambda q, i: CATEGORY[i] in ("Cat 0", "Cat 2"),
    "price = 12": lambda q, i: PRICE[i] == 12,
}
del CONDITIONS["category in 'cat 1'|cat 2"]


def brute_force(names: list[str], k: int, most: int | None) -> list[list[tuple[str, float]]]:
    scores = (ROWS @ ROWS.T).numpy()
    answers = []
    for q in range(N):
        order = sorted((i for i in range(N) if i != q), key=lambda i: (-scores[q, i], i))
        count: dict[str, int] = {}
        found: list[tuple[str, float]] = []
        for i in order:
            if not all(CONDITIONS[name](q, i) for name in names):
                continue
            group = GROUP[i]
            if most is not None and group is not None:
                count[group] = count.get(group, 0) + 1
                if count[group] > most:
                    continue
            found.append((f"i{i}", float(scores[q, i])))
        answers.append(found[:k])
    return answers


def make(folder: Path, shard_size: int = 70) -> Path:
    with ItemPool.create(folder, dims=WIDTH, shard_size=shard_size) as pool:
        pool.append([f"i{i}" for i in range(N)], ROWS)
    return folder


SETS = [
    ["category = same"],
    ["price within 30%"],
    ["category = same", "in_stock = true", "price within 30%"],
    ["group_id != same"],
    ["category = same", "group_id != same", "price < 7.5"],
    ["category != same", "price within 30%"],
    ["category != cat 0"],
    ["category in cat 0|CAT 2", "price within 30%"],
    ["price = 12"],
]


@pytest.mark.parametrize("names", SETS, ids=" and ".join)
@pytest.mark.parametrize("most", [None, 1, 2])
def test_conditions_equal_brute_force(tmp_path: Path, names: list[str], most: int | None) -> None:
    pool = ItemPool.open(make(tmp_path / "pool"))
    select = pool.select(", ".join(names), TABLE)
    groups = None if most is None else PerGroup(PerGroupCodes(pool), most)
    for k in (1, 5, 40):
        found = pool.search_like(pool.ids(), k, select=select, per_group=groups)
        expected = brute_force(names, k, most)
        assert [[x for x in line if x is not None] for line in found.ids] == [[x for x, _ in line] for line in expected]
        for line, wanted in zip(found.scores.tolist(), expected):
            assert line == [*(score for _, score in wanted), *[float("-inf")] * (k - len(wanted))]


def PerGroupCodes(pool: ItemPool) -> np.ndarray:
    from tgq_fast.pool.columns import columns_of

    return columns_of(pool._state[0], TABLE).codes("group_id")


@pytest.mark.parametrize("gather", [0.0, 1.0])
@pytest.mark.parametrize(("most_asked", "shared"), [(8, 32), (2048, 1), (2048, 10_000)])
def test_every_route_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gather: float, most_asked: int, shared: int
) -> None:
    monkeypatch.setattr(pool_filters, "CUT", 0)
    monkeypatch.setattr(pool_filters, "NARROW", 1.0)
    monkeypatch.setattr(pool_filters, "SHARED", shared)  # a search for each stretch of numbers, or one for all
    monkeypatch.setattr(pool_search, "GATHER_BELOW", gather)  # a mask always, or rows by themselves always
    monkeypatch.setattr(pool_join, "SAMPLED", 0)  # asks how deep the answers lie
    monkeypatch.setattr(pool_join, "MAX_K", most_asked)  # many queries end up one by one
    pool = ItemPool.open(make(tmp_path / "pool"))
    for names in SETS[1:6]:
        for most in (None, 1):
            groups = None if most is None else PerGroup(PerGroupCodes(pool), most)
            found = pool.search_like(pool.ids(), 7, select=pool.select(", ".join(names), TABLE), per_group=groups)
            expected = brute_force(names, 7, most)
            assert [[x for x in line if x] for line in found.ids] == [[x for x, _ in line] for line in expected]


def test_conditions_of_a_pool_with_deleted_and_moved_rows(tmp_path: Path) -> None:
    with ItemPool.open(make(tmp_path / "pool"), mode="a") as pool:
        pool.delete([f"i{i}" for i in range(0, 60, 2)])
        pool.upsert(["i7", "new"], ROWS[:2])
        select = pool.select("category = same, in_stock = true", TABLE)
        found = pool.search_like(["i7", "i9", "new"], 200, select=select)
        for item, hits in zip((7, 9), found.ids):
            wanted = {
                f"i{i}"
                for i in range(N)
                if i != item
                and f"i{i}" in pool.ids()
                and all(CONDITIONS[name](item, i) for name in ("category = same", "in_stock = true"))
            }
            assert {hit for hit in hits if hit is not None} == wanted
        assert set(found.ids[2]) == {None}  # the table knows nothing of it
        pool.delete(["i9"])
        with pytest.raises(ArgumentError, match="this version"):
            pool.search_like(["i7"], 3, select=select)


def test_a_mask_of_the_caller(tmp_path: Path) -> None:
    pool = ItemPool.open(make(tmp_path / "pool"))
    mask = DRAW.random(N) < 0.3
    found = pool.search(ROWS[:9], 20, where=mask, exclude_ids=[f"i{i}" for i in range(9)])
    scores = (ROWS[:9] @ ROWS.T).numpy()
    for q in range(9):
        order = sorted((i for i in range(N) if i != q and mask[i]), key=lambda i: (-scores[q, i], i))
        assert found.indices[q].tolist() == order[:20]
    assert pool.search(ROWS[:1], 3, where=np.zeros(N, bool)).ids == [[None] * 3]
    for wrong in (mask[:-1], mask.astype(int), "price < 3"):
        with pytest.raises(ArgumentError, match="where"):
            pool.search(ROWS[:1], 3, where=wrong)  # type: ignore[arg-type]


def read(path: Path) -> list[tuple[str, int, str, float]]:
    if path.suffix == ".parquet":
        return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]  # type: ignore[misc]
    if path.suffix == ".jsonl":
        return [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]  # type: ignore[misc]
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["item", "rank", "neighbour", "score"]
    return [(a, int(b), c, float(d)) for a, b, c, d in rows[1:]]


@pytest.mark.parametrize("suffix", pool_neighbours.FORMATS)
def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(pool_neighbours, "PART_ROWS", 64)
    pool, out = ItemPool.open(make(tmp_path / "pool")), tmp_path / f"related{suffix}"
    steps: list[tuple[int, int]] = []
    report = neighbours(
        pool, out, k=4, where="category = same", table=TABLE, progress=lambda a, b: steps.append((a, b))
    )
    expected = brute_force(["category = same"], 4, None)
    assert read(out) == [
        (f"i{q}", rank, name, score) for q in range(N) for rank, (name, score) in enumerate(expected[q], start=1)
    ]
    assert report.rows == sum(map(len, expected)) and report.short == sum(len(line) < 4 for line in expected)
    assert steps[-1] == (N, N) and len(steps) == 4 and report.resumed == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool", out.name]


def test_an_interrupted_table_goes_on_if_nothing_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_neighbours, "PART_ROWS", 64)
    pool, out = ItemPool.open(make(tmp_path / "pool")), tmp_path / "related.csv"

    def stop(done: int, total: int) -> None:
        if done >= 128:
            raise KeyboardInterrupt

    def start(**options: object) -> None:
        with pytest.raises(KeyboardInterrupt):
            neighbours(pool, out, k=4, table=TABLE, progress=stop, **options)  # type: ignore[arg-type]
        assert not out.exists()

    start(where="price < 9")
    assert neighbours(pool, out, k=4, where="price < 9", table=TABLE).resumed == 128
    first = read(out)
    out.unlink()
    for other in (
        {"k": 5},
        {"where": "price < 8"},
        {"per_group": 1},
        {"table": TABLE.set_column(2, "price", [[3.0] * N])},
    ):
        start(where="price < 9")
        assert neighbours(pool, out, **({"k": 4, "where": "price < 9", "table": TABLE} | other)).resumed == 0  # type: ignore[arg-type]
        out.unlink()
    start(where="price < 9")
    with ItemPool.open(tmp_path / "pool", mode="a") as writer:
        writer.delete(["i199"])
    assert neighbours(ItemPool.open(tmp_path / "pool"), out, k=4, where="price < 9", table=TABLE).resumed == 0
    assert read(out) != first
    with pytest.raises(ArgumentError, match=r"\.parquet"):
        neighbours(pool, tmp_path / "related.xlsx")
    (tmp_path / ".x.csv.parts").mkdir()
    (tmp_path / ".x.csv.parts" / "photo.png").touch()
    with pytest.raises(PoolError, match=r"photo\.png"):
        neighbours(pool, tmp_path / "x.csv")


def test_parsing() -> None:
    assert parse_where(" category=same ,price within 30%, 'a, b' in x|y, brand != \"A, B\"") == [
        Condition("category", "=", "same"),
        Condition("price", "within", "30%"),
        Condition("a, b", "in", "x|y"),
        Condition("brand", "!=", "A, B"),
    ]
    for wrong in (
        "",
        "category",
        "= 3",
        "price < many",
        "price within 3",
        "price within -3%",
        "a = ",
        "a ~ b",
        "price < same",
    ):
        with pytest.raises(ArgumentError, match="where"):
            parse_where(wrong)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    pool = ItemPool.open(make(tmp_path / "pool"))
    with pytest.raises(ArgumentError, match=r"colour.*category, price, in_stock, group_id"):
        pool.select("colour = red", TABLE)
    with pytest.raises(ArgumentError, match=r"numbers"):
        pool.select("category < 3", TABLE)
    with pytest.raises(PoolError, match=r"items\.parquet"):
        pool.select("price < 3")
    with pytest.raises(ArgumentError, match="id"):
        pool.select("price < 3", TABLE.drop_columns(["id"]))
    with pytest.raises(ArgumentError, match="none of which"):
        pool.select("price < 3", TABLE.set_column(0, "id", [[f"x{i}" for i in range(N)]]))


def linked(threshold: float) -> list[list[str]]:
    scores = (ROWS @ ROWS.T).numpy()
    np.fill_diagonal(scores, -np.inf)
    group = list(range(N))
    for _ in range(N):
        for q, i in zip(*np.nonzero(scores >= threshold)):
            group[q] = group[i] = min(group[q], group[i])
    sets: dict[int, list[str]] = {}
    for row, label in enumerate(group):
        sets.setdefault(label, []).append(f"i{row}")
    return [members for members in sets.values() if len(members) > 1]


@pytest.mark.parametrize("threshold", [20.0, 14.0, 3.0])
@pytest.mark.parametrize("first", [1, 3, 16])
def test_duplicates_are_the_linked_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, first: int
) -> None:
    monkeypatch.setattr(pool_duplicates, "FIRST_K", first)
    monkeypatch.setattr(pool_duplicates, "MAX_K", 16)  # more near ones than one search gives
    monkeypatch.setattr(pool_duplicates, "STEP", 64)
    found = duplicates(ItemPool.open(make(tmp_path / "pool")), threshold)
    groups: dict[int, list[str]] = {}
    for one in found:
        groups.setdefault(one.group, []).append(one.item)
        scores = ROWS @ ROWS[int(one.item[1:])]
        scores[int(one.item[1:])] = float("-inf")
        assert one.score == scores.max() >= threshold and scores[int(one.nearest[1:])] == one.score
    assert list(groups.values()) == linked(threshold) and list(groups) == list(range(1, len(groups) + 1))
    with pytest.raises(ArgumentError, match="threshold"):
        duplicates(ItemPool.open(tmp_path / "pool"), float("nan"))


def test_skipped_and_excluded_neighbours(tmp_path: Path) -> None:
    pool, out = ItemPool.open(make(tmp_path / "pool")), tmp_path / "negatives.parquet"
    exclude = {"i0": ["i1", "i2", "nobody"], "i5": ["i5"], "nobody": ["i3"]}
    neighbours(pool, out, k=3, skip=2, where="group_id != same", table=TABLE, exclude=exclude)
    wanted = brute_force(["group_id != same"], N, None)
    wanted[0] = [hit for hit in wanted[0] if hit[0] not in ("i1", "i2")]
    assert read(out) == [
        (f"i{q}", rank, name, score) for q in range(N) for rank, (name, score) in enumerate(wanted[q][2:5], start=3)
    ]


@pytest.mark.parametrize(
    ("values", "condition", "hits"),
    [
        # As floats the next two are one number; as codes of products they are not.
        (["90071992547409931", "90071992547409932"], "x = 90071992547409931", [0]),
        (["90071992547409931", "90071992547409932"], "x != 90071992547409931", [1]),
        (["2012", "2012.0", "2.012e3", "2013", "two"], "x = 2012", [0, 1, 2]),
        (["10", "1_0", "١٠", "1e1", "0x0a", "nan", "inf"], "x = 10", [0, 3]),
        (["ΟΔΟΣ", "οδοσ", "οδός"], "x = ΟΔΟΣ", [0, 1]),
        (["İZMİR", "izmir"], "x = İZMİR", [0, 1]),
        (["Cafe\u0301", "Café", "CAFÉ"], "x = 'cafe\u0301'", [1, 2]),
        (["Dark Red", "dark  red"], "x = ' Dark   Red '", [0]),
        (["yes", "no", "1", "true"], "x = true", [0, 2, 3]),
    ],
)
def test_a_condition_reads_its_value_as_the_table_has_it(
    tmp_path: Path, values: list[str], condition: str, hits: list[int]
) -> None:
    ids = [str(number) for number in range(len(values))]
    with ItemPool.create(tmp_path / "pool", dims=2) as pool:
        pool.append(ids, torch.randn(len(ids), 2))
    table = pa.table({"id": ids, "attributes.x": values})
    with ItemPool.open(tmp_path / "pool") as pool:
        assert np.flatnonzero(pool.select(condition, table).base).tolist() == hits
