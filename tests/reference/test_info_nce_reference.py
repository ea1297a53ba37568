"""The reference of InfoNCE against a loop over its definition, its edges, gradcheck in fp64."""

from __future__ import annotations

import reference_checks as checks
import torch
from reference_checks import F64
from torch.autograd import gradcheck

from tgq_fast import reference


def test_info_nce_by_brute_force() -> None:
    checks.check_info_nce(reference)


def test_info_nce_of_one_pair_with_no_negative_is_zero() -> None:
    e = torch.eye(2, dtype=F64)
    assert reference.info_nce(e, torch.tensor([1, 0]), torch.tensor(3.0)).item() == 0.0


def test_info_nce_gradcheck() -> None:
    e = torch.randn(6, 3, dtype=F64, requires_grad=True)
    t = torch.tensor(0.5, dtype=F64, requires_grad=True)
    positives, groups = torch.tensor([1, 0, 3, 2, 5, 4]), torch.tensor([0, 0, 0, 0, -1, -1])
    for kwargs in ({}, {"groups": groups}, {"groups": groups, "rows": torch.tensor([4, 1])}):
        chosen = positives[kwargs["rows"]] if "rows" in kwargs else positives
        assert gradcheck(lambda e, t, c=chosen, k=kwargs: reference.info_nce(e, c, t, **k), (e, t))


def test_half_precision_gives_fp32() -> None:
    e = torch.randn(6, 3, dtype=torch.bfloat16)
    positives = torch.tensor([1, 0, 3, 2, 5, 4])
    assert reference.info_nce(e, positives, torch.tensor(1.0)).dtype == torch.float32
