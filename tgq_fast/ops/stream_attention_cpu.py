"""Stream self-attention of short sequences on the CPU: the whole sequence in one masked computation, both ways.

A call over [A; E; T] costs less than one per block, whose matrices are tiny, and its gradient needs no slices of q, k
and v to be filled and added up. Exploratory rows that must not depend on the metadata are computed again by themselves.

PyTorch's flash attention does it, except for training in 16 bit: its backward does not use the matrix unit then, so
both directions run on plain batched products, chunk by chunk of items.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from tgq_fast.ops.dispatch import wants_grad
from tgq_fast.reference.stream_attention import Mixing, stream_mask

__all__ = ["LONGEST", "stream_attention_cpu", "streams_on_cpu"]

# Tokens up to which a mask per item is small beside q.
LONGEST = 256
# Queries, keys and values of the items that plain products take at once.
_CHUNK_BYTES = 16 * 2**20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def streams_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, int, int],
    mixing: Mixing,
    explore_sees_text: bool,
    text_mask: Tensor | None,
) -> Tensor:
    """[B, S, H, dh] queries, keys and values, none empty → [B, S, H, dh]; arguments as those of the operator."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    num_anchored, num_exploratory, num_text = lengths
    layout = list(lengths)
    if mixing == "block" and not num_text and num_anchored == num_exploratory:  # as many items again, of one stream
        q, k, v = (x.unflatten(1, (2, num_anchored)).flatten(0, 1) for x in (q, k, v))
        layout = [num_anchored, 0, 0]
    training = wants_grad(q, k, v)
    out, _ = stream_attention_cpu(q, k, v, text_mask, layout, mixing, explore_sees_text, training)
    return out.reshape(-1, sum(lengths), *out.shape[2:])


@torch.library.custom_op("tgq_fast::stream_attention_cpu", mutates_args=(), device_types="cpu")
def stream_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_mask: Tensor | None,
    lengths: list[int],
    mixing: str,
    explore_sees_text: bool,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Result [B, S, H, dh], and what the backward keeps (`training`: one will follow).

    That is the log-sum-exp [B, H, S], or, from plain products, the weights [B * H, S, S] where they are no larger than
    q and k (else nothing).
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    products = _by_products(q, training)
    out, kept = _attend(q, k, v, _bias(q, text_mask, lengths, mixing, explore_sees_text), products)
    if mixing == "block" and not explore_sees_text and 0 < lengths[1] < q.shape[1]:
        alone = slice(lengths[0], lengths[0] + lengths[1])
        out[:, alone] = _attend(q[:, alone], k[:, alone], v[:, alone], None, products)[0]
    return out, kept


@stream_attention_cpu.register_fake
def _(q, k, v, text_mask, lengths, mixing, explore_sees_text, training):  # type: ignore[no-untyped-def]
    batch, length, heads, head = q.shape
    kept = q.new_empty(batch, length, heads, dtype=torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)
    if _by_products(q, training):
        kept = q.new_empty(batch * heads if _keeps_weights(length, head) else 0, length, length)
    return q.new_empty(q.shape), kept


@torch.library.custom_op("tgq_fast::stream_attention_cpu_backward", mutates_args=(), device_types="cpu")
def stream_attention_cpu_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_mask: Tensor | None,
    out: Tensor,
    kept: Tensor,
    lengths: list[int],
    mixing: str,
    explore_sees_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [B, S, H, dh]."""
    d_out, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (d_out, q, k, v))
    bias = _bias(q, text_mask, lengths, mixing, explore_sees_text)
    if _by_products(q, True):
        return _products_backward(d_out, q, k, v, bias, kept)
    heads = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
    d_q, d_k, d_v = _flash_backward(*heads, kept, 0.0, False, attn_mask=bias)
    return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2)


@stream_attention_cpu_backward.register_fake
def _(d_out, q, k, v, text_mask, out, kept, lengths, mixing, explore_sees_text):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.layout = inputs[4:7]


def _backward(ctx, d_out, _):  # type: ignore[no-untyped-def]
    if d_out is None:
        return (None,) * 8
    return (*stream_attention_cpu_backward(d_out, *ctx.saved_tensors, *ctx.layout), *(None,) * 5)


stream_attention_cpu.register_autograd(_backward, setup_context=_setup)


def _bias(
    q: Tensor, text_mask: Tensor | None, lengths: list[int], mixing: str, explore_sees_text: bool
) -> Tensor | None:
    """What is added to the scores, 0 or -inf: [1 or B, 1, 1 or S, S]; None where every row sees every key."""
    bias = None
    if mixing != "full" and max(lengths) < sum(lengths):
        bias = _layout_bias(tuple(lengths), mixing, explore_sees_text, q.dtype)
    if text_mask is not None and lengths[2]:
        text = torch.where(text_mask, 0.0, float("-inf")).to(q.dtype)
        text = pad(text, (lengths[0] + lengths[1], 0))[:, None, None]
        bias = text if bias is None else bias + text
    return bias


@lru_cache(maxsize=32)
def _layout_bias(lengths: tuple[int, int, int], mixing: Mixing, explore_sees_text: bool, dtype: torch.dtype) -> Tensor:
    """[1, 1, S, S]; called on real tensors only, so that what is kept is real."""
    visible = stream_mask(lengths, mixing=mixing, explore_sees_text=explore_sees_text)
    return torch.where(visible, 0.0, float("-inf")).to(dtype)


def _pairs(lengths: list[int], mixing: str, explore_sees_text: bool) -> int:
    """Rows times the keys they see."""
    anchored, exploratory, text = lengths
    if mixing == "full":
        return sum(lengths) ** 2
    seen = anchored + text + (exploratory if mixing == "one_way" else 0)
    return anchored * seen + exploratory * (exploratory + (text if explore_sees_text else 0)) + text**2


# What PyTorch's counter shows for a call: two products over the pairs, five in the backward.
@register_flop_formula(torch.ops.tgq_fast.stream_attention_cpu)
def _flops(q_shape, k_shape, v_shape, mask_shape, lengths, mixing, explore_sees_text, *_, **__):  # type: ignore[no-untyped-def]
    batch, _, heads, head = q_shape
    return 4 * batch * heads * head * _pairs(lengths, mixing, explore_sees_text)


@register_flop_formula(torch.ops.tgq_fast.stream_attention_cpu_backward)
def _backward_flops(d_shape, q_shape, k_shape, v_shape, mask_shape, result_shape, kept_shape, *layout, **__):  # type: ignore[no-untyped-def]
    return 5 * _flops(q_shape, k_shape, v_shape, mask_shape, *layout) // 2


def _by_products(q: Tensor, training: bool) -> bool:
    return training and q.dtype.itemsize == 2


def _keeps_weights(length: int, head: int) -> bool:
    """Whether [S, S] weights of a head are no larger than its q and k."""
    return length <= 2 * head


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, products: bool) -> tuple[Tensor, Tensor]:
    if products:
        return _products(q, k, v, bias)
    out, lse = _flash(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, False, attn_mask=bias)
    return out.transpose(1, 2), lse


def _chunks(q: Tensor) -> Iterator[slice]:
    """Items that plain products take together."""
    step = max(1, _CHUNK_BYTES // (3 * q[0].numel() * q.element_size()))
    for first in range(0, q.shape[0], step):
        yield slice(first, min(first + step, q.shape[0]))


def _packed(x: Tensor, factor: float = 1.0) -> Tensor:
    """[b, S, H, dh], times a factor → contiguous [b * H, S, dh]."""
    x = x.transpose(1, 2)
    into = x.new_empty(x.shape)
    return (into.copy_(x) if factor == 1 else torch.mul(x, factor, out=into)).flatten(0, 1)


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, items: slice, out: Tensor | None) -> Tensor:
    """softmax(q kᵀ + bias) of some items, packed: [b * H, S, S]; rows that see nothing are zero."""
    scores = torch.bmm(q, k.transpose(1, 2))
    if bias is None:
        return torch.softmax(scores, dim=-1, out=out)
    bias = bias if bias.shape[0] == 1 else bias[items]
    per_item = scores.unflatten(0, (items.stop - items.start, -1)).add_(bias)
    weights = torch.softmax(scores, dim=-1, out=out)
    nothing = bias.amax(dim=-1, keepdim=True).isneginf()
    if nothing.any():  # NaN so far
        weights.view_as(per_item).masked_fill_(nothing, 0.0)
    return weights


def _products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Result, and the weights where the backward gets them."""
    batch, length, heads, head = q.shape
    kept = q.new_empty(batch * heads if _keeps_weights(length, head) else 0, length, length)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for items in _chunks(q):
        rows, keys, values = _packed(q[items], head**-0.5), _packed(k[items]), _packed(v[items])
        into = kept[items.start * heads : items.stop * heads] if len(kept) else None
        weights = _weights(rows, keys, bias, items, into)
        out[items] = torch.bmm(weights, values, out=rows).unflatten(0, (-1, heads)).transpose(1, 2)
    return out, kept


def _products_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    heads, scale = q.shape[2], q.shape[3] ** -0.5
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

    def unpacked(packed: Tensor) -> Tensor:
        return packed.unflatten(0, (-1, heads)).transpose(1, 2)

    for items in _chunks(q):
        d, rows, keys, values = _packed(d_out[items]), _packed(q[items], scale), _packed(k[items]), _packed(v[items])
        weights = kept[items.start * heads : items.stop * heads]
        if not len(kept):
            weights = _weights(rows, keys, bias, items, None)
        d_scores = torch.bmm(d, values.transpose(1, 2))
        torch._softmax_backward_data(d_scores, weights, -1, q.dtype, grad_input=d_scores)
        d_v[items] = unpacked(torch.bmm(weights.transpose(1, 2), d, out=values))
        d_k[items] = unpacked(torch.bmm(d_scores.transpose(1, 2), rows, out=d))
        torch.mul(unpacked(torch.bmm(d_scores, keys, out=rows)), scale, out=d_q[items])
    return d_q, d_k, d_v
