"""Attention of short row segments over key ranges: projected cross-attention and stream self-attention.

One kernel family serves both. Rows and keys of a sequence come in up to three segments [A; E; T] whose lengths are
run-time numbers; which key ranges a row segment sees follows from the mode:

    ALL      one row segment, every key (projected cross-attention, or fully mixed self-attention)
    BLOCK    A sees A, T; E sees E; T sees T
    ONE_WAY  as BLOCK, and A also sees E

and SEES_TEXT lets E see T. A program handles rows of one segment only and reads only the keys that segment sees, packed
into one or two ranges: no dense mask exists and the exploratory rows never touch metadata. Keys from `mask_first` on
obey the key mask. A guide may be added to the scores of the first rows of A, see
:mod:`tgq_fast.kernels.cross_attention`. Softmax is computed online in base 2; statistics come from the same pass.

Tensors are [B, S, H, dh] with any strides, the last one 1. Gradients:
:mod:`tgq_fast.kernels.stream_attention_backward`.
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
    new_statistics,
    store_statistics,
)
from tgq_fast.kernels.tiling import precision, tile

ALL: tl.constexpr = tl.constexpr(0)
BLOCK: tl.constexpr = tl.constexpr(1)
ONE_WAY: tl.constexpr = tl.constexpr(2)
MODES = {"full": 0, "block": 1, "one_way": 2}


@triton.jit
def segment_of(index, n_a, n_e, n_t, TILE: tl.constexpr, MODE: tl.constexpr):
    """Tile number → (segment 0 A, 1 E, 2 T; first element of the segment, its length, tile number within it)."""
    tiles_a = tl.cdiv(n_a, TILE)
    tiles_ae = tiles_a + tl.cdiv(n_e, TILE)
    segment = 0
    first = 0
    count = n_a
    local = index
    if MODE != ALL:
        if index >= tiles_ae:
            segment = 2
            first = n_a + n_e
            count = n_t
            local = index - tiles_ae
        elif index >= tiles_a:
            segment = 1
            first = n_a
            count = n_e
            local = index - tiles_a
    return segment, first, count, local


@triton.jit
def seen_keys(segment, n_a, n_e, n_t, length, MODE: tl.constexpr, SEES_TEXT: tl.constexpr):
    """Key ranges [start0, start0 + size0) and [start1, start1 + size1) that a row segment attends to."""
    start0 = 0
    size0 = length
    start1 = 0
    size1 = 0
    if MODE != ALL:
        start1 = n_a + n_e
        if segment == 0:
            size0 = n_a
            if MODE == ONE_WAY:
                size0 = n_a + n_e
            size1 = n_t
        elif segment == 1:
            start0 = n_a
            size0 = n_e
            if SEES_TEXT:
                size1 = n_t
        else:
            start0 = n_a + n_e
            size0 = n_t
    return start0, size0, start1, size1


@triton.jit
def own_rows(heads, n_a, n_e, n_t, BLOCK_S: tl.constexpr, MODE: tl.constexpr):
    """(item, head, rows of an item, segment, this program's rows, which of them exist)."""
    tiles = tl.cdiv(n_a, BLOCK_S)
    rows = n_a
    if MODE != ALL:
        tiles += tl.cdiv(n_e, BLOCK_S) + tl.cdiv(n_t, BLOCK_S)
        rows = n_a + n_e + n_t
    pair = tl.program_id(0) // tiles
    segment, first, count, local = segment_of(tl.program_id(0) % tiles, n_a, n_e, n_t, BLOCK_S, MODE)
    within = local * BLOCK_S + tl.arange(0, BLOCK_S)
    row = (first + within).to(tl.int64)
    return (pair // heads).to(tl.int64), (pair % heads).to(tl.int64), rows, segment, row, within < count


@triton.jit
def member(index, start0, size0, start1):
    """Position of the index-th element of two ranges laid end to end."""
    return tl.where(index < size0, start0 + index, start1 + index - size0)


@triton.jit
def key_visible(key, inside, key_mask, mask_first, stride, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        masked = inside & (key >= mask_first)
        seen = tl.load(key_mask + (key - mask_first).to(tl.int64) * stride, mask=masked, other=0) != 0
        inside = inside & (seen | (key < mask_first))
    return inside


@triton.jit(do_not_specialize=UNSPECIALIZED)
def stream_forward(
    q, k, v, key_mask, key_group, guide, guide_scale, out, lse, entropy, mass,
    scale, heads, n_a, n_e, n_t, num_guided, length, mask_first, head_width,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, mask_b, mask_l, group_b, group_l, guide_b, guide_l, o_b, o_s, o_h,
    MODE: tl.constexpr, SEES_TEXT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GROUP: tl.constexpr,
    HAS_GUIDE: tl.constexpr, WANT_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one segment, head and item; lse, entropy and mass are contiguous [B, H, rows] fp32."""
    item, head, rows, segment, row, row_ok = own_rows(heads, n_a, n_e, n_t, BLOCK_S, MODE)
    start0, size0, start1, size1 = seen_keys(segment, n_a, n_e, n_t, length, MODE, SEES_TEXT)
    key_mask += item * mask_b
    key_group += item * group_b
    col = tl.arange(0, BLOCK_D)
    in_head = col[None, :] < head_width
    queries = tl.load(
        q + item * q_b + head * q_h + row[:, None] * q_s + col[None, :], mask=row_ok[:, None] & in_head, other=0.0
    )
    k += item * k_b + head * k_h
    v += item * v_b + head * v_h

    if HAS_GUIDE:
        guided, _, strength = guide_of_rows(guide_scale, head, row, row_ok, num_guided)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    spread = tl.zeros([BLOCK_S], tl.float32)
    marked = tl.zeros([BLOCK_S], tl.float32)
    for begin in range(0, size0 + size1, BLOCK_K):
        index = begin + tl.arange(0, BLOCK_K)
        inside = index < size0 + size1
        key = member(index, start0, size0, start1)
        there = inside[:, None] & in_head
        keys = tl.load(k + key.to(tl.int64)[:, None] * k_s + col[None, :], mask=there, other=0.0)
        values = tl.load(v + key.to(tl.int64)[:, None] * v_s + col[None, :], mask=there, other=0.0)
        seen = key_visible(key, inside, key_mask, mask_first, mask_l, HAS_MASK)
        visible = seen[None, :]
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        if HAS_GUIDE:
            value = guide_of_keys(guide + item * guide_b, key, seen, guide_l)
            s += guide_bias(guided[:, None], strength[:, None], value[None, :])
        s = tl.where(visible, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing visible yet: p = exp2(-inf) = 0
        p = tl.exp2(s - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        if WANT_ENTROPY:
            spread = spread * keep + tl.sum(p * tl.where(visible, s, 0.0), 1)
        if HAS_GROUP:
            group = tl.load(key_group + key.to(tl.int64) * group_l, mask=inside, other=0) != 0
            marked = marked * keep + tl.sum(tl.where(group[None, :], p, 0.0), 1)
        acc = tl.dot(p.to(values.dtype), values, acc * keep[:, None], input_precision=PRECISION)
        top = new_top

    _, inverse = store_statistics(
        lse, entropy, mass, (item * heads + head) * rows + row, row_ok, top, total, spread, marked, WANT_ENTROPY,
        HAS_GROUP,
    )  # fmt: skip
    tl.store(
        out + item * o_b + head * o_h + row[:, None] * o_s + col[None, :],
        (acc * inverse[:, None]).to(out.dtype.element_ty),
        mask=row_ok[:, None] & in_head,
    )


def count_tiles(lengths: tuple[int, int, int], block: int) -> int:
    return sum(triton.cdiv(n, block) for n in lengths)


def tile_options(kernel: str, q: Tensor, k: Tensor, lengths: tuple[int, int, int]) -> dict[str, int]:
    options: dict[str, int] = tile(kernel, q, rows=max(lengths), keys=k.shape[1], head=q.shape[3])
    return options | {"BLOCK_D": max(16, triton.next_power_of_2(q.shape[3]))}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, int, int],
    mode: str,
    sees_text: bool,
    key_mask: Tensor | None,
    mask_first: int,
    key_group: Tensor | None,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    scale: float,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Attention output [B, S, H, dh] and lse, entropy, group mass [B, H, S] fp32.

    Args:
        q: [B, S, H, dh]; k, v: [B, L, H, dh], L = S unless mode is "full".
        lengths: the row segments; (S, 0, 0) for mode "full".
        key_mask: [B, L - mask_first] bool for the keys from `mask_first` on, or None.
        key_group: [B, L] bool or None.
        guide, guide_scale: [B, L] and [Na, H] fp32 for the first Na rows, or both None.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, rows, heads, head = q.shape
    out = torch.empty(batch, rows, heads, head, dtype=q.dtype, device=q.device)
    lse, entropy, mass = new_statistics((batch, heads, rows), q.device, want_entropy, key_group is not None)
    none = placeholder(q.device)
    mask, group = (none if m is None else m for m in (key_mask, key_group))
    value, strength, guided = guide_arguments(guide, guide_scale, q)
    options = tile_options("stream_forward", q, k, lengths)
    grid = (batch * heads * count_tiles(lengths, options["BLOCK_S"]),)
    if grid[0]:
        with on_device(q):
            stream_forward[grid](
                q, k, v, mask, group, value, strength, out,
                lse, lse if entropy is None else entropy, lse if mass is None else mass,
                scale, heads, *lengths, guided, k.shape[1], mask_first, head,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask.stride()[:2], *group.stride()[:2],
                *value.stride()[:2], *out.stride()[:3],
                MODE=MODES[mode], SEES_TEXT=sees_text, HAS_MASK=key_mask is not None, HAS_GROUP=key_group is not None,
                HAS_GUIDE=guided > 0, WANT_ENTROPY=want_entropy, PRECISION=precision(q), **options,
            )  # fmt: skip
    return out, lse, entropy, mass
