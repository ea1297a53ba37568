"""What the operators ask of their arguments before anything runs: tensors where tensors belong, of shapes that fit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tgq_fast.errors import ArgumentError

__all__ = ["check_heads", "check_lengths", "check_mask", "check_number", "check_shape", "check_tensors"]


def check_tensors(dimensions: int | None = None, **given: object) -> None:
    """Every one is a tensor, with so many dimensions.

    Raises:
        ArgumentError: names the first that is not.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            hint = "Convert with torch.from_numpy." if type(value).__name__ == "ndarray" else ""
            raise ArgumentError(name, f"a {type(value).__name__}", "a torch tensor", hint)
        if dimensions is not None and value.ndim != dimensions:
            raise ArgumentError(name, f"shape {tuple(value.shape)}", f"{dimensions} dimensions")


def check_shape(name: str, value: Tensor | None, *shape: int) -> None:
    """A tensor of this shape, or None."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise ArgumentError(name, f"a {type(value).__name__}", f"None or a torch tensor {list(shape)}")
    if tuple(value.shape) != shape:
        raise ArgumentError(name, f"shape {tuple(value.shape)}", f"{list(shape)}")


def check_mask(name: str, value: Tensor | None, *shape: int) -> None:
    """A bool tensor of this shape, or None."""
    check_shape(name, value, *shape)
    if value is not None and value.dtype != torch.bool:
        raise ArgumentError(name, str(value.dtype), f"bool {list(shape)}", "Compare with != 0 what is a number.")


def check_heads(num_heads: object, width: int) -> None:
    """A whole number that divides the width."""
    whole = isinstance(num_heads, (int, np.integer)) and not isinstance(num_heads, bool)
    if not whole or num_heads < 1 or width % num_heads:  # type: ignore[operator]
        raise ArgumentError("num_heads", repr(num_heads), f"a divisor of the model width {width}")


def check_number(name: str, value: object) -> None:
    """A plain number."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise ArgumentError(name, f"a {type(value).__name__}", "a number")


def check_lengths(lengths: object, total: int) -> None:
    """Three whole numbers that sum to the total."""
    expected = f"three lengths that sum to the sequence length {total}"
    if not isinstance(lengths, (tuple, list)) or len(lengths) != 3:
        raise ArgumentError("lengths", repr(lengths)[:80], expected)
    for length in lengths:
        if not isinstance(length, (int, np.integer, torch.SymInt)) or isinstance(length, bool) or length < 0:
            raise ArgumentError("lengths", repr(lengths)[:80], expected)
    if sum(lengths) != total:
        raise ArgumentError("lengths", lengths, expected)
