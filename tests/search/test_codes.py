"""Codes of a pool: the levels that are chosen, parts that are joined, and what a caller may have set."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tgq_fast import _native
from tgq_fast.reference import TopK
from tgq_fast.search import topk, topk_native
from tgq_fast.search.codes import Codes, build_codes, encode_rows, fit_basis, join_codes

ROWS, DIMS = 5000, 256
needs_core = pytest.mark.skipif(_native.extension() is None, reason="without the compiled core")


def white(rows: int = ROWS, dims: int = DIMS) -> Tensor:
    return normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(0)), dim=1)


def concentrated(rows: int = ROWS, dims: int = DIMS) -> Tensor:
    """Nearly all of the energy lies in a few directions, as that of trained embeddings does."""
    falling = (torch.arange(dims) + 5.0) ** -1.3
    return normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(0)) * falling + 0.02, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [ROWS, 100 * ROWS, 20_000 * ROWS])
def test_white_rows_keep_all_columns(count: int, dtype: torch.dtype) -> None:
    # However large the pool that these rows are a sample of: fewer columns would leave most of it.
    basis = fit_basis(white().to(dtype), count=count)
    assert (basis.first, basis.second) == (DIMS, False)


@pytest.mark.parametrize("count", [ROWS, 100 * ROWS, 20_000 * ROWS])
def test_concentrated_rows_need_few_columns(count: int) -> None:
    basis = fit_basis(concentrated(), count=count)
    assert basis.first <= DIMS // 2 and basis.explained > 0.95


def same(a: Codes, b: Codes) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("codes", "second", "scale", "rest"))
    return tensors and a.basis.same(b.basis) and (a.rows, a.step, a.norm) == (b.rows, b.step, b.norm)


@needs_core
@pytest.mark.parametrize("write", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_of_codes_that_were_searched_has_addresses_of_its_own(write: Callable[[Codes], Codes]) -> None:
    pool = concentrated()
    codes = build_codes(pool)
    want = topk(pool[:3], pool, 5, codes=codes)
    copied = write(codes)
    assert same(copied, codes) and codes.addresses and copied.addresses
    assert copied.addresses[0] == copied.codes.data_ptr() != codes.addresses[0]
    assert torch.equal(topk(pool[:3], pool, 5, codes=copied).indices, want.indices)


@needs_core
@pytest.mark.parametrize("levels", [(64, False), (128, True), None], ids=str)
def test_parts_joined_are_the_whole(levels: tuple[int, bool] | None) -> None:
    pool = concentrated(1000)
    basis = fit_basis(pool, levels=levels)
    whole = encode_rows(pool, basis)
    joined = join_codes([encode_rows(part, basis) for part in pool.split([333, 16, 1, 650])])
    assert joined is not None and same(joined, whole)
    assert same(whole.part(0, 1000), whole)
    chosen = torch.tensor([7, 999, 7, 0])
    assert torch.equal(whole.take(chosen).scale[:4], whole.scale[chosen])
    assert join_codes([whole, encode_rows(pool, fit_basis(white(1000)))]) is None


@needs_core
@pytest.mark.parametrize("setting", ["float64", "meta"])
def test_a_callers_defaults_change_nothing(setting: str) -> None:
    pool = concentrated(600)
    expected = build_codes(pool)
    torch.set_default_device("meta" if setting == "meta" else None)
    torch.set_default_dtype(torch.float64 if setting == "float64" else torch.float32)
    try:
        found = build_codes(pool)
        parts = [found.part(16, 600), found.part(5, 600), join_codes([found.part(0, 160), found.part(160, 600)])]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert same(found, expected) and same(parts[0], expected.part(16, 600)) and same(parts[1], expected.part(5, 600))
    assert torch.equal(parts[2].codes, expected.codes)


@needs_core
@pytest.mark.parametrize("draw", [white, concentrated])
def test_codes_take_less_than_a_third(draw: Callable[[], Tensor]) -> None:
    pool = draw()
    codes = build_codes(pool)
    assert sum(each.nbytes for each in (codes.codes, codes.second, codes.scale, codes.rest)) <= 0.3 * pool.nbytes


def coded(queries: Tensor, pool: Tensor, codes: Codes, k: int = 100) -> bool:
    """Whether a search takes the codes it has; its answers are those without them."""
    counters: dict[str, int] = {}
    out = TopK(torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64))
    topk_native.search(queries, pool, k, None, out, 1, None, codes=codes, counters=counters)
    expected = topk(queries, pool, k)
    assert torch.equal(out.scores, expected.scores) and torch.equal(out.indices, expected.indices)
    return counters["coded"] > 0


@needs_core
@pytest.mark.parametrize("queries", [1, 16, 100])
def test_a_call_takes_codes_only_where_they_pay(queries: int) -> None:
    # The same first level tells much of one pool, and next to nothing of the other.
    pool = concentrated(30_000)
    assert coded(pool[:queries].clone(), pool, build_codes(pool))
    pool = white(30_000)
    assert not coded(pool[:queries].clone(), pool, encode_rows(pool, fit_basis(pool, levels=(64, False))))
