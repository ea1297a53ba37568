"""Projectors that average the visual tokens before they map them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.embeddings import prepare_features
from tgq_fast.models.layers import initialise_connector
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures

__all__ = ["AveragePoolProjector", "MLPProjector"]


class MLPProjector(nn.Module):
    """Averages the visual tokens over cells, then LN → linear → GELU → linear → LN.

    N cells, runs of neighbouring visual tokens in raster order, give one output token each. Averaging first keeps the
    number of tokens equal to the other connectors' and the cost independent of L.

    Source: the projector of LLaVA-1.5 and InternVL; averaging before it, DeCo.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_cells = self.cells_of(config)
        self.layernorm = nn.LayerNorm(config.token_width, eps=1e-5)
        self.intermediate = nn.Linear(config.token_width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        initialise_connector(self, config)

    @staticmethod
    def cells_of(config: TGQFormerConfig) -> int:
        """Number of cells."""
        return config.num_queries

    def initialise(self, std: float) -> None:
        nn.init.normal_(self.query_tokens, std=std)

    def pool(self, visual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, dv] → [B, cells, dv], means over real tokens; a cell without any is zero."""
        length, cells = visual.shape[1], self.num_cells
        position = torch.arange(length, device=visual.device)
        first = torch.arange(cells, device=visual.device)[:, None] * length
        # The cells of adaptive average pooling: [⌊iL/cells⌋, ⌈(i+1)L/cells⌉).
        inside = (position >= first // cells) & (position < (first + length + cells - 1) // cells)  # [cells, L]
        weight = inside.to(visual.dtype).expand(visual.shape[0], -1, -1)
        if mask is not None:
            weight = weight * mask[:, None].to(visual.dtype)
        return (weight @ visual) / weight.sum(dim=-1, keepdim=True).clamp_min(1)

    def forward(self, features: FrozenFeatures, *, return_attention: bool = False) -> ConnectorOutput:
        """Features of B items → tokens [B, N, d]; there is no attention to return."""
        features = prepare_features(features, self.config, self.query_tokens.dtype)
        pooled = self.layernorm(self.pool(features.visual_tokens, features.visual_mask))  # [B, cells, dv]
        projected = self.dense(self.dropout(self.activation(self.intermediate(pooled))))
        return ConnectorOutput(tokens=self.LayerNorm(projected + self.query_tokens))


class AveragePoolProjector(MLPProjector):
    """:class:`MLPProjector` with one cell, the whole image; its N tokens differ by a learned offset only.

    Source: as there.
    """

    @staticmethod
    def cells_of(config: TGQFormerConfig) -> int:
        """One."""
        return 1
