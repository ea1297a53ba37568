"""Full-pool evaluation against brute force: exact ranks, self-exclusion, ties, missing items."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tgq_fast import _native
from tgq_fast.data import Catalog, Item
from tgq_fast.errors import ArgumentError, NonFiniteError
from tgq_fast.evaluation import ranks as ranks_module
from tgq_fast.evaluation.evaluate import compare, evaluate, format_table
from tgq_fast.evaluation.metrics import ABSENT
from tgq_fast.evaluation.ranks import positive_ranks
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.search import blocks, topk_native

needs_extension = pytest.mark.skipif(not _native.available(), reason=_native.why_missing() or "built")


def make_catalog(groups: int = 40, size: int = 3) -> Catalog:
    items = [
        Item(
            id=f"i{g:03d}-{v}",
            file_name=f"{g}-{v}.png",
            title=None,
            brand=None,
            category="thing",
            attributes={},
            price=None,
            group_id=f"g{g}",
            row=g * size + v + 1,
        )
        for g in range(groups)
        for v in range(size)
    ]
    return Catalog.from_items(items)


def brute_rank(embeddings: torch.Tensor, query: int, target: int) -> int:
    scores = embeddings[query] @ embeddings.T
    others = [j for j in range(len(scores)) if j != query]
    others.sort(key=lambda j: (-float(scores[j]), j))
    return others.index(target) + 1


def integer_embeddings(n: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Small integers: products are exact and ties are frequent."""
    return torch.randint(-2, 3, (n, width), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("depth", [0, 1, 7, 200])
def test_ranks_equal_brute_force(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_SCORE_BYTES", 1000)
    monkeypatch.setattr(ranks_module, "_TILE_QUERIES", 9)
    embeddings = integer_embeddings(50)
    rng = np.random.default_rng(0)
    query, target = rng.integers(50, size=60), rng.integers(50, size=60)
    ranks, hits = positive_ranks(embeddings, query, target, depth=depth)
    assert hits.shape == (len(np.unique(query)), depth)
    for q, p, rank in zip(query.tolist(), target.tolist(), ranks.tolist(), strict=True):
        assert rank == (ABSENT if p == q else brute_rank(embeddings, q, p))


@pytest.mark.parametrize("depth", [0, 1, 7])
@pytest.mark.parametrize("part", [1, 7, 17, 64])
def test_ranks_are_the_same_from_a_pool_on_disk(
    depth: int, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "_SCORE_BYTES", 4 * 5 * part)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * 6 * part)
    monkeypatch.setattr(ranks_module, "_TILE_QUERIES", 9)
    embeddings = integer_embeddings(50)
    embeddings[20:30] = embeddings[10:20]  # equal scores in several parts
    rng = np.random.default_rng(1)
    query, target = rng.integers(50, size=90), rng.integers(50, size=90)
    with ItemPool.create(tmp_path / "pool", dims=6, shard_size=17) as pool:
        pool.append([str(i) for i in range(60)], torch.cat((embeddings[:30], torch.ones(10, 6), embeddings[30:])))
        pool.delete([str(i) for i in range(30, 40)])
    steps: list[tuple[int, int]] = []
    with ItemPool.open(tmp_path / "pool") as pool:
        ranks, hits = positive_ranks(pool, query, target, depth=depth, progress=lambda d, of: steps.append((d, of)))
        asked, asked_hits = positive_ranks(pool, query, target, depth=depth, asked=embeddings.flip(0))
    for q, p, rank in zip(query.tolist(), target.tolist(), ranks.tolist(), strict=True):
        assert rank == (ABSENT if p == q else brute_rank(embeddings, q, p))
    expected, expected_hits = positive_ranks(embeddings, query, target, depth=depth)
    assert np.array_equal(ranks, expected) and torch.equal(hits, expected_hits)
    expected, expected_hits = positive_ranks(embeddings, query, target, depth=depth, asked=embeddings.flip(0))
    assert np.array_equal(asked, expected) and torch.equal(asked_hits, expected_hits)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps) and steps[-1][0] == steps[-1][1]


def test_a_large_pool_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = make_catalog()
    embeddings = torch.nn.functional.normalize(torch.randn(len(catalog.items), 8), dim=1)
    asked = embeddings + 0.1 * torch.randn_like(embeddings)
    asked[3] = float("nan")
    with ItemPool.create(tmp_path / "pool", dims=8, shard_size=17) as pool:
        pool.append([item.id for item in reversed(catalog.items)], embeddings.flip(0))
    with ItemPool.open(tmp_path / "pool") as pool:
        whole = [evaluate(catalog, pool, ks=(1, 10), samples=20, queries=q) for q in (None, asked)]
        monkeypatch.setattr(importlib.import_module("tgq_fast.evaluation.evaluate"), "_HELD_BYTES", 0)
        monkeypatch.setattr(ItemPool, "embeddings", None)  # not to be called
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * 8 * 5)
        parts = [evaluate(catalog, pool, ks=(1, 10), samples=20, queries=q) for q in (None, asked)]
    for one, other in zip(whole, parts, strict=True):
        assert one.to_dict() == other.to_dict() and np.array_equal(one.rank, other.rank)


@needs_extension
def test_a_query_for_every_row_searches_one_triangle(monkeypatch: pytest.MonkeyPatch) -> None:
    size, counters, joined = 2100, {}, []
    search, matrix = topk_native.search, topk_native._matrix

    def counted(*arguments: object, **options: object) -> object:
        joined.append(matrix(arguments[0]) == matrix(arguments[1]))  # type: ignore[arg-type]
        return search(*arguments, **options, counters=counters)  # type: ignore[arg-type]

    embeddings = torch.randn(size, 24)
    query, target = np.arange(size), np.roll(np.arange(size), 1)
    steps: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(topk_native, "search", counted)
        ranks, hits = positive_ranks(
            embeddings, query, target, depth=20, progress=lambda done, of: steps.append((done, of))
        )
    assert joined == [True] and counters["filtered"] + counters["direct"] < 0.75 * size * size
    assert steps[-1] == (size, size)
    # One query fewer, and they are searched as strangers: the same answer for the others.
    with monkeypatch.context() as patch:
        patch.setattr(topk_native, "search", counted)
        some, some_hits = positive_ranks(embeddings, query[1:], target[1:], depth=20)
    assert joined == [True, False]
    assert np.array_equal(some, ranks[1:]) and torch.equal(some_hits, hits[1:])


def test_evaluate_from_tensor_and_pool_agree(tmp_path: Path) -> None:
    catalog = make_catalog()
    embeddings = torch.nn.functional.normalize(torch.randn(len(catalog.items), 8), dim=1)
    whole = evaluate(catalog, embeddings, ks=(1, 10), samples=50)
    order = torch.randperm(len(catalog.items)).tolist()  # a pool may hold the items in any order
    with ItemPool.create(tmp_path / "pool", dims=8, shard_size=17) as pool:
        pool.append([catalog.items[i].id for i in order], embeddings[order])
    pooled = evaluate(catalog, ItemPool.open(tmp_path / "pool"), ks=(1, 10), samples=50)
    assert pooled.to_dict() == whole.to_dict()
    assert whole.pool_size == 120 and whole.missing_pairs == 0
    pairs = catalog.split_pairs("test")
    expected = np.mean([brute_rank(embeddings, q, p) <= 10 for q, p in zip(pairs.query, pairs.target, strict=True)])
    assert whole["H@10"] == pytest.approx(expected)


def test_perfect_embeddings_reach_one() -> None:
    catalog = make_catalog()
    one_hot = torch.nn.functional.one_hot(torch.arange(40).repeat_interleave(3), 40).float()
    result = evaluate(catalog, one_hot, ks=(1, 2))
    assert result["H@2"] == result["HR@1"] == result["MRR"] == result["NDCG@2"] == result["1-NN"] == 1.0
    assert result["H@1"] == pytest.approx(0.5)  # two positives, one first place


def test_items_missing_from_the_pool_count_as_misses(tmp_path: Path) -> None:
    catalog = make_catalog()
    one_hot = torch.nn.functional.one_hot(torch.arange(40).repeat_interleave(3), 40).float()
    lost = int(catalog.split_pairs("test").target[0])
    keep = [i for i in range(120) if i != lost]
    with ItemPool.create(tmp_path / "pool", dims=40) as pool:
        pool.append([catalog.items[i].id for i in keep], one_hot[keep])
    result = evaluate(catalog, ItemPool.open(tmp_path / "pool"), ks=(2,))
    pairs = catalog.split_pairs("test")
    touched = int(((pairs.query == lost) | (pairs.target == lost)).sum())
    assert result.missing_pairs == touched > 0
    assert result["H@2"] == pytest.approx(1 - touched / len(pairs.query))
    assert "outside the pool" in result.table()


def test_outputs(tmp_path: Path) -> None:
    catalog = make_catalog()
    result = evaluate(catalog, torch.randn(120, 4), ks=(10, 1), samples=20)
    saved = json.loads(Path(tmp_path / "e.json").read_text()) if result.to_json(tmp_path / "e.json") else None
    assert saved == result.to_dict() and saved["ks"] == [1, 10]
    assert set(saved["metrics"]) == {
        *(f"{m}@{k}" for m in ("H", "HR", "Recall", "NDCG") for k in (1, 10)),
        "MRR",
        "1-NN",
    }
    table = result.table()
    assert "K=10" in table and f"{result['H@10']:.4f}" in table
    both = format_table({"first": result, "second": result})
    assert both.count("Recall@K") == 2 and "first" in both and "second" in both


def test_paired_comparison() -> None:
    catalog = make_catalog()
    good = torch.nn.functional.one_hot(torch.arange(40).repeat_interleave(3), 40).float()
    first, second = evaluate(catalog, good, ks=(2,)), evaluate(catalog, torch.randn(120, 4), ks=(2,))
    result = compare(first, second, "H@2").difference
    assert result.value == pytest.approx(first["H@2"] - second["H@2"])
    assert 0 < result.low <= result.value <= result.high
    same = compare(first, first, "MRR").difference
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ArgumentError, match="metric"):
        compare(first, second, "H@3")
    with pytest.raises(ArgumentError, match="pairs"):
        compare(first, evaluate(catalog, good, ks=(2,), split="train"), "H@2")


def test_bad_arguments(tmp_path: Path) -> None:
    catalog = make_catalog()
    with pytest.raises(ArgumentError, match="embeddings"):
        evaluate(catalog, torch.randn(119, 4))
    with pytest.raises(ArgumentError, match="ks"):
        evaluate(catalog, torch.randn(120, 4), ks=(0,))
    broken = torch.randn(120, 4)
    broken[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="i001-0"):
        evaluate(catalog, broken)
    with ItemPool.create(tmp_path / "pool", dims=4) as pool:
        pool.append(["stranger"], torch.randn(1, 4))
    with pytest.raises(ArgumentError, match="catalogue"):
        evaluate(catalog, ItemPool.open(tmp_path / "pool"))


def grouped(groups: int, size: int) -> Catalog:
    return Catalog.from_items([Item(f"{g}-{i}", group_id=f"g{g}") for g in range(groups) for i in range(size)])


def centres(groups: int, size: int, noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centre = torch.nn.functional.normalize(torch.randn(groups, 32, generator=generator), dim=1)
    rows = centre.repeat_interleave(size, 0)
    return torch.nn.functional.normalize(rows + noise * torch.randn(rows.shape, generator=generator), dim=1)


def test_every_mate_of_a_large_group_is_a_positive() -> None:
    found = evaluate(grouped(30, 60), centres(30, 60, 0.01), ks=(1, 10, 100), samples=0)
    assert found["HR@1"] == found["MRR"] == found["NDCG@10"] == found["1-NN"] == 1.0
    assert found["Recall@100"] == found["H@100"] == 1.0
    assert found["Recall@10"] == pytest.approx(10 / 59)


def test_queries_may_ask_with_another_embedding() -> None:
    """The pool keeps its own: each query asks with the vector of its next mate, and so finds that mate first."""
    catalog, rows = grouped(30, 3), centres(30, 3, 0.5)
    order = np.arange(90).reshape(30, 3)[:, [1, 2, 0]].reshape(-1)
    pairs = catalog.split_pairs("test")
    found = evaluate(catalog, rows, queries=rows[torch.from_numpy(order)], ks=(1,), samples=0)
    nearest = {int(q): int(t) for q, t, r in zip(found.query, found.target, found.rank) if r == 1}
    assert nearest == {int(q): int(order[q]) for q in np.unique(pairs.query)}
    same = evaluate(catalog, rows, queries=rows.clone(), ks=(1, 3), samples=0)
    assert np.array_equal(same.rank, evaluate(catalog, rows, ks=(1, 3), samples=0).rank)
    with pytest.raises(ArgumentError, match="queries"):
        evaluate(catalog, rows, queries=rows[:5])


def test_items_without_an_embedding_are_no_candidates() -> None:
    catalog, rows = grouped(40, 3), centres(40, 3, 0.2)
    lost = int(catalog.split_pairs("test").target[0])
    absent = rows.clone()
    absent[lost] = float("nan")
    found = evaluate(catalog, absent, ks=(1, 10), samples=0)
    assert found.pool_size == len(catalog) - 1 and found.missing_pairs == 4  # its two pairs in each direction
    queries = rows.clone()
    queries[lost] = float("nan")
    assert evaluate(catalog, rows, queries=queries, ks=(1,), samples=0).missing_pairs == 2
    absent[0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        evaluate(catalog, absent)


def test_intervals_draw_groups_not_queries() -> None:
    """Queries of one group stand or fall together here: their interval is that of the groups, not of all queries."""
    catalog = grouped(60, 12)
    rows = centres(60, 12, 0.01)
    generator = torch.Generator().manual_seed(7)
    for group in range(0, 60, 2):  # every second group is scattered
        scattered = torch.nn.functional.normalize(torch.randn(12, 32, generator=generator), dim=1)
        rows[12 * group : 12 * group + 12] = scattered
    found = evaluate(catalog, rows, ks=(1,), split="train", samples=400)
    groups = len(np.unique(found.group))
    share = found["HR@1"]
    expected = 2 * 1.96 * np.sqrt(share * (1 - share) / groups)
    width = found.metrics["HR@1"].high - found.metrics["HR@1"].low
    assert 0.7 * expected < width < 1.4 * expected
    better = evaluate(catalog, centres(60, 12, 0.01), ks=(1,), split="train", samples=400)
    difference = compare(found, better, "HR@1").difference
    assert difference.high < 0 and difference.high - difference.low > 0.7 * expected


def test_default_device_changes_nothing() -> None:
    catalog = make_catalog()
    vectors = integer_embeddings(len(catalog))
    expected = evaluate(catalog, vectors, samples=5)
    torch.set_default_device("meta")
    try:
        assert evaluate(catalog, vectors.numpy(), samples=5).metrics == expected.metrics
    finally:
        torch.set_default_device(None)


def test_autocast_changes_nothing() -> None:
    """Ranks beyond the search depth are counted from products, which autocast would round to 16 bit."""
    rows = torch.nn.functional.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    query, target = np.arange(299), np.arange(1, 300)
    expected, _ = positive_ranks(rows, query, target)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = positive_ranks(rows, query, target)
    np.testing.assert_array_equal(found, expected)


def test_embeddings_in_every_form_mean_their_values() -> None:
    """Ranks beyond the search depth are counted over the rows' memory, where a lazy negation is not carried out."""
    catalog = make_catalog(40)
    vectors = torch.randn(len(catalog), 6, generator=torch.Generator().manual_seed(0))
    expected = evaluate(catalog, vectors, ks=(1,), samples=0).rank
    assert (expected > 1).any()
    array = vectors.numpy()
    forms = [torch._neg_view(-vectors), array[::-1].copy()[::-1], array.astype(">f4"), np.asfortranarray(array)]
    for form in forms:
        for queries in (None, form):
            found = evaluate(catalog, form, queries=queries, ks=(1,), samples=0).rank
            np.testing.assert_array_equal(found, expected)
    rows = np.arange(len(catalog) - 1)
    want, _ = positive_ranks(vectors, rows, rows + 1)
    np.testing.assert_array_equal(positive_ranks(torch._neg_view(-vectors), rows, rows + 1)[0], want)
    for odd in ("pool", 5, None, [[1.0]], np.ma.array(array, mask=array > 0)):
        with pytest.raises(ArgumentError):
            evaluate(catalog, odd)  # type: ignore[arg-type]
