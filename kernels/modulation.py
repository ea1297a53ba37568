"""Dual-gated vector modulation: pooling, both gate MLPs, centred sigmoid and residual scaling in one kernel each way.

A program owns ITEMS items. Forward, first walk over the channels: token means, fed straight into the hidden layers
[s; has_metadata; v_g; ā; ē] W1aᵀ and [v_g; ē] W1eᵀ (both held on chip). Second walk: gates from the hidden layers,
tokens read again (from L2: a program's tokens are small) and scaled. Backward walks the same way: gate gradients and
their product with W2 first, then token, mean and image gradients. Weight gradients are sums over items of outer
products: the kernel leaves the factors in memory and the launcher multiplies them, so nothing is atomic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tgq_fast.kernels.launch import on_device, placeholder, unit_stride
from tgq_fast.kernels.tiling import precision, tile

_SIZES = ["batch", "n_a", "n_e"]


@triton.jit
def centred_sigmoid(z):
    """tanh(z / 2) with full relative precision near zero."""
    x = z * 0.5
    x2 = x * x
    series = x * (1.0 + x2 * (-0.33333333333 + x2 * (0.13333333333 - x2 * 0.05396825397)))
    small = tl.exp(-tl.abs(z))
    value = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(z) < 0.25, series, tl.where(z < 0, -value, value))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _weights(w, row, row_ok, stride, col, limit):
    """Tile [rows, columns] of a row-major weight."""
    return tl.load(w + row[:, None] * stride + col[None, :], mask=row_ok[:, None] & (col < limit)[None, :], other=0.0)


@triton.jit
def _token_mean(x, item, item_ok, tokens, col, in_width, x_b, x_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_C: tl.constexpr):  # fmt: skip
    """[BLOCK_M, BLOCK_C] fp32 mean over a stream's tokens; zero for a stream without tokens."""
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, tokens, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        there = item_ok[:, None, None] & (token < tokens)[None, :, None] & in_width[None, None, :]
        offset = item[:, None, None] * x_b + token.to(tl.int64)[None, :, None] * x_n + col[None, None, :]
        total += tl.sum(tl.load(x + offset, mask=there, other=0.0).to(tl.float32), 1)
    return total / tl.maximum(tokens, 1)


@triton.jit
def _scale_tokens(x, out, factor, item, item_ok, tokens, col, in_width, x_b, x_n, o_b, o_n, BLOCK_N: tl.constexpr):
    for first in range(0, tokens, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        there = item_ok[:, None, None] & (token < tokens)[None, :, None] & in_width[None, None, :]
        position = token.to(tl.int64)[None, :, None]
        value = tl.load(x + item[:, None, None] * x_b + position * x_n + col[None, None, :], mask=there, other=0.0)
        value = value.to(tl.float32) * factor[:, None, :]
        tl.store(
            out + item[:, None, None] * o_b + position * o_n + col[None, None, :],
            value.to(out.dtype.element_ty),
            mask=there,
        )


@triton.jit
def _own_items(batch, ITEMS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(this program's items, 64 bits, and which of the BLOCK_M lanes hold one)."""
    lane = tl.arange(0, BLOCK_M)
    item = tl.program_id(0) * ITEMS + lane
    return item.to(tl.int64), (lane < ITEMS) & (item < batch)


@triton.jit(do_not_specialize=_SIZES)
def modulation_forward(
    a, e, agreement, has_metadata, image, flag_a, w1a, b1a, w2a, b2a, w1e, b1e, w2e, b2e,
    out_a, out_e, gate_a, gate_e, pre_a, pre_e, mean_a, mean_e,
    alpha, batch, n_a, n_e, width, image_width, rank_a, rank_e, gate_width,
    a_b, a_n, e_b, e_n, image_b, w1a_r, w1e_r, w2a_c, w2e_c, b2_c, oa_b, oa_n, oe_b, oe_n,
    PRECISION: tl.constexpr, ITEMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """ITEMS ≤ BLOCK_M items; flag_a is [2, rank_a], w1a the anchored W1 without its two flag columns."""
    dtype = a.dtype.element_ty
    item, item_ok = _own_items(batch, ITEMS, BLOCK_M)
    unit = tl.arange(0, RANK)
    in_a = unit < rank_a
    in_e = unit < rank_e

    s = tl.load(agreement + item, mask=item_ok, other=0.0).to(tl.float32)
    has = tl.load(has_metadata + item, mask=item_ok, other=0.0).to(tl.float32)
    hidden_a = tl.load(b1a + unit, mask=in_a, other=0.0).to(tl.float32)[None, :]
    hidden_a = hidden_a + s[:, None] * tl.load(flag_a + unit, mask=in_a, other=0.0).to(tl.float32)[None, :]
    hidden_a = hidden_a + has[:, None] * tl.load(flag_a + rank_a + unit, mask=in_a, other=0.0).to(tl.float32)[None, :]
    hidden_e = tl.zeros([BLOCK_M, RANK], tl.float32)
    hidden_e += tl.load(b1e + unit, mask=in_e, other=0.0).to(tl.float32)[None, :]

    for first in range(0, image_width, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        there = item_ok[:, None] & (col < image_width)[None, :]
        v_g = tl.load(image + item[:, None] * image_b + col[None, :], mask=there, other=0.0)
        wa = _weights(w1a, unit, in_a, w1a_r, col, image_width)
        we = _weights(w1e, unit, in_e, w1e_r, col, image_width)
        hidden_a = tl.dot(v_g, tl.trans(wa), hidden_a, input_precision=PRECISION)
        hidden_e = tl.dot(v_g, tl.trans(we), hidden_e, input_precision=PRECISION)

    for first in range(0, width, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        in_width = col < width
        ma = _token_mean(a, item, item_ok, n_a, col, in_width, a_b, a_n, BLOCK_M, BLOCK_N, BLOCK_C)
        me = _token_mean(e, item, item_ok, n_e, col, in_width, e_b, e_n, BLOCK_M, BLOCK_N, BLOCK_C)
        there = item_ok[:, None] & in_width[None, :]
        tl.store(mean_a + item[:, None] * width + col[None, :], ma.to(dtype), mask=there)
        tl.store(mean_e + item[:, None] * width + col[None, :], me.to(dtype), mask=there)
        waa = _weights(w1a + image_width, unit, in_a, w1a_r, col, width)
        wae = _weights(w1a + image_width + width, unit, in_a, w1a_r, col, width)
        wee = _weights(w1e + image_width, unit, in_e, w1e_r, col, width)
        hidden_a = tl.dot(ma.to(dtype), tl.trans(waa), hidden_a, input_precision=PRECISION)
        hidden_a = tl.dot(me.to(dtype), tl.trans(wae), hidden_a, input_precision=PRECISION)
        hidden_e = tl.dot(me.to(dtype), tl.trans(wee), hidden_e, input_precision=PRECISION)

    tl.store(pre_a + item[:, None] * rank_a + unit[None, :], hidden_a, mask=item_ok[:, None] & in_a[None, :])
    tl.store(pre_e + item[:, None] * rank_e + unit[None, :], hidden_e, mask=item_ok[:, None] & in_e[None, :])
    active_a = gelu(hidden_a).to(dtype)
    active_e = gelu(hidden_e).to(dtype)

    for first in range(0, width, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        in_width = col < width
        wa = _weights(w2a, col, in_width, w2a_c, unit, rank_a)
        we = _weights(w2e, col, in_width, w2e_c, unit, rank_e)
        za = tl.dot(active_a, tl.trans(wa), input_precision=PRECISION)
        ze = tl.dot(active_e, tl.trans(we), input_precision=PRECISION)
        ga = centred_sigmoid(za + tl.load(b2a + col * b2_c, mask=in_width, other=0.0).to(tl.float32)[None, :])
        ge = centred_sigmoid(ze + tl.load(b2e + col * b2_c, mask=in_width, other=0.0).to(tl.float32)[None, :])
        there = item_ok[:, None] & (col < gate_width)[None, :]
        tl.store(gate_a + item[:, None] * gate_width + col[None, :], ga.to(dtype), mask=there)
        tl.store(gate_e + item[:, None] * gate_width + col[None, :], ge.to(dtype), mask=there)
        _scale_tokens(a, out_a, 1.0 + alpha * ga, item, item_ok, n_a, col, in_width, a_b, a_n, oa_b, oa_n, BLOCK_N)
        _scale_tokens(e, out_e, 1.0 + alpha * ge, item, item_ok, n_e, col, in_width, e_b, e_n, oe_b, oe_n, BLOCK_N)


@triton.jit
def _gate_gradient(x, d_out, d_gate, gate, item, item_ok, tokens, col, in_width, gate_width, alpha, gate_c, x_b, x_n,
                   g_b, g_n, HAS_D_GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    """Gradient of the gate logits of one channel chunk, and the gate itself."""
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, tokens, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        there = item_ok[:, None, None] & (token < tokens)[None, :, None] & in_width[None, None, :]
        position = token.to(tl.int64)[None, :, None]
        value = tl.load(x + item[:, None, None] * x_b + position * x_n + col[None, None, :], mask=there, other=0.0)
        slope = tl.load(d_out + item[:, None, None] * g_b + position * g_n + col[None, None, :], mask=there, other=0.0)
        total += tl.sum(value.to(tl.float32) * slope.to(tl.float32), 1)
    total *= alpha
    if HAS_D_GATE:
        there = item_ok[:, None] & (col < gate_width)[None, :]
        total += tl.load(d_gate + item[:, None] * gate_width + col[None, :], mask=there, other=0.0).to(tl.float32)
    there = item_ok[:, None] & in_width[None, :]
    g = tl.load(gate + item[:, None] * gate_width + (col * gate_c)[None, :], mask=there, other=0.0).to(tl.float32)
    return total * 0.5 * (1.0 - g * g), g


@triton.jit
def _token_gradient(d_out, d_x, factor, shift, item, item_ok, tokens, col, in_width, g_b, g_n, d_b, d_n,
                    BLOCK_N: tl.constexpr):  # fmt: skip
    for first in range(0, tokens, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        there = item_ok[:, None, None] & (token < tokens)[None, :, None] & in_width[None, None, :]
        position = token.to(tl.int64)[None, :, None]
        slope = tl.load(d_out + item[:, None, None] * g_b + position * g_n + col[None, None, :], mask=there, other=0.0)
        value = slope.to(tl.float32) * factor[:, None, :] + shift[:, None, :]
        tl.store(
            d_x + item[:, None, None] * d_b + position * d_n + col[None, None, :],
            value.to(d_x.dtype.element_ty),
            mask=there,
        )


@triton.jit(do_not_specialize=_SIZES)
def modulation_backward(
    a, e, d_out_a, d_out_e, d_gate_a, d_gate_e, gate_a, gate_e, pre_a, pre_e, w1a, w2a, w1e, w2e,
    d_a, d_e, d_image, d_logit_a, d_logit_e, d_pre_a, d_pre_e,
    alpha, batch, n_a, n_e, width, image_width, rank_a, rank_e, gate_width, gate_c,
    a_b, a_n, e_b, e_n, ga_b, ga_n, ge_b, ge_n, w1a_r, w1e_r, w2a_c, w2e_c, da_b, da_n, de_b, de_n,
    HAS_D_GATE: tl.constexpr, PRECISION: tl.constexpr, ITEMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Token and image gradients; d_logit [B, width] and d_pre [B, rank] fp32 are factors of the weight gradients."""
    dtype = a.dtype.element_ty
    item, item_ok = _own_items(batch, ITEMS, BLOCK_M)
    unit = tl.arange(0, RANK)
    in_a = unit < rank_a
    in_e = unit < rank_e
    d_active_a = tl.zeros([BLOCK_M, RANK], tl.float32)
    d_active_e = tl.zeros([BLOCK_M, RANK], tl.float32)
    for first in range(0, width, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        in_width = col < width
        dza, _ = _gate_gradient(a, d_out_a, d_gate_a, gate_a, item, item_ok, n_a, col, in_width, gate_width, alpha,
                                gate_c, a_b, a_n, ga_b, ga_n, HAS_D_GATE, BLOCK_M, BLOCK_N, BLOCK_C)  # fmt: skip
        dze, _ = _gate_gradient(e, d_out_e, d_gate_e, gate_e, item, item_ok, n_e, col, in_width, gate_width, alpha,
                                gate_c, e_b, e_n, ge_b, ge_n, HAS_D_GATE, BLOCK_M, BLOCK_N, BLOCK_C)  # fmt: skip
        there = item_ok[:, None] & in_width[None, :]
        tl.store(d_logit_a + item[:, None] * width + col[None, :], dza, mask=there)
        tl.store(d_logit_e + item[:, None] * width + col[None, :], dze, mask=there)
        wa = _weights(w2a, col, in_width, w2a_c, unit, rank_a)
        we = _weights(w2e, col, in_width, w2e_c, unit, rank_e)
        d_active_a = tl.dot(dza.to(dtype), wa, d_active_a, input_precision=PRECISION)
        d_active_e = tl.dot(dze.to(dtype), we, d_active_e, input_precision=PRECISION)

    there_a = item_ok[:, None] & in_a[None, :]
    there_e = item_ok[:, None] & in_e[None, :]
    dpa = d_active_a * gelu_slope(tl.load(pre_a + item[:, None] * rank_a + unit[None, :], mask=there_a, other=0.0))
    dpe = d_active_e * gelu_slope(tl.load(pre_e + item[:, None] * rank_e + unit[None, :], mask=there_e, other=0.0))
    tl.store(d_pre_a + item[:, None] * rank_a + unit[None, :], dpa, mask=there_a)
    tl.store(d_pre_e + item[:, None] * rank_e + unit[None, :], dpe, mask=there_e)
    low_a = dpa.to(dtype)
    low_e = dpe.to(dtype)

    for first in range(0, width, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        in_width = col < width
        there = item_ok[:, None] & in_width[None, :]
        waa = _weights(w1a + image_width, unit, in_a, w1a_r, col, width)
        wae = _weights(w1a + image_width + width, unit, in_a, w1a_r, col, width)
        wee = _weights(w1e + image_width, unit, in_e, w1e_r, col, width)
        dma = tl.dot(low_a, waa, input_precision=PRECISION)
        dme = tl.dot(low_e, wee, tl.dot(low_a, wae, input_precision=PRECISION), input_precision=PRECISION)
        offset = item[:, None] * gate_width + (col * gate_c)[None, :]
        ga = tl.load(gate_a + offset, mask=there, other=0.0).to(tl.float32)
        ge = tl.load(gate_e + offset, mask=there, other=0.0).to(tl.float32)
        _token_gradient(d_out_a, d_a, 1.0 + alpha * ga, dma / tl.maximum(n_a, 1), item, item_ok, n_a, col, in_width,
                        ga_b, ga_n, da_b, da_n, BLOCK_N)  # fmt: skip
        _token_gradient(d_out_e, d_e, 1.0 + alpha * ge, dme / tl.maximum(n_e, 1), item, item_ok, n_e, col, in_width,
                        ge_b, ge_n, de_b, de_n, BLOCK_N)  # fmt: skip

    for first in range(0, image_width, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        in_image = col < image_width
        wa = _weights(w1a, unit, in_a, w1a_r, col, image_width)
        we = _weights(w1e, unit, in_e, w1e_r, col, image_width)
        d_v = tl.dot(low_e, we, tl.dot(low_a, wa, input_precision=PRECISION), input_precision=PRECISION)
        tl.store(d_image + item[:, None] * image_width + col[None, :], d_v.to(d_image.dtype.element_ty),
                 mask=item_ok[:, None] & in_image[None, :])  # fmt: skip


class Gate(NamedTuple):
    """Weights of one gate MLP; w1 [r, input], b1 [r], w2 [g, r], b2 [g]."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class Forward(NamedTuple):
    """Outputs of the forward kernel; pre_* [B, r] fp32 are hidden layers before the activation."""

    out_a: Tensor
    out_e: Tensor
    gate_a: Tensor
    gate_e: Tensor
    pre_a: Tensor
    pre_e: Tensor
    mean_a: Tensor
    mean_e: Tensor


def _prepared(gate: Gate) -> Gate:
    return Gate(unit_stride(gate.w1), gate.b1.contiguous(), unit_stride(gate.w2), gate.b2.contiguous())


def _options(kernel: str, a: Tensor, rank: int) -> dict[str, int]:
    options: dict[str, int] = tile(kernel, a, rank=rank)
    return options | {"RANK": max(16, triton.next_power_of_2(rank))}


def forward(
    a: Tensor, e: Tensor, agreement: Tensor, has_metadata: Tensor, image: Tensor, gate_a: Gate, gate_e: Gate,
    alpha: float,
) -> Forward:  # fmt: skip
    """Modulated streams; shapes as in :func:`tgq_fast.reference.dual_gated_modulation`, one dtype for all."""
    a, e, image = unit_stride(a), unit_stride(e), unit_stride(image)
    gate_a, gate_e = _prepared(gate_a), _prepared(gate_e)
    batch, n_a, width = a.shape
    n_e, image_width = e.shape[1], image.shape[1]
    rank_a, rank_e, gate_width = gate_a.w1.shape[0], gate_e.w1.shape[0], gate_a.w2.shape[0]
    out_a, out_e = a.new_empty(a.shape), e.new_empty(e.shape)
    made_a, made_e = (a.new_empty(batch, gate_width) for _ in range(2))
    pre_a, pre_e = (a.new_empty(batch, rank, dtype=torch.float32) for rank in (rank_a, rank_e))
    mean_a, mean_e = a.new_empty(batch, width), a.new_empty(batch, width)
    options = _options("modulation_forward", a, max(rank_a, rank_e))
    grid = (triton.cdiv(batch, options["ITEMS"]),)
    vector = gate_width > 1 or width == 1
    if grid[0]:
        # The two flag columns leave the anchored W1, so that the rest of its rows can be read 16 bytes at a time.
        flags, body = gate_a.w1[:, :2].t().contiguous(), gate_a.w1[:, 2:].contiguous()
        with on_device(a):
            modulation_forward[grid](
                a, e, agreement.contiguous(), has_metadata.to(a.dtype).contiguous(), image,
                flags, body, *gate_a[1:], *gate_e, out_a, out_e, made_a, made_e, pre_a, pre_e, mean_a, mean_e,
                alpha, batch, n_a, n_e, width, image_width, rank_a, rank_e, gate_width,
                *a.stride()[:2], *e.stride()[:2], image.stride(0), body.stride(0), gate_e.w1.stride(0),
                gate_a.w2.stride(0) if vector else 0, gate_e.w2.stride(0) if vector else 0, int(vector),
                *out_a.stride()[:2], *out_e.stride()[:2],
                PRECISION=precision(a), **options,
            )  # fmt: skip
    return Forward(out_a, out_e, made_a, made_e, pre_a, pre_e, mean_a, mean_e)


class Gradients(NamedTuple):
    """Gradients in the order of the inputs; `gate_a` and `gate_e` hold those of w1, b1, w2, b2."""

    a: Tensor
    e: Tensor
    agreement: Tensor
    image: Tensor
    gate_a: Gate
    gate_e: Gate


def _weight_gradients(d_pre: Tensor, inputs: list[Tensor], d_logit: Tensor, pre: Tensor, gate: Gate) -> Gate:
    """Outer products summed over items, in fp32 in one fixed order each."""
    if gate.w2.shape[0] == 1 != d_logit.shape[1]:
        d_logit = d_logit.sum(dim=1, keepdim=True)
    d_w1 = torch.cat([d_pre.t() @ x.float() for x in inputs], dim=1)
    d_w2 = d_logit.t() @ torch.nn.functional.gelu(pre)
    grads = (d_w1, d_pre.sum(dim=0), d_w2, d_logit.sum(dim=0))
    return Gate(*(g.to(w.dtype) for g, w in zip(grads, gate)))


def backward(
    d_out_a: Tensor, d_out_e: Tensor, d_gate_a: Tensor | None, d_gate_e: Tensor | None, a: Tensor,
    e: Tensor, agreement: Tensor, has_metadata: Tensor, image: Tensor, gate_a: Gate, gate_e: Gate, saved: Forward,
    alpha: float,
) -> Gradients:  # fmt: skip
    """All gradients; d_gate_* come both or not at all."""
    a, e, d_out_a, d_out_e = (unit_stride(t) for t in (a, e, d_out_a, d_out_e))
    gate_a, gate_e = _prepared(gate_a), _prepared(gate_e)
    batch, n_a, width = a.shape
    n_e, image_width = e.shape[1], image.shape[1]
    rank_a, rank_e, gate_width = gate_a.w1.shape[0], gate_e.w1.shape[0], gate_a.w2.shape[0]
    d_a, d_e = a.new_empty(a.shape), e.new_empty(e.shape)
    d_image = image.new_empty(batch, image_width)
    d_logits = [a.new_empty(batch, width, dtype=torch.float32) for _ in range(2)]
    d_pre_a, d_pre_e = torch.empty_like(saved.pre_a), torch.empty_like(saved.pre_e)
    options = _options("modulation_backward", a, max(rank_a, rank_e))
    grid = (triton.cdiv(batch, options["ITEMS"]),)
    vector = gate_width > 1 or width == 1
    none = placeholder(a.device)
    optional = [none if t is None else t.contiguous() for t in (d_gate_a, d_gate_e)]
    if grid[0]:
        body = gate_a.w1[:, 2:].contiguous()
        with on_device(a):
            modulation_backward[grid](
                a, e, d_out_a, d_out_e, *optional, saved.gate_a, saved.gate_e, saved.pre_a, saved.pre_e,
                body, gate_a.w2, gate_e.w1, gate_e.w2, d_a, d_e, d_image, *d_logits, d_pre_a, d_pre_e,
                alpha, batch, n_a, n_e, width, image_width, rank_a, rank_e, gate_width, int(vector),
                *a.stride()[:2], *e.stride()[:2], *d_out_a.stride()[:2], *d_out_e.stride()[:2],
                body.stride(0), gate_e.w1.stride(0), gate_a.w2.stride(0) if vector else 0,
                gate_e.w2.stride(0) if vector else 0, *d_a.stride()[:2], *d_e.stride()[:2],
                HAS_D_GATE=d_gate_a is not None, PRECISION=precision(a), **options,
            )  # fmt: skip
    flags = torch.stack((agreement.float(), has_metadata.float()), dim=1)
    grad_a = _weight_gradients(d_pre_a, [flags, image, saved.mean_a, saved.mean_e], d_logits[0], saved.pre_a, gate_a)
    grad_e = _weight_gradients(d_pre_e, [image, saved.mean_e], d_logits[1], saved.pre_e, gate_e)
    d_agreement = (d_pre_a @ gate_a.w1[:, 0].float()).to(agreement.dtype)
    return Gradients(d_a, d_e, d_agreement, d_image, grad_a, grad_e)
