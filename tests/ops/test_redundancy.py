"""Redundancy loss through its kernels and on torch against the reference, forward and gradients."""

import pytest
import torch
from op_checks import DTYPES, check_redundancy


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_redundancy(dtype: torch.dtype, backend: str) -> None:
    check_redundancy(dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_redundancy_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tgq_fast.ops.redundancy.CENTRED_ELEMENTS", 100)  # 20 channels: five items per chunk
    check_redundancy(dtype, backend="torch")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_redundancy_small_batches(batch: int, backend: str) -> None:
    check_redundancy(torch.float32, batch=batch, width=3, offset=0, backend=backend)
