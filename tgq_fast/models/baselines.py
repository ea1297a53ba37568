"""The connectors that TGQ-Former is compared with: same interface, same number of tokens, same budget."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tgq_fast.models.attention import exit_norm
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.embeddings import MetadataEmbeddings, prepare_features
from tgq_fast.models.layers import QueryEncoder, initialise_connector, stream_layout
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures

__all__ = ["MLPProjector", "QFormerConnector", "TextOnlyConnector"]


class QFormerConnector(nn.Module):
    """BLIP-2's Q-Former (``qformer``, ``image-only``) and InstructBLIP's (``instructblip``).

    In the latter the metadata tokens take part in self-attention. They are the frozen text tower's (projected,
    marked with their field) in place of InstructBLIP's own word embeddings, so that every connector sees the same text.

    Source: BLIP-2; InstructBLIP.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.layernorm = exit_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        layout = stream_layout(config)
        self.metadata = MetadataEmbeddings(config) if layout.reads_text else None
        self.encoder = QueryEncoder(config, layout)
        initialise_connector(self, config)

    def initialise(self, std: float) -> None:
        nn.init.normal_(self.query_tokens, std=std)

    def forward(self, features: FrozenFeatures, *, return_attention: bool = False) -> ConnectorOutput:
        """Features of B items → tokens [B, N, d] and, on request, attention [B, N, L]."""
        features = prepare_features(features, self.config, self.query_tokens.dtype)
        text = None
        if self.metadata is not None:
            text = self.metadata.dense(features)
        queries = self.layernorm(self.query_tokens).expand(features.visual_tokens.shape[0], -1, -1)
        tokens, attention = self.encoder(
            self.dropout(queries),
            text,
            features.visual_tokens,
            text_mask=features.metadata_mask,
            visual_mask=features.visual_mask,
            return_attention=return_attention,
        )
        return ConnectorOutput(tokens=tokens, attention=attention)


class MLPProjector(nn.Module):
    """Averages the visual tokens over cells, then LN → linear → GELU → linear → LN.

    ``mlp`` has N cells, runs of neighbouring visual tokens in raster order, one output token each; ``avgpool`` has one
    cell, the whole image, and tells its N tokens apart by a learned offset only. Averaging first keeps the number of
    tokens equal to the other connectors' and the cost independent of L.

    Source: the projector of LLaVA-1.5 and InternVL; averaging before it, DeCo.
    """

    def __init__(self, config: TGQFormerConfig, *, num_cells: int) -> None:
        super().__init__()
        self.config = config
        self.num_cells = num_cells
        self.layernorm = nn.LayerNorm(config.token_width, eps=1e-5)
        self.intermediate = nn.Linear(config.token_width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        initialise_connector(self, config)

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


class TextOnlyConnector(nn.Module):
    """Emits no visual token, [B, 0, d]: the reader has the metadata text alone. No parameters.

    Source: ours, a control.
    """

    empty: Tensor

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        # Follows the model's dtype and device, which no parameter here would tell.
        self.register_buffer("empty", torch.zeros(1, 0, config.hidden_size), persistent=False)

    def forward(self, features: FrozenFeatures, *, return_attention: bool = False) -> ConnectorOutput:
        """Features of B items → tokens [B, 0, d]."""
        return ConnectorOutput(tokens=self.empty.expand(features.metadata_tokens.shape[0], -1, -1))
