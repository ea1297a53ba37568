"""Hybrid-query cross-attention: both query streams over shared visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from tgq_fast.errors import ArgumentError
from tgq_fast.ops.cost import form_cost
from tgq_fast.ops.dispatch import (
    Decision,
    choose,
    explainer,
    flash_attn_importable,
    multiprocessors,
    requested_backend,
    triton_reasons,
    wants_grad,
)
from tgq_fast.ops.triton_attention import absorbed_attention, stream_attention
from tgq_fast.reference.attention import AttentionStats, HybridAttentionOutput

__all__ = ["Form", "hybrid_cross_attention", "shared_keys_values"]

Form = Literal["auto", "projected", "absorbed", "fused"]

_OP = "hybrid_cross_attention"
MAX_HEAD = 256


def head_reasons(head: int, dtype: torch.dtype) -> list[str]:
    """Why the per-head kernels cannot take heads of this width (registers: half the width in fp32)."""
    limit = 128 if dtype == torch.float32 else MAX_HEAD
    return [f"heads of width {head} exceed {limit} for {dtype}"] if head > limit else []


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
    return_stats: bool = False,
    form: Form = "auto",
    keys_values: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> HybridAttentionOutput:
    """Both query streams attend to the same visual tokens with shared projections.

    Arguments and result are those of :func:`tgq_fast.reference.hybrid_cross_attention`; in addition:

    Args:
        form: "projected"; "absorbed"; "fused", the absorbed form in one kernel, its products with the key and value
            weights included (triton only); or "auto": the cost model of :mod:`tgq_fast.ops.cost` decides between the
            first two, and :mod:`tgq_fast.kernels.fusion` whether the second runs fused.
        keys_values: [B, L, d] keys and values that were projected already (:func:`shared_keys_values`); implies the
            projected form. `k_weight` and `v_weight` are then not used; neither holds a bias.
        backend: "auto", "triton", "flash_attn" or "torch"; None: the one in force, see :mod:`tgq_fast.ops.dispatch`.

    Raises:
        ArgumentError: shapes that do not fit, or an unknown form or backend.
        BackendError: a backend that was asked for by name cannot run this call.
    """
    decision = _decide(
        anchored,
        exploratory,
        visual,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        v_weight,
        v_bias,
        num_heads=num_heads,
        key_mask=key_mask,
        key_group=key_group,
        return_stats=return_stats,
        form=form,
        keys_values=keys_values,
        backend=backend,
    )
    num_anchored, width = anchored.shape[1:]
    head = width // num_heads
    queries = torch.cat((anchored, exploratory), dim=1)  # [B, N, d]
    q = linear(queries, q_weight, q_bias).unflatten(-1, (num_heads, head))  # [B, N, H, dh]
    if decision.form != "projected":
        run = _absorbed
        if decision.backend == "triton":
            fused, inside = decision.form == "fused", None
            # With gradients the bias stays outside: see absorbed_attention.
            if fused and not wants_grad(anchored, exploratory, visual, q_weight, q_bias, k_weight, v_weight, v_bias):
                inside, v_bias = v_bias, None
            run = partial(_absorbed_triton, fused=fused, v_bias=inside)
        context, stats = run(q, visual, k_weight, v_weight, key_mask, key_group, return_stats)
    else:
        k, v = keys_values or (linear(visual, k_weight), linear(visual, v_weight))
        k, v = (x.unflatten(-1, (num_heads, head)) for x in (k, v))  # [B, L, H, dh]
        context, stats = _PROJECTED[decision.backend](q, k, v, key_mask, key_group, return_stats)
    if v_bias is not None:  # the weights of a row sum to one, or to zero when no key is visible
        bias = v_bias.to(context.dtype)
        if key_mask is not None:
            bias = bias * key_mask.any(dim=1)[:, None, None]
        elif not visual.shape[1]:
            bias = bias * 0
        context = context + bias
    return HybridAttentionOutput(context[:, :num_anchored], context[:, num_anchored:], stats)


def _check(anchored: Tensor, exploratory: Tensor, visual: Tensor, num_heads: int, form: str) -> None:
    if anchored.ndim != 3 or exploratory.ndim != 3 or visual.ndim != 3:
        shapes = tuple(map(tuple, (anchored.shape, exploratory.shape, visual.shape)))
        raise ArgumentError("anchored, exploratory, visual", shapes, "three tensors [B, Na, d], [B, Ne, d], [B, L, dv]")
    if anchored.shape[2] != exploratory.shape[2] or not (anchored.shape[0] == exploratory.shape[0] == visual.shape[0]):
        shapes = tuple(map(tuple, (anchored.shape, exploratory.shape, visual.shape)))
        raise ArgumentError("anchored, exploratory, visual", shapes, "one batch size, and one width for both streams")
    if anchored.shape[2] % num_heads:
        raise ArgumentError("num_heads", num_heads, f"a divisor of the model width {anchored.shape[2]}")
    if form not in get_args(Form):
        raise ArgumentError("form", repr(form), "one of " + ", ".join(map(repr, get_args(Form))))


@explainer(_OP)
def _decide(
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
    return_stats: bool = False,
    form: str = "auto",
    keys_values: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Decision:
    _check(anchored, exploratory, visual, num_heads, form)
    notes: tuple[str, ...] = ("form asked for by the caller",)
    open_form = form == "auto"
    if keys_values is not None:
        if form in ("absorbed", "fused"):
            raise ArgumentError("form", repr(form), "'auto' or 'projected' when keys and values are given")
        form, notes = "projected", ("keys and values were given",)
    elif form == "auto" and requested_backend(backend) == "flash_attn":
        form, notes = "projected", ("the only form of flash_attn",)
    elif form == "auto":
        cost = form_cost(
            queries=anchored.shape[1] + exploratory.shape[1],
            length=visual.shape[1],
            visual_width=visual.shape[2],
            width=anchored.shape[2],
            num_heads=num_heads,
            device=visual.device.type,
            dtype=anchored.dtype,
            grad_queries=wants_grad(anchored, exploratory, q_weight),
            grad_weights=wants_grad(k_weight, v_weight),
            grad_visual=wants_grad(visual),
        )
        form = cost.best
        notes = ("form by the cost model",) if torch.compiler.is_compiling() else (f"form by the cost model: {cost}",)
    tensors = (anchored, exploratory, visual, q_weight, k_weight, v_weight, key_mask, key_group)
    head = anchored.shape[2] // num_heads
    forced = requested_backend(backend) != "auto"
    reasons = triton_reasons(*tensors, forced=forced)
    if form != "absorbed":
        reasons += head_reasons(head, visual.dtype)
    candidates = {
        "triton": reasons,
        "flash_attn": _flash_attn_reasons(visual, head, form, key_mask, return_stats),
        "torch": ["it has no fused form"] if form == "fused" else [],
    }
    requested, chosen, rejected = choose(_OP, backend, candidates)
    if open_form and form == "absorbed" and chosen == "triton" and not head_reasons(head, visual.dtype):
        form, note = _fused(anchored, exploratory, visual, num_heads)
        notes += note
    return Decision(_OP, requested, chosen, form, rejected, notes)


def _fused(anchored: Tensor, exploratory: Tensor, visual: Tensor, num_heads: int) -> tuple[str, tuple[str, ...]]:
    """Whether an absorbed call runs as one launch, and the figures behind it."""
    from tgq_fast.kernels.fusion import fusion_cost

    processors, correction = multiprocessors(visual.device)
    if not processors:
        return "absorbed", ()
    cost = fusion_cost(
        batch=visual.shape[0],
        queries=anchored.shape[1] + exploratory.shape[1],
        length=visual.shape[1],
        visual_width=visual.shape[2],
        num_heads=num_heads,
        head=anchored.shape[2] // num_heads,
        item_size=anchored.element_size(),
        processors=processors,
        correction=correction,
    )
    return "fused" if cost.fuse else "absorbed", () if torch.compiler.is_compiling() else (str(cost),)


def _flash_attn_reasons(visual: Tensor, head: int, form: str, key_mask: Tensor | None, return_stats: bool) -> list[str]:
    reasons = []
    if not flash_attn_importable():
        reasons.append("flash-attn is not installed")
    if not visual.is_cuda:
        reasons.append(f"tensors are on {visual.device.type}, not on a CUDA device")
    if form != "projected":
        reasons.append("it has no absorbed form")
    if key_mask is not None:
        reasons.append("it takes no key mask")
    if return_stats:
        reasons.append("it returns no statistics")
    if head > MAX_HEAD:
        reasons.append(f"heads of width {head} exceed {MAX_HEAD}")
    autocast = torch.is_autocast_enabled("cuda")
    if not autocast and visual.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it does not compute in {visual.dtype}")
    return reasons


def shared_keys_values(
    visual: Tensor, k_weights: Sequence[Tensor], v_weights: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of several layers over the same visual tokens through one matrix product.

    Args:
        visual: [B, L, dv]; k_weights, v_weights: one [d, dv] per layer.

    Returns:
        (keys, values) per layer, views [B, L, d] for the `keys_values` argument of :func:`hybrid_cross_attention`.
    """
    together = linear(visual, torch.cat([w for pair in zip(k_weights, v_weights) for w in pair]))
    parts = together.split([w.shape[0] for pair in zip(k_weights, v_weights) for w in pair], dim=-1)
    return list(zip(parts[::2], parts[1::2]))


_Context = tuple[Tensor, AttentionStats | None]


def _projected(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, key_group: Tensor | None, stats: bool
) -> _Context:
    """[B, N, H, dh] over [B, L, H, dh] → [B, N, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    context = scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, N, dh]
    found = _statistics(q, k, q.shape[-1] ** -0.5, key_mask, key_group) if stats else None
    return context.transpose(1, 2).flatten(2), found


def _projected_triton(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, key_group: Tensor | None, stats: bool
) -> _Context:
    k, v = k.to(q.dtype), v.to(q.dtype)
    group = key_group if stats else None
    context, *found = stream_attention(q, k, v, key_mask, group, (q.shape[1], 0, 0), "full", False, 0, stats)
    return context.flatten(2), _stats(found, group) if stats else None


def _projected_flash(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, key_group: Tensor | None, stats: bool
) -> _Context:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k.to(q.dtype), v.to(q.dtype)).flatten(2), None


_PROJECTED = {"torch": _projected, "triton": _projected_triton, "flash_attn": _projected_flash}


def _absorbed_triton(
    q: Tensor,
    visual: Tensor,
    wk: Tensor,
    wv: Tensor,
    key_mask: Tensor | None,
    key_group: Tensor | None,
    stats: bool,
    fused: bool,
    v_bias: Tensor | None,
) -> _Context:
    dtype, heads = q.dtype, q.shape[2]
    group = key_group if stats else None
    bias = None if v_bias is None else v_bias.to(dtype)
    context, *found = absorbed_attention(
        q.flatten(2), visual.to(dtype), wk.to(dtype), wv.to(dtype), bias, key_mask, group, heads, stats, fused
    )
    return context, _stats(found, group) if stats else None


def _stats(found: list[Tensor], key_group: Tensor | None) -> AttentionStats:
    return AttentionStats(found[0], found[1], None if key_group is None else found[2])


def _absorbed(
    q: Tensor, visual: Tensor, wk: Tensor, wv: Tensor, key_mask: Tensor | None, key_group: Tensor | None, stats: bool
) -> _Context:
    """[B, N, H, dh] queries → [B, N, d]; the raw tokens are keys and values of all H * N rows at once."""
    if not stats and q.device.type == "cpu" and not torch.compiler.is_compiling() and not wants_grad(q, visual, wk, wv):
        return _absorbed_on_cpu(q, visual, wk, wv, key_mask), None
    batch, queries, num_heads, head = q.shape
    rows, visual_width = queries * num_heads, visual.shape[2]
    wk, wv = wk.unflatten(0, (num_heads, head)), wv.unflatten(0, (num_heads, head))  # [H, dh, dv]
    flat = q.permute(2, 0, 1, 3).reshape(num_heads, batch * queries, head)
    # Heads lead the rows: the layout of the batched product, so that one copy (not two) makes the rows contiguous.
    absorbed = torch.bmm(flat, wk.to(flat.dtype)).view(num_heads, batch, queries, visual_width)  # q' = q_h Wk_h
    absorbed = absorbed.transpose(0, 1).reshape(batch, rows, visual_width)[:, None]  # [B, 1, H * N, dv]
    tokens = visual.to(absorbed.dtype)[:, None]
    if q.device.type == "cpu":
        pooled = _weights(absorbed[:, 0], tokens[:, 0], key_mask, head**-0.5) @ tokens[:, 0]
    else:
        mask = None if key_mask is None else key_mask[:, None, None, :]
        pooled = scaled_dot_product_attention(absorbed, tokens, tokens, attn_mask=mask, scale=head**-0.5)  # P X
    pooled = pooled.view(batch, num_heads, queries, visual_width).transpose(0, 1)
    pooled = pooled.reshape(num_heads, batch * queries, visual_width)
    context = torch.bmm(pooled, wv.to(pooled.dtype).transpose(1, 2)).view(num_heads, batch, queries, head)
    found = None
    if stats:
        found = _statistics(absorbed, tokens, head**-0.5, key_mask, key_group)
        found = AttentionStats(*(None if s is None else s.view(batch, num_heads, queries) for s in found))  # type: ignore[arg-type]
    return context.permute(1, 2, 0, 3).reshape(batch, queries, num_heads * head), found


def _weights(q: Tensor, x: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q xᵀ): [B, R, dv] and [B, L, dv] → [B, R, L], no larger than q while L is below dv.

    For the CPU, whose flash attention works in blocks made for heads of 64, not of dv.
    """
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, x.transpose(1, 2), beta=0, alpha=scale)
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
    """Whether the torch backend would take the absorbed form for [B, N, d] queries without gradients."""
    if not visual.shape[1] or requested_backend(None) not in ("auto", "torch"):
        return False
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
def _absorbed_on_cpu(q: Tensor, visual: Tensor, wk: Tensor, wv: Tensor, key_mask: Tensor | None) -> Tensor:
    """:func:`_absorbed` for inference. Every product writes where the next reads, nothing is permuted, and one buffer
    holds the absorbed queries and then the pooled tokens; what is left is memory traffic.
    """
    batch, queries, num_heads, head = q.shape
    visual_width = visual.shape[2]
    wk, wv = (w.to(q.dtype).unflatten(0, (num_heads, head)) for w in (wk, wv))  # [H, dh, dv]
    context = torch.zeros_like(q, memory_format=torch.contiguous_format)
    step = items_at_once(q.flatten(2), visual, num_heads)
    buffer = q.new_empty(step * queries, num_heads, visual_width)
    for first in range(0, batch if visual.shape[1] else 0, step):
        items = slice(first, min(first + step, batch))
        tokens = visual[items].to(q.dtype)
        rows, into = q[items].flatten(0, 1), context[items].flatten(0, 1)  # [b * N, H, dh]
        wide = buffer[: rows.shape[0]]
        for h in range(num_heads):
            torch.mm(rows[:, h], wk[h], out=wide[:, h])
        pooled = wide.view(-1, queries * num_heads, visual_width)  # rows of an item: query, then head
        weights = _weights(pooled, tokens, None if key_mask is None else key_mask[items], head**-0.5)
        torch.bmm(weights, tokens, out=pooled)
        for h in range(num_heads):
            torch.mm(wide[:, h], wv[h].t(), out=into[:, h])
    return context.flatten(2)


@torch.no_grad()
def _statistics(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None, key_group: Tensor | None) -> Any:
    """Statistics of softmax(scale q kᵀ), [B, G, S, c] against [B, G, L, c] → [B, G, S] each, in at least fp32."""
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    some = lse > float("-inf")
    p = torch.exp(scores - torch.where(some, lse, 0.0)[..., None])
    expected = torch.where(p > 0, p * scores, 0.0).sum(dim=-1)
    entropy = torch.where(some, lse - expected, 0.0)
    mass = None if key_group is None else torch.einsum("bgsl,bl->bgs", p, key_group.to(p.dtype))
    return AttentionStats(lse, entropy, mass)
