"""Cross-attention pooling: learned probes look at the visual tokens once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tgq_fast.models.attention import HybridCrossAttention, entrance_norm
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.embeddings import prepare_features
from tgq_fast.models.layers import Intermediate, initialise_connector
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures

__all__ = ["AttentionPool"]


class _Projection(nn.Module):
    """What is seen, without the probe that looked."""

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.dense(x)


class AttentionPool(nn.Module):
    """x = MHA(probes, X, X); x + MLP(LN(x)).

    SigLIP has one probe, this has N. An item without any visual token sees zeros. With norm="pre" the tokens are
    normed at the entrance and the result at the end, as in the other connectors.

    Source: SigLIP's attention pooling head (which is Set Transformer's PMA without its first residual).
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.probe = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.attention = HybridCrossAttention(config, config.token_width)
        self.attention.output = _Projection(config)  # type: ignore[assignment]
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = Intermediate(config)
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = entrance_norm(config)
        initialise_connector(self, config)

    def initialise(self, std: float) -> None:
        nn.init.normal_(self.probe, std=std)

    def forward(self, features: FrozenFeatures, *, return_attention: bool = False) -> ConnectorOutput:
        """Features of B items → tokens [B, N, d] and, on request, attention [B, N, L]."""
        features = prepare_features(features, self.config, self.probe.dtype)
        visual, mask = features.visual_tokens, features.visual_mask
        probes = self.probe.expand(visual.shape[0], -1, -1)
        seen = self.attention(probes, 0, visual, mask)  # [B, N, d]
        tokens = seen + self.dropout(self.dense(self.intermediate(self.layernorm(seen))))
        attention = self.attention.attention_map(probes, visual, mask) if return_attention else None
        return ConnectorOutput(tokens=self.norm(tokens), attention=attention)
