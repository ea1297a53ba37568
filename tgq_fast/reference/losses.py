"""Training losses on one process' (already gathered) batch, by definition."""

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


def info_nce(
    embeddings: Tensor,
    positives: Tensor,
    log_scale: Tensor,
    *,
    groups: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """InfoNCE over a batch of items: each anchor against every other item, self and co-positives masked.

    Args:
        embeddings: [M, D] L2-normalised, gathered over ranks.
        positives: [R] index into M of the positive of each anchor row.
        log_scale: [] t; logits are exp(t) · cosine.
        groups: [M] integer labels; items that share the anchor's label (its known co-positives) leave the
            denominator, except the anchor's own positive. Negative labels mean "no group". None: mask self only.
        rows: [R] which embeddings are anchors. None: all M.

    Returns:
        [] mean over anchors, in fp32 (fp64 for fp64 input).
    """
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    e = embeddings.to(dtype)
    if rows is None:
        rows = torch.arange(e.shape[0], device=e.device)
    logits = e[rows] @ e.T * log_scale.to(dtype).exp()  # [R, M]
    columns = torch.arange(e.shape[0], device=e.device)
    masked = columns == rows[:, None]
    if groups is not None:
        masked = masked | ((groups[rows][:, None] == groups) & (groups >= 0))
    masked = masked & (columns != positives[:, None])
    logits = logits.masked_fill(masked, float("-inf"))
    picked = logits.gather(1, positives[:, None])[:, 0]
    return (torch.logsumexp(logits, dim=1) - picked).mean()
