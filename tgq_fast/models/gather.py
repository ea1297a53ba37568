"""What a loss over the items of all ranks needs: their tensors, with gradient, and sums over ranks, without."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "rank", "total", "world_size"]


def world_size() -> int:
    """Number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process' rank, 0 without torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.rows = value.shape[0]
        sent = value.to(torch.uint8) if value.dtype == torch.bool else value.contiguous()  # gloo has no booleans
        parts = [torch.empty_like(sent) for _ in range(world_size())]
        dist.all_gather(parts, sent)
        return torch.cat(parts).to(value.dtype)

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
    if world_size() == 1:
        return value
    result: Tensor = _Gather.apply(value)
    return result


@torch.no_grad()
def total(value: Tensor) -> Tensor:
    """Sum over all ranks, without gradient; the value itself in a single process."""
    if world_size() == 1:
        return value
    result = value.clone()
    dist.all_reduce(result)
    return result
