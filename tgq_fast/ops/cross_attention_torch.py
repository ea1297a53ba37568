"""Hybrid-query cross-attention in PyTorch's own products: the `torch` backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tgq_fast.ops.cross_attention_cost import form_cost
from tgq_fast.ops.dispatch import wants_grad
from tgq_fast.reference.cross_attention import AttentionStats, guide_bias

__all__ = ["Context", "Keys", "absorbed", "absorbs", "items_at_once", "projected"]

Context = tuple[Tensor, AttentionStats | None]


class Keys(NamedTuple):
    """What a call says about its keys.

    Attributes:
        mask, group: [B, L] bool or None, as the operator takes them.
        guide: [B, L] without gradient, and guide_scale: [Na, H] with Na > 0; or both None.
    """

    mask: Tensor | None
    group: Tensor | None
    guide: Tensor | None
    guide_scale: Tensor | None

    def bias(self, queries: int, dtype: torch.dtype) -> Tensor | None:
        """[B, H, N, L] that the guide adds to the scores."""
        if self.guide is None or self.guide_scale is None:
            return None
        return guide_bias(self.guide, self.guide_scale, queries, self.mask).to(dtype)

    def score_mask(self, bias: Tensor | None) -> Tensor | None:
        """The `attn_mask` of PyTorch's attention: visibility, or the bias with -inf for hidden keys."""
        visible = None if self.mask is None else self.mask[:, None, None, :]
        if bias is None:
            return visible
        return bias if visible is None else bias.masked_fill(~visible, float("-inf"))

    def guide_rows(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """The guide [B, 1, L] and its strength [1, Na * H, 1] in rows of query, then head."""
        if self.guide is None or self.guide_scale is None:
            return None, torch.empty(0)
        guide = self.guide if self.mask is None else self.guide.masked_fill(~self.mask, 0.0)
        return guide[:, None].to(dtype), self.guide_scale.to(dtype).flatten()[None, :, None]


def projected(q: Tensor, k: Tensor, v: Tensor, keys: Keys, stats: bool) -> Context:
    """[B, N, H, dh] over [B, L, H, dh] → [B, N, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = keys.bias(q.shape[2], q.dtype)
    context = scaled_dot_product_attention(q, k, v, attn_mask=keys.score_mask(bias))  # [B, H, N, dh]
    found = _statistics(q, k, q.shape[-1] ** -0.5, keys, bias) if stats else None
    return context.transpose(1, 2).flatten(2), found


def absorbed(q: Tensor, visual: Tensor, wk: Tensor, wv: Tensor, keys: Keys, stats: bool) -> Context:
    """[B, N, H, dh] queries → [B, N, d]; the raw tokens are keys and values of all H * N rows at once."""
    learns = wants_grad(q, visual, wk, wv, keys.guide_scale)
    if not stats and q.device.type == "cpu" and not torch.compiler.is_compiling() and not learns:
        return _absorbed_on_cpu(q, visual, wk, wv, keys), None
    batch, queries, num_heads, head = q.shape
    rows, visual_width = queries * num_heads, visual.shape[2]
    wk, wv = wk.unflatten(0, (num_heads, head)), wv.unflatten(0, (num_heads, head))  # [H, dh, dv]
    flat = q.permute(2, 0, 1, 3).reshape(num_heads, batch * queries, head)
    # Heads lead the rows: the layout of the batched product, so that one copy (not two) makes the rows contiguous.
    wide = torch.bmm(flat, wk.to(flat.dtype)).view(num_heads, batch, queries, visual_width)  # q' = q_h Wk_h
    wide = wide.transpose(0, 1).reshape(batch, rows, visual_width)[:, None]  # [B, 1, H * N, dv]
    tokens, scale = visual.to(wide.dtype)[:, None], head**-0.5
    bias = keys.bias(queries, wide.dtype)
    bias = None if bias is None else bias.flatten(1, 2)[:, None]  # [B, 1, H * N, L]
    if q.device.type == "cpu":
        scores = _scores(wide[:, 0], tokens[:, 0], scale, None if bias is None else bias[:, 0])
        pooled = _softmax(scores, keys.mask) @ tokens[:, 0]
    else:
        mask = keys.score_mask(bias)
        pooled = scaled_dot_product_attention(wide, tokens, tokens, attn_mask=mask, scale=scale)  # P X
    pooled = pooled.view(batch, num_heads, queries, visual_width).transpose(0, 1)
    pooled = pooled.reshape(num_heads, batch * queries, visual_width)
    context = torch.bmm(pooled, wv.to(pooled.dtype).transpose(1, 2)).view(num_heads, batch, queries, head)
    found = None
    if stats:
        found = _statistics(wide, tokens, scale, keys, bias)
        found = AttentionStats(*(None if s is None else s.view(batch, num_heads, queries) for s in found))  # type: ignore[arg-type]
    return context.permute(1, 2, 0, 3).reshape(batch, queries, num_heads * head), found


def _scores(q: Tensor, x: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """scale q xᵀ + bias: [B, R, dv] and [B, L, dv] → [B, R, L], no larger than q while L is below dv.

    For the CPU, whose flash attention works in blocks made for heads of 64, not of dv.
    """
    if bias is None:
        return torch.baddbmm(q.new_zeros(1, 1, 1), q, x.transpose(1, 2), beta=0, alpha=scale)
    return torch.baddbmm(bias, q, x.transpose(1, 2), alpha=scale)


def _softmax(scores: Tensor, key_mask: Tensor | None) -> Tensor:
    """[B, R, L] scores → weights."""
    if key_mask is None:
        return scores.softmax(dim=-1)
    hidden = ~key_mask[:, None]
    # Twice, because an item without any visible key has NaN for weights.
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).masked_fill(hidden, 0.0)


# Absorbed queries of the items that the CPU takes at once. Above it their memory goes back to the system at each call.
_CPU_BYTES = 16 * 2**20


def items_at_once(queries: Tensor, visual: Tensor, num_heads: int) -> int:
    """How many items of [B, N, d] queries over [B, L, dv] tokens a pass of the absorbed form takes on the CPU."""
    item = queries.shape[1] * num_heads * visual.shape[2] * queries.element_size()
    return max(1, min(queries.shape[0], _CPU_BYTES // max(1, item)))


def absorbs(queries: Tensor, visual: Tensor, num_heads: int) -> bool:
    """Whether the absorbed form costs less for [B, N, d] queries without gradients."""
    cost = form_cost(
        queries=queries.shape[1],
        length=visual.shape[1],
        visual_width=visual.shape[2],
        width=queries.shape[2],
        num_heads=num_heads,
        device=visual.device.type,
        dtype=queries.dtype,
        grad_queries=False,
        grad_weights=False,
        grad_visual=False,
    )
    return cost.best == "absorbed"


@torch.no_grad()
def _absorbed_on_cpu(q: Tensor, visual: Tensor, wk: Tensor, wv: Tensor, keys: Keys) -> Tensor:
    """:func:`absorbed` for inference. Every product writes where the next reads, nothing is permuted, and one buffer
    holds the absorbed queries and then the pooled tokens; what is left is memory traffic.
    """
    batch, queries, num_heads, head = q.shape
    visual_width = visual.shape[2]
    wk, wv = (w.to(q.dtype).unflatten(0, (num_heads, head)) for w in (wk, wv))  # [H, dh, dv]
    context = torch.zeros_like(q, memory_format=torch.contiguous_format)
    step = items_at_once(q.flatten(2), visual, num_heads)
    buffer = q.new_empty(step * queries, num_heads, visual_width)
    guide, strength = keys.guide_rows(q.dtype)
    for first in range(0, batch if visual.shape[1] else 0, step):
        items = slice(first, min(first + step, batch))
        tokens = visual[items].to(q.dtype)
        rows, into = q[items].flatten(0, 1), context[items].flatten(0, 1)  # [b * N, H, dh]
        wide = buffer[: rows.shape[0]]
        for h in range(num_heads):
            torch.mm(rows[:, h], wk[h], out=wide[:, h])
        pooled = wide.view(-1, queries * num_heads, visual_width)  # rows of an item: query, then head
        mask = None if keys.mask is None else keys.mask[items]
        scores = _scores(pooled, tokens, head**-0.5)
        if guide is not None:  # anchored queries come first, so their rows do
            scores[:, : strength.shape[1]].addcmul_(strength, guide[items])
        torch.bmm(_softmax(scores, mask), tokens, out=pooled)
        for h in range(num_heads):
            torch.mm(wide[:, h], wv[h].t(), out=into[:, h])
    return context.flatten(2)


@torch.no_grad()
def _statistics(q: Tensor, k: Tensor, scale: float, keys: Keys, bias: Tensor | None) -> Any:
    """Statistics of softmax(scale q kᵀ + bias), [B, G, S, c] over [B, G, L, c] → [B, G, S] each, in at least fp32."""
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if bias is not None:
        scores = scores + bias
    if keys.mask is not None:
        scores = scores.masked_fill(~keys.mask[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    some = lse > float("-inf")
    surprise = torch.where(some, lse, 0.0)[..., None] - scores
    p = torch.exp(-surprise)
    entropy = torch.where(p > 0, p * surprise, 0.0).sum(dim=-1)
    mass = None if keys.group is None else torch.einsum("bgsl,bl->bgs", p, keys.group.to(p.dtype))
    return AttentionStats(lse, entropy, mass)
