"""Ranking metrics against pytrec_eval, brute force and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgq_fast.errors import ArgumentError
from tgq_fast.evaluation.metrics import ABSENT, bootstrap_interval, query_table, ranking_metrics


def random_ranks(seed: int, users: int = 30, pool: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    query, rank = [], []
    for user in range(users):
        count = int(rng.integers(1, 8))
        query += [user * 3] * count
        rank += list(rng.choice(np.arange(1, pool), size=count, replace=False))
    return np.array(query), np.array(rank, dtype=np.int64)


@pytest.mark.parametrize("seed", range(3))
def test_query_metrics_equal_pytrec_eval(seed: int) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    pool = 60
    query, rank = random_ranks(seed, pool=pool)
    truth: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for user in np.unique(query):
        ranks = set(rank[query == user].tolist())
        truth[str(user)] = {f"d{r:03d}": 1 for r in ranks}
        run[str(user)] = {f"d{r:03d}": float(pool - r) for r in range(1, pool)}
    measures = {"success_1,10", "recall_1,10", "ndcg_cut_1,10", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(truth, measures).evaluate(run)

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in theirs.values()]))

    ours = ranking_metrics(query, rank, (1, 10), samples=0)
    for k in (1, 10):
        assert ours[f"HR@{k}"].value == pytest.approx(mean(f"success_{k}"), abs=1e-12)
        assert ours[f"Recall@{k}"].value == pytest.approx(mean(f"recall_{k}"), abs=1e-12)
        assert ours[f"NDCG@{k}"].value == pytest.approx(mean(f"ndcg_cut_{k}"), abs=1e-12)
    assert ours["MRR"].value == pytest.approx(mean("recip_rank"), abs=1e-12)


def test_hand_made_case() -> None:
    query = np.array([7, 7, 2])
    rank = np.array([1, 4, 3])
    metrics = {name: m.value for name, m in ranking_metrics(query, rank, (1, 3), samples=0).items()}
    assert metrics["H@1"] == pytest.approx(1 / 3)  # pairs
    assert metrics["HR@1"] == pytest.approx(1 / 2)  # queries
    assert metrics["H@3"] == pytest.approx(2 / 3)
    assert metrics["HR@3"] == 1.0
    assert metrics["Recall@3"] == pytest.approx((1 / 2 + 1) / 2)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 3) / 2)
    ideal = 1 + 1 / math.log2(3)
    assert metrics["NDCG@3"] == pytest.approx((1 / ideal + 1 / math.log2(4)) / 2)


def test_absent_positives_are_never_found() -> None:
    query, rank = np.array([0, 0, 1]), np.array([2, ABSENT, ABSENT])
    metrics = ranking_metrics(query, rank, (10,), samples=0)
    assert metrics["H@10"].value == pytest.approx(1 / 3)
    assert metrics["HR@10"].value == pytest.approx(1 / 2)
    assert metrics["Recall@10"].value == pytest.approx(1 / 4)
    assert metrics["MRR"].value == pytest.approx(1 / 4)


def test_weights() -> None:
    query, rank = np.array([0, 0, 1]), np.array([1, 9, 9])
    weight = np.array([3.0, 1.0, 0.5])
    metrics = ranking_metrics(query, rank, (1,), weight=weight, samples=0)
    assert metrics["H@1"].value == pytest.approx(3 / 4.5)
    assert metrics["HR@1"].value == pytest.approx(2 / 2.5)  # query weights 2 and 0.5
    same = ranking_metrics(query, rank, (1,), weight=np.full(3, 7.0), samples=0)
    plain = ranking_metrics(query, rank, (1,), samples=0)
    assert {n: m.value for n, m in same.items()} == pytest.approx({n: m.value for n, m in plain.items()})


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=40, unique=True),
    st.integers(1, 40),
)
def test_brute_force(pairs: list[tuple[int, int]], k: int) -> None:
    query = np.array([q for q, _ in pairs])
    rank = np.array([r for _, r in pairs])
    metrics = ranking_metrics(query, rank, (k,), samples=0)
    by_query = {q: [r for p, r in pairs if p == q] for q in set(query.tolist())}
    assert metrics[f"H@{k}"].value == pytest.approx(sum(r <= k for _, r in pairs) / len(pairs))
    assert metrics[f"HR@{k}"].value == pytest.approx(np.mean([min(v) <= k for v in by_query.values()]))
    assert metrics[f"Recall@{k}"].value == pytest.approx(
        np.mean([sum(r <= k for r in v) / len(v) for v in by_query.values()])
    )
    assert metrics["MRR"].value == pytest.approx(np.mean([1 / min(v) for v in by_query.values()]))
    for metric in metrics.values():
        assert 0 <= metric.value <= 1


def test_bootstrap_is_seeded_and_covers() -> None:
    query, rank = random_ranks(0, users=200)
    table = query_table(query, rank, (10,))
    pair = table.numerator["H@10"], table.denominator["H@10"]
    first = bootstrap_interval(*pair, samples=300, seed=4)
    assert first == bootstrap_interval(*pair, samples=300, seed=4)
    assert first != bootstrap_interval(*pair, samples=300, seed=5)
    assert first[0] < table.value("H@10") < first[1]
    wide = bootstrap_interval(*pair, samples=300, seed=4, confidence=0.99)
    assert wide[0] <= first[0] and first[1] <= wide[1]
    # A mean of Bernoulli draws has a known standard error; the interval must be about ±1.96 of it.
    hits = (np.arange(400) % 4 == 0).astype(float)
    low, high = bootstrap_interval(hits, np.ones(400), samples=2000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 * 0.75 / 400), rel=0.1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"query": [0], "rank": [0], "ks": (1,)},
        {"query": [0, 1], "rank": [1], "ks": (1,)},
        {"query": [0], "rank": [1], "ks": ()},
        {"query": [0], "rank": [1], "ks": (0,)},
        {"query": [0], "rank": [1], "ks": (1,), "weight": [-1.0]},
        {"query": [0], "rank": [1], "ks": (1,), "weight": [float("nan")]},
    ],
)
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ArgumentError):
        ranking_metrics(
            np.array(arguments.pop("query")), np.array(arguments.pop("rank")), arguments.pop("ks"), **arguments
        )


def test_bad_bootstrap_arguments() -> None:
    with pytest.raises(ArgumentError, match="samples"):
        bootstrap_interval(np.ones(2), np.ones(2), samples=0)
    with pytest.raises(ArgumentError, match="confidence"):
        bootstrap_interval(np.ones(2), np.ones(2), confidence=1.0)
