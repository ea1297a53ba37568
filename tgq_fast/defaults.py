"""What a caller may have changed for the whole process or thread, and what the package relies on meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
    """Within, new tensors are fp32 on the CPU unless told otherwise, and products have the dtype of their factors:
    whatever the caller's default dtype, default device and autocast are.
    """
    with ExitStack() as stack:
        stack.enter_context(single_precision())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
