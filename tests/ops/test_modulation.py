"""Dual-gated modulation through its kernels against the reference, forward and gradients."""

import pytest
import torch
from op_checks import DTYPES, check_modulation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scalar", [False, True], ids=["vector", "scalar"])
def test_modulation(dtype: torch.dtype, scalar: bool) -> None:
    check_modulation(dtype, scalar=scalar)


@pytest.mark.parametrize("sizes", [(0, 2, 2, 8, 4, 4), (1, 1, 1, 17, 3, 5)], ids=["B=0", "odd"])
def test_modulation_edges(sizes: tuple[int, int, int, int, int, int]) -> None:
    check_modulation(torch.float32, sizes=sizes)


def test_modulation_strided() -> None:
    check_modulation(torch.float32, sizes=(3, 2, 2, 16, 4, 4), strided=True)
