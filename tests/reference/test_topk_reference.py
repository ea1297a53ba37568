"""The reference of exact top-k against NumPy's lexsort, and any scores."""

from __future__ import annotations

import reference_checks as checks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tgq_fast import reference


def test_against_lexsort() -> None:
    checks.check_topk(reference)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_scores(data: st.DataObject) -> None:
    value = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, float("inf"), float("-inf"), float("nan")])
    rows, size, k = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 7)), data.draw(st.integers(0, 9))
    pool = torch.tensor([data.draw(value) for _ in range(size)]).reshape(size, 1)
    queries = torch.ones(rows, 1)
    exclude = torch.tensor([data.draw(st.integers(-2, size - 1)) for _ in range(rows)], dtype=torch.int64)
    found = reference.exact_topk(queries, pool, k, exclude=exclude)
    banned = [{int(x)} if x >= 0 else set() for x in exclude]
    values, indices = checks.lexsort_topk((queries @ pool.T).numpy(), k, banned)
    assert found.indices.tolist() == indices.tolist()
    assert found.scores.tolist() == values.tolist()


def test_a_real_minus_infinity_is_no_padding() -> None:
    found = reference.exact_topk(torch.ones(1, 1), torch.tensor([[float("-inf")], [float("nan")]]), 2)
    assert found.indices.tolist() == [[0, -1]]
