"""Planted faults in the Python side of the search: each is caught by a check that the unchanged code passes.

Faults of the compiled core are planted in its inputs: codes whose proved bounds are too small are a margin that is too
small.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from planting import caught, plant

from tgq_fast import _native
from tgq_fast.pool import search as pool_search
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.reference import TopK, exact_topk
from tgq_fast.search import blocks, topk_native, topk_torch
from tgq_fast.search import count as COUNT
from tgq_fast.search.codes import Codes, encode_rows, fit_basis
from tgq_fast.search.topk import topk

needs_extension = pytest.mark.skipif(not _native.available(), reason=_native.why_missing() or "built")
TOPK = importlib.import_module("tgq_fast.search.topk")  # the package has a function of this name
RANKS = importlib.import_module("tgq_fast.evaluation.ranks")
QUERIES, ROWS, WIDTH, K = 9, 730, 5, 40


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers: exact products, many ties; NaN, infinite and signed zero scores; exclusions at every edge."""
    generator = torch.Generator().manual_seed(3)
    pool = torch.randint(-2, 3, (ROWS, WIDTH), generator=generator).float()
    pool[5, 0], pool[6, 1], pool[7] = float("nan"), float("-inf"), -0.0
    pool[-1], pool[350] = 3.0, 3.0
    queries = torch.randint(-2, 3, (QUERIES, WIDTH), generator=generator).float()
    queries[0], queries[1] = 1.0, 0.0  # all scores of the second tie, as -0 and +0
    exclude = torch.randint(-1, ROWS, (QUERIES, 3), generator=generator)
    exclude[0], exclude[1] = torch.tensor([ROWS - 1, 99, 100]), torch.tensor([0, 1, 200])
    return queries, pool, exclude


def same(found: TopK, expected: TopK) -> None:
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)
    assert not torch.signbit(found.scores[found.scores == 0]).any()


def in_chunks(folder: Path) -> None:
    signed = topk_torch.order_keys(torch.tensor([[0.0, -0.0]]), 3)[0] >> 32
    assert signed[0] == signed[1]
    queries, pool, exclude = problem()
    before = topk_torch._TILE_SCORES
    topk_torch._TILE_SCORES = 100 * QUERIES
    try:
        for k in (K, ROWS + 1):
            same(
                topk(queries, pool, k, exclude=exclude, backend="torch"), exact_topk(queries, pool, k, exclude=exclude)
            )
    finally:
        topk_torch._TILE_SCORES = before


def in_parts(folder: Path) -> None:
    queries, pool, _ = problem()
    cuts = [0, 1, 100, 650]
    for k in (K, ROWS + 1):
        parts = [topk(queries, part, k) for part in pool.tensor_split(cuts[1:])]
        for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
            merged = TOPK.merge_topk([parts[i] for i in order], k, offsets=[cuts[i] for i in order])
            same(merged, exact_topk(queries, pool, k))
    assert TOPK.merge_topk([TopK(parts[0].scores[:, :5], parts[0].indices[:, :5])], 9).indices.shape == (QUERIES, 9)


def from_disk(folder: Path) -> None:
    queries, pool, exclude = problem()
    pool = pool.nan_to_num(0.0, neginf=-1.0)
    with ItemPool.create(folder, dims=WIDTH, shard_size=130) as written:
        written.append([str(i) for i in range(ROWS)], pool)
    names = [[str(i) for i in line if i >= 0] for line in exclude.tolist()]
    before = blocks.BLOCK_BYTES
    try:
        for rows in (50, 300, 10_000):
            blocks.BLOCK_BYTES = rows * WIDTH * 4
            hits = ItemPool.open(folder).search(queries, K, exclude_ids=names)
            same(TopK(hits.scores, hits.indices), exact_topk(queries, pool, K, exclude=exclude))
    finally:
        blocks.BLOCK_BYTES = before


def ranks(folder: Path) -> None:
    embeddings = problem()[1].nan_to_num(0.0, neginf=-1.0)[:120]
    query, target = torch.arange(120).repeat(2).numpy(), torch.randperm(240).remainder(120).numpy()
    available = _native.available
    try:
        for depth, compiled in product((0, 7), (True, False)):
            _native.available = lambda compiled=compiled: compiled and available()
            found, _ = RANKS.positive_ranks(embeddings, query, target, depth=depth)
            for q, p, rank in zip(query.tolist(), target.tolist(), found.tolist(), strict=True):
                order = (
                    exact_topk(embeddings[q : q + 1], embeddings, 120, exclude=torch.tensor([q])).indices[0].tolist()
                )
                assert p == q or rank == order.index(p) + 1
    finally:
        _native.available = available


CHUNKED, MERGED, DISK, RANKED = (in_chunks, in_parts, from_disk, ranks)
FAULTS: dict[str, tuple[object, str, str, str, Callable[[Path], None]]] = {
    "wrong tie order": (topk_torch, "order_keys", "(_LOW - rows)", "rows", CHUNKED),
    "NaN returned": (topk_torch, "order_keys", "scores.isnan()", "scores.isnan() & False", CHUNKED),
    "-0 below +0": (topk_torch, "order_keys", "(scores + 0.0)", "scores", CHUNKED),
    "negative scores upside down": (topk_torch, "order_keys", "& 0x7FFFFFFF", "& 0", CHUNKED),
    "rows of a chunk not counted on": (
        TOPK,
        "topk_torch",
        "order_keys(scores, first)",
        "order_keys(scores, 0)",
        CHUNKED,
    ),
    "dropped tail rows": (
        TOPK,
        "topk_torch",
        "range(0, pool_size, rows)",
        "range(0, pool_size - rows + 1, rows)",
        CHUNKED,
    ),
    "earlier chunks forgotten": (
        TOPK,
        "topk_torch",
        "torch.cat((best, keys), dim=1)",
        "torch.cat((best * 0 + _NONE, keys), dim=1)",
        CHUNKED,
    ),
    "one candidate too few kept": (
        TOPK,
        "topk_torch",
        "keys.topk(min(k, keys.shape[1])",
        "keys.topk(min(k - 1, keys.shape[1])",
        CHUNKED,
    ),
    "exclusions of the first chunk only": (
        TOPK,
        "topk_torch",
        "exclude[begin:end] - first",
        "exclude[begin:end]",
        CHUNKED,
    ),
    "first row cannot be excluded": (topk_torch, "_mask", "(excluded >= 0)", "(excluded > 0)", CHUNKED),
    "last row of a chunk cannot be excluded": (topk_torch, "_mask", "< keys.shape[1]", "< keys.shape[1] - 1", CHUNKED),
    "missing hits look like rows": (
        topk_torch,
        "read_keys",
        "torch.where(missing, -1,",
        "torch.where(missing, 0,",
        CHUNKED,
    ),
    "ties merged in the order of parts": (
        TOPK,
        "merge_topk",
        "indices).argsort(dim=1, stable=True)",
        "indices * 0).argsort(dim=1, stable=True)",
        MERGED,
    ),
    "missing hits before -inf": (TOPK, "merge_topk", "torch.iinfo(torch.int64).max", "-1", MERGED),
    "parts not shifted": (TOPK, "merge_topk", "_shift(part.indices, shift)", "part.indices", MERGED),
    "missing hits shifted": (
        TOPK,
        "_shift",
        "torch.where(indices < 0, indices, indices + offset)",
        "indices + offset",
        MERGED,
    ),
    "no padding": (TOPK, "merge_topk", "lacking = k - scores.shape[1]", "lacking = 0", MERGED),
    "last block lost": (
        pool_search,
        "cut_blocks",
        "    if joined:\n        blocks.append",
        "    if False:\n        blocks.append",
        DISK,
    ),
    "tail of a large shard lost": (
        pool_search,
        "cut_blocks",
        "range(0, size, step)",
        "range(0, size - step, step)",
        DISK,
    ),
    "blocks start too early": (pool_search, "cut_blocks", "joined, start = [], end", "joined = []", DISK),
    "exclusions beside the block": (
        pool_search.PoolSearch,
        "best_rows",
        "excluded - block.start, -1",
        "(excluded - block.start) // 2, -1",
        DISK,
    ),
    "last row of a block cannot be excluded": (
        pool_search.PoolSearch,
        "best_rows",
        "< block.start + block.rows)",
        "< block.start + block.rows - 1)",
        DISK,
    ),
    "whole shard for a part": (
        pool_search.PoolSearch,
        "_load",
        "slice(part.first, part.stop)",
        "slice(0, part.stop - part.first)",
        DISK,
    ),
    "self counted as a rival": (RANKS, "_counted", " - itself.to(torch.int64)", "", RANKED),
    "self behind at a tie": (RANKS, "_counted", "(rows[line] < target)", "(rows[line] > target)", RANKED),
    "ties ranked late": (COUNT, "count_before", "(rows < marks", "(rows > marks", RANKED),
    "marks of the next query": (RANKS, "_counted", "scores, target)", "scores.flip(0), target.flip(0))", RANKED),
    "rank off by one": (RANKS, "positive_ranks", ".numpy()[inside] + 1", ".numpy()[inside]", RANKED),
}


@pytest.mark.parametrize("check", [CHUNKED, MERGED, DISK, RANKED])
def test_unchanged_code_passes(tmp_path: Path, check: Callable[[Path], None]) -> None:
    check(tmp_path / "pool")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    owner, name, old, new, check = FAULTS[fault]
    plant(owner, name, old, new, monkeypatch)
    caught(check, tmp_path / "pool")


def coded_problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores so close that rounding to bytes, or what lies beyond the first level, changes their order."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.cat((torch.full((64,), 0.1), torch.full((64,), 0.01)))
    pool = torch.randn(1, 128, generator=generator) + spread * torch.randn(20_000, 128, generator=generator)
    return torch.randn(40, 128, generator=generator), pool


LAYOUTS = [(64, False), (64, True), (128, False)]  # columns of the first level, and whether there is a second


def coded(pool: torch.Tensor, layout: tuple[int, bool]) -> Codes:
    return encode_rows(pool, fit_basis(pool, levels=layout))


def check_codes(codes: Codes) -> None:
    queries, pool = coded_problem()
    found = TopK(torch.empty(len(queries), 20), torch.empty(len(queries), 20, dtype=torch.int64))
    topk_native.search(queries, pool, 20, None, found, 2, None, codes=codes, tuning={"use_codes": 1})
    same(found, topk(queries, pool, 20))


CODE_FAULTS: dict[str, Callable[[Codes], Codes]] = {
    "no rounding errors": lambda c: replace(c, step=(0.0,) * len(c.step), norm=(0.0,) * len(c.norm)),
    "nothing beyond the first level": lambda c: replace(c, rest=c.rest * 0),
    "rows out of step": lambda c: replace(c, codes=c.codes.roll(1, 1)),
    "scale slip of odd rows": lambda c: replace(c, scale=c.scale * torch.tensor([1.0, 0.9]).repeat(len(c.scale) // 2)),
    "another mean": lambda c: replace(c, basis=replace(c.basis, mean=c.basis.mean * 0.9)),
    "another rotation": lambda c: replace(c, basis=replace(c.basis, rotation=c.basis.rotation.roll(1, 0))),
    "last rows encoded as zero": lambda c: replace(
        c, codes=torch.cat((c.codes[:, :-500], torch.full_like(c.codes[:, -500:], 128)), dim=1)
    ),
}


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_true_codes_pass(layout: tuple[int, bool]) -> None:
    check_codes(coded(coded_problem()[1], layout))


@needs_extension
@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_codes_with_wrong_bounds_are_caught(fault: str) -> None:
    # What lies beyond a first level hides small errors, and there is nothing beyond 128 columns.
    layouts = {"no rounding errors": (128, False), "scale slip of odd rows": (128, True)}
    layout = layouts.get(fault, (64, True))
    caught(check_codes, CODE_FAULTS[fault](coded(coded_problem()[1], layout)))
