"""Attention of the connector's layers: block-masked among queries and text, hybrid over the visual tokens.

Parameter names are those of `transformers`' Q-Formers. Key projections have no bias: it adds the same number to all
scores of a query and cancels in the softmax.

Symbols: B items, N = Na + Ne queries, M metadata tokens, L visual tokens, H heads, d width, dv visual width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from tgq_fast import ops
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.ops.plain import why_not_plain
from tgq_fast.reference.stream_attention import Mixing

__all__ = [
    "AttentionProjections",
    "Guide",
    "HybridCrossAttention",
    "ResidualOutput",
    "StreamLayout",
    "StreamSelfAttention",
    "TextPacking",
    "entrance_norm",
    "exit_norm",
]


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


def entrance_norm(config: TGQFormerConfig, width: int | None = None) -> nn.Module:
    """The LayerNorm at the entrance of a part with norm="pre"; the identity with norm="post"."""
    if config.norm == "post":
        return nn.Identity()
    return nn.LayerNorm(config.hidden_size if width is None else width, eps=config.layer_norm_eps)


def exit_norm(config: TGQFormerConfig) -> nn.Module:
    """The LayerNorm after a residual sum with norm="post"; the identity with norm="pre"."""
    return nn.Identity() if config.norm == "pre" else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


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
    """LN(residual + dropout(dense(x))): BERT's self-output and output; without the LayerNorm with norm="pre"."""

    def __init__(self, in_width: int, config: TGQFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, config.hidden_size)
        self.LayerNorm = exit_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class StreamSelfAttention(nn.Module):
    """Self-attention over [A; E; T] with one set of weights, block-masked by `layout`.

    Queries and text are projected by separate products, and exploratory queries that see only themselves attend in a
    call of their own. All shapes that an exploratory row passes through are then independent of M and of the
    metadata, hence so are its bits.
    """

    def __init__(self, config: TGQFormerConfig, layout: StreamLayout) -> None:
        super().__init__()
        self.layout = layout
        self.norm = entrance_norm(config)
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
        normed = self.norm(queries)
        q, k, v = (p.heads(linear(normed)) for linear in (p.query, p.key, p.value))  # [B, N, H, dh]
        if text is None:
            context = ops.stream_self_attention(q, k, v, (num_anchored, num_exploratory, 0), mixing=layout.mixing)
            return self.output(context.flatten(2), queries), None

        def padded(x: Tensor) -> Tensor:
            return p.heads(x if packing is None else packing.pad(x))

        normed_text = self.norm(text)
        text_k, text_v = padded(p.key(normed_text)), padded(p.value(normed_text))  # [B, M, H, dh]
        # Text rows that nobody wants still enter the operator, but need no projection: any query will do.
        text_q = padded(p.query(normed_text)) if text_wanted else torch.zeros_like(text_k)
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


@dataclass(frozen=True)
class Guide:
    """Where the anchored queries look: agreement [B, L] fp32 of each visual token with the item's metadata, centred
    over the visible tokens and without gradient, and its learned weight β in the scores, [Na, H], or [N, H] where
    exploratory queries are guided too.
    """

    agreement: Tensor
    scale: Tensor


class HybridCrossAttention(nn.Module):
    """Both query streams attend to the same tokens with shared projections, one pass for both.

    With norm="pre", LayerNorms stand before the queries and, unless `normed_source`, before the tokens.
    """

    def __init__(self, config: TGQFormerConfig, source_width: int, *, normed_source: bool = False) -> None:
        super().__init__()
        self.norm = entrance_norm(config)
        self.norm_source = nn.Identity() if normed_source else entrance_norm(config, source_width)
        self.attention = AttentionProjections(config.hidden_size, source_width, config.num_attention_heads)
        self.output = ResidualOutput(config.hidden_size, config)

    def context(
        self,
        anchored: Tensor,
        exploratory: Tensor,
        source: Tensor,
        key_mask: Tensor | None,
        guide: Guide | None = None,
        affine: nn.LayerNorm | None = None,
    ) -> Tensor:
        """[B, Na, d], [B, Ne, d], [B, L, dv] → [B, N, d] before the output projection; `affine` is what the source
        still lacks of its LayerNorm."""
        p = self.attention
        key: Tensor = p.key.weight
        value: Tensor = p.value.weight
        value_bias: Tensor = p.value.bias
        if affine is not None:  # the shift of the keys adds the same to all scores of a query
            value_bias = value_bias + value @ affine.bias
            key, value = key * affine.weight, value * affine.weight
        weights: tuple[Tensor | None, ...] = (p.query.weight, p.query.bias, key, None, value, value_bias)
        projected: dict[str, Any] = {}
        if why_not_plain(query=p.query, key=p.key, value=p.value):  # adapters, hooks: the layers run as they are
            anchored, exploratory = p.query(anchored), p.query(exploratory)
            weights, projected = (None,) * 6, {"keys_values": (p.key(source), p.value(source))}
        result = ops.hybrid_cross_attention(
            anchored,
            exploratory,
            source,
            *weights,
            num_heads=p.num_heads,
            key_mask=key_mask,
            guide=None if guide is None else guide.agreement,
            guide_scale=None if guide is None else guide.scale,
            form="auto",
            **projected,
        )
        return torch.cat((result.anchored, result.exploratory), dim=1)

    def forward(
        self,
        queries: Tensor,
        num_anchored: int,
        source: Tensor,
        key_mask: Tensor | None,
        guide: Guide | None = None,
    ) -> Tensor:
        """[B, N, d] → [B, N, d]."""
        normed = self.norm(queries)
        if guide is not None:
            num_anchored = guide.scale.shape[0]  # to the operator, anchored queries are those that are guided
        anchored, exploratory = normed[:, :num_anchored], normed[:, num_anchored:]
        source, affine = self._normed(source)
        return self.output(self.context(anchored, exploratory, source, key_mask, guide, affine), queries)

    def _normed(self, source: Tensor) -> tuple[Tensor, nn.LayerNorm | None]:
        """The tokens after their LayerNorm. While its weights learn and the tokens are frozen, its affine part is left
        to the projections and returned: no gradient then passes through the tokens, the largest tensor of a step.
        """
        norm, p = self.norm_source, self.attention
        if (
            not isinstance(norm, nn.LayerNorm)
            or source.requires_grad
            or not torch.is_grad_enabled()
            or why_not_plain(nn.LayerNorm, norm=norm)
            or why_not_plain(query=p.query, key=p.key, value=p.value)
        ):
            return norm(source), None
        with torch.autocast(source.device.type, enabled=False):  # in the tokens' own dtype; statistics are fp32
            return nn.functional.layer_norm(source, norm.normalized_shape, eps=norm.eps), norm

    def over_rows(self, queries: Tensor, rows: Tensor, index: Tensor, key_mask: Tensor) -> Tensor:
        """The same queries [1, N, d] for every item, over tokens that are given as distinct rows [U, ds] and an index
        [B, M] into them: products and scores once per row, then one softmax per item. → [B, N, d].
        """
        p = self.attention
        rows = self.norm_source(rows)
        q, k = p.heads(p.query(self.norm(queries))[0]), p.heads(p.key(rows))  # [N, H, dh], [U, H, dh]
        scores = torch.einsum("nhc,uhc->unh", q, k) * q.shape[-1] ** -0.5
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = embedding(index, scores.flatten(1)).unflatten(2, scores.shape[1:])  # [B, M, N, H]
        hidden = ~key_mask[:, :, None, None]
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=1).masked_fill(hidden, 0.0)
        # The values carry their bias: softmax weights sum to one, or an item sees nothing.
        values = p.heads(embedding(index, p.value(rows)))  # [B, M, H, dh]
        context = torch.einsum("bmnh,bmhc->bnhc", weights.to(values.dtype), values).flatten(2)
        return self.output(context, queries.expand_as(context))

    @torch.no_grad()
    def attention_map(
        self, queries: Tensor, source: Tensor, key_mask: Tensor | None, guide: Guide | None = None
    ) -> Tensor:
        """[B, N, L] attention averaged over heads, without gradient: for reports, not for the forward path."""
        p = self.attention
        q, k = p.heads(p.query(self.norm(queries))), p.heads(p.key(self.norm_source(source)))
        scores = torch.einsum("bnhc,blhc->bhnl", q, k) * q.shape[-1] ** -0.5
        if guide is not None:
            guided = guide.scale.shape[0]
            scores[:, :, :guided] += torch.einsum("nh,bl->bhnl", guide.scale, guide.agreement).to(scores.dtype)
        if key_mask is not None:
            hidden = ~key_mask[:, None, None, :]
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
            return scores.softmax(dim=-1).masked_fill(hidden, 0.0).mean(dim=1)
        return scores.softmax(dim=-1).mean(dim=1)
