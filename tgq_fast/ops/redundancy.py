"""Redundancy of the two streams: choice of backend, schema, fake function and autograd."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tgq_fast import reference
from tgq_fast.errors import ArgumentError
from tgq_fast.ops.checks import check_number, check_tensors
from tgq_fast.ops.dispatch import Decision, choose, explainer, requested_backend, triton_reasons

__all__ = ["redundancy_loss"]

# Elements of either stream that are taken at once on a CPU.
CENTRED_ELEMENTS = 2**17


def redundancy_loss(
    anchored: Tensor,
    exploratory: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """mean_i C_ii² with C the batch correlation matrix of ā against ē.

    Arguments and result are those of :func:`tgq_fast.reference.redundancy_loss`; `backend` as in
    :mod:`tgq_fast.ops.dispatch`. The kernels stream over the batch once, the CPU over what fits in its caches.

    Raises:
        ArgumentError: the two streams' means differ in shape.
        BackendError: a backend that was asked for by name cannot run this call.
    """
    decision = _decide(anchored, exploratory, eps=eps, backend=backend)
    triton = decision.backend == "triton"
    if anchored.shape[0] >= 2 and (triton or anchored.device.type == "cpu"):
        return redundancy_forward(anchored, exploratory.to(anchored.dtype), eps, triton)[0]
    return reference.redundancy_loss(anchored, exploratory, eps=eps)


@explainer("redundancy_loss")
def _decide(
    anchored: Tensor,
    exploratory: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Decision:
    check_tensors(2, anchored=anchored, exploratory=exploratory)
    check_number("eps", eps)
    if anchored.shape != exploratory.shape:
        given = tuple(anchored.shape), tuple(exploratory.shape)
        raise ArgumentError("anchored, exploratory", given, "two tensors [B, d]")
    reasons = triton_reasons(anchored, exploratory, forced=requested_backend(backend) != "auto")
    requested, chosen, rejected = choose("redundancy_loss", backend, {"triton": reasons, "torch": ()})
    return Decision("redundancy_loss", requested, chosen, None, rejected)


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
def redundancy_forward(anchored: Tensor, exploratory: Tensor, eps: float, triton: bool) -> tuple[Tensor, Tensor]:
    """Loss [] and merged moments [5, d] of [B, d] means, fp32 (fp64 for fp64 input); B ≥ 2."""
    if triton:
        from tgq_fast.kernels import redundancy as kernel

        merged, terms = kernel.merge(kernel.moments(anchored, exploratory), eps)
        return terms.sum(), merged
    moments = _moments(anchored, exploratory)
    var_a, var_e, cov = moments[2:]
    return (cov.square() / ((var_a + eps) * (var_e + eps))).mean(), moments


@redundancy_forward.register_fake
def _(anchored, exploratory, eps, triton):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(anchored.dtype, torch.float32)
    return anchored.new_empty((), dtype=dtype), anchored.new_empty(5, anchored.shape[1], dtype=dtype)


@torch.library.custom_op("tgq_fast::redundancy_loss_backward", mutates_args=())
def redundancy_backward(
    d_loss: Tensor, anchored: Tensor, exploratory: Tensor, merged: Tensor, eps: float, triton: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of both means."""
    if triton:
        from tgq_fast.kernels import redundancy as kernel

        return kernel.backward(d_loss, anchored, exploratory, merged, eps)
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


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    anchored, exploratory, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(anchored, exploratory, output[1])


def _backward(ctx, d_loss, _):  # type: ignore[no-untyped-def]
    if d_loss is None:
        return (None,) * 4
    return (*redundancy_backward(d_loss, *ctx.saved_tensors, *ctx.options), None, None)


redundancy_forward.register_autograd(_backward, setup_context=_setup)
