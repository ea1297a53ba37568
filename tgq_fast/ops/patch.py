"""Run the Q-Formers of `transformers` (BLIP-2, InstructBLIP) on this package's attention operators.

:func:`patch` swaps the class of every Q-Former attention module for a subclass with the same parameters, so that
weights, state dict and checkpoints are untouched; :func:`unpatch` swaps it back. Calls that ask for what the operators
do not offer (attention dropout in training, attention weights, masks that differ between queries) run the original
code. `transformers` itself is not imported.

The operators read the weights of a cross-attention themselves only where its projections are plain: `nn.Linear` as
PyTorch made it, without hooks. Anything else, such as LoRA adapters, quantised or offloaded layers and observers, runs
as it is, and the operators attend over what it returns; :func:`tgq_fast.explain` says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tgq_fast.errors import ArgumentError
from tgq_fast.ops.cross_attention import Form, hybrid_cross_attention
from tgq_fast.ops.dispatch import Decision, explain
from tgq_fast.ops.plain import why_not_plain
from tgq_fast.ops.stream_attention import stream_self_attention

__all__ = ["patch", "unpatch"]

Model = TypeVar("Model", bound=nn.Module)

_CLASSES = ("Blip2QFormerMultiHeadAttention", "InstructBlipQFormerMultiHeadAttention")
_OPTIONS = "_tgq_fast_options"


def patch(model: Model, *, form: Form = "auto", backend: str | None = None) -> Model:
    """Let every Q-Former attention of a model run on :mod:`tgq_fast.ops`, in place.

    Args:
        model: any module that holds a BLIP-2 or InstructBLIP Q-Former of `transformers`.
        form: algebraic form of its cross-attention, see :func:`tgq_fast.ops.hybrid_cross_attention`; without effect
            where projections are not plain (see above), which leaves the projected form.
        backend: backend of its attention; None: whichever is in force at each call.

    Returns:
        The same model. Patching twice changes the options.

    Raises:
        ArgumentError: the model holds no such Q-Former.
    """
    found = False
    for module in _attentions(model):
        found = True
        if not hasattr(module, _OPTIONS):
            module.__class__ = _patched(type(module))  # type: ignore[arg-type]
        setattr(module, _OPTIONS, (form, backend))
    if not found:
        raise ArgumentError("model", type(model).__name__, "a model with " + " or ".join(_CLASSES))
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`, in place; a model that was not patched stays as it is."""
    for module in _attentions(model):
        if hasattr(module, _OPTIONS):
            module.__class__ = type(module).__mro__[1]
            delattr(module, _OPTIONS)
    return model


def _attentions(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(base.__name__ in _CLASSES for base in type(module).__mro__):
            yield module


@functools.cache
def _patched(base: type[nn.Module]) -> type[nn.Module]:
    """Subclass of one attention class whose forward tries the operators first."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
        dropout = self.training and self.attention_dropout > 0
        if dropout or kwargs.get("output_attentions") or not _is_key_mask(mask):
            return base.forward(
                self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kwargs
            )
        return _attend(self, hidden_states, encoder_hidden_states, _key_mask(mask)), None

    def decide(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Decision:
        """What :func:`tgq_fast.explain` says about a call without masks."""
        operator, arguments, options = _call(self, hidden_states, encoder_hidden_states, None)
        decision = explain(operator, *arguments, **options)
        why = () if encoder_hidden_states is None else _notes(self)
        return dataclasses.replace(decision, notes=(*decision.notes, *why))

    def reduce(self: Any, protocol: Any) -> Any:
        """Pickles and copies as its original class, patched again on the way back."""
        reduced: Any = base.__reduce_ex__(self, protocol)
        _, made_by, *rest = reduced
        return (_new_patched, (base, *made_by[1:]), *rest)

    methods = {"forward": forward, "decide": decide, "__reduce_ex__": reduce}
    return type(base.__name__, (base,), {**methods, "__module__": base.__module__, "__doc__": base.__doc__})


def _new_patched(base: type[nn.Module], *arguments: Any) -> nn.Module:
    patched = _patched(base)  # type: ignore[arg-type]
    return patched.__new__(patched, *arguments)


def _notes(module: Any) -> tuple[str, ...]:
    """That the operator may not read the weights of the projections itself, and why; empty when it may."""
    why = why_not_plain(query=module.query, key=module.key, value=module.value)
    return (f"the projections run as they are: {why}",) if why else ()


def _is_key_mask(mask: Tensor | None) -> bool:
    """Whether a mask hides keys only: [B, L], or [B, 1, Q, L] that is the same for every query.

    The masks of `transformers`' "sdpa" attention are broadcast over the queries, which their strides show. A mask that
    was written out ("eager") must be compared, which is done on the CPU only: on a GPU it would stall every layer.
    """
    if mask is None or mask.ndim == 2:
        return True
    if mask.ndim != 4 or mask.shape[1] != 1:
        return False
    if mask.shape[2] == 1 or mask.stride(2) == 0:
        return True
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool((mask == mask[:, :, :1]).all())


def _key_mask(mask: Tensor | None) -> Tensor | None:
    """[B, L] bool, True where a key may be attended, from a boolean, integer or additive mask."""
    if mask is None:
        return None
    rows = mask[:, 0, 0] if mask.ndim == 4 else mask
    if rows.is_floating_point() and mask.ndim == 4:  # additive: 0 or a huge negative number
        return rows > torch.finfo(rows.dtype).min / 2
    return rows != 0


def _attend(module: Any, hidden: Tensor, visual: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """Attention output [B, S, d] of one module, self-attention where there are no visual tokens."""
    operator, arguments, options = _call(module, hidden, visual, key_mask)
    out = operator(*arguments, **options)
    return out.flatten(2) if visual is None else out.anchored


def _call(
    module: Any, hidden: Tensor, visual: Tensor | None, key_mask: Tensor | None
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The operator of one module's call, and its arguments."""
    form, backend = getattr(module, _OPTIONS)
    heads = module.num_attention_heads
    if visual is None:
        q, k, v = (
            layer(hidden).unflatten(-1, (heads, module.attention_head_size))
            for layer in (module.query, module.key, module.value)
        )
        if key_mask is not None and key_mask.shape[0] != hidden.shape[0]:
            key_mask = key_mask.expand(hidden.shape[0], -1)
        lengths = (0, 0, hidden.shape[1])
        return stream_self_attention, (q, k, v, lengths), {"text_mask": key_mask, "backend": backend}
    if hidden.shape[0] != visual.shape[0]:  # the queries of an unconditional Q-Former have batch size 1
        hidden = hidden.expand(visual.shape[0], -1, -1)
    if key_mask is not None and key_mask.shape[0] != visual.shape[0]:
        key_mask = key_mask.expand(visual.shape[0], -1)
    options = {"num_heads": heads, "key_mask": key_mask, "backend": backend}
    if _notes(module):
        q, k, v = module.query(hidden), module.key(visual), module.value(visual)
        options |= {"keys_values": (k, v)}
        return hybrid_cross_attention, (q, q[:, :0], visual, *(None,) * 6), options
    weights = ((layer.weight, layer.bias) for layer in (module.query, module.key, module.value))
    options |= {"form": form}
    return hybrid_cross_attention, (hidden, hidden[:, :0], visual, *(w for pair in weights for w in pair)), options
