"""What callers hand to the search: lazy tensors mean their values, and whatever cannot be read is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tgq_fast import _native
from tgq_fast.errors import ArgumentError
from tgq_fast.search import build_codes, merge_topk, topk
from tgq_fast.search.count import Marks, count_before, score_rows

needs_extension = pytest.mark.skipif(not _native.available(), reason=_native.why_missing())
Q, P = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.randn(50, 16)


def negated(x: torch.Tensor) -> torch.Tensor:
    """x itself, with its signs kept as a mark beside memory that holds -x."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def test_lazily_negated_tensors_mean_their_values() -> None:
    assert negated(Q).is_neg() and torch.equal(negated(Q), Q)
    want = topk(Q, P, 5)
    for queries, pool in ((negated(Q), P), (Q, negated(P)), (negated(Q), negated(P))):
        found = topk(queries, pool, 5)
        assert torch.equal(found.indices, want.indices) and torch.equal(found.scores, want.scores)
    zeros = torch._efficientzerotensor((4, 16))  # has no memory at all
    assert topk(zeros, P, 2).indices.tolist() == [[0, 1]] * 4


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_hits_have_no_gradient(backend: str) -> None:
    want = topk(Q, P, 5, backend=backend)
    found = topk(Q.clone().requires_grad_(), torch.nn.Parameter(P), 5, backend=backend)
    assert not found.scores.requires_grad and torch.equal(found.indices, want.indices)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(Q, torch.ones_like(Q))
        found = topk(dual, P, 5, backend=backend)
        assert torch.autograd.forward_ad.unpack_dual(found.scores).tangent is None
    assert torch.equal(found.scores, want.scores)


@needs_extension
def test_an_instruction_set_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGQ_ISA", "sse9")
    marks = Marks(torch.tensor([0, 1]), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    for call in (lambda: topk(Q, P, 5), lambda: score_rows(Q, P[:4]), lambda: count_before(Q[:1], P, marks)):
        with pytest.raises(ArgumentError, match=r"TGQ_ISA: got 'sse9', expected an instruction set .* scalar"):
            call()


@needs_extension
def test_codes_of_a_lazily_negated_pool() -> None:
    assert torch.equal(build_codes(negated(P)).codes, build_codes(P).codes)
    assert torch.equal(topk(Q, P, 5, codes=build_codes(negated(P))).indices, topk(Q, P, 5).indices)


def test_a_lazily_negated_output_is_refused() -> None:
    out = torch.zeros(4, 2, dtype=torch.complex64).conj().imag
    with pytest.raises(ArgumentError, match=r"out\[0\]"):
        topk(Q, P, 2, out=(out, torch.empty(4, 2, dtype=torch.int64)))


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.astype(">f4"),
        lambda x: np.flip(np.flip(x, 1).copy(), 1),
        lambda x: np.flip(np.flip(x, 0).copy(), 0),
        lambda x: np.frombuffer(b"x" + x.tobytes(), dtype=np.uint8)[1:].view(np.float32).reshape(x.shape),
    ],
    ids=["big endian", "columns backwards", "rows backwards", "not aligned"],
)
def test_odd_memory_of_numpy(write: Callable[[np.ndarray], np.ndarray]) -> None:
    found = topk(write(Q.numpy()), write(P.numpy()), 5)
    assert torch.equal(found.indices, topk(Q, P, 5).indices)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Q.numpy().astype(np.longdouble), "numpy dtype"),
        (torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged), "nested"),
        (Q.to(torch.float8_e4m3fn), "float8"),
        (Q.to_sparse(), "layout"),
        (Q.numpy().astype(object), "numpy dtype object"),
        (Q.numpy().astype("M8[s]"), "datetime64"),
        (np.ma.masked_less(Q.numpy(), 0), "masked"),
        (Q.numpy().astype(np.float64), r"astype\("),
        (Q.double(), r"queries\.float\(\)"),
    ],
)
def test_unreadable_matrices_are_named(given: Any, reason: str) -> None:
    with pytest.raises(ArgumentError, match=rf"queries.*{reason}"):
        topk(given, P, 2)


@pytest.mark.parametrize(
    "given",
    [
        [None] * 4,
        [1.5] * 4,
        ["12"] * 4,
        [True] * 4,
        [np.bool_(True)] * 4,
        [torch.tensor(True)] * 4,
        [2**70] * 4,
        [-(2**70)] * 4,
        [[[1]]] * 4,
        [object()] * 4,
        "abcd",
        b"abcd",
        {1, 2, 3, 4},
        iter([1, 2, 3, 4]),
        np.arange(4).astype(np.longdouble),
        np.array(["a"] * 4),
        np.ma.array([1, 2, 3, 4], mask=[0, 1, 0, 0]),
        torch.nested.nested_tensor([torch.tensor([1]), torch.tensor([2, 3])], layout=torch.jagged),
        torch.eye(4, dtype=torch.int64).to_sparse(),
        [torch.tensor(2.0)] * 4,
    ],
)
def test_odd_exclusions_are_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match="exclude"):
        topk(Q, P, 2, exclude=given)


@pytest.mark.parametrize(
    "given",
    [
        np.array([3] * 4, dtype=">i8"),
        np.array([9, 3, 9, 3, 9, 3, 9, 3])[::-2],
        [np.int16(3)] * 4,
        [torch.tensor(3)] * 4,
        [torch.tensor([3])] * 4,
        [range(3, 4)] * 4,
    ],
)
def test_whole_numbers_of_any_kind_exclude(given: Any) -> None:
    assert torch.equal(topk(Q, P, 5, exclude=given).indices, topk(Q, P, 5, exclude=[3] * 4).indices)


class TestTensorsWithoutMemory:
    """Their addresses lead nowhere, or to less than their shape says: refused before any is passed on."""

    def test_wrapped_transformed_and_freed(self) -> None:
        from torch.masked import masked_tensor
        from torch.testing._internal.two_tensor import TwoTensor

        queries, pool = torch.randn(3, 16), torch.randn(20, 16)
        freed, short = pool.clone(), pool.clone()
        freed.untyped_storage().resize_(0)
        short.untyped_storage().resize_(20 * 16 * 4 - 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masked = masked_tensor(pool, torch.ones_like(pool, dtype=torch.bool))
        for odd in (TwoTensor(pool, pool), masked, freed, short):
            with pytest.raises(ArgumentError, match=r"pool: got a .* do not lie in memory"):
                topk(queries, odd, 3)
            with pytest.raises(ArgumentError, match="queries: got a"):
                topk(odd, pool, 3)
        with pytest.raises(ArgumentError, match="function transforms"):
            torch.func.vmap(lambda row: topk(row[None], pool, 3).scores)(queries)

    def test_views_to_the_last_element_are_taken(self) -> None:
        base = torch.randn(20, 33)
        for view in (base[:, :16], base[:, 17:], base[::2, 1:17], base[3:4, 17:].expand(20, 16), base[:0, :16]):
            expected = topk(torch.ones(1, 16), view.clone(), 2)
            assert torch.equal(topk(torch.ones(1, 16), view, 2).indices, expected.indices)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_extension)])
def test_autocast_changes_nothing(backend: str) -> None:
    """Its products in 16 bit would have scores of another width, and another order."""
    want = topk(Q, P, 5, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = topk(Q, P, 5, backend=backend)
        assert torch.is_autocast_enabled("cpu")  # the caller's own stays on
    assert torch.equal(found.indices, want.indices) and torch.equal(found.scores, want.scores)


@needs_extension
def test_codes_learned_under_autocast_are_the_same() -> None:
    want = build_codes(P)
    with torch.autocast("cpu", torch.bfloat16):
        found = build_codes(P)
    assert torch.equal(found.codes, want.codes) and found.step == want.step and found.norm == want.norm


def test_codes_of_another_kind_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^codes\b"):
        topk(Q, P, 5, codes="codes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "part",
    [
        (np.zeros((4, 2)), np.zeros((4, 2), dtype=np.int32)),
        (torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.int64)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
        torch.zeros(4, 2),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64)),
    ],
)
def test_results_that_cannot_be_merged_are_refused(part: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^parts\b"):
        merge_topk([topk(Q, P, 2), part], 2)


def test_merge_names_what_is_no_list_of_results_and_no_first_row() -> None:
    part = topk(Q, P, 2)
    for parts in (None, 5, "x", part, torch.zeros(2, 2), [], {"a": part}, iter([part])):
        with pytest.raises(ArgumentError, match=r"^parts: "):
            merge_topk(parts, 2)  # type: ignore[arg-type]
    for offsets in (5, "x", [0], [0, 1, 2], [0, -1], [0, 0.5], [0, True], [0, 2**70], [0, None], np.array([0.0, 1.0])):
        with pytest.raises(ArgumentError, match=r"^offsets: "):
            merge_topk([part, part], 2, offsets)  # type: ignore[arg-type]
    for offsets in ((0, 10), np.array([0, 10]), torch.tensor([0, 10])):
        assert torch.equal(merge_topk([part, part], 2, offsets).scores, merge_topk([part, part], 2).scores)  # type: ignore[arg-type]


def test_merge_reads_numpy_and_lazy_results() -> None:
    want = topk(Q, P, 5)
    for part in ((negated(want.scores), want.indices), (want.scores.numpy(), want.indices.numpy())):
        found = merge_topk([part], 5)
        assert torch.equal(found.scores, want.scores) and torch.equal(found.indices, want.indices)


def test_the_old_package_passes_its_names_on() -> None:
    import tgq_fast
    from tgq_fast import retrieval

    for name in ("topk", "ItemPool", "evaluate", "embed_catalog"):
        with pytest.warns(DeprecationWarning, match=name):
            assert getattr(retrieval, name) is getattr(tgq_fast, name)
    with pytest.raises(AttributeError, match=r"tgq_fast\.pool"):
        _ = retrieval.nothing
