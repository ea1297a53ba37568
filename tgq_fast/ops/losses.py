"""Training losses: redundancy of the two streams and InfoNCE."""

from __future__ import annotations

import torch
from torch import Tensor

from tgq_fast import reference
from tgq_fast.errors import ArgumentError
from tgq_fast.ops.dispatch import Decision, choose, explainer, requested_backend, triton_reasons
from tgq_fast.ops.triton_losses import info_nce_operator, redundancy_operator

__all__ = ["info_nce", "redundancy_loss"]


def redundancy_loss(
    anchored: Tensor,
    exploratory: Tensor,
    *,
    eps: float = 1e-6,
    moments: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """mean_i C_ii² with C the batch correlation matrix of ā against ē.

    Arguments and result are those of :func:`tgq_fast.reference.redundancy_loss`; `backend` as in
    :mod:`tgq_fast.ops.dispatch`. The kernels stream over the batch once, the CPU over what fits in its caches.

    Args:
        moments: [5, d] of :func:`tgq_fast.ops.dual_gated_modulation_with_moments` over the very same means: the
            forward then does not read the means at all.

    Raises:
        ArgumentError: the two streams' means differ in shape.
        BackendError: a backend that was asked for by name cannot run this call.
    """
    decision = _decide_redundancy(anchored, exploratory, eps=eps, moments=moments, backend=backend)
    triton = decision.backend == "triton"
    if anchored.shape[0] >= 2 and (triton or anchored.device.type == "cpu"):
        return redundancy_operator(anchored, exploratory.to(anchored.dtype), moments, eps, triton)[0]
    return reference.redundancy_loss(anchored, exploratory, eps=eps)


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
    decision = _decide_info_nce(embeddings, positives, log_scale, groups=groups, rows=rows, backend=backend)
    if rows is None:
        rows = torch.arange(embeddings.shape[0], device=embeddings.device)
    return info_nce_operator(embeddings, positives, log_scale, groups, rows, decision.backend == "triton")[0]


@explainer("redundancy_loss")
def _decide_redundancy(
    anchored: Tensor,
    exploratory: Tensor,
    *,
    eps: float = 1e-6,
    moments: Tensor | None = None,
    backend: str | None = None,
) -> Decision:
    if anchored.ndim != 2 or anchored.shape != exploratory.shape:
        given = tuple(anchored.shape), tuple(exploratory.shape)
        raise ArgumentError("anchored, exploratory", given, "two tensors [B, d]")
    reasons = triton_reasons(anchored, exploratory, forced=requested_backend(backend) != "auto")
    requested, chosen, rejected = choose("redundancy_loss", backend, {"triton": reasons, "torch": ()})
    return Decision("redundancy_loss", requested, chosen, None, rejected)


@explainer("info_nce")
def _decide_info_nce(
    embeddings: Tensor,
    positives: Tensor,
    log_scale: Tensor,
    *,
    groups: Tensor | None = None,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Decision:
    anchors = embeddings.shape[0] if rows is None else rows.shape[0]
    if positives.shape[0] != anchors:
        raise ArgumentError("positives", tuple(positives.shape), f"one index per anchor, [{anchors}]")
    if groups is not None and groups.shape[0] != embeddings.shape[0]:
        raise ArgumentError("groups", tuple(groups.shape), f"one label per item, [{embeddings.shape[0]}]")
    forced = requested_backend(backend) != "auto"
    reasons = triton_reasons(embeddings, positives, log_scale, groups, rows, forced=forced)
    requested, chosen, rejected = choose("info_nce", backend, {"triton": reasons, "torch": ()})
    return Decision("info_nce", requested, chosen, None, rejected)
