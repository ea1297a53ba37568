"""Gradients of absorbed attention (:mod:`tgq_fast.kernels.cross_attention`): of rows, guide's scale and tokens.

With the log-sum-exp of the forward and δ = Σ dO' ∘ O' per row given:

    dP = dO' Xᵀ,  dS = P ∘ (dP − δ),  dQ' = scale · dS X,  dβ = Σ dS g   and, on request, dX = scale · dSᵀ Q' + Pᵀ dO'

Rows and keys are tiled as in the forward; groups of keys (of rows, for the tokens) are added up in a fixed order.
Nothing is atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgq_fast.kernels.cross_attention import load_tokens, own_tile, row_offsets, row_scores
from tgq_fast.kernels.launch import on_device, placeholder, unit_stride
from tgq_fast.kernels.softmax import (
    LOG2E,
    UNSPECIALIZED,
    guide_arguments,
    guide_bias,
    guide_of_keys,
    guide_of_rows,
    load_log_sum,
    visible_keys,
)
from tgq_fast.kernels.tiling import precision, tile


@triton.jit
def _two_scores(a1, a2, b, width, a1_rows, a2_rows, b_rows, a_ok, b_ok, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
                BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Products of two row sets a1, a2 with the same rows of b, which is read once."""
    acc1 = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    acc2 = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    for start in range(0, width, BLOCK_C):
        col = start + tl.arange(0, BLOCK_C)
        in_width = col[None, :] < width
        left1 = tl.load(a1 + a1_rows[:, None] + col[None, :], mask=a_ok[:, None] & in_width, other=0.0)
        left2 = tl.load(a2 + a2_rows[:, None] + col[None, :], mask=a_ok[:, None] & in_width, other=0.0)
        right = tl.trans(tl.load(b + b_rows[:, None] + col[None, :], mask=b_ok[:, None] & in_width, other=0.0))
        acc1 = tl.dot(left1, right, acc1, input_precision=PRECISION)
        acc2 = tl.dot(left2, right, acc2, input_precision=PRECISION)
    return acc1, acc2


@triton.jit(do_not_specialize=UNSPECIALIZED)
def absorbed_backward_rows(
    q, x, key_mask, guide, guide_scale, d_out, lse, delta, d_q, d_guide_scale,
    scale, rows, num_queries, num_guided, length, width,
    q_b, q_h, q_n, x_b, x_l, mask_b, mask_l, guide_b, guide_l, g_b, g_h, g_n, d_b, d_h, d_n,
    HAS_MASK: tl.constexpr, HAS_GUIDE: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dQ' of one tile of rows, and what dβ is made of (:func:`backward_rows`), contiguous [B, 3, H, Na] fp32.

    With ACCUMULATE the results are added to what their places hold.
    """
    item, row, row_ok = own_tile(rows, BLOCK_R)
    q += item * q_b
    x += item * x_b
    d_out += item * g_b
    d_q += item * d_b
    key_mask += item * mask_b
    guide += item * guide_b
    q_rows = row_offsets(row, num_queries, q_h, q_n)
    g_rows = row_offsets(row, num_queries, g_h, g_n)
    d_rows = row_offsets(row, num_queries, d_h, d_n)
    some, log_sum = load_log_sum(lse + item * rows + row, row_ok)
    dot_out = tl.load(delta + item * rows + row, mask=row_ok, other=0.0)

    gradients = ()
    steered = tl.zeros([BLOCK_R], tl.float32)  # Σ dS g
    excess = tl.zeros([BLOCK_R], tl.float32)  # Σ dS
    level = tl.zeros([BLOCK_R], tl.float32)  # Σ p g
    for segment in tl.static_range(SEGMENTS):
        key = segment * BLOCK_L + tl.arange(0, BLOCK_L)
        s, d_p = _two_scores(
            q, d_out, x, width, q_rows, g_rows, key.to(tl.int64) * x_l, row_ok, key < length, BLOCK_R, BLOCK_L,
            BLOCK_C, PRECISION,
        )  # fmt: skip
        visible = visible_keys(key, length, key_mask, mask_l, HAS_MASK)
        s *= scale * LOG2E
        if HAS_GUIDE:
            guided, _, strength = guide_of_rows(guide_scale, row // num_queries, row % num_queries, row_ok, num_guided)
            value = guide_of_keys(guide, key, visible, guide_l)
            s += guide_bias(guided[:, None], strength[:, None], value[None, :])
        p = tl.where(visible[None, :] & some[:, None], tl.exp2(s - log_sum[:, None]), 0.0)
        d_s = p * (d_p - dot_out[:, None])
        if HAS_GUIDE:
            steered += tl.sum(d_s * value[None, :], 1)
            excess += tl.sum(d_s, 1)
            level += tl.sum(p * value[None, :], 1)
        gradients = gradients + ((d_s * scale).to(x.dtype.element_ty),)  # type: ignore[assignment] # noqa: RUF005

    if HAS_GUIDE:
        guided, place, _ = guide_of_rows(guide_scale, row // num_queries, row % num_queries, row_ok, num_guided)
        pairs = (rows // num_queries) * num_guided
        sums = d_guide_scale + item * 3 * pairs + place
        if ACCUMULATE:
            steered += tl.load(sums, mask=guided, other=0.0)
            excess += tl.load(sums + pairs, mask=guided, other=0.0)
            level += tl.load(sums + 2 * pairs, mask=guided, other=0.0)
        tl.store(sums, steered, mask=guided)
        tl.store(sums + pairs, excess, mask=guided)
        tl.store(sums + 2 * pairs, level, mask=guided)

    for start in range(0, width, BLOCK_O):
        col = start + tl.arange(0, BLOCK_O)
        in_width = col[None, :] < width
        acc = tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32)
        for segment in tl.static_range(SEGMENTS):
            key = segment * BLOCK_L + tl.arange(0, BLOCK_L)
            tokens = load_tokens(x, key, length, x_l, col, in_width)
            acc = tl.dot(gradients[segment], tokens, acc, input_precision=PRECISION)
        target = d_q + d_rows[:, None] + col[None, :]
        if ACCUMULATE:
            acc += tl.load(target, mask=row_ok[:, None] & in_width, other=0.0).to(tl.float32)
        tl.store(target, acc.to(d_q.dtype.element_ty), mask=row_ok[:, None] & in_width)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def absorbed_backward_tokens(
    q, x, key_mask, guide, guide_scale, d_out, lse, delta, d_x,
    scale, first_row, rows, num_queries, num_guided, length, width,
    q_b, q_h, q_n, x_b, x_l, mask_b, mask_l, guide_b, guide_l, g_b, g_h, g_n, d_b, d_l,
    HAS_MASK: tl.constexpr, HAS_GUIDE: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dX of one tile of keys from rows [first_row, first_row + SEGMENTS * BLOCK_R); the mirror image of the above."""
    item, key, key_ok = own_tile(length, BLOCK_L)
    q += item * q_b
    x += item * x_b
    d_out += item * g_b
    d_x += item * d_b
    key_mask += item * mask_b
    guide += item * guide_b
    visible = visible_keys(key, length, key_mask, mask_l, HAS_MASK)
    x_rows = key.to(tl.int64) * x_l

    weights = ()
    gradients = ()
    for segment in tl.static_range(SEGMENTS):
        row = first_row + segment * BLOCK_R + tl.arange(0, BLOCK_R)
        row_ok = row < rows
        q_rows = row_offsets(row, num_queries, q_h, q_n)
        g_rows = row_offsets(row, num_queries, g_h, g_n)
        some, log_sum = load_log_sum(lse + item * rows + row, row_ok)
        dot_out = tl.load(delta + item * rows + row, mask=row_ok, other=0.0)
        s = row_scores(x, q, width, x_rows, q_rows, key_ok, row_ok, BLOCK_L, BLOCK_R, BLOCK_C, PRECISION)
        s *= scale * LOG2E
        if HAS_GUIDE:
            guided, _, strength = guide_of_rows(guide_scale, row // num_queries, row % num_queries, row_ok, num_guided)
            s += guide_bias(guided[None, :], strength[None, :], guide_of_keys(guide, key, visible, guide_l)[:, None])
        p = tl.where(visible[:, None] & some[None, :], tl.exp2(s - log_sum[None, :]), 0.0)
        d_p = row_scores(x, d_out, width, x_rows, g_rows, key_ok, row_ok, BLOCK_L, BLOCK_R, BLOCK_C, PRECISION)
        weights = weights + (p.to(x.dtype.element_ty),)  # type: ignore[assignment] # noqa: RUF005
        gradients = gradients + ((p * (d_p - dot_out[None, :]) * scale).to(x.dtype.element_ty),)  # type: ignore[assignment] # noqa: RUF005

    for start in range(0, width, BLOCK_O):
        col = start + tl.arange(0, BLOCK_O)
        in_width = col[None, :] < width
        acc = tl.zeros([BLOCK_L, BLOCK_O], dtype=tl.float32)
        for segment in tl.static_range(SEGMENTS):
            row = first_row + segment * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = (row < rows)[:, None] & in_width
            q_rows = row_offsets(row, num_queries, q_h, q_n)
            g_rows = row_offsets(row, num_queries, g_h, g_n)
            acc = tl.dot(
                weights[segment], tl.load(d_out + g_rows[:, None] + col[None, :], mask=inside, other=0.0), acc,
                input_precision=PRECISION,
            )  # fmt: skip
            acc = tl.dot(
                gradients[segment], tl.load(q + q_rows[:, None] + col[None, :], mask=inside, other=0.0), acc,
                input_precision=PRECISION,
            )  # fmt: skip
        target = d_x + key.to(tl.int64)[:, None] * d_l + col[None, :]
        if ACCUMULATE:
            acc += tl.load(target, mask=key_ok[:, None] & in_width, other=0.0).to(tl.float32)
        tl.store(target, acc.to(d_x.dtype.element_ty), mask=key_ok[:, None] & in_width)


def backward_rows(
    q: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    d_q: Tensor,
    d_guide_scale: Tensor | None = None,
) -> None:
    """Gradient of the absorbed queries, and the sums that make up that of the guide's scale.

    dβ of an item is Σ dS g. It is returned as (Σ dS g, Σ dS, Σ p g): Σ dS is zero but for the error of `delta`, which
    enters Σ dS g times Σ p g and so can be taken out again.

    Args:
        d_out: [B, H, N, dv] gradient of the pooled tokens.
        lse, delta: [B, H, N] fp32 contiguous: log-sum-exp of the forward and Σ d_out ∘ out.
        d_q: [B, H, N, dv] to write, any strides but 1 in the last dimension.
        d_guide_scale: [B, 3, H, Na] fp32 contiguous to write; needed with a guide.
    """
    q, x, d_out = unit_stride(q), unit_stride(x), unit_stride(d_out)
    batch, heads, queries, width = q.shape
    length = x.shape[1]
    options = tile("absorbed_backward_rows", q, keys=length, rows=heads * queries)
    resident = options["SEGMENTS"] * options["BLOCK_L"]
    # Groups of keys are summed in fp32.
    target = d_q if length <= resident else torch.empty(q.shape, dtype=torch.float32, device=q.device)
    grid = (batch * triton.cdiv(heads * queries, options["BLOCK_R"]),)
    if not length:
        d_q.zero_()
        if d_guide_scale is not None:
            d_guide_scale.zero_()
    if not length or not grid[0]:
        return
    steer, strength, guided = guide_arguments(guide, guide_scale, q)
    for first in range(0, length, resident):
        keys = slice(first, min(first + resident, length))
        tokens = x[:, keys]
        mask = placeholder(q.device) if key_mask is None else key_mask[:, keys]
        value = steer[:, keys] if guided else steer
        with on_device(q):
            absorbed_backward_rows[grid](
                q, tokens, mask, value, strength, d_out, lse, delta, target, lse if not guided else d_guide_scale,
                scale, heads * queries, queries, guided, tokens.shape[1], width,
                *q.stride()[:3], *tokens.stride()[:2], *mask.stride()[:2], *value.stride()[:2], *d_out.stride()[:3],
                *target.stride()[:3],
                HAS_MASK=key_mask is not None, HAS_GUIDE=guided > 0, ACCUMULATE=first > 0, PRECISION=precision(q),
                **options,
            )  # fmt: skip
    if target is not d_q:
        d_q.copy_(target)


def backward_tokens(
    q: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> Tensor:
    """Gradient of the tokens, [B, L, dv]; arguments as :func:`backward_rows`."""
    q, x, d_out = unit_stride(q), unit_stride(x), unit_stride(d_out)
    batch, heads, queries, width = q.shape
    rows, length = heads * queries, x.shape[1]
    options = tile("absorbed_backward_tokens", q, keys=length, rows=rows)
    resident = options["SEGMENTS"] * options["BLOCK_R"]
    d_x = torch.empty(batch, length, width, dtype=torch.float32 if rows > resident else x.dtype, device=x.device)
    grid = (batch * triton.cdiv(length, options["BLOCK_L"]),)
    if not grid[0] or not rows:
        return d_x.zero_().to(x.dtype)
    mask = placeholder(q.device) if key_mask is None else key_mask
    value, strength, guided = guide_arguments(guide, guide_scale, q)
    for first in range(0, rows, resident):
        with on_device(q):
            absorbed_backward_tokens[grid](
                q, x, mask, value, strength, d_out, lse, delta, d_x,
                scale, first, rows, queries, guided, length, width,
                *q.stride()[:3], *x.stride()[:2], *mask.stride()[:2], *value.stride()[:2], *d_out.stride()[:3],
                *d_x.stride()[:2],
                HAS_MASK=key_mask is not None, HAS_GUIDE=guided > 0, ACCUMULATE=first > 0, PRECISION=precision(q),
                **options,
            )  # fmt: skip
    return d_x.to(x.dtype)
