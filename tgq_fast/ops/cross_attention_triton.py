"""The kernels of absorbed cross-attention as a torch operator: schema, fake function and autograd.

``tgq_fast::absorbed_attention``: projected queries and raw visual tokens → context, heads merged; in one fused launch,
or with absorbed queries and pooled tokens that exist for one chunk of items at a time and are rebuilt in the backward.
Training saves nothing larger than the queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["absorbed_attention"]

HOST_CHUNK = 128 * 2**20  # under the interpreter


def chunk_bytes(device: torch.device) -> int:
    """How many bytes the absorbed queries of one chunk of items may take, and their pooled tokens as much again.

    A quarter of L2 keeps both buffers and the chunk's tokens in it, which pays only while a CUDA graph records the
    launches: three of them per chunk take the host longer than such a chunk takes the GPU. Else it is four times that,
    which lets the host run ahead. A tuned table (:mod:`tgq_fast.kernels.tune`) comes before the rule.
    """
    from tgq_fast.kernels.tiling import limit

    recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    tuned = limit("graph_chunk_bytes" if recording else "chunk_bytes", device)
    if tuned is not None:
        return int(tuned)
    if device.type != "cuda":
        return HOST_CHUNK
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return cache // 4 if recording else cache


def _chunks(batch: int, row_bytes: int, device: torch.device) -> tuple[int, list[slice]]:
    """Items per chunk, and the chunks."""
    step = max(1, min(batch, chunk_bytes(device) // max(1, row_bytes)))
    return step, [slice(first, min(first + step, batch)) for first in range(0, batch, step)]


def _per_head(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, d] → [H, B * N, dh], a view where `x` is contiguous."""
    return x.reshape(-1, num_heads, x.shape[-1] // num_heads).transpose(0, 1)


def _per_item(x: Tensor, queries: int) -> Tensor:
    """[H, b * N, c] → [b, H, N, c]"""
    return x.unflatten(1, (-1, queries)).transpose(0, 1)


def _rows(mask: Tensor | None, items: slice) -> Tensor | None:
    return None if mask is None else mask[items]


@torch.library.custom_op("tgq_fast::absorbed_attention", mutates_args=())
def absorbed_attention(
    q: Tensor,
    visual: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    key_mask: Tensor | None,
    key_group: Tensor | None,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    num_heads: int,
    want_stats: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, N, d] projected queries over [B, L, dv] → context [B, N, d]; lse, entropy, group mass [B, H, N] fp32.

    Entropy and mass are empty where not asked for. The value bias costs nothing where `fused`. In training it is better
    added outside: the backward has to take it out of the context, which is rounded with it.
    """
    from tgq_fast.kernels import cross_attention, cross_attention_fused, softmax

    batch, queries, width = q.shape
    head, visual_width = width // num_heads, visual.shape[2]
    scale = head**-0.5
    if fused:
        heads = q.unflatten(-1, (num_heads, head))
        context, *stats = cross_attention_fused.forward(
            heads, visual, k_weight, v_weight, v_bias, key_mask, key_group, guide, guide_scale, scale, want_stats
        )  # fmt: skip
        lse, entropy, mass = (stats[0].new_empty(0) if s is None else s for s in stats)
        return context.flatten(2), lse, entropy, mass
    wk, wv = k_weight.unflatten(0, (num_heads, head)), v_weight.unflatten(0, (num_heads, head))
    context = torch.empty_like(q, memory_format=torch.contiguous_format)
    stats = softmax.new_statistics((batch, num_heads, queries), q.device, want_stats, key_group is not None)
    step, chunks = _chunks(batch, num_heads * queries * visual_width * q.element_size(), q.device)
    # The same two buffers serve every chunk, so that a chunk finds them in L2.
    absorbed_q, pooled = (q.new_empty(num_heads, step * queries, visual_width) for _ in range(2))
    for items in chunks:
        rows = slice(items.start * queries, items.stop * queries)
        chunk_q, chunk_pooled = (buffer[:, : rows.stop - rows.start] for buffer in (absorbed_q, pooled))
        torch.bmm(_per_head(q, num_heads)[:, rows], wk, out=chunk_q)
        cross_attention.forward(
            _per_item(chunk_q, queries), visual[items], _rows(key_mask, items), _rows(key_group, items),
            _rows(guide, items), guide_scale, scale,
            _per_item(chunk_pooled, queries), *(_rows(s, items) for s in stats),
        )  # fmt: skip
        torch.bmm(chunk_pooled, wv.transpose(1, 2), out=_per_head(context, num_heads)[:, rows])
    lse, entropy, mass = (stats[0].new_empty(0) if s is None else s for s in stats)
    if v_bias is not None:
        context += _seen_bias(v_bias, lse)
    return context, lse, entropy, mass


def _seen_bias(v_bias: Tensor, lse: Tensor) -> Tensor:
    """[B, N, d] value bias of every row, zero where it sees no key."""
    seen = (lse > float("-inf")).transpose(1, 2)[..., None]  # [B, N, H, 1]
    return (seen * v_bias.unflatten(0, (lse.shape[1], -1))).flatten(2)


@absorbed_attention.register_fake
def _(q, visual, k_weight, v_weight, v_bias, key_mask, key_group, guide, guide_scale, num_heads, want_stats, fused):  # type: ignore[no-untyped-def]
    lse = q.new_empty(q.shape[0], num_heads, q.shape[1], dtype=torch.float32)
    none = lse.new_empty(0)
    entropy = torch.empty_like(lse) if want_stats else none
    mass = torch.empty_like(lse) if key_group is not None else torch.empty_like(none)
    return q.new_empty(q.shape), lse, entropy, mass


@torch.library.custom_op("tgq_fast::absorbed_attention_backward", mutates_args=())
def absorbed_attention_backward(
    d_context: Tensor,
    q: Tensor,
    visual: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    key_mask: Tensor | None,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    context: Tensor,
    lse: Tensor,
    num_heads: int,
    need_visual: bool,
    need_k_weight: bool,
    need_v_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, visual, k_weight, v_weight and guide_scale; empty where not needed.

    Sums over chunks run in order, in fp32.
    """
    from tgq_fast.kernels import cross_attention, cross_attention_backward

    batch, queries, width = q.shape
    head, visual_width = width // num_heads, visual.shape[2]
    scale = head**-0.5
    wk, wv = k_weight.unflatten(0, (num_heads, head)), v_weight.unflatten(0, (num_heads, head))
    d_q = q.new_empty(batch, queries, width)
    d_visual = visual.new_empty(visual.shape) if need_visual else visual.new_empty(0)
    d_wk, d_wv = (
        weight.new_zeros(num_heads, head, visual_width, dtype=torch.float32) if need else weight.new_empty(0)
        for weight, need in ((k_weight, need_k_weight), (v_weight, need_v_weight))
    )
    step, chunks = _chunks(batch, num_heads * queries * visual_width * q.element_size(), q.device)
    guided = 0 if guide_scale is None else guide_scale.shape[0]
    d_scale = lse.new_empty(batch, 3, num_heads, guided)
    buffers = [q.new_empty(num_heads, step * queries, visual_width) for _ in range(3)]
    for items in chunks:
        rows = slice(items.start * queries, items.stop * queries)
        tokens, mask, steer = visual[items], _rows(key_mask, items), (_rows(guide, items), guide_scale)
        q_heads, g_heads = (_per_head(t, num_heads)[:, rows] for t in (q, d_context))
        absorbed_q, pooled, d_absorbed = (buffer[:, : rows.stop - rows.start] for buffer in buffers)
        item_q, item_pooled, item_d = (_per_item(t, queries) for t in (absorbed_q, pooled, d_absorbed))
        item_lse = lse[items]
        torch.bmm(q_heads, wk, out=absorbed_q)
        if need_v_weight:
            cross_attention.forward(item_q, tokens, mask, None, *steer, scale, item_pooled, torch.empty_like(item_lse))
            d_wv += torch.bmm(g_heads.transpose(1, 2), pooled)
        torch.bmm(g_heads, wv, out=pooled)  # from here on the gradient of the pooled tokens
        # dO' · O' of a row equals d_context · context of its head, which is dh wide instead of dv.
        product = d_context[items].float() * context[items].float()
        delta = product.unflatten(-1, (num_heads, head)).sum(-1).transpose(1, 2).contiguous()
        given = (item_q, tokens, mask, *steer, item_pooled, item_lse, delta, scale)
        cross_attention_backward.backward_rows(*given, item_d, d_scale[items])
        if need_visual:
            d_visual[items] = cross_attention_backward.backward_tokens(*given)
        torch.bmm(d_absorbed, wk.transpose(1, 2), out=_per_head(d_q, num_heads)[:, rows])
        if need_k_weight:
            d_wk += torch.bmm(q_heads.transpose(1, 2), d_absorbed)
    d_wk = d_wk.view(k_weight.shape).to(k_weight.dtype) if need_k_weight else d_wk
    d_wv = d_wv.view(v_weight.shape).to(v_weight.dtype) if need_v_weight else d_wv
    steered, excess, level = d_scale.unbind(1)
    return d_q, d_visual, d_wk, d_wv, (steered - excess * level).sum(0).t().contiguous()


@absorbed_attention_backward.register_fake
def _(d_context, q, visual, k_weight, v_weight, key_mask, guide, guide_scale, context, lse, num_heads, *needs):  # type: ignore[no-untyped-def]
    grads = (t.new_empty(t.shape) if need else t.new_empty(0) for t, need in zip((visual, k_weight, v_weight), needs))
    return (q.new_empty(q.shape), *grads, lse.new_empty(0 if guide_scale is None else guide_scale.shape[0], num_heads))


def _absorbed_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, visual, k_weight, v_weight, v_bias, key_mask, _, guide, guide_scale, num_heads, *_ = inputs
    context, lse, entropy, mass = output
    ctx.mark_non_differentiable(lse, entropy, mass)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, visual, k_weight, v_weight, v_bias, key_mask, guide, guide_scale, context, lse)
    ctx.num_heads = num_heads


def _absorbed_backward(ctx, d_context, *_):  # type: ignore[no-untyped-def]
    if d_context is None:
        return (None,) * 12
    q, visual, k_weight, v_weight, v_bias, key_mask, guide, guide_scale, context, lse = ctx.saved_tensors
    needs, d_bias = ctx.needs_input_grad, None
    if v_bias is not None:
        context = context - _seen_bias(v_bias, lse)
        d_bias = (d_context * _seen_bias(torch.ones_like(v_bias), lse)).sum((0, 1)) if needs[4] else None
    saved = (q, visual, k_weight, v_weight, key_mask, guide, guide_scale, context, lse)
    *grads, d_scale = absorbed_attention_backward(d_context, *saved, ctx.num_heads, needs[1], needs[2], needs[3])
    grads = (g if need else None for g, need in zip(grads, needs))
    return (*grads, d_bias, None, None, None, d_scale if needs[8] else None, None, None, None)


absorbed_attention.register_autograd(_absorbed_backward, setup_context=_absorbed_setup)
