"""The floating dtype of a loaded model."""

from __future__ import annotations

from typing import Any

import torch

from tgq_fast.errors import ArgumentError

__all__ = ["as_dtype"]


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
