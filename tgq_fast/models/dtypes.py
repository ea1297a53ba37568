"""Floating dtypes: of a loaded model, and of new modules whatever the caller's default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tgq_fast.errors import ArgumentError

__all__ = ["as_dtype", "single_precision"]


def as_dtype(given: Any) -> torch.dtype | None:
    """A floating dtype given as such or by name; None and "auto" keep what the checkpoint has.

    Raises:
        ArgumentError: anything else.
    """
    if given is None or given == "auto":
        return None
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArgumentError("dtype", repr(given), "a floating torch.dtype or its name, such as 'bfloat16', or 'auto'")
    return found


@contextmanager
def single_precision() -> Iterator[None]:
    """Modules made within are fp32 whatever the caller's default dtype."""
    caller = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(caller)
