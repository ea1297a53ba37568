"""Training losses: redundancy of the two streams and InfoNCE."""

from __future__ import annotations

from torch import Tensor

from tgq_fast import reference
from tgq_fast.ops.dispatch import Decision, choose, explainer

__all__ = ["info_nce", "redundancy_loss"]


def redundancy_loss(anchored: Tensor, exploratory: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """mean_i C_ii² with C the batch correlation matrix of ā against ē; see the reference for arguments.

    Raises:
        BackendError: a backend that was asked for by name cannot run this call.
    """
    _decide_redundancy(anchored, exploratory, eps=eps, backend=backend)
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
    """InfoNCE over a batch of items; see the reference for arguments.

    Raises:
        BackendError: a backend that was asked for by name cannot run this call.
    """
    _decide_info_nce(embeddings, positives, log_scale, groups=groups, rows=rows, backend=backend)
    return reference.info_nce(embeddings, positives, log_scale, groups=groups, rows=rows)


@explainer("redundancy_loss")
def _decide_redundancy(
    anchored: Tensor, exploratory: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Decision:
    requested, chosen, rejected = choose("redundancy_loss", backend, {"torch": ()})
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
    requested, chosen, rejected = choose("info_nce", backend, {"torch": ()})
    return Decision("info_nce", requested, chosen, None, rejected)
