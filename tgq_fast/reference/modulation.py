"""Dual-gated vector modulation, by definition."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear


def centred_sigmoid(z: Tensor) -> Tensor:
    """cσ(z) = 2σ(z) − 1 = tanh(z / 2), in (−1, 1) and zero at zero (the factor 2 is our reading)."""
    return torch.tanh(z * 0.5)


class Gate(Protocol):
    """What makes the logits of one gate."""

    def logits(self, x: Tensor) -> Tensor:
        """[B, input width] → [B, g]."""


class GateParameters(NamedTuple):
    """One bottleneck gate MLP: out = W2 gelu(W1 x + b1) + b2.

    Attributes:
        w1: [r, input width]; b1: [r].
        w2: [g, r]; b2: [g]; g is the model width (vector gate) or 1 (scalar gate).
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """[B, input width] → [B, g]."""
        return linear(gelu(linear(x, self.w1, self.b1)), self.w2, self.b2)


class ModulationOutput(NamedTuple):
    """Modulated streams and the gates that made them.

    Attributes:
        anchored: [B, Na, d]; exploratory: [B, Ne, d].
        anchored_gate, exploratory_gate: [B, d] (or [B, 1]) in (−1, 1).
    """

    anchored: Tensor
    exploratory: Tensor
    anchored_gate: Tensor
    exploratory_gate: Tensor


def dual_gated_modulation(
    anchored: Tensor,
    exploratory: Tensor,
    agreement: Tensor,
    has_metadata: Tensor,
    global_image: Tensor,
    anchored_parameters: Gate,
    exploratory_parameters: Gate,
    *,
    alpha: float = 1.0,
    statistics: Tensor | None = None,
) -> ModulationOutput:
    """Scale every channel of each stream by 1 + α·gate.

    g_a = cσ(MLP_a[s; has_metadata; v_g; ā; ē]) and g_e = cσ(MLP_e[v_g; ē]), with ā, ē the means over a
    stream's tokens. A gate of −1 silences a channel (α = 1); zero MLP outputs give the exact identity.

    Args:
        anchored: [B, Na, d]; exploratory: [B, Ne, d].
        agreement: [B] standardised image–metadata agreement s.
        has_metadata: [B], 1 where the item has metadata, else 0 (bool or floating).
        global_image: [B, dg] pooled image feature v_g.
        anchored_parameters: gate MLP with input width 2 + dg + 2d, as :class:`GateParameters` or by its logits.
        exploratory_parameters: gate MLP with input width dg + d.
        alpha: residual scale α.
        statistics: [B, c] further inputs of the anchored gate, after ē; None: none. Only this definition takes them.

    Either stream may be empty; its mean then counts as zero.

    Source: what each gate sees and the residual form, TGQ-Former's public digest; bottleneck and factor 2, ours.
    """
    dtype = anchored.dtype
    # The mean of an empty stream (an ablation) is zero, not NaN.
    mean_a, mean_e = (x.sum(dim=1) / max(1, x.shape[1]) for x in (anchored, exploratory))  # [B, d]
    flags = torch.stack((agreement.to(dtype), has_metadata.to(dtype)), dim=-1)  # [B, 2]
    v_g = global_image.to(dtype)
    more = () if statistics is None else (statistics.to(dtype),)
    gate_a = centred_sigmoid(anchored_parameters.logits(torch.cat((flags, v_g, mean_a, mean_e, *more), dim=-1)))
    gate_e = centred_sigmoid(exploratory_parameters.logits(torch.cat((v_g, mean_e), dim=-1)))
    return ModulationOutput(
        anchored * (1 + alpha * gate_a)[:, None],
        exploratory * (1 + alpha * gate_e)[:, None],
        gate_a,
        gate_e,
    )
