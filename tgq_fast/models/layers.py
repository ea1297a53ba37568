"""Layers of a Q-Former, over two query streams and a text stream.

A layer is BLIP-2's: self-attention, every c-th layer cross-attention to the visual tokens, then feed-forward with
separate weights for queries and text. With norm="post" LayerNorm follows every residual sum, as in BERT; with
norm="pre" it stands at the entrance of every part, of the visual tokens too, and once at the end. Parameter names are
those of `transformers`' Q-Formers (``layer.0.attention.attention.query.weight`` …), so their checkpoints load by name
(:mod:`tgq_fast.models.qformer_weights`). The last layer has no text feed-forward: nobody reads the final text rows.

Symbols: B items, N = Na + Ne queries, M metadata tokens, L visual tokens, H heads, d width, dv visual width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from tgq_fast.errors import ArgumentError
from tgq_fast.models.attention import (
    Guide,
    HybridCrossAttention,
    ResidualOutput,
    StreamLayout,
    StreamSelfAttention,
    TextPacking,
    entrance_norm,
)
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.zoo.registry import connector_spec

__all__ = ["Intermediate", "QueryEncoder", "QueryLayer", "initialise_connector", "stream_layout"]


def initialise_connector(connector: nn.Module, config: TGQFormerConfig) -> None:
    """Initialise every parameter of a connector in place.

    Biases are zero, LayerNorms the identity, embeddings and learned queries normal(0, `initializer_range`). Linear
    weights are the same after BERT; with norm="pre", where nothing rescales what a part adds, they keep the variance of
    what they read (Xavier's uniform start) [ours]. Convolutions start as PyTorch starts them. A module with further
    parameters, or with a start of its own (learned queries, zero gates), says so in `initialise(std)`.
    """
    connector.apply(lambda module: _initialise_module(module, config.initializer_range, config.norm == "pre"))


def _initialise_module(module: nn.Module, std: float, keep_variance: bool) -> None:
    if isinstance(module, nn.Linear):
        if keep_variance:
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        module.reset_parameters()
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()
    elif callable(own := getattr(module, "initialise", None)):
        own(std)


def stream_layout(config: TGQFormerConfig) -> StreamLayout:
    """The layout of a connector with query layers: two streams for ``tgq`` and its variants, one for Q-Formers."""
    spec = connector_spec(config.connector)
    if not spec.is_hybrid:
        return StreamLayout(0, config.num_queries, spec.reads_metadata, "full")
    anchored, mixing = config.num_anchored_queries, config.stream_mixing
    # Without anchored queries in block mode nobody would look at the text.
    reads_text = config.text_in_layers and (anchored > 0 or config.explore_sees_text or mixing == "full")
    return StreamLayout(anchored, config.num_exploratory_queries, reads_text, mixing, config.explore_sees_text)


class Intermediate(nn.Module):
    """act(dense(x)), the first half of a feed-forward."""

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class QueryLayer(nn.Module):
    """One layer: self-attention, cross-attention in every c-th layer, feed-forward.

    Source: BLIP-2; separate text feed-forward, InstructBLIP; `per_stream_ffn`, norm="pre" and the guide, ours.
    """

    def __init__(self, config: TGQFormerConfig, layout: StreamLayout, index: int) -> None:
        super().__init__()
        self.layout = layout
        self.attention = StreamSelfAttention(config, layout)
        self.crossattention = (
            HybridCrossAttention(config, config.token_width) if index % config.cross_attention_frequency == 0 else None
        )
        guided = self.crossattention is not None and config.guide and layout.num_anchored > 0
        num_guided = layout.num_anchored + (layout.num_exploratory if config.guide_explore else 0)
        self.guide_scale = nn.Parameter(torch.empty(num_guided, config.num_attention_heads)) if guided else None
        self.guide_init = config.guide_init
        self.norm_feed_forward = entrance_norm(config)
        self.intermediate_query = Intermediate(config)
        self.output_query = ResidualOutput(config.intermediate_size, config)
        self.splits_ffn = config.per_stream_ffn and layout.num_anchored > 0 and layout.num_exploratory > 0
        if self.splits_ffn:
            self.intermediate_explore = Intermediate(config)
            self.output_explore = ResidualOutput(config.intermediate_size, config)
        self.updates_text = layout.reads_text and index < config.num_hidden_layers - 1
        if self.updates_text:
            self.intermediate = Intermediate(config)
            self.output = ResidualOutput(config.intermediate_size, config)

    def initialise(self, std: float) -> None:
        if self.guide_scale is not None:
            nn.init.constant_(self.guide_scale, self.guide_init)

    def forward(
        self,
        queries: Tensor,
        text: Tensor | None,
        visual: Tensor,
        *,
        text_mask: Tensor | None = None,
        visual_mask: Tensor | None = None,
        patch_agreement: Tensor | None = None,
        packing: TextPacking | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Args:
            queries: [B, N, d]; text: [B, M, d] or None, with `packing` [T, d]; visual: [B, L, dv].
            patch_agreement: [B, L] what guides the anchored queries, or None.

        Returns:
            queries [B, N, d], text shaped as before or None, attention [B, N, L] or None.
        """
        num_anchored = self.layout.num_anchored
        queries, text = self.attention(queries, text, text_mask, text_wanted=self.updates_text, packing=packing)
        attention = None
        if self.crossattention is not None:
            guide = None
            if self.guide_scale is not None and patch_agreement is not None:
                guide = Guide(patch_agreement, self.guide_scale)
            if return_attention:
                attention = self.crossattention.attention_map(queries, visual, visual_mask, guide)
            queries = self.crossattention(queries, num_anchored, visual, visual_mask, guide)
        if self.splits_ffn:
            anchored, exploratory = queries[:, :num_anchored], queries[:, num_anchored:]
            anchored = self.feed_forward(self.intermediate_query, self.output_query, anchored)
            exploratory = self.feed_forward(self.intermediate_explore, self.output_explore, exploratory)
            queries = torch.cat((anchored, exploratory), dim=1)
        else:
            queries = self.feed_forward(self.intermediate_query, self.output_query, queries)
        if text is not None:
            text = self.feed_forward(self.intermediate, self.output, text)
        return queries, text, attention

    def feed_forward(self, intermediate: Intermediate, output: ResidualOutput, x: Tensor) -> Tensor:
        """[..., d] → [..., d]."""
        return output(intermediate(self.norm_feed_forward(x)), x)


def _run_layer(
    layer: nn.Module, queries: Tensor, text: Tensor | None, visual: Tensor, guide: Tensor | None, **given: Any
) -> Any:
    return layer(queries, text, visual, patch_agreement=guide, **given)


class QueryEncoder(nn.Module):
    """The stack of layers, and with norm="pre" the LayerNorm after the last.

    Raises:
        ArgumentError: attention dropout is asked for; the fused operators never hold the attention weights.
    """

    def __init__(self, config: TGQFormerConfig, layout: StreamLayout) -> None:
        super().__init__()
        if config.attention_probs_dropout_prob:
            raise ArgumentError(
                "attention_probs_dropout_prob",
                config.attention_probs_dropout_prob,
                "0",
                "The attention operators keep no attention weights to drop; use hidden_dropout_prob.",
            )
        self.layer = nn.ModuleList(QueryLayer(config, layout, i) for i in range(config.num_hidden_layers))
        self.norm = entrance_norm(config)
        self.gradient_checkpointing = False  # transformers' switch: gradient_checkpointing_enable() of the model
        self._gradient_checkpointing_func: Callable[..., Any] = checkpoint

    def forward(
        self,
        queries: Tensor,
        text: Tensor | None,
        visual: Tensor,
        *,
        text_mask: Tensor | None = None,
        visual_mask: Tensor | None = None,
        patch_agreement: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, N, d] → the final queries and, on request, the attention [B, N, L] of the last cross layer."""
        packing = TextPacking.where_useful(text_mask) if text is not None else None
        if text is not None and packing is not None:
            text = packing.pack(text)
        last = None
        # Tensors with gradients by position: what a reentrant checkpoint finds in keywords, it takes for constants.
        for layer in self.layer:
            run: Callable[..., Any] = partial(
                _run_layer,
                layer,
                text_mask=text_mask,
                visual_mask=visual_mask,
                packing=packing,
                return_attention=return_attention,
            )
            if self.gradient_checkpointing and self.training:
                run = partial(self._gradient_checkpointing_func, run)
            queries, text, attention = run(queries, text, visual, patch_agreement)
            last = attention if attention is not None else last
        return self.norm(queries), last
