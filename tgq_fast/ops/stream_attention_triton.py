"""The kernels of attention per head as a torch operator: schema, fake function and autograd.

``tgq_fast::stream_attention``: queries, keys and values per head → context; block structure from lengths. It serves
stream self-attention and the projected form of cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["stream_attention"]


@torch.library.custom_op("tgq_fast::stream_attention", mutates_args=())
def stream_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    key_group: Tensor | None,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    lengths: Sequence[int],
    mode: str,
    sees_text: bool,
    mask_first: int,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, S, H, dh] over [B, L, H, dh] → output [B, S, H, dh]; lse, entropy, group mass [B, H, S] fp32.

    Args:
        key_mask: [B, L - mask_first] bool for the keys from `mask_first` on.
        guide, guide_scale: [B, L] and [Na, H] for the first Na rows, or None.
        lengths, mode, sees_text: block structure, see :mod:`tgq_fast.kernels.stream_attention`.
    """
    from tgq_fast.kernels import stream_attention as kernel

    a, e, t = lengths
    scale = q.shape[3] ** -0.5
    out, lse, entropy, mass = kernel.forward(
        q, k, v, (a, e, t), mode, sees_text, key_mask, mask_first, key_group, guide, guide_scale, scale, want_stats
    )
    return (
        out,
        lse,
        lse.new_empty(0) if entropy is None else entropy,
        lse.new_empty(0) if mass is None else mass,
    )


@stream_attention.register_fake
def _(q, k, v, key_mask, key_group, guide, guide_scale, lengths, mode, sees_text, mask_first, want_stats):  # type: ignore[no-untyped-def]
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    entropy = torch.empty_like(lse) if want_stats else lse.new_empty(0)
    mass = torch.empty_like(lse) if key_group is not None else lse.new_empty(0)
    return q.new_empty(q.shape), lse, entropy, mass


@torch.library.custom_op("tgq_fast::stream_attention_backward", mutates_args=())
def stream_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    guide: Tensor | None,
    guide_scale: Tensor | None,
    lengths: Sequence[int],
    mode: str,
    sees_text: bool,
    mask_first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and guide_scale."""
    from tgq_fast.kernels import stream_attention_backward as kernel

    a, e, t = lengths
    scale = q.shape[3] ** -0.5
    *grads, d_scale = kernel.backward(
        d_out, q, k, v, out, lse, (a, e, t), mode, sees_text, key_mask, mask_first, guide, guide_scale, scale
    )
    return (*grads, d_scale.sum(0).t().contiguous())


@stream_attention_backward.register_fake
def _(d_out, q, k, v, out, lse, key_mask, guide, guide_scale, lengths, mode, sees_text, mask_first):  # type: ignore[no-untyped-def]
    d_scale = lse.new_empty(0 if guide_scale is None else guide_scale.shape[0], q.shape[2])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_scale


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, key_mask, _, guide, guide_scale, lengths, mode, sees_text, mask_first, _ = inputs
    out, lse, entropy, mass = output
    ctx.mark_non_differentiable(lse, entropy, mass)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, key_mask, guide, guide_scale)
    ctx.structure = (lengths, mode, sees_text, mask_first)


def _backward(ctx, d_out, *_):  # type: ignore[no-untyped-def]
    if d_out is None:
        return (None,) * 12
    *grads, d_scale = stream_attention_backward(d_out, *ctx.saved_tensors, *ctx.structure)
    return (*grads, None, None, None, d_scale if ctx.needs_input_grad[6] else None, *(None,) * 5)


stream_attention.register_autograd(_backward, setup_context=_setup)
