"""A pool of small vectors and what it must hold."""

from __future__ import annotations

import torch
from op_checks import assert_close
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def close(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    assert got.dtype == plain.dtype
    assert_close("result", got, exact, plain, exact.abs().max().item())
