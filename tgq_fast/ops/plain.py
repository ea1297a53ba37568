"""Whether a layer is what its weights say and no more, so that an operator may read them past its forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["why_not_as_made", "why_not_plain"]


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


def why_not_as_made(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str:
    """Why a part and its parts must be called; empty when they are of these kinds and nobody has added to them."""
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    for name, part in module.named_modules():
        plain = nn.LayerNorm if isinstance(part, nn.LayerNorm) else nn.Linear
        if isinstance(part, plain):
            reason = _oddity(part, plain)
        else:
            reason = _added(part) if type(part) in kinds else f"is a {type(part).__name__}"
        if reason:
            return f"{name or type(module).__name__} {reason}"
    return ""


def _oddity(layer: nn.Module, kind: type[nn.Module]) -> str:
    if getattr(layer, "packs", type(layer)) is not kind:  # a twin that packs one is as plain
        return f"is a {type(layer).__name__}"
    if reason := _added(layer):
        return reason
    for name, value in (("weight", layer.weight), ("bias", layer.bias)):
        if value is not None and type(value) not in (nn.Parameter, Tensor):  # a quantised or sharded tensor
            return f"has a {type(value).__name__} as {name}"
    return ""


def _added(module: nn.Module) -> str:
    if "forward" in vars(module):  # how accelerate offloads
        return "has a forward of its own"
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return "has hooks"
    return ""
