"""InfoNCE without its logits in memory: tiles of anchors against tiles of items, in the manner of flash attention.

    forward   lse_i = log Σ_j exp(s_ij) over the items an anchor may see, picked_i = s_i,pos(i),  s = exp(t) · e eᵀ
    backward  G_ij = softmax_ij - [j = pos(i)];  anchors: Σ_j G_ij e_j,  items: Σ_i G_ij e_i,  scale: Σ_ij G_ij s_ij

An anchor sees neither itself nor other items of its group, but always its own positive. Everything is fp32: embeddings
are upcast as in the reference. Wide embeddings are split over programs in the backward; there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgq_fast.kernels.launch import on_device
from tgq_fast.kernels.tiling import precision, tile

_SIZES = ["anchors", "items"]


@triton.jit
def _logits(x, left, right, left_ok, right_ok, width, stride, scale, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
            BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scaled products of embeddings `left` with embeddings `right`."""
    acc = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for first in range(0, width, BLOCK_D):
        col = first + tl.arange(0, BLOCK_D)
        in_width = (col < width)[None, :]
        a = tl.load(x + left[:, None] * stride + col[None, :], mask=left_ok[:, None] & in_width, other=0.0)
        b = tl.load(x + right[:, None] * stride + col[None, :], mask=right_ok[:, None] & in_width, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc * scale


@triton.jit
def _seen(item, item_ok, item_group, anchor, positive, anchor_group, HAS_GROUPS: tl.constexpr):
    """[anchors, items]: which items take part in an anchor's softmax."""
    hidden = item[None, :] == anchor[:, None]
    if HAS_GROUPS:
        hidden = hidden | ((item_group[None, :] == anchor_group[:, None]) & (item_group >= 0)[None, :])
    return item_ok[None, :] & ((item[None, :] == positive[:, None]) | (hidden == 0))


@triton.jit
def _anchors(first, anchors, rows, positives, groups, HAS_GROUPS: tl.constexpr, BLOCK_A: tl.constexpr):
    """(place, whether there is one, item, positive item, group) of the anchors from `first` on."""
    index = first + tl.arange(0, BLOCK_A)
    ok = index < anchors
    anchor = tl.load(rows + index, mask=ok, other=0)
    positive = tl.load(positives + index, mask=ok, other=0)
    return index, ok, anchor, positive, tl.load(groups + anchor, mask=ok, other=-1) if HAS_GROUPS else anchor


@triton.jit
def _slope(s, seen, log_sum, item, item_ok, positive, ok):
    """[anchors, items]: derivative of the anchors' losses with respect to their logits."""
    g = tl.where(seen, tl.exp(s - log_sum[:, None]), 0.0)
    g -= tl.where((item[None, :] == positive[:, None]) & item_ok[None, :], 1.0, 0.0)
    return tl.where(ok[:, None], g, 0.0)


@triton.jit(do_not_specialize=_SIZES)
def info_nce_forward(
    x, rows, positives, groups, log_scale, lse, picked, anchors, items, width, stride,
    HAS_GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of anchors over all items."""
    index, ok, anchor, positive, anchor_group = _anchors(
        tl.program_id(0) * BLOCK_A, anchors, rows, positives, groups, HAS_GROUPS, BLOCK_A
    )
    scale = tl.exp(tl.load(log_scale).to(tl.float32))
    top = tl.full([BLOCK_A], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    target = tl.zeros([BLOCK_A], tl.float32)
    for first in range(0, items, BLOCK_B):
        item32 = first + tl.arange(0, BLOCK_B)
        item = item32.to(tl.int64)
        item_ok = item32 < items
        item_group = tl.load(groups + item, mask=item_ok, other=-1) if HAS_GROUPS else item
        s = _logits(x, anchor, item, ok, item_ok, width, stride, scale, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION)
        seen = _seen(item, item_ok, item_group, anchor, positive, anchor_group, HAS_GROUPS)
        target += tl.sum(tl.where(item[None, :] == positive[:, None], s, 0.0), 1)
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = new_top
    tl.store(lse + index, top + tl.log(total), mask=ok)
    tl.store(picked + index, target, mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def info_nce_backward_anchors(
    x, rows, positives, groups, log_scale, lse, d_x, d_scale, anchors, items, width, stride,
    HAS_GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Σ_j G_ij e_j · scale for one tile of anchors and BLOCK_O columns; column chunk 0 also leaves Σ_j G_ij s_ij."""
    index, ok, anchor, positive, anchor_group = _anchors(
        tl.program_id(0) * BLOCK_A, anchors, rows, positives, groups, HAS_GROUPS, BLOCK_A
    )
    log_sum = tl.load(lse + index, mask=ok, other=0.0)
    scale = tl.exp(tl.load(log_scale).to(tl.float32))
    out_col = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_out = (out_col < width)[None, :]
    acc = tl.zeros([BLOCK_A, BLOCK_O], tl.float32)
    slope = tl.zeros([BLOCK_A], tl.float32)
    for first in range(0, items, BLOCK_B):
        item32 = first + tl.arange(0, BLOCK_B)
        item = item32.to(tl.int64)
        item_ok = item32 < items
        item_group = tl.load(groups + item, mask=item_ok, other=-1) if HAS_GROUPS else item
        s = _logits(x, anchor, item, ok, item_ok, width, stride, scale, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION)
        seen = _seen(item, item_ok, item_group, anchor, positive, anchor_group, HAS_GROUPS)
        g = _slope(s, seen, log_sum, item, item_ok, positive, ok)
        slope += tl.sum(g * s, 1)
        values = tl.load(x + item[:, None] * stride + out_col[None, :], mask=item_ok[:, None] & in_out, other=0.0)
        acc = tl.dot(g, values, acc, input_precision=PRECISION)
    tl.store(d_x + index.to(tl.int64)[:, None] * width + out_col[None, :], acc * scale, mask=ok[:, None] & in_out)
    if tl.program_id(1) == 0:
        tl.store(d_scale + index, slope, mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def info_nce_backward_items(
    x, rows, positives, groups, log_scale, lse, d_x, anchors, items, width, stride,
    HAS_GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Σ_i G_ij e_i · scale for one tile of items and BLOCK_O columns."""
    item32 = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    item = item32.to(tl.int64)
    item_ok = item32 < items
    scale = tl.exp(tl.load(log_scale).to(tl.float32))
    item_group = tl.load(groups + item, mask=item_ok, other=-1) if HAS_GROUPS else item
    out_col = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_out = (out_col < width)[None, :]
    acc = tl.zeros([BLOCK_B, BLOCK_O], tl.float32)
    for first in range(0, anchors, BLOCK_A):
        index, ok, anchor, positive, anchor_group = _anchors(
            first, anchors, rows, positives, groups, HAS_GROUPS, BLOCK_A
        )
        log_sum = tl.load(lse + index, mask=ok, other=0.0)
        s = _logits(x, anchor, item, ok, item_ok, width, stride, scale, BLOCK_A, BLOCK_B, BLOCK_D, PRECISION)
        seen = _seen(item, item_ok, item_group, anchor, positive, anchor_group, HAS_GROUPS)
        g = _slope(s, seen, log_sum, item, item_ok, positive, ok)
        values = tl.load(x + anchor[:, None] * stride + out_col[None, :], mask=ok[:, None] & in_out, other=0.0)
        acc = tl.dot(tl.trans(g), values, acc, input_precision=PRECISION)
    tl.store(d_x + item[:, None] * width + out_col[None, :], acc * scale, mask=item_ok[:, None] & in_out)


def forward(
    x: Tensor, rows: Tensor, positives: Tensor, groups: Tensor | None, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and logit of the positive of every anchor, [R] fp32 each.

    Args:
        x: [M, D] fp32 contiguous; rows, positives: [R] int64; groups: [M] int64 or None; log_scale: [] fp32.
    """
    lse, picked = (torch.empty(rows.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    options = tile("info_nce_forward", x)
    grid = (triton.cdiv(rows.shape[0], options["BLOCK_A"]),)
    if grid[0]:
        with on_device(x):
            info_nce_forward[grid](
                x, rows, positives, rows if groups is None else groups, log_scale, lse, picked,
                rows.shape[0], *x.shape, x.stride(0), HAS_GROUPS=groups is not None, PRECISION=precision(x), **options,
            )  # fmt: skip
    return lse, picked


def backward(
    x: Tensor, rows: Tensor, positives: Tensor, groups: Tensor | None, log_scale: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ_i (lse_i - picked_i): of the anchors [R, D], of the items [M, D], of log_scale per anchor [R]."""
    anchors, (items, width) = rows.shape[0], x.shape
    d_anchors = torch.empty(anchors, width, dtype=torch.float32, device=x.device)
    d_items = torch.empty(items, width, dtype=torch.float32, device=x.device)
    d_scale = torch.empty(anchors, dtype=torch.float32, device=x.device)
    options = tile("info_nce_backward", x)
    labels = rows if groups is None else groups
    flags = {"HAS_GROUPS": groups is not None, "PRECISION": precision(x)}
    chunks = triton.cdiv(width, options["BLOCK_O"])
    with on_device(x):
        if anchors and chunks:
            info_nce_backward_anchors[(triton.cdiv(anchors, options["BLOCK_A"]), chunks)](
                x, rows, positives, labels, log_scale, lse, d_anchors, d_scale, anchors, items, width, x.stride(0),
                **flags, **options,
            )  # fmt: skip
        if items and chunks:
            info_nce_backward_items[(triton.cdiv(items, options["BLOCK_B"]), chunks)](
                x, rows, positives, labels, log_scale, lse, d_items, anchors, items, width, x.stride(0),
                **flags, **options,
            )  # fmt: skip
    return d_anchors, d_items, d_scale
