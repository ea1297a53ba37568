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
from tgq_fast.models.zoo.registry import connector_spec

__all__ = ["DirectReadout"]

_GAIN = 3.0  # learning-rate multiplier of the switch, as in GuideHead


class DirectReadout(nn.Module):
    """e → [√(1 − a) e; √a G p / |G p|], with p the visual tokens pooled by a softmax over κ · agreement + u · x/rms(x).

    At first u is zero, κ one, a one half and G the first whitened directions. Both parts are unit vectors, so that the
    scalar product of two embeddings is the mixture of their two cosines.

    With `direct_switch` the second part is (1 − w) G' p' / |G' p'| + w G p / |G p|, made a unit vector again: p' is
    pooled without agreement, G' a map of its own, and w = σ(of the mean token, and of the largest value and deviation
    of the agreement). Pictures of one product need no guide and are told apart better without it.
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
        self.plain = self.switch = None
        if config.direct_switch and self.sharpness is not None:
            self.plain = nn.Linear(config.token_width, config.direct_size, bias=False)
            self.switch = nn.Linear(config.token_width + 2, 1)
            nn.init.eye_(self.plain.weight)
            nn.init.zeros_(self.switch.weight)
            nn.init.zeros_(self.switch.bias)

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
        saliency = (tokens @ self.saliency.to(tokens.dtype)).float() * features.token_scales()
        alone = self._part(features, saliency, self.projection if self.plain is None else self.plain)
        guided = alone
        if self.sharpness is not None and agreement is not None:
            guided = self._part(features, saliency + self.sharpness * agreement, self.projection)
            if self.switch is not None:
                w = self.guided_share(features, agreement)
                guided = normalize((1 - w) * alone + w * guided, dim=-1)
        a = torch.sigmoid(self.share_logit)
        both = ((embedding, guided), (visual_embedding, alone))
        out = [torch.cat(((1 - a).sqrt() * e, a.sqrt() * part), dim=-1) for e, part in both]
        return out[0], out[1]

    def guided_share(self, features: FrozenFeatures, agreement: Tensor) -> Tensor:
        """[B, 1] fp32 the switch w: how much of the direct part comes from the guided tokens."""
        assert self.switch is not None
        spread = agreement.square().mean(dim=1, keepdim=True).sqrt()
        seen = torch.cat((features.mean_tokens().float(), agreement.amax(dim=1, keepdim=True), 4 * spread), dim=1)
        with torch.autocast(seen.device.type, enabled=False):
            return torch.sigmoid(_GAIN * self.switch(seen.detach().to(self.switch.weight.dtype)).float())

    def _part(self, features: FrozenFeatures, logits: Tensor, projection: nn.Linear) -> Tensor:
        pooled = self.pooled(features, logits)
        return normalize(projection(pooled.to(projection.weight.dtype)).float(), dim=-1)
