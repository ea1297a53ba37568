"""Gradients of attention of row segments over key ranges (:mod:`tgq_fast.kernels.stream_attention`).

Two kernels without atomics: one per row tile (dQ, and δ = Σ dO ∘ O on the way), one per key tile (dK, dV). Tensors are
[B, S, H, dh] with any strides, the last one 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgq_fast.kernels.launch import on_device, placeholder, unit_stride
from tgq_fast.kernels.softmax import (
    LOG2E,
    UNSPECIALIZED,
    guide_arguments,
    guide_bias,
    guide_of_keys,
    guide_of_rows,
    load_log_sum,
)
from tgq_fast.kernels.stream_attention import (
    ALL,
    MODES,
    ONE_WAY,
    count_tiles,
    key_visible,
    member,
    own_rows,
    seen_keys,
    segment_of,
    tile_options,
)
from tgq_fast.kernels.tiling import precision


@triton.jit
def _seeing_rows(segment, n_a, n_e, n_t, MODE: tl.constexpr, SEES_TEXT: tl.constexpr):
    """Row ranges that attend to a key segment: the transpose of :func:`seen_keys`."""
    start0 = 0
    size0 = n_a
    start1 = 0
    size1 = 0
    if MODE != ALL:
        if segment == 1:
            if MODE == ONE_WAY:
                size0 = n_a + n_e
            else:
                start0 = n_a
                size0 = n_e
        elif segment == 2:
            start1 = n_a + n_e
            size1 = n_t
            if SEES_TEXT:
                size0 = n_a + n_e
    return start0, size0, start1, size1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def stream_backward_rows(
    q, k, v, key_mask, guide, guide_scale, out, d_out, lse, delta, d_q, d_guide_scale,
    scale, heads, n_a, n_e, n_t, num_guided, length, mask_first, head_width,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, mask_b, mask_l, guide_b, guide_l,
    o_b, o_s, o_h, g_b, g_s, g_h, d_b, d_s, d_h,
    MODE: tl.constexpr, SEES_TEXT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GUIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of rows, δ for the key side, and dβ of the item and head in contiguous [B, H, Na] fp32."""
    item, head, rows, segment, row, row_ok = own_rows(heads, n_a, n_e, n_t, BLOCK_S, MODE)
    start0, size0, start1, size1 = seen_keys(segment, n_a, n_e, n_t, length, MODE, SEES_TEXT)
    key_mask += item * mask_b
    col = tl.arange(0, BLOCK_D)
    in_head = col[None, :] < head_width
    there = row_ok[:, None] & in_head
    queries = tl.load(q + item * q_b + head * q_h + row[:, None] * q_s + col[None, :], mask=there, other=0.0)
    gradient = tl.load(d_out + item * g_b + head * g_h + row[:, None] * g_s + col[None, :], mask=there, other=0.0)
    result = tl.load(out + item * o_b + head * o_h + row[:, None] * o_s + col[None, :], mask=there, other=0.0)
    dot_out = tl.sum(result.to(tl.float32) * gradient.to(tl.float32), 1)
    stats = (item * heads + head) * rows + row
    tl.store(delta + stats, dot_out, mask=row_ok)
    some, log_sum = load_log_sum(lse + stats, row_ok)
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h

    if HAS_GUIDE:
        guided, place, strength = guide_of_rows(guide_scale, head, row, row_ok, num_guided)
        steered = tl.zeros([BLOCK_S], tl.float32)  # Σ dS g, Σ dS and Σ p g: see absorbed.backward_rows
        excess = tl.zeros([BLOCK_S], tl.float32)
        level = tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for begin in range(0, size0 + size1, BLOCK_K):
        index = begin + tl.arange(0, BLOCK_K)
        inside = index < size0 + size1
        key = member(index, start0, size0, start1)
        loaded = inside[:, None] & in_head
        keys = tl.load(k + key.to(tl.int64)[:, None] * k_s + col[None, :], mask=loaded, other=0.0)
        values = tl.load(v + key.to(tl.int64)[:, None] * v_s + col[None, :], mask=loaded, other=0.0)
        visible = key_visible(key, inside, key_mask, mask_first, mask_l, HAS_MASK)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        if HAS_GUIDE:
            value = guide_of_keys(guide + item * guide_b, key, visible, guide_l)
            s += guide_bias(guided[:, None], strength[:, None], value[None, :])
        p = tl.where(visible[None, :] & some[:, None], tl.exp2(s - log_sum[:, None]), 0.0)
        d_p = tl.dot(gradient, tl.trans(values), input_precision=PRECISION)
        d_scores = p * (d_p - dot_out[:, None])
        if HAS_GUIDE:
            steered += tl.sum(d_scores * value[None, :], 1)
            excess += tl.sum(d_scores, 1)
            level += tl.sum(p * value[None, :], 1)
        acc = tl.dot((d_scores * scale).to(keys.dtype), keys, acc, input_precision=PRECISION)
    if HAS_GUIDE:
        tl.store(d_guide_scale + item * heads * num_guided + place, steered - excess * level, mask=guided)
    tl.store(
        d_q + item * d_b + head * d_h + row[:, None] * d_s + col[None, :], acc.to(d_q.dtype.element_ty), mask=there
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def stream_backward_keys(
    q, k, v, key_mask, guide, guide_scale, d_out, lse, delta, d_k, d_v,
    scale, heads, n_a, n_e, n_t, num_guided, length, mask_first, head_width,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, mask_b, mask_l, guide_b, guide_l,
    g_b, g_s, g_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    MODE: tl.constexpr, SEES_TEXT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GUIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one segment, summed over the rows that see it in a fixed order."""
    rows = n_a
    tiles = tl.cdiv(length, BLOCK_K)
    if MODE != ALL:
        tiles = tl.cdiv(n_a, BLOCK_K) + tl.cdiv(n_e, BLOCK_K) + tl.cdiv(n_t, BLOCK_K)
        rows = n_a + n_e + n_t
    pair = tl.program_id(0) // tiles
    item = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    segment, first, count, local = segment_of(tl.program_id(0) % tiles, n_a, n_e, n_t, BLOCK_K, MODE)
    if MODE == ALL:
        count = length
    start0, size0, start1, size1 = _seeing_rows(segment, n_a, n_e, n_t, MODE, SEES_TEXT)
    key_mask += item * mask_b
    within = local * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = within < count
    key = first + within
    col = tl.arange(0, BLOCK_D)
    in_head = col[None, :] < head_width
    there = inside[:, None] & in_head
    position = key.to(tl.int64)[:, None]
    keys = tl.load(k + item * k_b + head * k_h + position * k_s + col[None, :], mask=there, other=0.0)
    values = tl.load(v + item * v_b + head * v_h + position * v_s + col[None, :], mask=there, other=0.0)
    seen = key_visible(key, inside, key_mask, mask_first, mask_l, HAS_MASK)
    visible = seen[:, None]
    if HAS_GUIDE:
        value = guide_of_keys(guide + item * guide_b, key, seen, guide_l)
    q += item * q_b + head * q_h
    d_out += item * g_b + head * g_h
    base = (item * heads + head) * rows

    acc_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for begin in range(0, size0 + size1, BLOCK_S):
        index = begin + tl.arange(0, BLOCK_S)
        row_ok = index < size0 + size1
        row = member(index, start0, size0, start1).to(tl.int64)
        loaded = row_ok[:, None] & in_head
        queries = tl.load(q + row[:, None] * q_s + col[None, :], mask=loaded, other=0.0)
        gradient = tl.load(d_out + row[:, None] * g_s + col[None, :], mask=loaded, other=0.0)
        some, log_sum = load_log_sum(lse + base + row, row_ok)
        dot_out = tl.load(delta + base + row, mask=row_ok, other=0.0)
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)  # [keys, rows]
        if HAS_GUIDE:
            guided, _, strength = guide_of_rows(guide_scale, head, row, row_ok, num_guided)
            s += guide_bias(guided[None, :], strength[None, :], value[:, None])
        p = tl.where(visible & some[None, :], tl.exp2(s - log_sum[None, :]), 0.0)
        acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v, input_precision=PRECISION)
        d_p = tl.dot(values, tl.trans(gradient), input_precision=PRECISION)
        d_s_tile = (p * (d_p - dot_out[None, :]) * scale).to(queries.dtype)
        acc_k = tl.dot(d_s_tile, queries, acc_k, input_precision=PRECISION)
    tl.store(
        d_k + item * dk_b + head * dk_h + position * dk_s + col[None, :], acc_k.to(d_k.dtype.element_ty), mask=there
    )
    tl.store(
        d_v + item * dv_b + head * dv_h + position * dv_s + col[None, :], acc_v.to(d_v.dtype.element_ty), mask=there
    )


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: tuple[int, int, int],
    mode: str,
    sees_text: bool,
    key_mask: Tensor | None,
    mask_first: int,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, and of the guide's scale item by item, [B, H, Na] fp32."""
    q, k, v, out, d_out = (unit_stride(t) for t in (q, k, v, out, d_out))
    batch, rows, heads, head = q.shape
    d_q = torch.empty(batch, rows, heads, head, dtype=q.dtype, device=q.device)
    d_k = torch.empty(batch, k.shape[1], heads, head, dtype=k.dtype, device=k.device)
    d_v = torch.empty(batch, k.shape[1], heads, head, dtype=v.dtype, device=v.device)
    delta = torch.empty_like(lse)
    value, strength, guided = guide_arguments(guide, guide_scale, q)
    d_guide_scale = torch.empty(batch, heads, guided, dtype=torch.float32, device=q.device)
    mask = placeholder(q.device) if key_mask is None else key_mask
    flags = {"MODE": MODES[mode], "SEES_TEXT": sees_text, "PRECISION": precision(q)}
    flags |= {"HAS_MASK": key_mask is not None, "HAS_GUIDE": guided > 0}
    sizes = (scale, heads, *lengths, guided, k.shape[1], mask_first, head)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask.stride()[:2], *value.stride()[:2])
    key_lengths = (k.shape[1], 0, 0) if mode == "full" else lengths
    with on_device(q):
        options = tile_options("stream_backward_rows", q, k, lengths)
        grid = (batch * heads * count_tiles(lengths, options["BLOCK_S"]),)
        if grid[0]:
            stream_backward_rows[grid](
                q, k, v, mask, value, strength, out, d_out, lse, delta, d_q, d_guide_scale, *sizes, *strides,
                *out.stride()[:3], *d_out.stride()[:3], *d_q.stride()[:3], **flags, **options,
            )  # fmt: skip
        options = tile_options("stream_backward_keys", q, k, lengths)
        grid = (batch * heads * count_tiles(key_lengths, options["BLOCK_K"]),)
        if grid[0]:
            stream_backward_keys[grid](
                q, k, v, mask, value, strength, d_out, lse, delta, d_k, d_v, *sizes, *strides,
                *d_out.stride()[:3], *d_k.stride()[:3], *d_v.stride()[:3], **flags, **options,
            )  # fmt: skip
    return d_q, d_k, d_v, d_guide_scale
