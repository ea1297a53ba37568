"""Controls that have a module of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures

__all__ = ["TextOnlyConnector"]


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
