"""Faster linear layers for inference on the CPU: weights in the matrix library's own layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tgq_fast.models.layers import Intermediate

__all__ = ["packed_weights"]

# Rows multiplied at a time. oneDNN's bf16 product of many rows is slower than the same rows in parts.
_ROWS = 256


@contextmanager
def packed_weights(module: nn.Module) -> Iterator[None]:
    """While open, the linear layers in `module` that are on the CPU multiply with a repacked copy of their weights.

    A plain product brings the weights into the layout that the matrix unit reads, each time. Here that happens once,
    and the activation of a feed-forward is applied as the result is written. For calls without autograd; all others
    take the weights as they are. Weights must not change while it is open. Costs a second copy of them.

    Values are those of the plain product up to the rounding of another order of summation. Does nothing where PyTorch
    has no oneDNN. Source: what TorchInductor's freezing does to a compiled graph, for eager modules.
    """
    changed: list[nn.Module] = []
    fused: set[nn.Module] = set()  # linear layers whose feed-forward multiplies for them
    try:
        for child in module.modules() if torch.backends.mkldnn.is_available() else ():  # owners before what they own
            if isinstance(child, Intermediate) and type(child.activation) is type(ACT2FN["gelu"]):
                changed += _pack(child, child.dense, "gelu")
                fused.add(child.dense)
            elif type(child) is nn.Linear and child not in fused:
                changed += _pack(child, child, "none")
        yield
    finally:
        for child in changed:
            child.__dict__.pop("forward", None)


def _pack(owner: nn.Module, layer: nn.Linear, activation: str) -> list[nn.Module]:
    """Puts the product in front of `owner.forward`; the changed module, or none."""
    weight = layer.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16) or "forward" in vars(owner):
        return []
    with torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    owner.__dict__["forward"] = partial(_forward, owner, layer, packed, activation)
    return [owner]


def _forward(owner: Any, layer: nn.Linear, packed: Tensor, activation: str, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or x.dtype != layer.weight.dtype or not x.numel() or torch.compiler.is_compiling():
        return type(owner).forward(owner, x)
    variant = "none" if activation == "gelu" else ""  # the exact error function, not its approximation
    parts = [
        torch.ops.mkldnn._linear_pointwise(part, packed, layer.bias, activation, [], variant)
        for part in x.reshape(-1, x.shape[-1]).split(_ROWS)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.unflatten(0, x.shape[:-1])
