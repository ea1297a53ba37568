"""Loss kernels as torch operators, and InfoNCE in chunks of anchors for the torch backend.

Neither form of ``tgq_fast::info_nce`` holds the full matrix of logits: the kernels keep tiles on chip, the torch form
keeps one chunk of anchors and rebuilds it in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["info_nce_operator", "redundancy_operator"]

# Logits of one chunk of anchors, torch backend: few enough to stay in a CPU's caches from one pass to the next.
CHUNK_ELEMENTS = 2**21
# Elements of either stream that the redundancy loss takes at once there.
CENTRED_ELEMENTS = 2**17


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


class _Chunks:
    """Scaled products of a chunk of anchors with all items, -inf where an anchor must not look, in one buffer."""

    def __init__(self, e: Tensor, positives: Tensor, log_scale: Tensor, groups: Tensor | None, rows: Tensor) -> None:
        self.e, self.positives, self.rows = e, positives, rows
        self.scaled = e * log_scale.exp()  # scale · items
        self.step = max(1, min(CHUNK_ELEMENTS // max(1, e.shape[0]), rows.shape[0]))
        self.buffer = e.new_empty(self.step, e.shape[0])
        self.labels = None if groups is None else groups.long().clamp(min=-1)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, self.rows.shape[0], self.step):
            part = slice(first, min(first + self.step, self.rows.shape[0]))
            yield part, self._logits(part)

    def _logits(self, part: slice) -> Tensor:
        """[r, M], overwritten by the next call."""
        positives, rows = self.positives[part, None], self.rows[part, None]
        logits = torch.mm(self.scaled[rows[:, 0]], self.e.T, out=self.buffer[: rows.shape[0]])
        picked = logits.gather(1, positives)
        if self.labels is not None:
            own = self.labels[rows]
            own.masked_fill_(own < 0, -2)  # no group: nobody's label
            logits.masked_fill_(own == self.labels, float("-inf"))
        return logits.scatter_(1, rows, float("-inf")).scatter_(1, positives, picked)


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
        for part, logits in _Chunks(e, positives, t, groups, rows):
            picked[part] = logits.gather(1, positives[part, None])[:, 0]
            largest = logits.amax(dim=1, keepdim=True)
            lse[part] = logits.sub_(largest).exp_().sum(dim=1).log_() + largest[:, 0]
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
        d_anchors, d_items = e.new_empty(rows.shape[0], e.shape[1]), torch.zeros_like(e)
        chunks = _Chunks(e, positives, t, groups, rows)
        for part, logits in chunks:
            g = logits.sub_(lse[part, None]).exp_()
            g[torch.arange(g.shape[0], device=g.device), positives[part]] -= 1
            torch.mm(g, chunks.scaled, out=d_anchors[part])
            d_items.addmm_(g.T, chunks.scaled[rows[part]])
        # sum(g · logits), since the logits are products of anchors with the items that d_anchors sums.
        slope = (d_anchors * e[rows]).sum()
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


def _centred(a: Tensor, e: Tensor, means: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Both streams less their means, some items at a time: what is computed from them then stays in a CPU's caches."""
    step = max(1, CENTRED_ELEMENTS // max(1, a.shape[1]))
    for first in range(0, a.shape[0], step):
        part = slice(first, first + step)
        yield part, a[part] - means[0], e[part] - means[1]


def _moments(a: Tensor, e: Tensor) -> Tensor:
    """[5, d] means of both streams, their variances and covariance."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    found = a.new_zeros(5, a.shape[1], dtype=dtype)
    found[0], found[1] = a.mean(dim=0, dtype=dtype), e.mean(dim=0, dtype=dtype)
    for _, x, y in _centred(a, e, found):
        found[4] += (x * y).sum(dim=0)
        found[2] += x.square_().sum(dim=0)
        found[3] += y.square_().sum(dim=0)
    found[2:] /= a.shape[0]
    return found


@torch.library.custom_op("tgq_fast::redundancy_loss", mutates_args=())
def redundancy_operator(
    anchored: Tensor, exploratory: Tensor, moments: Tensor | None, eps: float, triton: bool
) -> tuple[Tensor, Tensor]:
    """Loss [] and merged moments [5, d] of [B, d] means, fp32 (fp64 for fp64 input); B ≥ 2.

    Moments that are known save the pass.
    """
    if moments is None and triton:
        from tgq_fast.kernels import redundancy

        merged, terms = redundancy.merge(redundancy.moments(anchored, exploratory), eps)
        return terms.sum(), merged
    moments = _moments(anchored, exploratory) if moments is None else moments.clone()
    var_a, var_e, cov = moments[2:]
    return (cov.square() / ((var_a + eps) * (var_e + eps))).mean(), moments


@redundancy_operator.register_fake
def _(anchored, exploratory, moments, eps, triton):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(anchored.dtype, torch.float32)
    return anchored.new_empty((), dtype=dtype), anchored.new_empty(5, anchored.shape[1], dtype=dtype)


@torch.library.custom_op("tgq_fast::redundancy_loss_backward", mutates_args=())
def redundancy_backward(
    d_loss: Tensor, anchored: Tensor, exploratory: Tensor, merged: Tensor, eps: float, triton: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of both means."""
    if triton:
        from tgq_fast.kernels import redundancy

        return redundancy.backward(d_loss, anchored, exploratory, merged, eps)
    var_a, var_e, cov = merged[2] + eps, merged[3] + eps, merged[4]
    across = d_loss * 2 / anchored.numel() * cov / (var_a * var_e)  # per channel: slope of cov, over B
    own_a, own_e = -across * cov / var_a, -across * cov / var_e  # of either variance, times 2
    d_a, d_e = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (anchored, exploratory))
    for part, x, y in _centred(anchored, exploratory, merged):
        d_a[part] = (y * across).addcmul_(x, own_a)
        d_e[part] = x.mul_(across).addcmul_(y, own_e)
    return d_a, d_e


@redundancy_backward.register_fake
def _(d_loss, anchored, exploratory, merged, eps, triton):  # type: ignore[no-untyped-def]
    return anchored.new_empty(anchored.shape), exploratory.new_empty(exploratory.shape)


def _redundancy_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    anchored, exploratory, _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(anchored, exploratory, output[1])


def _redundancy_backward(ctx, d_loss, _):  # type: ignore[no-untyped-def]
    if d_loss is None:
        return (None,) * 5
    return (*redundancy_backward(d_loss, *ctx.saved_tensors, *ctx.options), None, None, None)


redundancy_operator.register_autograd(_redundancy_backward, setup_context=_redundancy_setup)
