"""The training loss: named terms with their weights.

Source: 0.9 / 0.1 on the two embeddings and the learned scale, NoteLLM-2; redundancy, public digest; alignment and mask,
ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tgq_fast import ops
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.gather import gather, rank
from tgq_fast.models.outputs import ConnectorOutput
from tgq_fast.models.readers import ReaderOutput
from tgq_fast.models.zoo import connector_spec

__all__ = ["weighted_losses"]

_MAX_LOG_SCALE = 4.6052  # ln 100, CLIP's cap


def weighted_losses(
    config: TGQFormerConfig,
    read: ReaderOutput,
    connected: ConnectorOutput,
    log_scale: Tensor,
    positives: Tensor,
    groups: Tensor | None,
) -> dict[str, tuple[float, Tensor]]:
    """Weighted terms: InfoNCE on both embeddings, redundancy, alignment, mask.

    Args:
        read, connected: what reader and connector gave for M items.
        log_scale: [] learned scale of the InfoNCE logits.
        positives, groups: [M] as in :meth:`TGQFormerModel.forward`.
    """
    offset = rank() * len(positives)
    rows = torch.nonzero(positives >= 0)[:, 0]
    targets = positives[rows] + offset
    everyone = None if groups is None else gather(groups)
    scale = log_scale.clamp(max=_MAX_LOG_SCALE)

    def contrast(embeddings: Tensor) -> Tensor:
        return ops.info_nce(gather(embeddings), targets, scale, groups=everyone, rows=rows + offset)

    # Without pictures v_emb is a constant: nothing to contrast.
    share = config.visual_loss_weight if connector_spec(config.connector).sees_picture else 0.0
    terms = {"item": (1.0 - share, contrast(read.embedding))}
    if share:
        terms["visual"] = (share, contrast(read.visual_embedding))
    anchored, exploratory = connected.anchored_mean, connected.exploratory_mean
    if config.redundancy_weight and anchored is not None and exploratory is not None:
        term = ops.redundancy_loss(gather(anchored), gather(exploratory))
        terms["redundancy"] = (config.redundancy_weight, term)
    logits = connected.alignment_logits
    if config.alignment_weight and logits is not None:
        answer = torch.arange(len(logits), device=logits.device)
        term = (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2
        terms["alignment"] = (config.alignment_weight, term)
    if config.mask_weight and connected.mask_loss is not None:
        terms["mask"] = (config.mask_weight, connected.mask_loss)
    return terms
