"""Absorbed attention: R rows of one item attend to its raw tokens X, which are keys and values at once.

    S = scale · Q' Xᵀ + β g,  P = softmax(S),  O' = P X     Q', O' [B, H, N, dv], X [B, L, dv]

The R = H · N rows of an item are cut into tiles of BLOCK_R, one program each. Scores of a tile are built key segment by
key segment, walking the width in chunks; P then stays on chip (registers, in the input dtype) and multiplies X chunk by
chunk, so nothing is rescaled or written in between and no program holds a [BLOCK_R, dv] accumulator. SEGMENTS · BLOCK_L
keys are resident; the launchers cut longer inputs into groups and merge them in a fixed order. Nothing is atomic.

The guide g [B, L] with its β [Na, H] is optional; queries after the first Na never see it. Gradients:
:mod:`tgq_fast.kernels.cross_attention_backward`.

Every tensor comes with its strides; the last dimension must have stride 1.
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
    merge,
    new_statistics,
    store_statistics,
    visible_keys,
)
from tgq_fast.kernels.tiling import precision, tile


@triton.jit
def row_offsets(row, num_queries, stride_h, stride_n):
    """Offset of flat row h * N + n; 64 bits, as head strides span the whole batch."""
    return (row // num_queries).to(tl.int64) * stride_h + (row % num_queries).to(tl.int64) * stride_n


@triton.jit
def row_scores(a, b, width, a_rows, b_rows, a_ok, b_ok, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
            BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[BLOCK_A, BLOCK_B] products of rows of a with rows of b, summed over the width in chunks."""
    acc = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    for start in range(0, width, BLOCK_C):
        col = start + tl.arange(0, BLOCK_C)
        in_width = col[None, :] < width
        left = tl.load(a + a_rows[:, None] + col[None, :], mask=a_ok[:, None] & in_width, other=0.0)
        right = tl.load(b + b_rows[:, None] + col[None, :], mask=b_ok[:, None] & in_width, other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    return acc


@triton.jit
def own_tile(count, BLOCK: tl.constexpr):
    """(item, indices of this program's tile, which of them exist), `count` elements per item in tiles of BLOCK."""
    tiles = tl.cdiv(count, BLOCK)
    index = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), index, index < count


@triton.jit
def load_tokens(x, key, length, x_l, col, in_width):
    """[keys, columns] of X."""
    inside = (key < length)[:, None] & in_width
    return tl.load(x + key.to(tl.int64)[:, None] * x_l + col[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def absorbed_forward(
    q, x, key_mask, key_group, guide, guide_scale, out, lse, entropy, mass,
    scale, rows, num_queries, num_guided, length, width,
    q_b, q_h, q_n, x_b, x_l, mask_b, mask_l, group_b, group_l, guide_b, guide_l, o_b, o_h, o_n,
    HAS_MASK: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_GUIDE: tl.constexpr, WANT_ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one item; lse, entropy and mass are contiguous [B, R] fp32."""
    item, row, row_ok = own_tile(rows, BLOCK_R)
    q += item * q_b
    x += item * x_b
    out += item * o_b
    key_mask += item * mask_b
    key_group += item * group_b
    guide += item * guide_b
    q_rows = row_offsets(row, num_queries, q_h, q_n)
    o_rows = row_offsets(row, num_queries, o_h, o_n)

    # Triton's frontend has tuple addition but no star in a tuple, hence the noqa below.
    weights = ()  # P of each segment relative to the segment's own maximum
    maxima = ()
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)  # Σ exp(s - top)
    spread = tl.zeros([BLOCK_R], tl.float32)  # Σ exp(s - top) · s, for the entropy
    marked = tl.zeros([BLOCK_R], tl.float32)  # Σ over the marked keys
    for segment in tl.static_range(SEGMENTS):
        key = segment * BLOCK_L + tl.arange(0, BLOCK_L)
        key_ok = key < length
        s = row_scores(
            q, x, width, q_rows, key.to(tl.int64) * x_l, row_ok, key_ok, BLOCK_R, BLOCK_L, BLOCK_C, PRECISION
        )
        visible = visible_keys(key, length, key_mask, mask_l, HAS_MASK)
        s *= scale * LOG2E  # base 2
        if HAS_GUIDE:
            guided, _, strength = guide_of_rows(guide_scale, row // num_queries, row % num_queries, row_ok, num_guided)
            s += guide_bias(guided[:, None], strength[:, None], guide_of_keys(guide, key, visible, guide_l)[None, :])
        s = tl.where(visible[None, :], s, float("-inf"))
        peak = tl.max(s, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)  # a segment without visible keys: p = exp2(-inf) = 0
        p = tl.exp2(s - peak[:, None])
        weights = weights + (p.to(x.dtype.element_ty),)  # type: ignore[assignment] # noqa: RUF005
        maxima = maxima + (peak,)  # type: ignore[assignment] # noqa: RUF005
        partial = tl.sum(p, 1)
        new_top = tl.maximum(top, tl.where(partial > 0, peak, float("-inf")))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        keep = tl.where(top == float("-inf"), 0.0, tl.exp2(top - shift))
        gain = tl.where(partial > 0, tl.exp2(peak - shift), 0.0)
        total = total * keep + partial * gain
        if WANT_ENTROPY:
            spread = spread * keep + tl.sum(p * tl.where(visible[None, :], s, 0.0), 1) * gain
        if HAS_GROUP:
            group = tl.load(key_group + key.to(tl.int64) * group_l, mask=key_ok, other=0) != 0
            marked = marked * keep + tl.sum(tl.where(group[None, :], p, 0.0), 1) * gain
        top = new_top

    some, inverse = store_statistics(
        lse, entropy, mass, item * rows + row, row_ok, top, total, spread, marked, WANT_ENTROPY, HAS_GROUP
    )  # fmt: skip
    shift = tl.where(some, top, 0.0)
    for start in range(0, width, BLOCK_O):
        col = start + tl.arange(0, BLOCK_O)
        in_width = col[None, :] < width
        pooled = tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32)
        for segment in tl.static_range(SEGMENTS):
            key = segment * BLOCK_L + tl.arange(0, BLOCK_L)
            tokens = load_tokens(x, key, length, x_l, col, in_width)
            part = tl.dot(weights[segment], tokens, input_precision=PRECISION)
            factor = tl.where(some, tl.exp2(tl.minimum(maxima[segment] - shift, 0.0)) * inverse, 0.0)
            pooled += part * factor[:, None]
        tl.store(out + o_rows[:, None] + col[None, :], pooled.to(out.dtype.element_ty), mask=row_ok[:, None] & in_width)


def forward(
    q: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    key_group: Tensor | None,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor | None = None,
    mass: Tensor | None = None,
) -> None:
    """Pooled tokens and statistics.

    Args:
        q: [B, H, N, dv] absorbed queries, any strides.
        x: [B, L, dv] tokens of the same dtype.
        key_mask, key_group: [B, L] bool or None.
        guide, guide_scale: [B, L] and [Na, H] fp32, or both None.
        out: [B, H, N, dv] to write, any strides but 1 in the last dimension.
        lse, entropy, mass: [B, H, N] fp32 contiguous to write; entropy and mass (which needs `key_group`) may be None.
    """
    q, x = unit_stride(q), unit_stride(x)
    batch, heads, queries, width = q.shape
    length = x.shape[1]
    options = tile("absorbed_forward", q, keys=length, rows=heads * queries)
    grid = (batch * triton.cdiv(heads * queries, options["BLOCK_R"]),)
    if not grid[0]:
        return
    resident = options["SEGMENTS"] * options["BLOCK_L"]
    groups = max(1, triton.cdiv(length, resident))
    parts: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = [(out, lse, entropy, mass)]
    if groups > 1:
        pooled = torch.empty(groups, *q.shape, dtype=torch.float32, device=q.device)
        wanted = entropy is not None, mass is not None
        stacked = pooled, *new_statistics((groups, *lse.shape), q.device, *wanted)
        optional = ([None] * groups if s is None else s.unbind() for s in stacked[2:])
        parts = list(zip(stacked[0], stacked[1], *optional))
    none = placeholder(q.device)
    steer, strength, guided = guide_arguments(guide, guide_scale, q)
    for i, (target, *stats) in enumerate(parts):
        keys = slice(i * resident, min((i + 1) * resident, length))
        value = steer[:, keys] if guided else steer
        mask, group = (none if m is None else m[:, keys] for m in (key_mask, key_group))
        tokens = x[:, keys]
        with on_device(q):
            absorbed_forward[grid](
                q, tokens, mask, group, value, strength, target, *(stats[0] if s is None else s for s in stats),
                scale, heads * queries, queries, guided, tokens.shape[1], width,
                *q.stride()[:3], *tokens.stride()[:2], *mask.stride()[:2], *group.stride()[:2], *value.stride()[:2],
                *target.stride()[:3],
                HAS_MASK=key_mask is not None, HAS_GROUP=mass is not None, HAS_GUIDE=guided > 0,
                WANT_ENTROPY=entropy is not None, PRECISION=precision(q), **options,
            )  # fmt: skip
    if groups > 1:
        merge(stacked, out, lse, entropy, mass)
