"""The 2× rule of the benchmarks, and the check of search results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.case import UnavailableError
from benchmarks.cases.search import _Truth, load_embeddings
from benchmarks.cases.search_peers import Problem
from benchmarks.parity import PEER_SLACK, check, higher_precision


@pytest.fixture
def product() -> tuple[Tensor, Tensor]:
    a, b = torch.randn(40, 60), torch.randn(60, 50)
    return a.double() @ b.double(), (a.bfloat16() @ b.bfloat16())


def test_the_baseline_passes_and_twice_its_error_too(product: tuple[Tensor, Tensor]) -> None:
    exact, plain = product
    twice = (exact + 1.9 * (plain.double() - exact)).float()
    for out in (plain, twice):
        verdict = check({"out": out}, {"out": exact}, [{"out": plain}], torch.bfloat16)
        assert verdict.ok and 0 < verdict.error < 0.02


def test_four_times_the_error_fails_for_us_and_not_for_a_peer(product: tuple[Tensor, Tensor]) -> None:
    exact, plain = product
    out = (exact + 4.5 * (plain.double() - exact)).float()
    # fp32's noise floor: bf16's own would cover half of the error.
    arguments = {"out": out}, {"out": exact}, [{"out": plain}], torch.float32
    verdict = check(*arguments)
    assert not verdict.ok and "out: largest error" in verdict.detail
    assert check(*arguments, slack=PEER_SLACK).ok


def test_weight_gradients_may_have_three_times(product: tuple[Tensor, Tensor]) -> None:
    exact, plain = product
    out = {"w": (exact + 2.9 * (plain.double() - exact)).float()}
    assert check(out, {"w": exact}, [{"w": plain}], torch.float32, frozenset({"w"})).ok
    assert not check(out, {"w": exact}, [{"w": plain}], torch.float32).ok


@pytest.mark.parametrize("fault", ["nan", "shape", "name", "swapped", "zero"])
def test_faults_are_caught(fault: str, product: tuple[Tensor, Tensor]) -> None:
    exact, plain = product
    out = {"out": plain.clone()}
    if fault == "nan":
        out["out"][3, 3] = float("nan")
    elif fault == "shape":
        out["out"] = plain[:1]
    elif fault == "name":
        out = {"other": plain}
    elif fault == "swapped":
        out["out"] = plain.flip(0)
    else:
        out["out"][7] = 0
    assert not check(out, {"out": exact}, [{"out": plain}], torch.bfloat16, slack=PEER_SLACK).ok


def test_reference_precision() -> None:
    assert higher_precision(torch.float32) is torch.float64
    assert higher_precision(torch.bfloat16) is torch.float32


@pytest.fixture
def truth() -> _Truth:
    pool, queries = torch.randn(500, 16), torch.randn(7, 16)
    return _Truth(Problem(pool, [queries], k=10, threads=1))


def exact_rows(truth: _Truth) -> Tensor:
    return (truth.queries @ truth.pool.double().T).topk(10, dim=1).indices


def test_exact_search_has_no_shortfall(truth: _Truth) -> None:
    assert truth.shortfall(exact_rows(truth)) < 1e-13
    assert truth.shortfall(exact_rows(truth).flip(1)) < 1e-13  # order among the k is not what this check is about


def test_one_missed_neighbour_is_caught(truth: _Truth) -> None:
    rows = exact_rows(truth)
    eleventh = (truth.queries @ truth.pool.double().T).topk(11, dim=1).indices[:, 10]
    rows[2, 9] = eleventh[2]
    assert truth.shortfall(rows) > truth.allowed(torch.float32)


@pytest.mark.parametrize("row", [-1, 500])
def test_impossible_and_repeated_rows_are_caught(truth: _Truth, row: int) -> None:
    rows = exact_rows(truth)
    rows[1, 4] = row
    assert truth.shortfall(rows) == float("inf")
    rows[1, 4] = rows[1, 5]
    assert truth.shortfall(rows) == float("inf")
    assert truth.shortfall(rows[:, :9]) == float("inf")


def test_real_embeddings_from_numpy_and_their_absence(tmp_path) -> None:
    import numpy as np

    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(5, 3)))
    found = load_embeddings(tmp_path / "e.npy")
    assert found.shape == (5, 3) and torch.allclose(found.norm(dim=1), torch.ones(5))
    for path in (None, tmp_path / "none.npy"):
        with pytest.raises(UnavailableError, match="no real embeddings"):
            load_embeddings(path)


def test_real_embeddings_from_an_item_pool(tmp_path) -> None:
    from tgq_fast.pool import ItemPool

    rows = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    with ItemPool.create(tmp_path / "pool", dims=4) as pool:
        pool.append([f"i{i}" for i in range(6)], rows)
    assert torch.equal(load_embeddings(tmp_path / "pool"), rows)
