"""Perceiver-Resampler: latents that look at the visual tokens and at themselves in one attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.embeddings import prepare_features
from tgq_fast.models.layers import initialise_connector
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures

__all__ = ["PerceiverResampler"]

_EPS = 1e-5


class _LatentAttention(nn.Module):
    """MHA(LN(z); keys and values LN(x) and LN(z)), no biases."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.context_layer_norm = nn.LayerNorm(width, eps=_EPS)
        self.latents_layer_norm = nn.LayerNorm(width, eps=_EPS)
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (nn.Linear(width, width, bias=False) for _ in "qkvo")

    def forward(self, context: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, d], [B, N, d], [B, 1, 1, L + N] bool or None → [B, N, d]."""
        context, latents = self.context_layer_norm(context), self.latents_layer_norm(latents)
        source = torch.cat((context, latents), dim=1)  # [B, L + N, d]
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, latents), (self.k_proj, source), (self.v_proj, source))
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output_proj(seen.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """LN → linear → ReLU → linear, no biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width, eps=_EPS)
        self.fc = nn.Linear(width, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.fc(self.ln(x))))


class _Block(nn.ModuleList):
    """Attention and feed-forward, each added to the latents; a list, as in IDEFICS, so that names are the same."""

    def __init__(self, config: TGQFormerConfig) -> None:
        attention = _LatentAttention(config.hidden_size, config.num_attention_heads)
        super().__init__((attention, _FeedForward(config.hidden_size, config.intermediate_size)))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, context: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, d], [B, N, d], [B, 1, 1, L + N] bool or None → [B, N, d]."""
        latents = latents + self.dropout(self[0](context, latents, mask))
        return latents + self.dropout(self[1](latents))


class PerceiverResampler(nn.Module):
    """N latents, n layers of attention to [visual tokens; latents] and feed-forward, LayerNorm.

    Pre-LN by itself, so `norm` changes nothing but the start. Visual tokens of another width than d are projected
    first (IDEFICS resamples in the tower's width). An item without any visual token leaves the latents to themselves.

    Source: Flamingo; without biases, with ReLU and without time embeddings, IDEFICS.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.latents = nn.Parameter(torch.zeros(config.num_queries, d))
        self.project = nn.Identity() if config.token_width == d else nn.Linear(config.token_width, d)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(d, eps=_EPS)
        initialise_connector(self, config)

    def initialise(self, std: float) -> None:
        nn.init.normal_(self.latents, std=std)

    def forward(self, features: FrozenFeatures, *, return_attention: bool = False) -> ConnectorOutput:
        """Features of B items → tokens [B, N, d]; its attention mixes tokens and latents and is not returned."""
        features = prepare_features(features, self.config, self.latents.dtype)
        context, mask = self.project(features.visual_tokens), features.visual_mask
        latents = self.latents.expand(context.shape[0], -1, -1)
        if mask is not None:
            mask = F.pad(mask, (0, latents.shape[1]), value=True)[:, None, None]
        for block in self.blocks:
            latents = block(context, latents, mask)
        return ConnectorOutput(tokens=self.layer_norm(latents))
