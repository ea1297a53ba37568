"""Redundancy loss through its kernels and on torch against the reference, forward and gradients."""

import pytest
import torch
from op_checks import DTYPES, check_redundancy

from tgq_fast import ops, reference


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_redundancy(dtype: torch.dtype, backend: str) -> None:
    check_redundancy(dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_redundancy_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgq_fast.ops.redundancy.CENTRED_ELEMENTS", 100)  # 20 channels: five items per chunk
    check_redundancy(dtype, backend="torch")


def test_redundancy_of_known_moments_reads_no_means() -> None:
    a, e = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = ((a - a.mean(0)) * (e - e.mean(0))).mean(0)
    moments = torch.stack((a.mean(0), e.mean(0), a.var(0, correction=0), e.var(0, correction=0), covariance))
    unread = torch.full_like(a, float("nan"))
    found = ops.redundancy_loss(unread, unread, moments=moments, backend="torch")
    torch.testing.assert_close(found, reference.redundancy_loss(a, e))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_redundancy_small_batches(batch: int, backend: str) -> None:
    check_redundancy(torch.float32, batch=batch, width=3, offset=0, backend=backend)
