"""Faster connectors for inference on the CPU: weights in the layout that the processor multiplies.

:func:`packed` makes a twin of a module whose layers (:mod:`tgq_fast.models.packed_layers`) hold repacked copies of
their weights; the module itself stays as it is. :func:`packed_weights` keeps one twin open for a whole run of calls.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tgq_fast.defaults import Shared
from tgq_fast.models.packed_layers import IN_ONEDNN, ON_MATRIX_UNIT, PackedLayer, shallow
from tgq_fast.ops.matrix_unit import why_not

__all__ = ["evaluating", "in_run", "packed", "packed_weights", "running"]


def packed(module: nn.Module) -> nn.Module:
    """A twin of `module` for inference: the same parameters, and packed copies of those of its layers on the CPU.

    A plain product brings the weights into the layout that the matrix unit reads, each time. Here that happened once,
    and what surrounds the products happens as their results are written. For calls without autograd, outside of
    `torch.compile` and in the weights' dtype; all others take the weights as they are, and so does every call while
    another backend than "auto" or "cpp" is asked for; ``explain(layer, *arguments)`` says which and why. Weights must
    not change while the twin is in use. Costs a second copy of them, half as large again in fp32 with a matrix unit.

    Values are those of the plain layers up to rounding, which is no larger. Layers in other dtypes than fp32 and bf16
    stay plain, as all do where PyTorch has no oneDNN.

    Returns:
        The twin, or `module` itself where nothing in it can be packed.
    """
    kind = _packed_kind(module)
    if kind is not None:
        return kind.twin_of(module, packed)
    children = {name: child if child is None else packed(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    return shallow(module, children)


def _packed_kind(module: nn.Module) -> type[PackedLayer] | None:
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type != "cpu":
        return None
    if not why_not(weight.dtype):
        kind = ON_MATRIX_UNIT.get(type(module))
    elif torch.backends.mkldnn.is_available() and weight.dtype in (torch.float32, torch.bfloat16):
        kind = IN_ONEDNN.get(type(module))
    else:
        return None
    return kind if kind is not None and kind.packs_all_of(module) else None


@contextmanager
def _twin(module: nn.Module) -> Iterator[nn.Module]:
    yield packed(module)


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


_twins: Shared[nn.Module, nn.Module] = Shared(_twin, WeakKeyDictionary())
_in_eval: Shared[nn.Module, None] = Shared(_in_eval_mode, WeakKeyDictionary())
_mine = threading.local()  # twins of the runs of this thread: another's runs change no bit of what this one computes


def evaluating(module: nn.Module) -> AbstractContextManager[None]:
    """Every part in eval mode, and afterwards, once no thread needs that any more, in the caller's."""
    return _in_eval(module)


@contextmanager
def packed_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Pack once for a whole run: while open, :func:`running` gives the twin of `module`, which this yields, too.

    Opened again within, or by other threads, it packs nothing. Weights must not change while it is open.
    """
    before = _runs()
    with _twins(module) as twin:
        _mine.runs = [*before, (module, twin)]
        try:
            yield twin
        finally:
            _mine.runs = before


def in_run(module: nn.Module) -> bool:
    """Whether :func:`packed_weights` is open for `module` in this thread."""
    return any(one is module for one, _ in _runs())


def running(module: nn.Module) -> nn.Module:
    """The packed twin of `module` while one is open, else `module`; under `torch.compile` always that."""
    if torch.compiler.is_compiling():
        return module
    return next((twin for one, twin in _runs() if one is module), module)


def _runs() -> list[tuple[nn.Module, nn.Module]]:
    return getattr(_mine, "runs", [])
