"""Gathering tensors over ranks with gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "rank"]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process' rank, 0 without torch.distributed."""
    return dist.get_rank() if _world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(_world_size())]
        dist.all_gather(parts, value.contiguous())
        ctx.rows = value.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's rows; with DDP's mean over ranks the sum gives the gradient of the
        # mean loss.
        (gradient,) = gradients
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


def gather(value: Tensor) -> Tensor:
    """Concatenate [M, …] of all ranks along rows, in rank order; the identity in a single process.

    Every rank must hold equally many rows.
    """
    if _world_size() == 1:
        return value
    result: Tensor = _Gather.apply(value)
    return result
