"""The typed objects that travel between towers, connector, reader and losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class DistinctTokens:
    """The metadata tokens of a batch without repetition: items that share a field's value share its tokens.

    Attributes:
        tokens: [U, dt] distinct pairs of token and field; row 0 is zero and stands for padding.
        field_ids: [U] int64.
        index: [B, M] int64 row of each metadata token.
    """

    tokens: Tensor
    field_ids: Tensor
    index: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DistinctTokens:
        """Move to a device; the tokens also to `dtype`."""
        return DistinctTokens(self.tokens.to(device, dtype), self.field_ids.to(device), self.index.to(device))


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
        distinct: the metadata tokens once more, without repetition, or None; what reads it must give the same result.
        whitened: whether visual tokens and global image are whitened already (then [B, L, k] and [B, k]).
        product_share: [B, L] share of each visual token's cell that shows the item, or None where nobody knows; only
            training reads it.
        trusted: [B] bool whether the metadata is the item's own, or None for all; only training reads it.
        close_rows: [C] int64 the items of which there is a close-up (:mod:`tgq_fast.models.second_look`), or None.
        close_tokens: [C, L, dv] its visual tokens, never whitened.
        close_image: [C, dg] its pooled image feature, never whitened.
    """

    visual_tokens: Tensor
    global_image: Tensor
    metadata_tokens: Tensor
    metadata_mask: Tensor
    field_ids: Tensor
    agreement: Tensor | None = None
    visual_mask: Tensor | None = None
    distinct: DistinctTokens | None = None
    whitened: bool = False
    product_share: Tensor | None = None
    trusted: Tensor | None = None
    close_rows: Tensor | None = None
    close_tokens: Tensor | None = None
    close_image: Tensor | None = None

    @property
    def has_metadata(self) -> Tensor:
        """[B] bool: whether an item has at least one metadata token."""
        return self.metadata_mask.any(dim=1)

    def token_shares(self) -> Tensor:
        """[B, U] share of each distinct token in an item's metadata; rows sum to one, or to zero without metadata.

        Needs `distinct`.
        """
        assert self.distinct is not None
        mask = self.metadata_mask.to(self.distinct.tokens.dtype)
        shares = mask.new_zeros(mask.shape[0], self.distinct.tokens.shape[0])
        return shares.scatter_add_(1, self.distinct.index, mask / mask.sum(dim=1, keepdim=True).clamp_min(1))

    def mean_metadata(self) -> Tensor:
        """[B, dt] mean metadata token; zero for an item without metadata."""
        if self.distinct is not None:
            return self.token_shares() @ self.distinct.tokens
        weight = self.metadata_mask.to(self.metadata_tokens.dtype)[..., None]
        return (self.metadata_tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)

    def token_scales(self) -> Tensor:
        """[B, L] fp32 one over the root mean square of each visual token."""
        # The norm in the tokens' own dtype: no fp32 copy of the largest tensor of a step.
        norm = torch.linalg.vector_norm(self.visual_tokens, dim=-1).float()
        return torch.rsqrt(norm.square() / self.visual_tokens.shape[-1] + 1e-6)

    def mean_tokens(self) -> Tensor:
        """[B, dv] mean visual token over the real ones; zero for an item without any."""
        if self.visual_mask is None:
            length = self.visual_tokens.shape[1]
            # A product, since mean() makes an fp32 copy of tokens in half precision.
            return (self.visual_tokens.new_ones(length) @ self.visual_tokens).to(self.global_image.dtype) / max(
                length, 1
            )
        weight = self.visual_mask.to(self.visual_tokens.dtype)[..., None]
        return ((self.visual_tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)).to(self.global_image.dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FrozenFeatures:
        """Move to a device; floating tensors also to `dtype`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, dtype if value.is_floating_point() else None)
            return value.to(device, dtype) if isinstance(value, DistinctTokens) else value

        moved: dict[str, Any] = {f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return FrozenFeatures(**moved)

    def close_ups(self) -> FrozenFeatures:
        """Features of the C items of which there is a close-up, with the close-up as their picture."""
        rows, distinct = self.close_rows, self.distinct
        assert rows is not None and self.close_tokens is not None and self.close_image is not None
        return FrozenFeatures(
            self.close_tokens,
            self.close_image,
            self.metadata_tokens[rows],
            self.metadata_mask[rows],
            self.field_ids[rows],
            None if self.agreement is None else self.agreement[rows],
            distinct=distinct and dataclasses.replace(distinct, index=distinct.index[rows]),
        )

    def without_picture(self) -> FrozenFeatures:
        """The same with a pooled image feature of zeros."""
        return dataclasses.replace(self, global_image=torch.zeros_like(self.global_image))

    def without_metadata(self) -> FrozenFeatures:
        """The same with one token of padding as metadata."""
        return dataclasses.replace(
            self,
            metadata_tokens=self.metadata_tokens[:, :1] * 0,
            metadata_mask=torch.zeros_like(self.metadata_mask[:, :1]),
            field_ids=torch.zeros_like(self.field_ids[:, :1]),
            agreement=None,
            distinct=None,
        )


@dataclass
class ConnectorOutput(ModelOutput):
    """Result of any connector.

    Attributes:
        tokens: [B, N, d] what the reader reads, before the projection W_o.
        anchored_mean, exploratory_mean: [B, d] ā and ē before the gates (tgq only), for the redundancy loss.
        anchored_gate, exploratory_gate: [B, d] or [B, 1] (tgq with gates only).
        agreement: [B] the standardised s the gates saw (tgq only).
        patch_agreement: [B, L] fp32 what guided the anchored queries (tgq with `guide` only).
        attention: [B, N, L] cross-attention of the last cross layer averaged over heads, on request.
        alignment_logits: [B, B] of the learned alignment head in training, for its own loss.
        mask_loss: [] of the patch agreement in training, where the views know where the product is.
    """

    tokens: Tensor | None = None
    anchored_mean: Tensor | None = None
    exploratory_mean: Tensor | None = None
    anchored_gate: Tensor | None = None
    exploratory_gate: Tensor | None = None
    agreement: Tensor | None = None
    patch_agreement: Tensor | None = None
    attention: Tensor | None = None
    alignment_logits: Tensor | None = None
    mask_loss: Tensor | None = None


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
