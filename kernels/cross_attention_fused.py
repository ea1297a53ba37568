"""Absorbed attention with both projections inside: one launch from projected queries to the context of a head.

    q'_h = q_h Wk_h,  S = scale · q'_h Xᵀ + β g,  P = softmax(S),  context_h = (P X) Wv_hᵀ + bv_h

A program owns up to BLOCK_N queries of one head of one item and BLOCK_L keys. It builds the scores over chunks of the
width, making each chunk of q' on the spot, and leaves through the same chunks: O'_c = P X_c is multiplied with Wv_h
before the next chunk is made. Neither q' nor O' exists in memory. The price is that X is read by every head (from L2),
and Wk_h and Wv_h by every item: right for few items, see :mod:`tgq_fast.kernels.cross_attention_fusion`.

Keys beyond BLOCK_L, and as many parts of them as keep the multiprocessors of a small call busy, go to programs of their
own, whose contexts are merged by their log-sum-exps in a fixed order (a second launch). The last dimension of every
tensor has stride 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgq_fast.kernels.cross_attention_fusion import ROWS, parts
from tgq_fast.kernels.launch import multiprocessors, on_device, placeholder, unit_stride
from tgq_fast.kernels.softmax import (
    LOG2E,
    UNSPECIALIZED,
    guide_arguments,
    guide_bias,
    guide_of_keys,
    guide_of_rows,
    merge,
    new_statistics,
    store_statistics,
    visible_keys,
)
from tgq_fast.kernels.tiling import precision, tile


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fused_forward(
    q, x, wk, wv, bias, key_mask, key_group, guide, guide_scale, out, lse, entropy, mass,
    scale, heads, num_queries, num_guided, length, width, head_width,
    q_b, q_n, q_h, x_b, x_l, wk_d, wv_d, mask_b, mask_l, group_b, group_l, guide_b, guide_l,
    o_p, o_b, o_h, o_n, stats_p,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_GUIDE: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head and item over one part of the keys; neighbours in the grid are heads of one item.

    Weights are [H · dh, dv]; lse, entropy and mass of a part are contiguous [B, H, N] fp32.
    """
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    tiles = tl.cdiv(num_queries, BLOCK_N)
    row = (rest % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    rest = rest // tiles
    parts = tl.maximum(tl.cdiv(length, BLOCK_L), 1)
    part = rest % parts
    item = (rest // parts).to(tl.int64)
    row_ok = row < num_queries
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < head_width
    key = part * BLOCK_L + tl.arange(0, BLOCK_L)
    key_ok = key < length
    x_rows = (item * x_b + key.to(tl.int64) * x_l)[:, None]
    weight_rows = (head * head_width + dim).to(tl.int64)[:, None]
    queries = tl.load(
        q + item * q_b + head.to(tl.int64) * q_h + row.to(tl.int64)[:, None] * q_n + dim[None, :],
        mask=row_ok[:, None] & in_head[None, :], other=0.0,
    )  # fmt: skip

    s = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    for start in range(0, width, BLOCK_C):
        col = start + tl.arange(0, BLOCK_C)[None, :]
        weight = tl.load(wk + weight_rows * wk_d + col, mask=in_head[:, None] & (col < width), other=0.0)
        tokens = tl.load(x + x_rows + col, mask=key_ok[:, None] & (col < width), other=0.0)
        absorbed = tl.dot(queries, weight, input_precision=PRECISION).to(tokens.dtype)
        s = tl.dot(absorbed, tl.trans(tokens), s, input_precision=PRECISION)

    seen = visible_keys(key, length, key_mask + item * mask_b, mask_l, HAS_MASK)
    s *= scale * LOG2E  # base 2
    if HAS_GUIDE:
        guided, _, strength = guide_of_rows(guide_scale, head, row, row_ok, num_guided)
        value = guide_of_keys(guide + item * guide_b, key, seen, guide_l)
        s += guide_bias(guided[:, None], strength[:, None], value[None, :])
    visible = seen[None, :]
    s = tl.where(visible, s, float("-inf"))
    top = tl.max(s, 1)
    top = tl.where(top == float("-inf"), 0.0, top)  # no visible key: p = exp2(-inf) = 0
    p = tl.exp2(s - top[:, None])
    total = tl.sum(p, 1)
    spread = total
    if WANT_ENTROPY:
        spread = tl.sum(p * tl.where(visible, s, 0.0), 1)
    marked = total
    if HAS_GROUP:
        group = tl.load(key_group + item * group_b + key.to(tl.int64) * group_l, mask=key_ok, other=0) != 0
        marked = tl.sum(tl.where(group[None, :], p, 0.0), 1)
    place = part.to(tl.int64) * stats_p + (item * heads + head) * num_queries + row
    some, inverse = store_statistics(
        lse, entropy, mass, place, row_ok, top, total, spread, marked, WANT_ENTROPY, HAS_GROUP
    )  # fmt: skip

    p = p.to(x.dtype.element_ty)
    context = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_O):
        col = start + tl.arange(0, BLOCK_O)[None, :]
        tokens = tl.load(x + x_rows + col, mask=key_ok[:, None] & (col < width), other=0.0)
        weight = tl.load(wv + weight_rows * wv_d + col, mask=in_head[:, None] & (col < width), other=0.0)
        pooled = tl.dot(p, tokens, input_precision=PRECISION) * inverse[:, None]
        context = tl.dot(pooled.to(tokens.dtype), tl.trans(weight), context, input_precision=PRECISION)
    if HAS_BIAS:  # the weights of a row sum to one, or to zero when no key is visible
        value_bias = tl.load(bias + head * head_width + dim, mask=in_head, other=0.0).to(tl.float32)
        context += tl.where(some[:, None], value_bias[None, :], 0.0)
    target = part.to(tl.int64) * o_p + item * o_b + head.to(tl.int64) * o_h + row.to(tl.int64)[:, None] * o_n
    tl.store(out + target + dim[None, :], context.to(out.dtype.element_ty), mask=row_ok[:, None] & in_head[None, :])


def forward(
    q: Tensor,
    x: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    key_mask: Tensor | None,
    key_group: Tensor | None,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    scale: float,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Context and statistics.

    Args:
        q: [B, N, H, dh] projected queries.
        x: [B, L, dv] tokens of the same dtype; k_weight, v_weight: [H · dh, dv] of the same dtype.
        v_bias: [H · dh] of the same dtype, or None; rows without a visible key stay zero.
        key_mask, key_group: [B, L] bool or None.
        guide, guide_scale: [B, L] and [Na, H] fp32, or both None.

    Returns:
        [B, N, H, dh] contiguous, then lse, entropy and group mass [B, H, N] fp32 (None where not asked for).
    """
    q, x, k_weight, v_weight = (unit_stride(t) for t in (q, x, k_weight, v_weight))
    batch, queries, heads, head = q.shape
    length, width = x.shape[1:]
    out = torch.empty(batch, queries, heads, head, dtype=q.dtype, device=q.device)
    shape = (batch, heads, queries)
    lse, entropy, mass = new_statistics(shape, q.device, want_entropy, key_group is not None)
    if not out.numel():
        return out, lse, entropy, mass
    wanted = parts(batch * heads * triton.cdiv(queries, ROWS), length, multiprocessors(q.device))
    options = tile("fused_forward", q, keys=triton.cdiv(length, wanted), rows=queries, head=head)
    options = options | {"BLOCK_D": max(16, triton.next_power_of_2(head))}
    count = max(1, triton.cdiv(length, options["BLOCK_L"]))
    target, stats = out.transpose(1, 2)[None], (lse, entropy, mass)
    if count > 1:
        target = torch.empty(count, *shape, head, dtype=torch.float32, device=q.device)
        stats = new_statistics((count, *shape), q.device, want_entropy, key_group is not None)
    none = placeholder(q.device)
    mask, group = (none if m is None else m for m in (key_mask, key_group))
    bias = v_weight if v_bias is None else v_bias.contiguous()
    value, strength, guided = guide_arguments(guide, guide_scale, q)
    with on_device(q):
        fused_forward[(batch * count * heads * triton.cdiv(queries, options["BLOCK_N"]),)](
            q, x, k_weight, v_weight, bias, mask, group, value, strength, target,
            *(stats[0] if s is None else s for s in stats),
            scale, heads, queries, guided, length, width, head,
            *q.stride()[:3], *x.stride()[:2], k_weight.stride(0), v_weight.stride(0), *mask.stride()[:2],
            *group.stride()[:2], *value.stride()[:2], *target.stride()[:4], lse.numel(),
            HAS_BIAS=v_bias is not None, HAS_MASK=key_mask is not None, HAS_GROUP=key_group is not None,
            HAS_GUIDE=guided > 0, WANT_ENTROPY=want_entropy, PRECISION=precision(q), **options,
        )  # fmt: skip
    if count > 1:
        merge((target, *stats), out.transpose(1, 2), lse, entropy, mass)
    return out, lse, entropy, mass
