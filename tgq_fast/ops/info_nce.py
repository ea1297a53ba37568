"""InfoNCE of a batch: choice of backend, schema, fake function and autograd.

Neither form of ``tgq_fast::info_nce`` holds the full matrix of logits: the kernels keep tiles on chip, the torch form
keeps one chunk of anchors and rebuilds it in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tgq_fast.errors import ArgumentError
from tgq_fast.ops.checks import check_tensors
from tgq_fast.ops.dispatch import Decision, choose, explainer, requested_backend, triton_reasons

__all__ = ["info_nce"]

# Logits of one chunk of anchors, torch backend: few enough to stay in a CPU's caches from one pass to the next.
CHUNK_ELEMENTS = 2**21


def info_nce(
    embeddings: Tensor,
    positives: Tensor,
    log_scale: Tensor,
    *,
    groups: Tensor | None = None,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE over a batch of items, without ever holding all logits.

    Arguments and result are those of :func:`tgq_fast.reference.info_nce`; `backend` as in
    :mod:`tgq_fast.ops.dispatch`.

    Raises:
        ArgumentError: positives and rows differ in length, or groups and embeddings do.
        BackendError: a backend that was asked for by name cannot run this call.
    """
    decision = _decide(embeddings, positives, log_scale, groups=groups, rows=rows, backend=backend)
    if rows is None:
        rows = torch.arange(embeddings.shape[0], device=embeddings.device)
    return info_nce_forward(embeddings, positives, log_scale, groups, rows, decision.backend == "triton")[0]


@explainer("info_nce")
def _decide(
    embeddings: Tensor,
    positives: Tensor,
    log_scale: Tensor,
    *,
    groups: Tensor | None = None,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Decision:
    check_tensors(2, embeddings=embeddings)
    check_tensors(1, positives=positives, **({} if rows is None else {"rows": rows}))
    check_tensors(0, log_scale=log_scale)
    items = embeddings.shape[0]
    anchors = items if rows is None else rows.shape[0]
    if positives.shape[0] != anchors:
        raise ArgumentError("positives", tuple(positives.shape), f"one index per anchor, [{anchors}]")
    if groups is not None:
        check_tensors(1, groups=groups)
        if groups.shape[0] != items:
            raise ArgumentError("groups", tuple(groups.shape), f"one label per item, [{items}]")
    for name, index in (("positives", positives), ("rows", rows)):
        if index is not None and index.dtype != torch.int64:
            raise ArgumentError(name, str(index.dtype), "int64 indices of items")
    if groups is not None and (groups.is_floating_point() or groups.dtype == torch.bool or groups.is_complex()):
        raise ArgumentError("groups", str(groups.dtype), "whole numbers")
    forced = requested_backend(backend) != "auto"
    reasons = triton_reasons(embeddings, positives, log_scale, groups, rows, forced=forced)
    requested, chosen, rejected = choose("info_nce", backend, {"triton": reasons, "torch": ()})
    return Decision("info_nce", requested, chosen, None, rejected)


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
def info_nce_forward(
    embeddings: Tensor, positives: Tensor, log_scale: Tensor, groups: Tensor | None, rows: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss [] and log-sum-exp [R] of the anchors `rows`, in fp32 (fp64 for fp64 input)."""
    for name, index in (("positives", positives), ("rows", rows)):
        if index.device.type == "cpu" and index.numel():  # on a GPU the question would stall every step
            least, most = int(index.min()), int(index.max())
            if least < 0 or most >= embeddings.shape[0]:
                raise ArgumentError(name, f"{least} … {most}", f"items in 0 … {embeddings.shape[0] - 1}")
    e = _upcast(embeddings)
    t = log_scale.to(e.dtype)
    if triton:
        from tgq_fast.kernels import info_nce as kernel

        lse, picked = kernel.forward(e, rows, positives, groups, t)
    else:
        lse, picked = e.new_empty(rows.shape[0]), e.new_empty(rows.shape[0])
        for part, logits in _Chunks(e, positives, t, groups, rows):
            picked[part] = logits.gather(1, positives[part, None])[:, 0]
            largest = logits.amax(dim=1, keepdim=True)
            lse[part] = logits.sub_(largest).exp_().sum(dim=1).log_() + largest[:, 0]
    return (lse - picked).mean(), lse


@info_nce_forward.register_fake
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
        from tgq_fast.kernels import info_nce as kernel

        d_anchors, d_items, d_scale = kernel.backward(e, rows, positives, groups, t, lse)
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


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    embeddings, positives, log_scale, groups, rows, triton = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(embeddings, positives, log_scale, groups, rows, output[1])
    ctx.triton = triton


def _backward(ctx, d_loss, _):  # type: ignore[no-untyped-def]
    if d_loss is None:
        return (None,) * 6
    d_embeddings, d_scale = info_nce_backward(d_loss, *ctx.saved_tensors, ctx.triton)
    return d_embeddings, None, d_scale, None, None, None


info_nce_forward.register_autograd(_backward, setup_context=_setup)
