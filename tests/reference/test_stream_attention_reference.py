"""The reference of stream self-attention against the table of who sees whom, its edges, gradcheck in fp64."""

from __future__ import annotations

import itertools

import pytest
import reference_checks as checks
import torch
from reference_checks import F64
from torch import Tensor
from torch.autograd import gradcheck

from tgq_fast import reference
from tgq_fast.errors import ArgumentError


def test_visibility() -> None:
    checks.check_self_attention(reference)


@pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
@pytest.mark.parametrize("explore_sees_text", [False, True])
def test_gradients_follow_the_visibility(mixing: str, explore_sees_text: bool) -> None:
    """∂ row / ∂ column value is non-zero exactly where the table of the method lets the row see the column."""
    q, k, v = (torch.randn(1, 6, 1, 3, dtype=F64, requires_grad=True) for _ in range(3))
    output = reference.stream_self_attention(q, k, v, (2, 2, 2), mixing=mixing, explore_sees_text=explore_sees_text)
    for i, j in itertools.product(range(6), range(6)):
        gradient = torch.autograd.grad(output[0, i].sum(), v, retain_graph=True)[0][0, j]
        assert bool(gradient.any()) == checks.sees("AAEETT"[i], "AAEETT"[j], mixing, explore_sees_text)


def test_mask_shapes() -> None:
    assert reference.stream_mask((2, 1, 3)).shape == (1, 1, 6, 6)
    assert reference.stream_mask((2, 1, 3), text_mask=torch.ones(4, 3, dtype=torch.bool)).shape == (4, 1, 6, 6)


@pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(mixing: str, masked: bool) -> None:
    q, k, v = (torch.randn(2, 5, 1, 2, dtype=F64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[False, False], [True, False]]) if masked else None

    def run(*values: Tensor) -> Tensor:
        return reference.stream_self_attention(*values, (1, 2, 2), mixing=mixing, text_mask=mask)

    assert gradcheck(run, (q, k, v))


def test_empty_batch() -> None:
    x = torch.randn(0, 5, 2, 4)
    assert reference.stream_self_attention(x, x, x, (1, 2, 2)).shape == (0, 5, 2, 4)


def test_bad_arguments() -> None:
    x = torch.randn(1, 5, 1, 2)
    with pytest.raises(ArgumentError, match="lengths"):
        reference.stream_self_attention(x, x, x, (1, 2, 3))
    with pytest.raises(ArgumentError, match="mixing"):
        reference.stream_self_attention(x, x, x, (1, 2, 2), mixing="none")
