"""InfoNCE over one process' (already gathered) batch, by definition."""

from __future__ import annotations

import torch
from torch import Tensor


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
