"""Redundancy loss in one streaming pass: centred moments per block of items, merged in a fixed order.

Moments are [blocks, 6, d] fp32: count, mean of ā, mean of ē, centred Σ ā², Σ ē² and Σ ā ē. Merging by Chan's update
keeps the precision that plain sums of squares would lose.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgq_fast.kernels.launch import on_device, unit_stride
from tgq_fast.kernels.tiling import tile


@triton.jit(do_not_specialize=["batch"])
def block_moments(a, e, out, batch, width, a_b, e_b, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Moments of BLOCK_B items × BLOCK_C channels; grid (blocks of items, chunks of channels)."""
    row32 = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = row32.to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_width = col < width
    row_ok = row32 < batch
    there = row_ok[:, None] & in_width[None, :]
    va = tl.load(a + row[:, None] * a_b + col[None, :], mask=there, other=0.0).to(tl.float32)
    ve = tl.load(e + row[:, None] * e_b + col[None, :], mask=there, other=0.0).to(tl.float32)
    count = tl.sum(row_ok.to(tl.float32), 0)
    center_a = tl.sum(va, 0) / tl.maximum(count, 1.0)
    center_e = tl.sum(ve, 0) / tl.maximum(count, 1.0)
    va = tl.where(row_ok[:, None], va - center_a[None, :], 0.0)
    ve = tl.where(row_ok[:, None], ve - center_e[None, :], 0.0)
    target = out + tl.program_id(0).to(tl.int64) * 6 * width + col
    tl.store(target, tl.zeros_like(center_a) + count, mask=in_width)
    tl.store(target + width, center_a, mask=in_width)
    tl.store(target + 2 * width, center_e, mask=in_width)
    tl.store(target + 3 * width, tl.sum(va * va, 0), mask=in_width)
    tl.store(target + 4 * width, tl.sum(ve * ve, 0), mask=in_width)
    tl.store(target + 5 * width, tl.sum(va * ve, 0), mask=in_width)


@triton.jit(do_not_specialize=["blocks"])
def merge_moments(moments, merged, terms, blocks, width, eps, BLOCK_C: tl.constexpr):
    """Merge all blocks of a chunk of channels: merged [5, d] = means, variances, covariance; terms [d] = C_ii² / d."""
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_width = col < width
    n = tl.zeros([BLOCK_C], tl.float32)
    mean_a = tl.zeros([BLOCK_C], tl.float32)
    mean_e = tl.zeros([BLOCK_C], tl.float32)
    var_a = tl.zeros([BLOCK_C], tl.float32)
    var_e = tl.zeros([BLOCK_C], tl.float32)
    cov = tl.zeros([BLOCK_C], tl.float32)
    part = moments + col
    for _ in range(0, blocks):
        m = tl.load(part, mask=in_width, other=1.0)
        shift_a = tl.load(part + width, mask=in_width, other=0.0) - mean_a
        shift_e = tl.load(part + 2 * width, mask=in_width, other=0.0) - mean_e
        total = n + m
        share = m / total
        cross = n * share
        mean_a += shift_a * share
        mean_e += shift_e * share
        var_a += tl.load(part + 3 * width, mask=in_width, other=0.0) + shift_a * shift_a * cross
        var_e += tl.load(part + 4 * width, mask=in_width, other=0.0) + shift_e * shift_e * cross
        cov += tl.load(part + 5 * width, mask=in_width, other=0.0) + shift_a * shift_e * cross
        n = total
        part += 6 * width
    var_a /= n
    var_e /= n
    cov /= n
    tl.store(merged + col, mean_a, mask=in_width)
    tl.store(merged + width + col, mean_e, mask=in_width)
    tl.store(merged + 2 * width + col, var_a, mask=in_width)
    tl.store(merged + 3 * width + col, var_e, mask=in_width)
    tl.store(merged + 4 * width + col, cov, mask=in_width)
    tl.store(terms + col, cov * cov / ((var_a + eps) * (var_e + eps)) / width, mask=in_width)


@triton.jit(do_not_specialize=["batch"])
def redundancy_backward(
    a, e, merged, d_loss, d_a, d_e, batch, width, a_b, e_b, eps, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Gradients of both means; elementwise given the merged moments."""
    row32 = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = row32.to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_width = col < width
    there = (row32 < batch)[:, None] & in_width[None, :]
    mean_a = tl.load(merged + col, mask=in_width, other=0.0)
    mean_e = tl.load(merged + width + col, mask=in_width, other=0.0)
    var_a = tl.load(merged + 2 * width + col, mask=in_width, other=1.0) + eps
    var_e = tl.load(merged + 3 * width + col, mask=in_width, other=1.0) + eps
    cov = tl.load(merged + 4 * width + col, mask=in_width, other=0.0)
    slope = tl.load(d_loss).to(tl.float32) * 2.0 * cov / (var_a * var_e) / width / batch
    va = tl.load(a + row[:, None] * a_b + col[None, :], mask=there, other=0.0).to(tl.float32) - mean_a[None, :]
    ve = tl.load(e + row[:, None] * e_b + col[None, :], mask=there, other=0.0).to(tl.float32) - mean_e[None, :]
    grad_a = slope[None, :] * (ve - va * (cov / var_a)[None, :])
    grad_e = slope[None, :] * (va - ve * (cov / var_e)[None, :])
    offset = row[:, None] * width + col[None, :]
    tl.store(d_a + offset, grad_a.to(d_a.dtype.element_ty), mask=there)
    tl.store(d_e + offset, grad_e.to(d_e.dtype.element_ty), mask=there)


def moments(a: Tensor, e: Tensor) -> Tensor:
    """[B, d] means of both streams → [blocks, 6, d] fp32."""
    a, e = unit_stride(a), unit_stride(e)
    batch, width = a.shape
    options = tile("redundancy", a)
    grid = (triton.cdiv(batch, options["BLOCK_B"]), triton.cdiv(width, options["BLOCK_C"]))
    out = torch.empty(grid[0], 6, width, dtype=torch.float32, device=a.device)
    if grid[0] and grid[1]:
        with on_device(a):
            block_moments[grid](a, e, out, batch, width, a.stride(0), e.stride(0), **options)
    return out


def merge(parts: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[blocks, 6, d] moments → merged moments [5, d] (means, variances, covariance) and C_ii² / d [d], fp32."""
    blocks, _, width = parts.shape
    merged = torch.empty(5, width, dtype=torch.float32, device=parts.device)
    terms = torch.empty(width, dtype=torch.float32, device=parts.device)
    options = tile("redundancy_merge", parts)
    grid = (triton.cdiv(width, options["BLOCK_C"]),)
    if not blocks:
        return merged.zero_(), terms.zero_()
    if width:
        with on_device(parts):
            merge_moments[grid](parts, merged, terms, blocks, width, eps, **options)
    return merged, terms


def backward(d_loss: Tensor, a: Tensor, e: Tensor, merged: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients [B, d] of both means."""
    a, e = unit_stride(a), unit_stride(e)
    batch, width = a.shape
    d_a, d_e = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (a, e))
    options = tile("redundancy", a)
    grid = (triton.cdiv(batch, options["BLOCK_B"]), triton.cdiv(width, options["BLOCK_C"]))
    if grid[0] and grid[1]:
        with on_device(a):
            redundancy_backward[grid](
                a, e, merged, d_loss, d_a, d_e, batch, width, a.stride(0), e.stride(0), eps, **options
            )
    return d_a, d_e
