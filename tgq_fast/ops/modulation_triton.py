"""The modulation kernel as a torch operator: schema, fake function and autograd.

``tgq_fast::dual_gated_modulation`` also returns what its backward and the redundancy loss need: hidden layers, token
means (differentiable) and, on request, moments of the means.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["modulate"]


@torch.library.custom_op("tgq_fast::dual_gated_modulation", mutates_args=())
def modulate(
    anchored: Tensor,
    exploratory: Tensor,
    agreement: Tensor,
    has_metadata: Tensor,
    image: Tensor,
    a_w1: Tensor,
    a_b1: Tensor,
    a_w2: Tensor,
    a_b2: Tensor,
    e_w1: Tensor,
    e_b1: Tensor,
    e_w2: Tensor,
    e_b2: Tensor,
    alpha: float,
    want_moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Modulated streams, gates, means [B, d] of both streams, merged moments [5, d], hidden layers [B, r] fp32."""
    from tgq_fast.kernels import modulation, redundancy

    found = modulation.forward(
        anchored,
        exploratory,
        agreement,
        has_metadata,
        image,
        modulation.Gate(a_w1, a_b1, a_w2, a_b2),
        modulation.Gate(e_w1, e_b1, e_w2, e_b2),
        alpha,
        want_moments,
    )
    width = anchored.shape[2]
    moments = found.pre_a.new_empty(0, width) if found.moments is None else redundancy.merge(found.moments, 0.0)[0]
    return (*found[:4], found.mean_a, found.mean_e, moments, found.pre_a, found.pre_e)


@modulate.register_fake
def _(anchored, exploratory, agreement, has_metadata, image, a_w1, a_b1, a_w2, a_b2, e_w1, *rest):  # type: ignore[no-untyped-def]
    batch, width, gate_width = anchored.shape[0], anchored.shape[2], a_w2.shape[0]
    want_moments = rest[-1]
    return (
        anchored.new_empty(anchored.shape),
        exploratory.new_empty(exploratory.shape),
        anchored.new_empty(batch, gate_width),
        anchored.new_empty(batch, gate_width),
        anchored.new_empty(batch, width),
        anchored.new_empty(batch, width),
        anchored.new_empty(5 if want_moments else 0, width, dtype=torch.float32),
        anchored.new_empty(batch, a_w1.shape[0], dtype=torch.float32),
        anchored.new_empty(batch, e_w1.shape[0], dtype=torch.float32),
    )


@torch.library.custom_op("tgq_fast::dual_gated_modulation_backward", mutates_args=())
def modulate_backward(
    d_anchored: Tensor,
    d_exploratory: Tensor,
    d_gate_a: Tensor | None,
    d_gate_e: Tensor | None,
    d_mean_a: Tensor | None,
    d_mean_e: Tensor | None,
    anchored: Tensor,
    exploratory: Tensor,
    agreement: Tensor,
    has_metadata: Tensor,
    image: Tensor,
    a_w1: Tensor,
    a_b1: Tensor,
    a_w2: Tensor,
    a_b2: Tensor,
    e_w1: Tensor,
    e_b1: Tensor,
    e_w2: Tensor,
    e_b2: Tensor,
    gate_a: Tensor,
    gate_e: Tensor,
    mean_a: Tensor,
    mean_e: Tensor,
    pre_a: Tensor,
    pre_e: Tensor,
    alpha: float,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Gradients of every differentiable input, in their order (has_metadata is a flag and gets none)."""
    from tgq_fast.kernels import modulation

    # The forward's outputs stand in for the streams, which the backward does not read.
    saved = modulation.Forward(anchored, exploratory, gate_a, gate_e, pre_a, pre_e, mean_a, mean_e, None)
    grads = modulation.backward(
        d_anchored,
        d_exploratory,
        d_gate_a,
        d_gate_e,
        d_mean_a,
        d_mean_e,
        anchored,
        exploratory,
        agreement,
        has_metadata,
        image,
        modulation.Gate(a_w1, a_b1, a_w2, a_b2),
        modulation.Gate(e_w1, e_b1, e_w2, e_b2),
        saved,
        alpha,
    )
    return (*grads[:4], *grads.gate_a, *grads.gate_e)


@modulate_backward.register_fake
def _(d_anchored, d_exploratory, d_ga, d_ge, d_ma, d_me, anchored, exploratory, agreement, has, image, *rest):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (anchored, exploratory, agreement, image, *rest[:8]))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, alpha, _ = inputs
    gate_a, gate_e, mean_a, mean_e, moments, pre_a, pre_e = output[2:]
    ctx.mark_non_differentiable(moments, pre_a, pre_e)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, gate_a, gate_e, mean_a, mean_e, pre_a, pre_e)
    ctx.alpha = alpha


def _paired(first: Tensor | None, second: Tensor | None, shapes: tuple[Tensor, Tensor]) -> list[Tensor | None]:
    """Both gradients or neither, as the kernel takes them."""
    if first is None and second is None:
        return [None, None]
    return [torch.zeros_like(like) if given is None else given for given, like in zip((first, second), shapes)]


def _backward(ctx, d_a, d_e, d_gate_a, d_gate_e, d_mean_a, d_mean_e, *_):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    d_a, d_e = (torch.zeros_like(x) if d is None else d for d, x in zip((d_a, d_e), saved[:2]))
    grads = modulate_backward(
        d_a,
        d_e,
        *_paired(d_gate_a, d_gate_e, saved[13:15]),
        *_paired(d_mean_a, d_mean_e, saved[15:17]),
        *saved,
        ctx.alpha,
    )
    grads = [*grads[:3], None, *grads[3:]]
    return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), None, None)


modulate.register_autograd(_backward, setup_context=_setup)
