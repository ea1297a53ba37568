"""The contract of `topk`, on every backend, against answers that are known exactly.

Data are small integers, so dot products are exact in fp32 whatever the order of summation, and the reference (the whole
score matrix, stably sorted) gives the one right answer, indices included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.reference import exact_topk
from tgq_fast.search.topk import TopK, merge_topk, topk
from tgq_fast.search.topk_torch import order_keys

needs_extension = pytest.mark.skipif(not _native.available(), reason=_native.why_missing())
BACKENDS = ["torch", pytest.param("cpp", marks=needs_extension)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def integers(*shape: int, dtype: torch.dtype = torch.float32, span: int = 4) -> torch.Tensor:
    return torch.randint(-span, span + 1, shape).to(dtype)


def check(found: TopK, queries: torch.Tensor, pool: torch.Tensor, k: int, exclude: torch.Tensor | None = None) -> None:
    expected = exact_topk(queries.double(), pool.double(), k, exclude=exclude)
    assert found.scores.dtype == torch.float32 and found.indices.dtype == torch.int64
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 50, 7), (33, 1000, 64), (70, 3001, 100), (5, 17, 130)])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_matches_the_reference(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], k: int) -> None:
    q, n, d = shape
    queries, pool = integers(q, d, dtype=dtype), integers(n, d, dtype=dtype)
    check(topk(queries, pool, k, backend=backend), queries, pool, k)


@pytest.mark.parametrize(("q", "n"), [(0, 5), (3, 0), (0, 0)])
def test_empty_sides(backend: str, q: int, n: int) -> None:
    found = topk(torch.zeros(q, 4), torch.zeros(n, 4), 3, backend=backend)
    assert found.scores.shape == (q, 3) and found.indices.shape == (q, 3)
    assert bool((found.indices == -1).all()) and bool(torch.isneginf(found.scores).all())


def test_zero_width_scores_are_zero(backend: str) -> None:
    found = topk(torch.zeros(2, 0), torch.zeros(5, 0), 3, backend=backend)
    assert found.indices.tolist() == [[0, 1, 2]] * 2 and found.scores.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("k", [1, 99, 100, 101])
def test_k_around_the_pool_size(backend: str, k: int) -> None:
    queries, pool = integers(4, 8), integers(100, 8)
    found = topk(queries, pool, k, backend=backend)
    check(found, queries, pool, k)
    if k > 100:
        assert found.indices[:, 100:].tolist() == [[-1]] * 4


def test_all_scores_equal_gives_the_first_rows(backend: str) -> None:
    found = topk(torch.ones(40, 32), torch.ones(5000, 32), 300, backend=backend)
    assert torch.equal(found.indices, torch.arange(300).expand(40, 300))


@pytest.mark.parametrize("descending", [False, True])
def test_sorted_pools(backend: str, descending: bool) -> None:
    values = torch.arange(6000.0).flip(0) if descending else torch.arange(6000.0)
    pool = torch.zeros(6000, 16)
    pool[:, 3] = values
    queries = torch.zeros(35, 16)
    queries[:, 3] = 1.0
    found = topk(queries, pool, 64, backend=backend)
    expected = torch.arange(64) if descending else torch.arange(5999, 5999 - 64, -1)
    assert torch.equal(found.indices, expected.expand(35, 64))


def test_duplicates_straddle_k(backend: str) -> None:
    base = integers(37, 24)
    pool = base.repeat(40, 1)  # every row 40 times
    queries = integers(50, 24)
    for k in (1, 39, 40, 41, 100):
        check(topk(queries, pool, k, backend=backend), queries, pool, k)


@pytest.mark.parametrize("give", [lambda x: x, lambda x: x.numpy(), lambda x: torch.stack((x, ~x), 1)[:, 0]])
def test_only_allowed_rows_are_returned(backend: str, give: Callable[[torch.Tensor], Any]) -> None:
    queries, pool = integers(9, 8), integers(700, 8)
    exclude = torch.randint(-1, 700, (9, 3))
    for allowed in (torch.rand(700) < 0.3, torch.zeros(700, dtype=torch.bool), torch.arange(700) == 699):
        found = topk(queries, pool, 50, exclude=exclude, allowed=give(allowed), backend=backend)
        expected = exact_topk(queries, pool, 50, exclude=exclude, allowed=allowed)
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)
    for wrong in (torch.ones(699, dtype=torch.bool), torch.ones(700), [True] * 700):
        with pytest.raises(ArgumentError, match=r"allowed: got .*"):
            topk(queries, pool, 5, allowed=wrong, backend=backend)


def test_nan_is_never_returned_and_infinities_are_ordinary(backend: str) -> None:
    pool = integers(200, 16)
    pool[5, 2] = float("nan")
    pool[17, 0] = float("inf")
    pool[18, 0] = float("-inf")
    queries = torch.ones(3, 16)
    queries[1, 4] = float("nan")  # a query that has no valid score
    found = topk(queries, pool, 200, backend=backend)
    expected = exact_topk(queries, pool, 200)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)
    assert found.indices[0, 0] == 17 and found.indices[0, 198] == 18 and found.indices[0, 199] == -1
    assert 5 not in found.indices
    assert found.indices[1].unique().tolist() == [-1]


def test_infinite_queries(backend: str) -> None:
    pool = integers(300, 8)
    pool[:, 0] = torch.arange(300) % 3 - 1.0  # -1, 0, 1: -inf, NaN, inf
    queries = torch.zeros(2, 8)
    queries[:, 0] = torch.tensor([float("inf"), float("-inf")])
    found = topk(queries, pool, 150, backend=backend)
    expected = exact_topk(queries, pool, 150)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)


def test_minus_zero_ties_with_plus_zero(backend: str) -> None:
    pool = torch.tensor([[-0.0], [0.0], [-0.0], [1.0]])
    found = topk(torch.tensor([[1.0], [-1.0]]), pool, 4, backend=backend)
    assert found.indices.tolist() == [[3, 0, 1, 2], [0, 1, 2, 3]]
    assert not torch.signbit(found.scores[0]).any()


def test_denormals_are_told_apart(backend: str) -> None:
    tiny = torch.arange(1, 65, dtype=torch.float32)[:, None] * 1e-44
    pool = tiny.expand(64, 3).contiguous()
    found = topk(torch.ones(40, 3), pool, 5, backend=backend)
    assert torch.equal(found.indices, torch.tensor([63, 62, 61, 60, 59]).expand(40, 5))


def test_largest_finite_values(backend: str) -> None:
    pool = torch.full((100, 2), 3e38)
    pool[::2] *= -1
    found = topk(torch.ones(33, 2), pool, 100, backend=backend)  # sums overflow to ±inf
    assert torch.equal(found.indices[0], torch.cat([torch.arange(1, 100, 2), torch.arange(0, 100, 2)]))
    assert bool(torch.isposinf(found.scores[:, :50]).all()) and bool(torch.isneginf(found.scores[:, 50:]).all())


@pytest.mark.parametrize("width", [1, 3])
def test_exclusions(backend: str, width: int) -> None:
    pool = integers(60, 12).repeat(20, 1)  # many ties with the excluded rows
    queries = pool[:48]
    exclude = torch.randint(-1, 1200, (48, width))
    exclude[:, 0] = torch.arange(48)
    found = topk(queries, pool, 50, exclude=exclude, backend=backend)
    check(found, queries, pool, 50, exclude)
    flat = topk(queries, pool, 50, exclude=torch.arange(48), backend=backend)
    check(flat, queries, pool, 50, torch.arange(48))


def test_ragged_exclusions_and_exclusion_of_everything(backend: str) -> None:
    queries, pool = integers(3, 4), integers(5, 4)
    found = topk(queries, pool, 5, exclude=[[0, 1, 2, 3, 4], [], [2]], backend=backend)
    assert found.indices[0].tolist() == [-1] * 5
    assert sorted(found.indices[1].tolist()) == [0, 1, 2, 3, 4]
    assert sorted(found.indices[2].tolist()) == [-1, 0, 1, 3, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_transposed_views(backend: str, dtype: torch.dtype) -> None:
    wide = integers(200, 60, dtype=dtype)
    queries = integers(80, 20, dtype=dtype)[::2]
    for pool in (wide[::3, ::3], wide[:, 5:25], integers(20, 200, dtype=dtype).T, wide[:1, :20].expand(90, 20)):
        check(topk(queries, pool, 7, backend=backend), queries, pool, 7)
        check(topk(queries.T.contiguous().T, pool, 7, backend=backend), queries, pool, 7)


def test_numpy_and_read_only_memory(backend: str, tmp_path) -> None:
    rng = np.random.default_rng(0)
    pool = rng.integers(-4, 5, (150, 9)).astype(np.float32)
    queries = rng.integers(-4, 5, (20, 9)).astype(np.float32)
    pool.tofile(tmp_path / "pool.bin")
    mapped = np.memmap(tmp_path / "pool.bin", dtype=np.float32, mode="r", shape=(150, 9))
    expected = exact_topk(torch.from_numpy(queries), torch.from_numpy(pool), 6)
    for p in (pool, mapped, pool[::-1][::-1], pool.astype(">f4"), np.asfortranarray(pool)):
        assert torch.equal(topk(queries, p, 6, backend=backend).indices, expected.indices)
    flipped = topk(queries[:, ::-1], pool[:, ::-1], 6, backend=backend)
    assert torch.equal(flipped.indices, expected.indices)


def test_dlpack_and_mixed_dtypes(backend: str) -> None:
    class Shared:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options: object) -> object:
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.tensor.__dlpack_device__()

    queries, pool = integers(40, 16), integers(100, 16)
    check(topk(Shared(queries), Shared(pool), 5, backend=backend), queries, pool, 5)
    check(topk(queries, pool.bfloat16(), 5, backend=backend), queries, pool, 5)
    check(topk(queries.half(), pool, 5, backend=backend), queries, pool, 5)


def test_native_precision_rounds_the_queries(backend: str) -> None:
    queries = torch.tensor([[1.0 + 2**-10, 0.0]])
    pool = torch.eye(2).bfloat16()
    assert topk(queries, pool, 1, backend=backend, precision="exact").scores.item() == 1.0 + 2**-10
    assert topk(queries, pool, 1, backend=backend, precision="native").scores.item() == 1.0


def test_output_is_written_in_place(backend: str) -> None:
    queries, pool = integers(6, 5), integers(30, 5)
    scores, indices = torch.full((6, 8), float("nan")), torch.full((6, 8), -7)
    found = topk(queries, pool, 4, out=(scores[:, ::2], indices[:, ::2]), backend=backend)
    assert found.scores.data_ptr() == scores.data_ptr()
    check(TopK(scores[:, ::2], indices[:, ::2]), queries, pool, 4)
    assert bool((indices[:, 1::2] == -7).all())
    array = np.empty((6, 4), np.float32), np.empty((6, 4), np.int64)
    topk(queries, pool, 4, out=array, backend=backend)
    check(TopK(*map(torch.from_numpy, array)), queries, pool, 4)


def test_progress_is_reported_and_its_exception_ends_the_search(backend: str) -> None:
    seen: list[float] = []
    topk(integers(200, 8), integers(20000, 8), 3, progress=seen.append, backend=backend)
    assert seen and seen == sorted(seen) and seen[-1] == 1.0

    def stop(share: float) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        topk(integers(200, 8), integers(20000, 8), 3, progress=stop, backend=backend)


Q, P = torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((Q.double(), P, 1), {}, "queries"),
        ((Q, P.int(), 1), {}, "pool"),
        ((Q, np.zeros((5, 4), dtype="U1"), 1), {}, "pool"),
        ((Q[0], P, 1), {}, "queries"),
        ((Q, P[:, :3], 1), {}, "queries"),
        ((Q, P[:, :, None], 1), {}, "pool"),
        (([[1.0]], P, 1), {}, "queries"),
        ((Q, P.to_sparse(), 1), {}, "pool"),
        ((Q, P.to("meta"), 1), {}, "queries"),
        ((Q, P, 0), {}, "k"),
        ((Q, P, -3), {}, "k"),
        ((Q, P, 2049), {}, "k"),
        ((Q, P, 1.0), {}, "k"),
        ((Q, P, True), {}, "k"),
        ((Q, P, 1), {"exclude": torch.zeros(2, dtype=torch.int64)}, "exclude"),
        ((Q, P, 1), {"exclude": torch.zeros(3)}, "exclude"),
        ((Q, P, 1), {"exclude": torch.full((3,), 5)}, "exclude"),
        ((Q, P, 1), {"exclude": [[0], [1], ["x"]]}, "exclude"),
        ((Q, P, 1), {"precision": "fast"}, "precision"),
        ((Q, P, 1), {"num_threads": 0}, "num_threads"),
        ((Q, P, 1), {"num_threads": "two"}, "num_threads"),
        ((Q, P, 1), {"progress": 3}, "progress"),
        ((Q, P, 1), {"out": torch.zeros(3, 1)}, "out"),
        ((Q, P, 1), {"out": (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64))}, r"out\[0\]"),
        ((Q, P, 1), {"out": (torch.zeros(3, 1), torch.zeros(3, 1))}, r"out\[1\]"),
        ((Q, P, 1), {"out": (np.broadcast_to(np.float32(0), (3, 1)), np.zeros((3, 1), np.int64))}, r"out\[0\]"),
    ],
)
def test_bad_arguments_are_named(backend: str, arguments: tuple, options: dict, named: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{named}: got ") as caught:
        topk(*arguments, backend=backend, **options)
    assert "expected" in str(caught.value)


def test_unknown_backend(backend: str) -> None:
    with pytest.raises((ArgumentError, BackendError), match="backend"):
        topk(Q, P, 1, backend=backend + "x")


def test_key_order_is_total(backend: str) -> None:
    values = torch.tensor([float("nan"), float("-inf"), -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, float("inf")])
    keys = order_keys(values[None], 7)[0]
    assert torch.equal(keys, keys.sort().values) and keys.unique().numel() == keys.numel()
    same = order_keys(torch.zeros(1, 5), 2**32 - 6)[0]
    assert torch.equal(same, same.sort(descending=True).values) and same.unique().numel() == 5


def test_parts_merge_into_the_whole(backend: str) -> None:
    pool, queries = integers(90, 6), integers(25, 6)
    pool[10] = float("-inf")
    cuts = [0, 1, 1, 40, 90]
    parts = [topk(queries, pool[a:b], 30, backend=backend) for a, b in itertools.pairwise(cuts)]
    for k in (1, 30, 91):
        whole = [topk(queries, pool[a:b], k, backend=backend) for a, b in itertools.pairwise(cuts)]
        merged = merge_topk(whole, k, offsets=cuts[:-1])
        expected = topk(queries, pool, k, backend=backend)
        assert torch.equal(merged.indices, expected.indices) and torch.equal(merged.scores, expected.scores)
    assert merge_topk(parts, 200).indices.shape == (25, 200)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_dtype_ties_nan_and_exclusions(backend: str, data: st.DataObject) -> None:
    q = data.draw(st.integers(0, 70), "Q")
    n = data.draw(st.integers(0, 700), "N")
    d = data.draw(st.integers(0, 90), "D")
    k = data.draw(st.integers(1, 2048) | st.integers(1, 20), "k")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    span = data.draw(st.sampled_from([0, 1, 8]), "span")
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    queries, pool = integers(q, d, dtype=dtype, span=span), integers(n, d, dtype=dtype, span=span)
    if n and d and data.draw(st.booleans(), "NaN"):
        pool[torch.randint(0, n, (3,)), torch.randint(0, d, (3,))] = float("nan")
    exclude = None
    if n and data.draw(st.booleans(), "exclude"):
        exclude = torch.randint(-1, n, (q, data.draw(st.integers(1, 4))))
    threads = data.draw(st.integers(1, 3), "threads")
    found = topk(queries, pool, k, exclude=exclude, backend=backend, num_threads=threads)
    check(found, queries, pool, k, exclude)
