"""Absorbed attention: R rows of one item attend to its raw tokens X, which are keys and values at once.

    S = scale · Q' Xᵀ,  P = softmax(S),  O' = P X           Q', O' [B, H, N, dv], X [B, L, dv]

The R = H · N rows of an item are cut into tiles of BLOCK_R, one program each. Scores of a tile are built key segment by
key segment, walking the width in chunks; P then stays on chip (registers, in the input dtype) and multiplies X chunk by
chunk, so nothing is rescaled or written in between and no program holds a [BLOCK_R, dv] accumulator. SEGMENTS · BLOCK_L
keys are resident; the launchers cut longer inputs into groups and merge them in a fixed order. Nothing is atomic.

Backward of the rows, with the log-sum-exp of the forward and δ = Σ dO' ∘ O' per row given:

    dP = dO' Xᵀ,  dS = scale · P ∘ (dP − δ),  dQ' = dS X     and, on request, dX = dSᵀ Q' + Pᵀ dO'

Every tensor comes with its strides; the last dimension must have stride 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgq_fast.kernels.launch import on_device, placeholder, unit_stride
from tgq_fast.kernels.tiling import precision, tile

# Sizes that change from call to call: neither their value nor their divisibility may select a compiled variant.
_SIZES = ["rows", "num_queries", "length", "first_row", "mask_b", "mask_l", "group_b", "group_l"]

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _row_offsets(row, num_queries, stride_h, stride_n):
    """Offset of flat row h * N + n; 64 bits, as head strides span the whole batch."""
    return (row // num_queries).to(tl.int64) * stride_h + (row % num_queries).to(tl.int64) * stride_n


@triton.jit
def _scores(a, b, width, a_rows, b_rows, a_ok, b_ok, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
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


@triton.jit
def _visible(key, length, key_mask, stride, HAS_MASK: tl.constexpr):
    inside = key < length
    if HAS_MASK:
        inside = inside & (tl.load(key_mask + key.to(tl.int64) * stride, mask=inside, other=0) != 0)
    return inside


@triton.jit(do_not_specialize=[s for s in _SIZES if s != "first_row"])
def absorbed_forward(
    q, x, key_mask, key_group, out, lse, entropy, mass,
    scale, rows, num_queries, length, width,
    q_b, q_h, q_n, x_b, x_l, mask_b, mask_l, group_b, group_l, o_b, o_h, o_n,
    HAS_MASK: tl.constexpr, HAS_GROUP: tl.constexpr, WANT_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one item; lse, entropy and mass are contiguous [B, R] fp32."""
    tiles = tl.cdiv(rows, BLOCK_R)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = row < rows
    q += item * q_b
    x += item * x_b
    out += item * o_b
    key_mask += item * mask_b
    key_group += item * group_b
    q_rows = _row_offsets(row, num_queries, q_h, q_n)
    o_rows = _row_offsets(row, num_queries, o_h, o_n)

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
        s = _scores(q, x, width, q_rows, key.to(tl.int64) * x_l, row_ok, key_ok, BLOCK_R, BLOCK_L, BLOCK_C, PRECISION)
        visible = _visible(key, length, key_mask, mask_l, HAS_MASK)
        s = tl.where(visible[None, :], s * (scale * LOG2E), float("-inf"))  # base 2
        peak = tl.max(s, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)  # a segment without visible keys: p = exp2(-inf) = 0
        p = tl.exp2(s - peak[:, None])
        weights = weights + (p.to(x.dtype.element_ty),)  # noqa: RUF005
        maxima = maxima + (peak,)  # noqa: RUF005
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

    some = total > 0
    inverse = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    log_sum = tl.where(some, (tl.where(some, top, 0.0) + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    stats = item * rows + row
    tl.store(lse + stats, log_sum, mask=row_ok)
    if WANT_ENTROPY:
        tl.store(entropy + stats, tl.where(some, log_sum - spread * inverse * LN2, 0.0), mask=row_ok)
    if HAS_GROUP:
        tl.store(mass + stats, marked * inverse, mask=row_ok)

    shift = tl.where(some, top, 0.0)
    for start in range(0, width, BLOCK_O):
        col = start + tl.arange(0, BLOCK_O)
        in_width = col[None, :] < width
        pooled = tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32)
        for segment in tl.static_range(SEGMENTS):
            key = segment * BLOCK_L + tl.arange(0, BLOCK_L)
            tokens = tl.load(
                x + key.to(tl.int64)[:, None] * x_l + col[None, :], mask=(key < length)[:, None] & in_width, other=0.0
            )
            part = tl.dot(weights[segment], tokens, input_precision=PRECISION)
            factor = tl.where(some, tl.exp2(tl.minimum(maxima[segment] - shift, 0.0)) * inverse, 0.0)
            pooled += part * factor[:, None]
        tl.store(
            out + o_rows[:, None] + col[None, :], pooled.to(out.dtype.element_ty), mask=row_ok[:, None] & in_width
        )


@triton.jit(do_not_specialize=[s for s in _SIZES if s not in ("first_row", "group_b", "group_l")])
def absorbed_backward_rows(
    q, x, key_mask, d_out, lse, delta, d_q,
    scale, rows, num_queries, length, width,
    q_b, q_h, q_n, x_b, x_l, mask_b, mask_l, g_b, g_h, g_n, d_b, d_h, d_n,
    HAS_MASK: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dQ' of one tile of rows; with ACCUMULATE the result is added to what `d_q` holds."""
    tiles = tl.cdiv(rows, BLOCK_R)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = row < rows
    q += item * q_b
    x += item * x_b
    d_out += item * g_b
    d_q += item * d_b
    key_mask += item * mask_b
    q_rows = _row_offsets(row, num_queries, q_h, q_n)
    g_rows = _row_offsets(row, num_queries, g_h, g_n)
    d_rows = _row_offsets(row, num_queries, d_h, d_n)
    log_sum = tl.load(lse + item * rows + row, mask=row_ok, other=float("-inf"))
    some = log_sum > float("-inf")
    log_sum = tl.where(some, log_sum, 0.0) * LOG2E
    dot_out = tl.load(delta + item * rows + row, mask=row_ok, other=0.0)

    gradients = ()
    for segment in tl.static_range(SEGMENTS):
        key = segment * BLOCK_L + tl.arange(0, BLOCK_L)
        s, d_p = _two_scores(
            q, d_out, x, width, q_rows, g_rows, key.to(tl.int64) * x_l, row_ok, key < length, BLOCK_R, BLOCK_L,
            BLOCK_C, PRECISION,
        )  # fmt: skip
        visible = _visible(key, length, key_mask, mask_l, HAS_MASK)[None, :] & some[:, None]
        p = tl.where(visible, tl.exp2(s * (scale * LOG2E) - log_sum[:, None]), 0.0)
        gradients = gradients + ((p * (d_p - dot_out[:, None]) * scale).to(x.dtype.element_ty),)  # noqa: RUF005

    for start in range(0, width, BLOCK_O):
        col = start + tl.arange(0, BLOCK_O)
        in_width = col[None, :] < width
        acc = tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32)
        for segment in tl.static_range(SEGMENTS):
            key = segment * BLOCK_L + tl.arange(0, BLOCK_L)
            tokens = tl.load(
                x + key.to(tl.int64)[:, None] * x_l + col[None, :], mask=(key < length)[:, None] & in_width, other=0.0
            )
            acc = tl.dot(gradients[segment], tokens, acc, input_precision=PRECISION)
        target = d_q + d_rows[:, None] + col[None, :]
        if ACCUMULATE:
            acc += tl.load(target, mask=row_ok[:, None] & in_width, other=0.0).to(tl.float32)
        tl.store(target, acc.to(d_q.dtype.element_ty), mask=row_ok[:, None] & in_width)


@triton.jit(do_not_specialize=[s for s in _SIZES if not s.startswith("group")])
def absorbed_backward_tokens(
    q, x, key_mask, d_out, lse, delta, d_x,
    scale, first_row, rows, num_queries, length, width,
    q_b, q_h, q_n, x_b, x_l, mask_b, mask_l, g_b, g_h, g_n, d_b, d_l,
    HAS_MASK: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """dX of one tile of keys from rows [first_row, first_row + SEGMENTS * BLOCK_R); the mirror image of the above."""
    tiles = tl.cdiv(length, BLOCK_L)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    key = (tl.program_id(0) % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    key_ok = key < length
    q += item * q_b
    x += item * x_b
    d_out += item * g_b
    d_x += item * d_b
    key_mask += item * mask_b
    visible = _visible(key, length, key_mask, mask_l, HAS_MASK)
    x_rows = key.to(tl.int64) * x_l

    weights = ()
    gradients = ()
    for segment in tl.static_range(SEGMENTS):
        row = first_row + segment * BLOCK_R + tl.arange(0, BLOCK_R)
        row_ok = row < rows
        q_rows = _row_offsets(row, num_queries, q_h, q_n)
        g_rows = _row_offsets(row, num_queries, g_h, g_n)
        log_sum = tl.load(lse + item * rows + row, mask=row_ok, other=float("-inf"))
        some = log_sum > float("-inf")
        log_sum = tl.where(some, log_sum, 0.0) * LOG2E
        dot_out = tl.load(delta + item * rows + row, mask=row_ok, other=0.0)
        s = _scores(x, q, width, x_rows, q_rows, key_ok, row_ok, BLOCK_L, BLOCK_R, BLOCK_C, PRECISION)
        p = tl.where(visible[:, None] & some[None, :], tl.exp2(s * (scale * LOG2E) - log_sum[None, :]), 0.0)
        d_p = _scores(x, d_out, width, x_rows, g_rows, key_ok, row_ok, BLOCK_L, BLOCK_R, BLOCK_C, PRECISION)
        weights = weights + (p.to(x.dtype.element_ty),)  # noqa: RUF005
        gradients = gradients + ((p * (d_p - dot_out[None, :]) * scale).to(x.dtype.element_ty),)  # noqa: RUF005

    for start in range(0, width, BLOCK_O):
        col = start + tl.arange(0, BLOCK_O)
        in_width = col[None, :] < width
        acc = tl.zeros([BLOCK_L, BLOCK_O], dtype=tl.float32)
        for segment in tl.static_range(SEGMENTS):
            row = first_row + segment * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = (row < rows)[:, None] & in_width
            q_rows = _row_offsets(row, num_queries, q_h, q_n)
            g_rows = _row_offsets(row, num_queries, g_h, g_n)
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


def forward(
    q: Tensor, x: Tensor, key_mask: Tensor | None, key_group: Tensor | None, scale: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Pooled tokens and statistics.

    Args:
        q: [B, H, N, dv] absorbed queries, any strides.
        x: [B, L, dv] tokens of the same dtype.
        key_mask, key_group: [B, L] bool or None.

    Returns:
        [B, H, N, dv] laid out as [H, B, N, dv] (what the product with the value weights reads), then lse, entropy and
        group mass [B, H, N] fp32 (None where not asked for).
    """
    q, x = unit_stride(q), unit_stride(x)
    heads, queries = q.shape[1:3]
    length = x.shape[1]
    options = tile("absorbed_forward", q, keys=length, rows=heads * queries)
    resident = options["SEGMENTS"] * options["BLOCK_L"]
    if length <= resident:
        return _forward(q, x, key_mask, key_group, scale, want_entropy, options, q.dtype)
    parts = []
    for first in range(0, length, resident):
        keys = slice(first, min(first + resident, length))
        parts.append(
            _forward(
                q,
                x[:, keys],
                None if key_mask is None else key_mask[:, keys],
                None if key_group is None else key_group[:, keys],
                scale,
                want_entropy,
                options,
                torch.float32,
            )
        )
    return _merged(parts, q.dtype)


def _merged(parts: list, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Combine softmaxes over disjoint groups of keys by their log-sum-exps."""
    lse = torch.logsumexp(torch.stack([part[1] for part in parts]), dim=0)
    some = lse > float("-inf")
    shares = [torch.where(some, torch.exp(part[1] - torch.where(some, lse, 0.0)), 0.0) for part in parts]
    out, expected, mass = torch.zeros_like(parts[0][0]), torch.zeros_like(lse), torch.zeros_like(lse)
    for (pooled, group_lse, entropy, group_mass), share in zip(parts, shares):
        out.addcmul_(pooled, share[..., None])
        if entropy is not None:  # Σ p s of a group is lse - entropy
            expected += share * (torch.where(group_lse > float("-inf"), group_lse, 0.0) - entropy)
        if group_mass is not None:
            mass += share * group_mass
    entropy = None if parts[0][2] is None else torch.where(some, lse - expected, 0.0)
    return out.to(dtype), lse, entropy, None if parts[0][3] is None else mass


def _forward(q, x, key_mask, key_group, scale, want_entropy, options, dtype):
    batch, heads, queries, width = q.shape
    out = torch.empty(heads, batch, queries, width, dtype=dtype, device=q.device).transpose(0, 1)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    entropy = torch.empty_like(lse) if want_entropy else None
    mass = torch.empty_like(lse) if key_group is not None else None
    none = placeholder(q.device)
    mask, group = (none if m is None else m for m in (key_mask, key_group))
    grid = (batch * triton.cdiv(heads * queries, options["BLOCK_R"]),)
    if grid[0]:
        with on_device(q):
            absorbed_forward[grid](
                q, x, mask, group, out, lse, lse if entropy is None else entropy, lse if mass is None else mass,
                scale, heads * queries, queries, x.shape[1], width,
                *q.stride()[:3], *x.stride()[:2], *mask.stride()[:2], *group.stride()[:2], *out.stride()[:3],
                HAS_MASK=key_mask is not None, HAS_GROUP=key_group is not None, WANT_ENTROPY=want_entropy,
                PRECISION=precision(q), **options,
            )  # fmt: skip
    return out, lse, entropy, mass


def backward_rows(
    q: Tensor, x: Tensor, key_mask: Tensor | None, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> Tensor:
    """Gradient of the absorbed queries, [B, H, N, dv] laid out as [H, B, N, dv].

    Args:
        d_out: [B, H, N, dv] gradient of the pooled tokens.
        lse, delta: [B, H, N] fp32 contiguous: log-sum-exp of the forward and Σ d_out ∘ out.
    """
    q, x, d_out = unit_stride(q), unit_stride(x), unit_stride(d_out)
    batch, heads, queries, width = q.shape
    length = x.shape[1]
    options = tile("absorbed_backward_rows", q, keys=length, rows=heads * queries)
    resident = options["SEGMENTS"] * options["BLOCK_L"]
    grouped = length > resident
    d_q = torch.empty(heads, batch, queries, width, dtype=torch.float32 if grouped else q.dtype, device=q.device)
    if not length:
        return d_q.zero_().transpose(0, 1)
    d_q = d_q.transpose(0, 1)
    grid = (batch * triton.cdiv(heads * queries, options["BLOCK_R"]),)
    if not grid[0]:
        return d_q.to(q.dtype)
    for first in range(0, length, resident):
        keys = slice(first, min(first + resident, length))
        tokens = x[:, keys]
        mask = placeholder(q.device) if key_mask is None else key_mask[:, keys]
        with on_device(q):
            absorbed_backward_rows[grid](
                q, tokens, mask, d_out, lse, delta, d_q,
                scale, heads * queries, queries, tokens.shape[1], width,
                *q.stride()[:3], *tokens.stride()[:2], *mask.stride()[:2], *d_out.stride()[:3], *d_q.stride()[:3],
                HAS_MASK=key_mask is not None, ACCUMULATE=first > 0, PRECISION=precision(q), **options,
            )  # fmt: skip
    return d_q.to(q.dtype)


def backward_tokens(
    q: Tensor, x: Tensor, key_mask: Tensor | None, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float
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
    for first in range(0, rows, resident):
        with on_device(q):
            absorbed_backward_tokens[grid](
                q, x, mask, d_out, lse, delta, d_x,
                scale, first, rows, queries, length, width,
                *q.stride()[:3], *x.stride()[:2], *mask.stride()[:2], *d_out.stride()[:3], *d_x.stride()[:2],
                HAS_MASK=key_mask is not None, ACCUMULATE=first > 0, PRECISION=precision(q), **options,
            )  # fmt: skip
    return d_x.to(x.dtype)
