"""Dual-gated vector modulation of both streams: choice of backend, schema, fake function and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from tgq_fast import reference
from tgq_fast.errors import ArgumentError
from tgq_fast.ops.checks import check_number, check_shape, check_tensors
from tgq_fast.ops.dispatch import Decision, choose, explainer, requested_backend, triton_reasons
from tgq_fast.reference.modulation import GateParameters, ModulationOutput

__all__ = ["dual_gated_modulation"]

_OP = "dual_gated_modulation"
MAX_RANK = 128  # widest bottleneck the kernel holds on chip


def dual_gated_modulation(
    anchored: Tensor,
    exploratory: Tensor,
    agreement: Tensor,
    has_metadata: Tensor,
    global_image: Tensor,
    anchored_parameters: GateParameters,
    exploratory_parameters: GateParameters,
    *,
    alpha: float = 1.0,
    backend: str | None = None,
) -> ModulationOutput:
    """Scale every channel of each stream by 1 + α·gate.

    Arguments and result are those of :func:`tgq_fast.reference.dual_gated_modulation`; `backend` as in
    :mod:`tgq_fast.ops.dispatch`.

    Raises:
        ArgumentError: shapes that do not fit.
        BackendError: a backend that was asked for by name cannot run this call.
    """
    inputs = anchored, exploratory, agreement, has_metadata, global_image
    gates = anchored_parameters, exploratory_parameters
    decision = _decide(*inputs, *gates, alpha=alpha, backend=backend)
    if decision.backend != "triton":
        return reference.dual_gated_modulation(*inputs, *gates, alpha=alpha)
    dtype, device = anchored.dtype, anchored.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    low = [t.to(dtype) for t in (*inputs, *gates[0], *gates[1])]
    return ModulationOutput(*modulate(*low, alpha)[:4])


@explainer(_OP)
def _decide(
    anchored: Tensor,
    exploratory: Tensor,
    agreement: Tensor,
    has_metadata: Tensor,
    global_image: Tensor,
    anchored_parameters: GateParameters,
    exploratory_parameters: GateParameters,
    *,
    alpha: float = 1.0,
    backend: str | None = None,
) -> Decision:
    check_tensors(3, anchored=anchored, exploratory=exploratory)
    check_tensors(2, global_image=global_image)
    batch, _, width = anchored.shape
    image = global_image.shape[1]
    check_shape("exploratory", exploratory, batch, exploratory.shape[1], width)
    check_shape("global_image", global_image, batch, image)
    check_tensors(1, agreement=agreement, has_metadata=has_metadata)
    check_shape("agreement", agreement, batch)
    check_shape("has_metadata", has_metadata, batch)
    check_number("alpha", alpha)
    for name, gate, expected in (
        ("anchored_parameters", anchored_parameters, 2 + image + 2 * width),
        ("exploratory_parameters", exploratory_parameters, image + width),
    ):
        if not isinstance(gate, GateParameters):
            raise ArgumentError(name, f"a {type(gate).__name__}", "GateParameters")
        check_tensors(2, **{f"{name}.w1": gate.w1, f"{name}.w2": gate.w2})
        if gate.w1.shape[1] != expected:
            raise ArgumentError(f"{name}.w1", tuple(gate.w1.shape), f"[r, {expected}]")
        if gate.w2.shape[0] not in (1, width):
            raise ArgumentError(f"{name}.w2", tuple(gate.w2.shape), f"[{width}, r] or [1, r]")
        rank, out = gate.w1.shape[0], gate.w2.shape[0]
        check_shape(f"{name}.w2", gate.w2, out, rank)
        check_tensors(1, **{f"{name}.b1": gate.b1, f"{name}.b2": gate.b2})
        check_shape(f"{name}.b1", gate.b1, rank)
        check_shape(f"{name}.b2", gate.b2, out)
    tensors = (anchored, exploratory, agreement, global_image, *anchored_parameters, *exploratory_parameters)
    reasons = triton_reasons(*tensors, forced=requested_backend(backend) != "auto")
    rank = max(anchored_parameters.w1.shape[0], exploratory_parameters.w1.shape[0])
    if rank > MAX_RANK:
        reasons.append(f"a bottleneck of {rank} exceeds {MAX_RANK}")
    if anchored_parameters.w2.shape[0] != exploratory_parameters.w2.shape[0]:
        reasons.append("the gates differ in width")
    requested, chosen, rejected = choose(_OP, backend, {"triton": reasons, "torch": ()})
    return Decision(_OP, requested, chosen, None, rejected)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Modulated streams and gates; for the backward hidden layers [B, r] fp32 and means [B, d] of both streams."""
    from tgq_fast.kernels import modulation

    return modulation.forward(
        anchored,
        exploratory,
        agreement,
        has_metadata,
        image,
        modulation.Gate(a_w1, a_b1, a_w2, a_b2),
        modulation.Gate(e_w1, e_b1, e_w2, e_b2),
        alpha,
    )


@modulate.register_fake
def _(anchored, exploratory, agreement, has_metadata, image, a_w1, a_b1, a_w2, a_b2, e_w1, *rest):  # type: ignore[no-untyped-def]
    batch, width, gate_width = anchored.shape[0], anchored.shape[2], a_w2.shape[0]
    return (
        anchored.new_empty(anchored.shape),
        exploratory.new_empty(exploratory.shape),
        anchored.new_empty(batch, gate_width),
        anchored.new_empty(batch, gate_width),
        anchored.new_empty(batch, a_w1.shape[0], dtype=torch.float32),
        anchored.new_empty(batch, e_w1.shape[0], dtype=torch.float32),
        anchored.new_empty(batch, width),
        anchored.new_empty(batch, width),
    )


@torch.library.custom_op("tgq_fast::dual_gated_modulation_backward", mutates_args=())
def modulate_backward(
    d_anchored: Tensor,
    d_exploratory: Tensor,
    d_gate_a: Tensor | None,
    d_gate_e: Tensor | None,
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
    pre_a: Tensor,
    pre_e: Tensor,
    mean_a: Tensor,
    mean_e: Tensor,
    alpha: float,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Gradients of every differentiable input, in their order (has_metadata is a flag and gets none)."""
    from tgq_fast.kernels import modulation

    # The forward's outputs stand in for the streams, which the backward does not read.
    saved = modulation.Forward(anchored, exploratory, gate_a, gate_e, pre_a, pre_e, mean_a, mean_e)
    grads = modulation.backward(
        d_anchored,
        d_exploratory,
        d_gate_a,
        d_gate_e,
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
def _(d_anchored, d_exploratory, d_ga, d_ge, anchored, exploratory, agreement, has, image, *rest):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (anchored, exploratory, agreement, image, *rest[:8]))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.alpha = inputs
    _, _, *gates, pre_a, pre_e, mean_a, mean_e = output
    ctx.mark_non_differentiable(pre_a, pre_e, mean_a, mean_e)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *gates, pre_a, pre_e, mean_a, mean_e)


def _backward(ctx, d_a, d_e, d_gate_a, d_gate_e, *_):  # type: ignore[no-untyped-def]
    saved, gates = ctx.saved_tensors, [d_gate_a, d_gate_e]
    d_a, d_e = (torch.zeros_like(x) if d is None else d for d, x in zip((d_a, d_e), saved[:2]))
    if d_gate_a is not None or d_gate_e is not None:  # the kernel takes both or neither
        gates = [torch.zeros_like(x) if d is None else d for d, x in zip(gates, saved[13:15])]
    grads = modulate_backward(d_a, d_e, *gates, *saved, ctx.alpha)
    grads = [*grads[:3], None, *grads[3:]]
    return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), None)


modulate.register_autograd(_backward, setup_context=_setup)
