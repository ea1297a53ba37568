"""Dual-gated vector modulation of both streams."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tgq_fast import reference
from tgq_fast.errors import ArgumentError
from tgq_fast.ops.dispatch import Decision, choose, explainer, requested_backend, triton_reasons
from tgq_fast.ops.modulation_triton import modulate
from tgq_fast.reference.modulation import GateParameters, ModulationOutput

__all__ = ["StreamMoments", "dual_gated_modulation", "dual_gated_modulation_with_moments"]

_OP = "dual_gated_modulation"
MAX_RANK = 128  # widest bottleneck the kernel holds on chip


class StreamMoments(NamedTuple):
    """What the redundancy loss needs, from the pass over the tokens that the gates make anyway.

    Attributes:
        anchored, exploratory: [B, d] token means before the gates, differentiable.
        moments: [5, d] fp32 means, variances and covariance of the two over the batch, or None (torch backend): the
            `moments` argument of :func:`tgq_fast.ops.redundancy_loss`. They carry no gradient of their own.
    """

    anchored: Tensor
    exploratory: Tensor
    moments: Tensor | None


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
    gates = anchored_parameters, exploratory_parameters
    return _run((anchored, exploratory, agreement, has_metadata, global_image), gates, alpha, backend, False)[0]


def dual_gated_modulation_with_moments(
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
) -> tuple[ModulationOutput, StreamMoments]:
    """:func:`dual_gated_modulation` that also returns the token means and their batch moments.

    The moments describe this process' batch only: with several ranks gather the means instead.
    """
    gates = anchored_parameters, exploratory_parameters
    output, moments = _run((anchored, exploratory, agreement, has_metadata, global_image), gates, alpha, backend, True)
    return output, moments or StreamMoments(anchored.mean(dim=1), exploratory.mean(dim=1), None)


def _run(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    gates: tuple[GateParameters, GateParameters],
    alpha: float,
    backend: str | None,
    want_moments: bool,
) -> tuple[ModulationOutput, StreamMoments | None]:
    """Moments come from the kernel only."""
    decision = _decide(*inputs, *gates, alpha=alpha, backend=backend)
    if decision.backend != "triton":
        return reference.dual_gated_modulation(*inputs, *gates, alpha=alpha), None
    dtype, device = inputs[0].dtype, inputs[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    low = [t.to(dtype) for t in (*inputs, *gates[0], *gates[1])]
    out_a, out_e, gate_a, gate_e, mean_a, mean_e, moments, *_ = modulate(*low, alpha, want_moments)
    output = ModulationOutput(out_a, out_e, gate_a, gate_e)
    return output, StreamMoments(mean_a, mean_e, moments) if want_moments else None


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
    width, image = anchored.shape[2], global_image.shape[1]
    for name, gate, expected in (
        ("anchored_parameters", anchored_parameters, 2 + image + 2 * width),
        ("exploratory_parameters", exploratory_parameters, image + width),
    ):
        if gate.w1.shape[1] != expected:
            raise ArgumentError(f"{name}.w1", tuple(gate.w1.shape), f"[r, {expected}]")
        if gate.w2.shape[0] not in (1, width):
            raise ArgumentError(f"{name}.w2", tuple(gate.w2.shape), f"[{width}, r] or [1, r]")
    tensors = (anchored, exploratory, agreement, global_image, *anchored_parameters, *exploratory_parameters)
    reasons = triton_reasons(*tensors, forced=requested_backend(backend) != "auto")
    rank = max(anchored_parameters.w1.shape[0], exploratory_parameters.w1.shape[0])
    if rank > MAX_RANK:
        reasons.append(f"a bottleneck of {rank} exceeds {MAX_RANK}")
    if anchored_parameters.w2.shape[0] != exploratory_parameters.w2.shape[0]:
        reasons.append("the gates differ in width")
    requested, chosen, rejected = choose(_OP, backend, {"triton": reasons, "torch": ()})
    return Decision(_OP, requested, chosen, None, rejected)
