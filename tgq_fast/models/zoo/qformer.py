"""Q-Formers: N learned queries in layers with the visual tokens, with or without metadata tokens among them."""

from __future__ import annotations

import torch
from torch import nn

from tgq_fast.models.attention import exit_norm
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.embeddings import MetadataEmbeddings, prepare_features
from tgq_fast.models.layers import QueryEncoder, initialise_connector, stream_layout
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures

__all__ = ["QFormerConnector"]


class QFormerConnector(nn.Module):
    """BLIP-2's Q-Former (``qformer``, ``image-only``, ``notellm-2``) and InstructBLIP's (``instructblip``).

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
