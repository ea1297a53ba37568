"""Sizes and towers by name: "tiny" (CPU), "paper" and "large"."""

from __future__ import annotations

from typing import Any

# The parts of the recipe that do not depend on the size of the model; docs/method.md, "The recipe".
_RECIPE: dict[str, Any] = {
    "whitening": 512,
    "norm": "pre",
    "layer_norm_eps": 1e-5,
    "text_in_layers": False,
    "guide": True,
    "guide_explore": True,
    "guide_head": "mask",
    "mask_weight": 0.2,
    "ema": 0.98,
    "view_share": 0.65,
    "second_look": 0.38,
}

PRESETS: dict[str, dict[str, Any]] = {
    # CPU and tests.
    "tiny": {
        **_RECIPE,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 1024,
        "hidden_dropout_prob": 0.0,
        "direct_size": 128,
        "direct_switch": True,
        "num_anchored_queries": 4,
        "num_exploratory_queries": 4,
        "vision_tower": "efficientnet-lite0",
        "text_tower": "minilm",
        "llm": None,
        "agreement": "alignment",
    },
    # The sizes the paper's public digest gives.
    "paper": {
        **_RECIPE,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 6,
        "intermediate_size": 3072,
        "num_anchored_queries": 8,
        "num_exploratory_queries": 8,
        "vision_tower": "OFA-Sys/chinese-clip-vit-base-patch16",
        "text_tower": "dual_encoder",
        "llm": "Qwen/Qwen3-Embedding-0.6B",
        "lora_rank": 16,
        "agreement": "dual_encoder",
    },
    "large": {
        **_RECIPE,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "num_anchored_queries": 32,
        "num_exploratory_queries": 32,
        "vision_tower": "openai/clip-vit-large-patch14",
        "text_tower": "dual_encoder",
        "llm": "Qwen/Qwen3-Embedding-4B",
        "lora_rank": 16,
        "agreement": "dual_encoder",
    },
}
