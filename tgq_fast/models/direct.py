"""The direct part of the embedding: a linear map of the pooled visual tokens, past connector and reader.

It keeps the geometry of the pretrained feature, in which near duplicates are near, beside what is learned.

Source: ours; concatenation as a form of late fusion.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.outputs import FrozenFeatures
from tgq_fast.models.zoo import connector_spec

__all__ = ["DirectReadout"]


class DirectReadout(nn.Module):
    """e → [√(1 − a) e; √a G p / |G p|], with p the visual tokens pooled by a softmax over κ · agreement + u · x/rms(x).

    At first u is zero, κ one, a one half and G the first whitened directions. Both parts are unit vectors, so that the
    scalar product of two embeddings is the mixture of their two cosines.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.token_width, config.direct_size, bias=False)
        self.share_logit = nn.Parameter(torch.zeros(()))
        self.sharpness = (
            nn.Parameter(torch.ones(())) if connector_spec(config.connector).is_hybrid and config.guide else None
        )
        self.saliency = nn.Parameter(torch.zeros(config.token_width))
        nn.init.eye_(self.projection.weight)

    def pooled(self, features: FrozenFeatures, logits: Tensor) -> Tensor:
        """Visual tokens under a softmax over [B, L] logits → [B, k]; zero for an item without any."""
        real = features.visual_mask
        if real is not None:
            logits = logits.masked_fill(~real, torch.finfo(logits.dtype).min)
        weight = logits.softmax(dim=1)
        if real is not None:
            weight = weight * real
        tokens = features.visual_tokens
        return torch.einsum("bl,blk->bk", weight.to(tokens.dtype), tokens)

    def forward(
        self, embedding: Tensor, visual_embedding: Tensor, features: FrozenFeatures, agreement: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Extend both embeddings.

        Args:
            embedding, visual_embedding: [B, D - D2] unit vectors.
            features: as the connector reads them, whitened if it whitens.
            agreement: [B, L] of the tokens with the metadata, or None; the visual embedding takes none.

        Returns:
            [B, D] unit vectors each (shorter where an item has no picture).
        """
        tokens = features.visual_tokens
        # The norm in the tokens' own dtype: no fp32 copy of the largest tensor of a step.
        norm = torch.linalg.vector_norm(tokens, dim=-1).float()
        scale = torch.rsqrt(norm.square() / tokens.shape[-1] + 1e-6)  # [B, L]
        saliency = (tokens @ self.saliency.to(tokens.dtype)).float() * scale
        alone = self._part(features, saliency)
        guided = alone
        if self.sharpness is not None and agreement is not None:
            guided = self._part(features, saliency + self.sharpness * agreement)
        a = torch.sigmoid(self.share_logit)
        both = ((embedding, guided), (visual_embedding, alone))
        out = [torch.cat(((1 - a).sqrt() * e, a.sqrt() * part), dim=-1) for e, part in both]
        return out[0], out[1]

    def _part(self, features: FrozenFeatures, logits: Tensor) -> Tensor:
        pooled = self.pooled(features, logits)
        return normalize(self.projection(pooled.to(self.projection.weight.dtype)).float(), dim=-1)
