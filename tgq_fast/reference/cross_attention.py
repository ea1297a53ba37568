"""Hybrid-query cross-attention, by definition.

Symbols: B items, N = Na + Ne queries (anchored, exploratory), L visual tokens, H heads of width dh, d = H * dh model
width, dv visual width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from tgq_fast.errors import ArgumentError

Form = Literal["auto", "projected", "absorbed"]


class AttentionStats(NamedTuple):
    """Per-query statistics of the attention distribution; they carry no gradient.

    Attributes:
        lse: [B, H, N] log-sum-exp of the scaled scores over the visible keys; -inf where no key is visible.
            The key bias is left out: it shifts every score of a query alike and cancels in the softmax.
        entropy: [B, H, N] Shannon entropy in nats; 0 where no key is visible.
        group_mass: [B, H, N] attention on the keys marked by `key_group`, or None without one.
    """

    lse: Tensor
    entropy: Tensor
    group_mass: Tensor | None


class HybridAttentionOutput(NamedTuple):
    """Context of both query streams, heads merged, before the output projection.

    Attributes:
        anchored: [B, Na, d].
        exploratory: [B, Ne, d].
        stats: :class:`AttentionStats` over [anchored; exploratory] when asked for, else None.
    """

    anchored: Tensor
    exploratory: Tensor
    stats: AttentionStats | None = None


def masked_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the last axis; a row that sees no key is all zero instead of NaN."""
    if visible is None:
        return scores.softmax(dim=-1) if scores.shape[-1] else scores
    if not scores.shape[-1]:
        return scores
    hidden = ~visible
    p = scores.masked_fill(hidden, float("-inf"))
    p = p.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)  # keeps NaN out of forward and backward
    return p.softmax(dim=-1).masked_fill(hidden, 0.0)


def guide_bias(guide: Tensor, guide_scale: Tensor, num_queries: int, key_mask: Tensor | None = None) -> Tensor:
    """[B, L], [Na, H] → [B, H, N, L]: what a guide adds to the scores, zero for the queries after the first Na.

    The guide gets no gradient, and is not read where the key mask hides a key.
    """
    guide = guide.detach()
    if key_mask is not None:
        guide = guide.masked_fill(~key_mask, 0.0)
    bias = guide_scale.t()[None, :, :, None] * guide[:, None, None, :]  # [B, H, Na, L]
    return pad(bias, (0, 0, 0, num_queries - guide_scale.shape[0]))


def check_guide(
    guide: Tensor | None, guide_scale: Tensor | None, tokens: tuple[int, int], rows: tuple[int, int]
) -> None:
    """A guide [B, L] comes with a scale [Na, H], both floating point.

    Raises:
        ArgumentError: it does not.
    """
    for name, given, shape in (("guide", guide, tokens), ("guide_scale", guide_scale, rows)):
        if guide is None and guide_scale is None:
            return
        if given is None:
            raise ArgumentError(name, None, f"a tensor {list(shape)}: guide and guide_scale go together")
        if not isinstance(given, Tensor):
            raise ArgumentError(name, f"a {type(given).__name__}", f"a floating-point tensor {list(shape)}")
        if tuple(given.shape) != tuple(shape) or not given.is_floating_point():
            raise ArgumentError(name, f"{given.dtype} {tuple(given.shape)}", f"floating point {list(shape)}")


@torch.no_grad()
def _statistics(scores: Tensor, p: Tensor, visible: Tensor | None, key_group: Tensor | None) -> AttentionStats:
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)  # [B, H, N]
    some = torch.isfinite(lse)
    expected = torch.where(p > 0, p * scores, torch.zeros_like(p)).sum(dim=-1)
    entropy = torch.where(some, lse - expected, torch.zeros_like(lse))
    mass = None
    if key_group is not None:
        mass = torch.einsum("bhnl,bl->bhn", p, key_group.to(p.dtype))
    return AttentionStats(lse, entropy, mass)


def hybrid_cross_attention(
    anchored: Tensor,
    exploratory: Tensor,
    visual: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    num_heads: int,
    key_mask: Tensor | None = None,
    key_group: Tensor | None = None,
    guide: Tensor | None = None,
    guide_scale: Tensor | None = None,
    return_stats: bool = False,
    form: Form = "projected",
) -> HybridAttentionOutput:
    """Both query streams attend to the same visual tokens with shared projections.

    The projected form computes K = X Wkᵀ, V = X Wvᵀ. The absorbed form moves both products to the
    query side, softmax((q_h Wk_h) Xᵀ) X Wv_hᵀ, so the visual tokens are never projected; the two are
    equal in exact arithmetic. The key bias adds one number to all scores of a query and cancels.

    A guide says of every visual token how well it agrees with the item's metadata. Anchored query q adds
    β[q, h] · guide[b, l] to its scaled score of token l in head h; exploratory queries never see it.

    Args:
        anchored: [B, Na, d] metadata-anchored queries.
        exploratory: [B, Ne, d] exploratory queries.
        visual: [B, L, dv] visual tokens X.
        q_weight, q_bias: [d, d], [d] or None.
        k_weight, k_bias: [d, dv], [d] or None. The bias has no effect on the output.
        v_weight, v_bias: [d, dv], [d] or None.
        num_heads: H; must divide d.
        key_mask: [B, L] bool, True where a visual token may be attended. None: all. A query that may
            attend to nothing gives an exact zero.
        key_group: [B, L] bool; with `return_stats`, the attention mass on these keys is returned.
        guide: [B, L] guide of the anchored queries, in fp32; it gets no gradient. Statistics include what it adds.
        guide_scale: [Na, H] β, given if and only if a guide is.
        return_stats: also return :class:`AttentionStats`.
        form: "projected" or "absorbed" ("auto" means "projected" here).

    Returns:
        :class:`HybridAttentionOutput`.

    Raises:
        ArgumentError: d is not a multiple of num_heads, an unknown form, or a guide of other shapes or without scale.

    Source: shared keys and values for both streams, TGQ-Former (arXiv 2605.17366); the layer is BLIP-2's;
    the absorbed form, the guide and the statistics are ours.
    """
    batch, num_anchored, width = anchored.shape
    if width % num_heads:
        raise ArgumentError("num_heads", num_heads, f"a divisor of the model width {width}")
    if form not in ("auto", "projected", "absorbed"):
        raise ArgumentError("form", repr(form), "'auto', 'projected' or 'absorbed'")
    check_guide(guide, guide_scale, (batch, visual.shape[1]), (num_anchored, num_heads))
    head = width // num_heads
    queries = torch.cat((anchored, exploratory), dim=1)  # [B, N, d]
    num_queries, length = queries.shape[1], visual.shape[1]
    q = linear(queries, q_weight, q_bias) * head**-0.5
    q = q.view(batch, num_queries, num_heads, head)  # [B, N, H, dh]
    visible = None if key_mask is None else key_mask[:, None, None, :]  # [B, 1, 1, L]
    bias: Tensor | float = 0.0
    if guide is not None and guide_scale is not None:
        bias = guide_bias(guide, guide_scale, num_queries, key_mask).to(q.dtype)

    if form == "absorbed":
        wk = k_weight.view(num_heads, head, -1)  # [H, dh, dv]
        wv = v_weight.view(num_heads, head, -1)
        absorbed = torch.einsum("bnhc,hcv->bhnv", q, wk)  # q' = q_h Wk_h
        scores = torch.einsum("bhnv,blv->bhnl", absorbed, visual) + bias
        p = masked_softmax(scores, visible)
        pooled = torch.einsum("bhnl,blv->bhnv", p, visual)  # P X
        context = torch.einsum("bhnv,hcv->bnhc", pooled, wv)
    else:
        k = linear(visual, k_weight).view(batch, length, num_heads, head)
        v = linear(visual, v_weight).view(batch, length, num_heads, head)
        scores = torch.einsum("bnhc,blhc->bhnl", q, k) + bias
        p = masked_softmax(scores, visible)
        context = torch.einsum("bhnl,blhc->bnhc", p, v)
    context = context.reshape(batch, num_queries, width)
    if v_bias is not None:  # the weights of a row sum to one, or to zero when no key is visible
        some = length > 0 if key_mask is None else key_mask.any(dim=1)[:, None, None]
        context = context + v_bias * some
    stats = _statistics(scores.detach(), p.detach(), visible, key_group) if return_stats else None
    return HybridAttentionOutput(context[:, :num_anchored], context[:, num_anchored:], stats)
