"""Redundancy of the two streams over one process' (already gathered) batch, by definition."""

from __future__ import annotations

import torch
from torch import Tensor


def redundancy_loss(anchored: Tensor, exploratory: Tensor, *, eps: float = 1e-6) -> Tensor:
    """mean_i C_ii² with C the batch correlation matrix of ā against ē.

    Only the diagonal is penalised: channel i of one stream must not repeat channel i of the other.

    Args:
        anchored, exploratory: [B, d] token means of the two streams, gathered over ranks.
        eps: added to each variance; a constant channel counts as uncorrelated.

    Returns:
        [] in fp32 (fp64 for fp64 input). Zero for B < 2.

    Source: diagonal penalty, TGQ-Former's public digest; the square, ours.
    """
    dtype = torch.promote_types(anchored.dtype, torch.float32)
    a, e = anchored.to(dtype), exploratory.to(dtype)
    if a.shape[0] < 2:
        return (a.sum() + e.sum()) * 0.0
    a, e = a - a.mean(dim=0), e - e.mean(dim=0)
    covariance = (a * e).mean(dim=0)  # [d]
    variance = (a.square().mean(dim=0) + eps) * (e.square().mean(dim=0) + eps)
    return (covariance.square() / variance).mean()
