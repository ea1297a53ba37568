"""The typed objects that travel between towers, connector, reader and losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class FrozenFeatures:
    """What the frozen towers say about B items; the input of the connector and the unit of the feature cache.

    Attributes:
        visual_tokens: [B, L, dv] X.
        global_image: [B, dg] pooled image feature v_g.
        metadata_tokens: [B, M, dt] T, tokens of every guiding field, packed to the left.
        metadata_mask: [B, M] bool μ, True for real tokens.
        field_ids: [B, M] int64, 1 … F (index into `config.fields` plus one), 0 for padding.
        agreement: [B] raw image–metadata cosine of a dual encoder, or None.
        visual_mask: [B, L] bool, True where a visual token is real, or None for all.
    """

    visual_tokens: Tensor
    global_image: Tensor
    metadata_tokens: Tensor
    metadata_mask: Tensor
    field_ids: Tensor
    agreement: Tensor | None = None
    visual_mask: Tensor | None = None

    @property
    def has_metadata(self) -> Tensor:
        """[B] bool: whether an item has at least one metadata token."""
        return self.metadata_mask.any(dim=1)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FrozenFeatures:
        """Move to a device; floating tensors also to `dtype`."""

        def move(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return value.to(device, dtype if value.is_floating_point() else None)

        moved: dict[str, Any] = {f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return FrozenFeatures(**moved)


@dataclass
class ConnectorOutput(ModelOutput):
    """Result of any connector.

    Attributes:
        tokens: [B, N, d] what the reader reads, before the projection W_o.
        anchored_mean, exploratory_mean: [B, d] ā and ē before the gates (tgq only), for the redundancy loss.
        anchored_gate, exploratory_gate: [B, d] or [B, 1] (tgq with gates only).
        agreement: [B] the standardised s the gates saw (tgq only).
        attention: [B, N, L] cross-attention of the last cross layer averaged over heads, on request.
        alignment_logits: [B, B] of the learned alignment head in training, for its own loss.
    """

    tokens: Tensor | None = None
    anchored_mean: Tensor | None = None
    exploratory_mean: Tensor | None = None
    anchored_gate: Tensor | None = None
    exploratory_gate: Tensor | None = None
    agreement: Tensor | None = None
    attention: Tensor | None = None
    alignment_logits: Tensor | None = None


@dataclass
class TGQFormerOutput(ModelOutput):
    """Result of the whole model.

    Attributes:
        loss: [] present when pairs were given.
        embedding: [B, D] L2-normalised item embedding (mm_emb).
        visual_embedding: [B, D] L2-normalised v_emb.
        losses: named loss terms, each [] and detached.
        connector: the connector's own output.
    """

    loss: Tensor | None = None
    embedding: Tensor | None = None
    visual_embedding: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    connector: ConnectorOutput | None = None
