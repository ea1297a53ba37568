"""Rules, tested on hits: the same rows in the same order as a search that looks at every pair."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from tgq_fast import _native
from tgq_fast.reference import TopK
from tgq_fast.search import build_codes, topk_native
from tgq_fast.search.rules import Rule
from tgq_fast.search.topk import topk_by_rules
from tgq_fast.search.topk_torch import topk_torch

N, D, K = 4300, 32, 20
native = pytest.mark.skipif(not _native.available(), reason="no compiled core")


def problem(queries: int, self_join: bool) -> tuple[Tensor, Tensor, list[Rule]]:
    """Small integers, so that scores are exact and many of them tie; labels and numbers, some of them missing."""
    rng = np.random.default_rng(1)
    pool = torch.from_numpy(rng.integers(-2, 3, size=(N, D)).astype(np.float32))
    own = np.arange(N) if self_join else rng.integers(0, N, size=queries)
    labels = rng.integers(-1, 6, size=N)
    numbers = np.where(rng.random(N) < 0.1, np.nan, np.exp(rng.normal(size=N)))
    reach = 0.3 * numbers[own]
    differ = Rule(torch.from_numpy(labels), torch.from_numpy(labels[own]))
    near = Rule(torch.from_numpy(numbers), torch.from_numpy(numbers[own]), torch.from_numpy(reach))
    return pool if self_join else pool[own].flip(1).contiguous(), pool, [differ, near]


def brute_force(
    queries: Tensor, pool: Tensor, rules: list[Rule], exclude: Tensor, allowed: Tensor | None, k: int
) -> TopK:
    scores = (queries.double() @ pool.double().T).numpy()
    met = np.ones_like(scores, dtype=bool)
    differ, near = rules
    labels, asked = differ.rows.numpy(), differ.queries.numpy()[:, None]
    met &= (labels != asked) | (labels < 0)
    assert near.reach is not None
    distance = np.abs(near.rows.numpy() - near.queries.numpy()[:, None])
    met &= distance <= near.reach.numpy()[:, None]
    met[np.arange(len(met)), exclude.numpy().reshape(-1)] = False
    if allowed is not None:
        met &= allowed.numpy()
    scores[~met] = -np.inf
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, rows, axis=1)
    return TopK(torch.from_numpy(best).float(), torch.from_numpy(np.where(np.isinf(best), -1, rows)))


def same(found: TopK, expected: TopK) -> None:
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)


@cache
def whole(self_join: bool) -> tuple[Tensor, Tensor, list[Rule], Tensor, Tensor, TopK]:
    queries, pool, rules = problem(300, self_join)
    exclude = torch.arange(len(queries))[:, None]
    allowed = torch.from_numpy(np.random.default_rng(2).random(N) < 0.9)
    return queries, pool, rules, exclude, allowed, brute_force(queries, pool, rules, exclude, allowed, K)


@native
@pytest.mark.parametrize("self_join", [False, True])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("sampled_k", [0, 90, 3000])
@pytest.mark.parametrize("isa", ["avx2", None])
def test_the_compiled_core(self_join: bool, coded: bool, sampled_k: int, isa: str | None) -> None:
    queries, pool, rules, exclude, allowed, expected = whole(self_join)
    out = TopK(torch.empty(len(queries), K), torch.empty(len(queries), K, dtype=torch.int64))
    counters: dict[str, int] = {}
    found = topk_native.search(
        queries,
        pool,
        K,
        exclude,
        out,
        2,
        None,
        allowed=allowed,
        codes=build_codes(pool) if coded else None,
        rules=rules,
        sampled_k=sampled_k,
        isa=isa,
        tuning={"use_codes": 1} if coded else {},
        counters=counters,
    )
    same(found, expected)
    if sampled_k == 0 and not self_join:  # the thresholds of all rows are above those of the few that are left
        assert counters["rescanned"] > 0
    assert counters["rescanned"] <= {0: len(queries), 90: len(queries) // 2, 3000: 30 + len(queries) // 10}[sampled_k]


def test_pytorch() -> None:
    queries, pool, rules = problem(50, False)
    exclude = torch.arange(50)[:, None]
    out = TopK(torch.empty(50, K), torch.empty(50, K, dtype=torch.int64))
    found = topk_torch(queries, pool, K, exclude, out, None, rules=rules)
    same(found, brute_force(queries, pool, rules, exclude, None, K))


def test_rules_of_some_rows_and_queries() -> None:
    queries, pool, rules = problem(50, False)
    rows, asked = torch.arange(0, N, 3), torch.tensor([4, 7, 1])
    some = [rule.of_rows(rows).of_queries(asked) for rule in rules]
    found = topk_by_rules(queries[asked], pool[rows].contiguous(), K, some, sampled_k=100)
    whole = torch.zeros(N, dtype=torch.bool)
    whole[rows] = True
    expected = brute_force(queries, pool, rules, torch.full((50,), 1), whole, K)
    assert not (expected.indices[asked] == 1).any()
    assert torch.equal(rows[found.indices], expected.indices[asked])
