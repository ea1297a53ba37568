"""Loss kernels as torch operators, and InfoNCE in chunks of anchors for the torch backend.

Neither form of ``tgq_fast::info_nce`` holds the full matrix of logits: the kernels keep tiles on chip, the torch form
keeps one chunk of anchors and rebuilds it in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["info_nce_operator", "redundancy_operator"]

# Logits of one chunk of anchors, torch backend.
CHUNK_ELEMENTS = 2**22


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _chunks(anchors: int, items: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, items))
    for first in range(0, anchors, step):
        yield slice(first, min(first + step, anchors))


def _chunk_logits(e: Tensor, rows: Tensor, positives: Tensor, groups: Tensor | None, scale: Tensor) -> Tensor:
    """[r, M] scaled products of some anchors with all items, -inf where an anchor must not look."""
    logits = e[rows] @ e.T * scale
    columns = torch.arange(e.shape[0], device=e.device)
    hidden = columns == rows[:, None]
    if groups is not None:
        hidden |= (groups[rows][:, None] == groups) & (groups >= 0)
    hidden &= columns != positives[:, None]
    return logits.masked_fill_(hidden, float("-inf"))


@torch.library.custom_op("tgq_fast::info_nce", mutates_args=())
def info_nce_operator(
    embeddings: Tensor, positives: Tensor, log_scale: Tensor, groups: Tensor | None, rows: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss [] and log-sum-exp [R] of the anchors `rows`, in fp32 (fp64 for fp64 input)."""
    e = _upcast(embeddings)
    t = log_scale.to(e.dtype)
    if triton:
        from tgq_fast.kernels import contrastive

        lse, picked = contrastive.forward(e, rows, positives, groups, t)
    else:
        lse, picked = e.new_empty(rows.shape[0]), e.new_empty(rows.shape[0])
        for part in _chunks(rows.shape[0], e.shape[0]):
            logits = _chunk_logits(e, rows[part], positives[part], groups, t.exp())
            lse[part] = torch.logsumexp(logits, dim=1)
            picked[part] = logits.gather(1, positives[part, None])[:, 0]
    return (lse - picked).mean(), lse


@info_nce_operator.register_fake
def _(embeddings, positives, log_scale, groups, rows, triton):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return embeddings.new_empty((), dtype=dtype), embeddings.new_empty(rows.shape, dtype=dtype)


@torch.library.custom_op("tgq_fast::info_nce_backward", mutates_args=())
def info_nce_backward(
    d_loss: Tensor,
    embeddings: Tensor,
    positives: Tensor,
    log_scale: Tensor,
    groups: Tensor | None,
    rows: Tensor,
    lse: Tensor,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of embeddings and log_scale."""
    e = _upcast(embeddings)
    t = log_scale.to(e.dtype)
    if triton:
        from tgq_fast.kernels import contrastive

        d_anchors, d_items, d_scale = contrastive.backward(e, rows, positives, groups, t, lse)
        slope = d_scale.sum()
    else:
        d_anchors, d_items, slope = e.new_empty(rows.shape[0], e.shape[1]), torch.zeros_like(e), e.new_zeros(())
        for part in _chunks(rows.shape[0], e.shape[0]):
            logits = _chunk_logits(e, rows[part], positives[part], groups, t.exp())
            g = torch.exp(logits - lse[part, None])
            g[torch.arange(g.shape[0], device=g.device), positives[part]] -= 1
            slope += torch.where(g != 0, g * logits, 0.0).sum()
            g *= t.exp()
            d_anchors[part] = g @ e
            d_items += g.T @ e[rows[part]]
    # An anchor may occur twice; index_put_ with accumulate is deterministic, index_add_ on a GPU is not.
    d_items.index_put_((rows,), d_anchors, accumulate=True)
    share = d_loss / max(1, rows.shape[0])
    return (d_items * share).to(embeddings.dtype), (slope * share).to(log_scale.dtype)


@info_nce_backward.register_fake
def _(d_loss, embeddings, positives, log_scale, groups, rows, lse, triton):  # type: ignore[no-untyped-def]
    return embeddings.new_empty(embeddings.shape), log_scale.new_empty(log_scale.shape)


def _info_nce_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    embeddings, positives, log_scale, groups, rows, triton = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(embeddings, positives, log_scale, groups, rows, output[1])
    ctx.triton = triton


def _info_nce_backward(ctx, d_loss, _):  # type: ignore[no-untyped-def]
    if d_loss is None:
        return (None,) * 6
    d_embeddings, d_scale = info_nce_backward(d_loss, *ctx.saved_tensors, ctx.triton)
    return d_embeddings, None, d_scale, None, None, None


info_nce_operator.register_autograd(_info_nce_backward, setup_context=_info_nce_setup)


@torch.library.custom_op("tgq_fast::redundancy_loss", mutates_args=())
def redundancy_operator(
    anchored: Tensor, exploratory: Tensor, moments: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Loss [] and merged moments [5, d] of [B, d] means, fp32; B ≥ 2. Moments that are known save the pass."""
    from tgq_fast.kernels import redundancy

    if moments is not None:
        var_a, var_e, cov = moments[2:]
        return (cov.square() / ((var_a + eps) * (var_e + eps))).mean(), moments.clone()
    merged, terms = redundancy.merge(redundancy.moments(anchored, exploratory), eps)
    return terms.sum(), merged


@redundancy_operator.register_fake
def _(anchored, exploratory, moments, eps):  # type: ignore[no-untyped-def]
    make = anchored.new_empty
    return make((), dtype=torch.float32), make(5, anchored.shape[1], dtype=torch.float32)


@torch.library.custom_op("tgq_fast::redundancy_loss_backward", mutates_args=())
def redundancy_backward(
    d_loss: Tensor, anchored: Tensor, exploratory: Tensor, merged: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of both means."""
    from tgq_fast.kernels import redundancy

    return redundancy.backward(d_loss, anchored, exploratory, merged, eps)


@redundancy_backward.register_fake
def _(d_loss, anchored, exploratory, merged, eps):  # type: ignore[no-untyped-def]
    return anchored.new_empty(anchored.shape), exploratory.new_empty(exploratory.shape)


def _redundancy_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    anchored, exploratory, _, eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(anchored, exploratory, output[1])
    ctx.eps = eps


def _redundancy_backward(ctx, d_loss, _):  # type: ignore[no-untyped-def]
    if d_loss is None:
        return None, None, None, None
    return (*redundancy_backward(d_loss, *ctx.saved_tensors, ctx.eps), None, None)


redundancy_operator.register_autograd(_redundancy_backward, setup_context=_redundancy_setup)
