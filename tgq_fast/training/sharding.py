"""A model whose parameters, gradients and optimiser states are spread over the ranks of a job (FSDP), for own loops.

Source: ours, over PyTorch's `fully_shard`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tgq_fast.errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["shard_model", "whole_state"]


def shard_model(model: nn.Module, mesh: DeviceMesh | None = None, *, blocks: Iterable[nn.Module] = ()) -> nn.Module:
    """Shard a model in place; train it with any optimiser made afterwards. Every rank must call.

    Scalars, such as the scale of the logits, cannot be sharded: each rank has them whole, and their gradients are
    averaged. Losses and gradients are those of one process with the whole batch, as every term of the loss is gathered.

    Args:
        model: a :class:`~tgq_fast.models.TGQFormerModel`; call it, its parameters are whole only in between.
        mesh: one-dimensional; None: all ranks.
        blocks: modules inside that are gathered one at a time, such as the layers of an LLM reader.

    Raises:
        ArgumentError: there is no process group.
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise ArgumentError("model", "no process group", "torch.distributed.init_process_group to be called before")
    group = None if mesh is None else mesh.get_group()
    size = dist.get_world_size(group)

    def average(scalar: Tensor) -> None:
        assert scalar.grad is not None
        dist.all_reduce(scalar.grad, group=group)
        scalar.grad /= size

    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(average)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params={p for p in module.parameters() if p in scalars})
    return model


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Name → whole parameter or buffer, on the CPU, as a model that is not sharded has them. Every rank must call."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
            for name, value in model.state_dict().items()
        }
