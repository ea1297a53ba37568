"""The reference of the redundancy loss against correlation coefficients, its edges, gradcheck in fp64."""

from __future__ import annotations

import pytest
import reference_checks as checks
import torch
from reference_checks import F64, close
from torch.autograd import gradcheck

from tgq_fast import reference


def test_redundancy_against_corrcoef() -> None:
    checks.check_redundancy(reference)


def test_redundancy_range() -> None:
    a = torch.randn(50, 4, dtype=F64)
    close(reference.redundancy_loss(a, -2 * a + 1, eps=0.0), torch.tensor(1.0, dtype=F64))
    assert reference.redundancy_loss(a, torch.randn(50, 4, dtype=F64)) < 0.2


@pytest.mark.parametrize("batch", [0, 1])
def test_redundancy_of_too_few_items_is_zero_with_gradient(batch: int) -> None:
    a, e = (torch.randn(batch, 3, requires_grad=True) for _ in range(2))
    loss = reference.redundancy_loss(a, e)
    loss.backward()
    assert loss.item() == 0.0 and not a.grad.any()


def test_redundancy_gradcheck() -> None:
    a, e = (torch.randn(5, 3, dtype=F64, requires_grad=True) for _ in range(2))
    assert gradcheck(reference.redundancy_loss, (a, e))


def test_half_precision_gives_fp32() -> None:
    e = torch.randn(6, 3, dtype=torch.bfloat16)
    assert reference.redundancy_loss(e, e).dtype == torch.float32
