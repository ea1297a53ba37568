"""Whether a layer is what its weights say and no more, so that an operator may read them past its forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["why_not_plain"]


def why_not_plain(kind: type[nn.Module] = nn.Linear, /, **layers: nn.Module) -> str:
    """Why the named layers of a kind (nn.Linear, nn.LayerNorm) must run as they are; empty when their weights say all.

    LoRA adapters, quantised, sharded and offloaded layers, and anything with a hook must run as they are.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    for name, layer in layers.items():
        if reason := _oddity(layer, kind):
            return f"{name} {reason}"
    return ""


def _oddity(layer: nn.Module, kind: type[nn.Module]) -> str:
    if getattr(layer, "packs", type(layer)) is not kind:  # a twin that packs one is as plain
        return f"is a {type(layer).__name__}"
    if "forward" in vars(layer):  # how accelerate offloads
        return "has a forward of its own"
    if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
        return "has hooks"
    for name, value in (("weight", layer.weight), ("bias", layer.bias)):
        if value is not None and type(value) not in (nn.Parameter, Tensor):  # a quantised or sharded tensor
            return f"has a {type(value).__name__} as {name}"
    return ""
