"""Many random problems through every route, each against the definition; TGQ_FUZZ_ROWS asks for more than the default.

A problem that fails is named by its number: `TGQ_FUZZ_FIRST=<number> TGQ_FUZZ_ROWS=1` runs it alone.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest
import test_topk_native as native
import torch

from tgq_fast import _native
from tgq_fast.reference import TopK, exact_topk
from tgq_fast.search.codes import encode_rows, fit_basis
from tgq_fast.search.topk import merge_topk, topk

ROWS = int(os.environ.get("TGQ_FUZZ_ROWS", 150_000))  # pool rows searched, all problems together
FIRST = int(os.environ.get("TGQ_FUZZ_FIRST", 0))


@dataclass
class Problem:
    """Queries [Q, D], pool [N, D], k and excluded rows [Q, X]; `whole` says that all products are exact in fp32."""

    queries: torch.Tensor
    pool: torch.Tensor
    k: int
    exclude: torch.Tensor | None
    whole: bool


def draw(number: int) -> tuple[Problem, random.Random]:
    choose = random.Random(number)
    torch.manual_seed(number)
    rows = choose.choice([1, 7, 300, 1000, 4000, 6000]) + choose.randrange(100)
    queries, width = choose.choice([1, 5, 11, 12, 33, 70]), choose.randrange(2, 140)
    kind = choose.choice(["integers", *native.KINDS])
    if kind == "integers":
        span = choose.choice([0, 1, 8])
        data = [torch.randint(-span, span + 1, (n, width)).float() for n in (queries, rows)]
    else:
        data = [native.dataset(kind, n, width) for n in (queries, rows)]
    if kind != "integers" or span < 8:  # rounding integers up to 8 is exact, others to fp16 may overflow
        data = [values.to(choose.choice(native_dtypes(kind))) for values in data]
    if choose.random() < 0.3:
        data[1][choose.randrange(rows) :] = data[1][0].clone()  # a tail of duplicates
    if choose.random() < 0.3:
        data = [torch.cat((values, values), dim=1)[:, ::2] for values in data]  # strided
    exclude = torch.randint(-1, rows, (queries, choose.randint(1, 4))) if choose.random() < 0.5 else None
    k = choose.choice([1, 10, 100, 300, rows, rows + 1])
    return Problem(data[0], data[1], min(k, 2048), exclude, kind == "integers"), choose


def native_dtypes(kind: str) -> list[torch.dtype]:
    return [torch.float32, torch.float32, torch.bfloat16, *([] if kind == "exponents" else [torch.float16])]


def answers(problem: Problem, choose: random.Random) -> dict[str, TopK]:
    """What every route that scores by the fixed-order dot answers."""
    queries, pool, k, exclude = problem.queries, problem.pool, problem.k, problem.exclude
    threads = choose.randint(1, 3)
    isa, tuning = choose.choice(native.ISAS), choose.choice(native.TUNINGS)
    cuts = sorted({0, *(choose.randrange(len(pool) + 1) for _ in range(3))})
    stops = [*cuts[1:], len(pool)]
    parts = []
    for start, stop in zip(cuts, stops, strict=True):
        inside = None if exclude is None else torch.where((exclude >= start) & (exclude < stop), exclude - start, -1)
        parts.append(topk(queries, pool[start:stop], k, exclude=inside))
    split = choose.randrange(len(queries) + 1)
    halves = [
        topk(queries[part], pool, k, exclude=None if exclude is None else exclude[part], num_threads=threads)
        for part in (slice(0, split), slice(split, None))
    ]
    levels = (64 * choose.randint(1, -(-pool.shape[1] // 64)), choose.random() < 0.5)
    coded = encode_rows(pool, fit_basis(pool, levels=choose.choice((None, levels))))
    return {
        "topk": topk(queries, pool, k, exclude=exclude, num_threads=threads),
        f"{isa} {tuning}": native.search(queries, pool, k, exclude=exclude, threads=threads, isa=isa, tuning=tuning),
        f"codes, {isa}": native.search(
            queries, pool, k, exclude=exclude, threads=threads, isa=isa, codes=coded, tuning={"use_codes": 1}
        ),
        "codes where they pay": topk(queries, pool, k, exclude=exclude, num_threads=threads, codes=coded),
        f"parts at {cuts}": merge_topk(parts, k, offsets=cuts),
        "halves of the queries": TopK(*(torch.cat(both) for both in zip(*halves, strict=True))),
    }


@pytest.mark.skipif(not _native.available(), reason=_native.why_missing() or "built")
def test_every_route_gives_the_definition() -> None:
    rows, number = 0, FIRST
    while rows < ROWS:
        problem, choose = draw(number)
        expected = native.oracle(problem.queries, problem.pool, problem.k, problem.exclude)
        for route, found in answers(problem, choose).items():
            native.assert_same(found, expected, f"problem {number}, {route}")
        if problem.whole:  # an oracle that shares no code with the core
            exact = exact_topk(problem.queries.double(), problem.pool.double(), problem.k, exclude=problem.exclude)
            by_torch = topk(problem.queries, problem.pool, problem.k, exclude=problem.exclude, backend="torch")
            for found in (expected, by_torch):
                native.assert_same(found, TopK(exact.scores.float(), exact.indices), f"problem {number}, exact")
        if problem.queries.dtype == problem.pool.dtype and number % 4 == 0:
            joined = topk(problem.pool, problem.pool, problem.k)
            square = native.search(problem.pool, problem.pool, problem.k, tuning={"use_self_join": 0})
            native.assert_same(joined, square, f"problem {number}, self-join")
        rows += len(problem.pool)
        number += 1
    assert rows >= ROWS
