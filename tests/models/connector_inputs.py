"""Small configurations and random features for the connector tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.outputs import FrozenFeatures

DV, DG, DT = 24, 20, 16


def small_config(connector: str = "tgq", **overrides: Any) -> TGQFormerConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "num_anchored_queries": 3,
        "num_exploratory_queries": 2,
        "visual_width": DV,
        "global_width": DG,
        "text_width": DT,
        "num_visual_tokens": 9,
        "max_metadata_tokens": 6,
        "fields": ["brand", "colour"],
        "gate_bottleneck": 8,
        "alignment_size": 8,
    }
    return TGQFormerConfig(connector=connector, **{**sizes, **overrides})


def random_features(batch: int = 5, length: int = 9, text: int = 6, seed: int = 3) -> FrozenFeatures:
    """Item 0 has no metadata, item 1 has all M tokens, the rest something between."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, text + 1, (batch, 1), generator=generator) if text else torch.zeros(batch, 1).long()
    lengths[:1], lengths[1:2] = 0, text
    mask = torch.arange(text) < lengths
    return FrozenFeatures(
        visual_tokens=torch.randn(batch, length, DV, generator=generator),
        global_image=torch.randn(batch, DG, generator=generator),
        metadata_tokens=torch.randn(batch, text, DT, generator=generator) * mask[..., None],
        metadata_mask=mask,
        field_ids=torch.randint(1, 3, (batch, text), generator=generator) * mask,
        agreement=torch.rand(batch, generator=generator),
    )


def randomise(module: nn.Module, seed: int = 1) -> nn.Module:
    """Non-trivial values in every parameter: gates open, biases and LayerNorms not at their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name.lower() and name.endswith("weight") else 0.3 * noise)
    return module
