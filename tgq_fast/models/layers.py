"""Post-LN BERT layers of a Q-Former, over two query streams and a text stream.

A layer is BLIP-2's: self-attention, every c-th layer cross-attention to the visual tokens, then feed-forward with
separate weights for queries and text. Parameter names are those of `transformers`' Q-Formers
(``layer.0.attention.attention.query.weight`` …), so their checkpoints load by name
(:mod:`tgq_fast.models.qformer_weights`). Two things differ from BERT, neither in the result:

* key projections have no bias: it adds the same number to all scores of a query and cancels in the softmax;
* the last layer has no text feed-forward: nobody reads the final text rows.

Symbols: B items, N = Na + Ne queries, M metadata tokens, L visual tokens, H heads, d width, dv visual width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tgq_fast import ops
from tgq_fast.errors import ArgumentError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.reference.attention import Mixing

__all__ = [
    "HybridCrossAttention",
    "QueryEncoder",
    "QueryLayer",
    "StreamLayout",
    "StreamSelfAttention",
    "initialise_connector_module",
    "stream_layout",
]


def initialise_connector_module(module: nn.Module, std: float) -> None:
    """Initialise the own parameters of one module of a connector in place; apply children first, as `apply` does.

    Linear and embedding weights are normal(0, std), biases zero, LayerNorm the identity. A module with further
    parameters, or with a start of its own (learned queries, zero gates), says so in `initialise(std)`.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()
    elif callable(own := getattr(module, "initialise", None)):
        own(std)


@dataclass(frozen=True)
class StreamLayout:
    """Which streams a stack of layers carries and who sees whom.

    Attributes:
        num_anchored, num_exploratory: Na, Ne. A Q-Former with one kind of query has only exploratory ones.
        reads_text: whether metadata tokens take part at all.
        mixing, explore_sees_text: visibility, as in :func:`tgq_fast.reference.stream_mask`.
    """

    num_anchored: int
    num_exploratory: int
    reads_text: bool
    mixing: Mixing = "block"
    explore_sees_text: bool = False

    @property
    def explores_alone(self) -> bool:
        """Whether there are exploratory queries and they see nothing but each other."""
        return self.num_exploratory > 0 and self.mixing == "block" and not self.explore_sees_text


def stream_layout(config: TGQFormerConfig) -> StreamLayout:
    """The layout of a connector with query layers: two streams for ``tgq``, one for the plain Q-Formers."""
    if config.connector != "tgq":
        return StreamLayout(0, config.num_queries, config.connector == "instructblip", "full")
    anchored, mixing = config.num_anchored_queries, config.stream_mixing
    # Without anchored queries in block mode nobody would look at the text.
    reads_text = anchored > 0 or config.explore_sees_text or mixing == "full"
    return StreamLayout(anchored, config.num_exploratory_queries, reads_text, mixing, config.explore_sees_text)


class TextPacking:
    """The real tokens of a padded batch, in rows of their own: no product is then spent on padding.

    Padding is often half of a batch of metadata. Finding the real rows waits for the mask, so this is for the CPU.
    """

    def __init__(self, mask: Tensor) -> None:
        """mask: [B, M] bool, True for real tokens."""
        self.shape = mask.shape
        self.rows = mask.flatten().nonzero()[:, 0]  # [T]
        self.starts = nn.functional.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0))  # [B + 1] where each item's rows begin

    @classmethod
    def where_useful(cls, mask: Tensor | None) -> TextPacking | None:
        """None where there is no padding to skip, or where looking for it would stall a device or a graph."""
        if mask is None or mask.device.type != "cpu" or torch.compiler.is_compiling() or bool(mask.all()):
            return None
        return cls(mask)

    def pack(self, x: Tensor) -> Tensor:
        """[B, M, ...] → [T, ...]."""
        return x.flatten(0, 1).index_select(0, self.rows)

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] → [B, M, ...], zero where there is no token."""
        padded = x.new_zeros(self.shape.numel(), *x.shape[1:])
        return padded.index_copy(0, self.rows, x).unflatten(0, self.shape)


class AttentionProjections(nn.Module):
    """Query, key and value projections of one attention; the key bias is left out because it cancels."""

    def __init__(self, width: int, source_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width, bias=False)
        self.value = nn.Linear(source_width, width)

    def heads(self, projected: Tensor) -> Tensor:
        """[..., d] → [..., H, dh]."""
        return projected.unflatten(-1, (self.num_heads, -1))


class ResidualOutput(nn.Module):
    """LN(residual + dropout(dense(x))): BERT's self-output and output."""

    def __init__(self, in_width: int, config: TGQFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Intermediate(nn.Module):
    """act(dense(x)), the first half of a feed-forward."""

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class StreamSelfAttention(nn.Module):
    """Self-attention over [A; E; T] with one set of weights, block-masked by `layout`.

    Queries and text are projected by separate products, and exploratory queries that see only themselves attend in a
    call of their own. All shapes that an exploratory row passes through are then independent of M and of the
    metadata, hence so are its bits.
    """

    def __init__(self, config: TGQFormerConfig, layout: StreamLayout) -> None:
        super().__init__()
        self.layout = layout
        self.attention = AttentionProjections(config.hidden_size, config.hidden_size, config.num_attention_heads)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(
        self,
        queries: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        *,
        text_wanted: bool,
        packing: TextPacking | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Args:
            queries: [B, N, d], anchored first.
            text: [B, M, d] or None; with `packing` [T, d].
            text_mask: [B, M] bool, True for real tokens.
            text_wanted: whether the text rows of the result are needed.

        Returns:
            [B, N, d] and the new text, shaped as the old (None without text or when not wanted).
        """
        layout, p = self.layout, self.attention
        num_anchored, num_exploratory, num_queries = layout.num_anchored, layout.num_exploratory, queries.shape[1]
        q, k, v = (p.heads(linear(queries)) for linear in (p.query, p.key, p.value))  # [B, N, H, dh]
        if text is None:
            context = ops.stream_self_attention(q, k, v, (num_anchored, num_exploratory, 0), mixing=layout.mixing)
            return self.output(context.flatten(2), queries), None

        def padded(x: Tensor) -> Tensor:
            return p.heads(x if packing is None else packing.pad(x))

        text_k, text_v = padded(p.key(text)), padded(p.value(text))  # [B, M, H, dh]
        # Text rows that nobody wants still enter the operator, but need no projection: any query will do.
        text_q = padded(p.query(text)) if text_wanted else torch.zeros_like(text_k)
        if layout.explores_alone:
            a, e = slice(0, num_anchored), slice(num_anchored, None)
            mixed = ops.stream_self_attention(
                torch.cat((q[:, a], text_q), dim=1),
                torch.cat((k[:, a], text_k), dim=1),
                torch.cat((v[:, a], text_v), dim=1),
                (num_anchored, 0, text_k.shape[1]),
                text_mask=text_mask,
            )
            alone = ops.stream_self_attention(q[:, e], k[:, e], v[:, e], (0, num_exploratory, 0))
            context, text_context = torch.cat((mixed[:, a], alone), dim=1), mixed[:, num_anchored:]
        else:
            mixed = ops.stream_self_attention(
                torch.cat((q, text_q), dim=1),
                torch.cat((k, text_k), dim=1),
                torch.cat((v, text_v), dim=1),
                (num_anchored, num_exploratory, text_k.shape[1]),
                mixing=layout.mixing,
                explore_sees_text=layout.explore_sees_text,
                text_mask=text_mask,
            )
            context, text_context = mixed[:, :num_queries], mixed[:, num_queries:]
        updated = self.output(context.flatten(2), queries)
        if not text_wanted:
            return updated, None
        text_context = text_context.flatten(2)
        return updated, self.output(text_context if packing is None else packing.pack(text_context), text)


class HybridCrossAttention(nn.Module):
    """Both query streams attend to the same tokens with shared projections, one pass for both."""

    def __init__(self, config: TGQFormerConfig, source_width: int) -> None:
        super().__init__()
        self.attention = AttentionProjections(config.hidden_size, source_width, config.num_attention_heads)
        self.output = ResidualOutput(config.hidden_size, config)

    def context(self, anchored: Tensor, exploratory: Tensor, source: Tensor, key_mask: Tensor | None) -> Tensor:
        """[B, Na, d], [B, Ne, d], [B, L, dv] → [B, N, d] before the output projection."""
        p = self.attention
        result = ops.hybrid_cross_attention(
            anchored,
            exploratory,
            source,
            p.query.weight,
            p.query.bias,
            p.key.weight,
            None,
            p.value.weight,
            p.value.bias,
            num_heads=p.num_heads,
            key_mask=key_mask,
            form="auto",
        )
        return torch.cat((result.anchored, result.exploratory), dim=1)

    def forward(self, queries: Tensor, num_anchored: int, source: Tensor, key_mask: Tensor | None) -> Tensor:
        """[B, N, d] → [B, N, d]."""
        context = self.context(queries[:, :num_anchored], queries[:, num_anchored:], source, key_mask)
        return self.output(context, queries)

    @torch.no_grad()
    def attention_map(self, queries: Tensor, source: Tensor, key_mask: Tensor | None) -> Tensor:
        """[B, N, L] attention averaged over heads, without gradient: for reports, not for the forward path."""
        p = self.attention
        q, k = p.heads(p.query(queries)), p.heads(p.key(source))
        scores = torch.einsum("bnhc,blhc->bhnl", q, k) * q.shape[-1] ** -0.5
        if key_mask is not None:
            hidden = ~key_mask[:, None, None, :]
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
            return scores.softmax(dim=-1).masked_fill(hidden, 0.0).mean(dim=1)
        return scores.softmax(dim=-1).mean(dim=1)


class QueryLayer(nn.Module):
    """One layer: self-attention, cross-attention in every c-th layer, feed-forward.

    Source: BLIP-2; separate text feed-forward, InstructBLIP; `per_stream_ffn`, ours.
    """

    def __init__(self, config: TGQFormerConfig, layout: StreamLayout, index: int) -> None:
        super().__init__()
        self.layout = layout
        self.attention = StreamSelfAttention(config, layout)
        self.crossattention = (
            HybridCrossAttention(config, config.visual_width) if index % config.cross_attention_frequency == 0 else None
        )
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

    def forward(
        self,
        queries: Tensor,
        text: Tensor | None,
        visual: Tensor,
        *,
        text_mask: Tensor | None = None,
        visual_mask: Tensor | None = None,
        packing: TextPacking | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Args:
            queries: [B, N, d]; text: [B, M, d] or None, with `packing` [T, d]; visual: [B, L, dv].

        Returns:
            queries [B, N, d], text shaped as before or None, attention [B, N, L] or None.
        """
        num_anchored = self.layout.num_anchored
        queries, text = self.attention(queries, text, text_mask, text_wanted=self.updates_text, packing=packing)
        attention = None
        if self.crossattention is not None:
            if return_attention:
                attention = self.crossattention.attention_map(queries, visual, visual_mask)
            queries = self.crossattention(queries, num_anchored, visual, visual_mask)
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
        return output(intermediate(x), x)


class QueryEncoder(nn.Module):
    """The stack of layers.

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

    def forward(
        self,
        queries: Tensor,
        text: Tensor | None,
        visual: Tensor,
        *,
        text_mask: Tensor | None = None,
        visual_mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, N, d] → the final queries and, on request, the attention [B, N, L] of the last cross layer."""
        packing = TextPacking.where_useful(text_mask) if text is not None else None
        if text is not None and packing is not None:
            text = packing.pack(text)
        last = None
        for layer in self.layer:
            queries, text, attention = layer(
                queries,
                text,
                visual,
                text_mask=text_mask,
                visual_mask=visual_mask,
                packing=packing,
                return_attention=return_attention,
            )
            last = attention if attention is not None else last
        return queries, last
