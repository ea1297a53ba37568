"""What a caller may have changed for the whole process or thread, and what the package relies on meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

__all__ = ["plain_defaults", "single_precision"]


@contextmanager
def single_precision() -> Iterator[None]:
    """Modules made within are fp32 whatever the caller's default dtype."""
    caller = torch.get_default_dtype()
    if caller == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(caller)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """New tensors are fp32 on the CPU within, unless told otherwise, whatever the caller's defaults."""
    elsewhere = torch.get_default_device().type != "cpu"
    with single_precision(), torch.device("cpu") if elsewhere else nullcontext():
        yield
