"""Block-structured self-attention over [A; E; T]: the visibility follows from three lengths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tgq_fast.errors import ArgumentError
from tgq_fast.ops.checks import check_lengths, check_mask, check_shape, check_tensors
from tgq_fast.ops.cross_attention import head_reasons
from tgq_fast.ops.dispatch import PACKED_ONLY, Decision, choose, explainer, requested_backend, triton_reasons
from tgq_fast.ops.stream_attention_cpu import LONGEST, streams_on_cpu
from tgq_fast.ops.stream_attention_triton import stream_attention
from tgq_fast.reference.stream_attention import Mixing

__all__ = ["stream_self_attention"]

_OP = "stream_self_attention"


def stream_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, int, int],
    *,
    mixing: Mixing = "block",
    explore_sees_text: bool = False,
    text_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention over [A; E; T] without a mask per head.

    Arguments and result are those of :func:`tgq_fast.reference.stream_self_attention`; `backend` as in
    :mod:`tgq_fast.ops.dispatch`. With ``mixing="block"`` exploratory rows are a computation of their own: their bits do
    not depend on the metadata, however long it is.

    Raises:
        ArgumentError: lengths do not sum to S, or an unknown mixing or backend.
        BackendError: a backend that was asked for by name cannot run this call.
    """
    decision = _decide(
        q, k, v, lengths, mixing=mixing, explore_sees_text=explore_sees_text, text_mask=text_mask, backend=backend
    )
    if decision.backend == "triton":
        first_text = lengths[0] + lengths[1]
        rows = (sum(lengths), 0, 0) if mixing == "full" else lengths
        k, v = k.to(q.dtype), v.to(q.dtype)
        given = (rows, mixing, explore_sees_text, first_text, False)
        return stream_attention(q, k, v, text_mask, None, None, None, *given)[0]
    # An exported program is to run where this package is not, on ONNX Runtime too: no operator of its own.
    if q.device.type == "cpu" and not torch.compiler.is_exporting() and q.numel() and q.shape[1] <= LONGEST:
        return streams_on_cpu(q, k, v, lengths, mixing, explore_sees_text, text_mask)
    return _torch(q, k, v, lengths, mixing, explore_sees_text, text_mask)


@explainer(_OP)
def _decide(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, int, int],
    *,
    mixing: str = "block",
    explore_sees_text: bool = False,
    text_mask: Tensor | None = None,
    backend: str | None = None,
) -> Decision:
    check_tensors(4, q=q, k=k, v=v)
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, *q.shape)
    check_lengths(lengths, q.shape[1])
    check_mask("text_mask", text_mask, q.shape[0], lengths[2])
    if not isinstance(mixing, str) or mixing not in ("block", "one_way", "full"):
        raise ArgumentError("mixing", repr(mixing), "'block', 'one_way' or 'full'")
    reasons = triton_reasons(q, k, v, text_mask, forced=requested_backend(backend) != "auto")
    reasons += head_reasons(q.shape[3], q.dtype)
    requested, chosen, rejected = choose(_OP, backend, {"triton": reasons, "torch": ()})
    rejected = rejected | ({"cpp": PACKED_ONLY} if q.device.type == "cpu" else {})
    return Decision(_OP, requested, chosen, None, rejected)


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, int, int],
    mixing: str,
    explore_sees_text: bool,
    text_mask: Tensor | None,
) -> Tensor:
    num_anchored, num_exploratory, num_text = lengths
    queries = num_anchored + num_exploratory
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, dh]
    anchored, exploratory, text = (0, num_anchored), (num_anchored, queries), (queries, queries + num_text)
    if mixing == "full":
        blocks = [((0, queries + num_text), [(0, queries), text])]
    else:
        blocks = [
            (anchored, [(0, queries), text] if mixing == "one_way" else [anchored, text]),
            (exploratory, [exploratory, text] if explore_sees_text else [exploratory]),
            (text, [text]),
        ]
    parts = [_block(q, k, v, rows, seen, text, text_mask) for rows, seen in blocks if rows[1] > rows[0]]
    return (torch.cat(parts, dim=2) if parts else torch.zeros_like(q)).transpose(1, 2)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: tuple[int, int],
    seen: list[tuple[int, int]],
    text: tuple[int, int],
    text_mask: Tensor | None,
) -> Tensor:
    """Rows [first, last) attend to the union of `seen`, whose text part is masked."""
    seen = [span for span in seen if span[1] > span[0]]
    mask = None
    if text_mask is not None and text in seen:
        before = sum(last - first for first, last in seen if (first, last) != text)
        mask = torch.nn.functional.pad(text_mask, (before, 0), value=True)[:, None, None, :]
    if len(seen) == 2 and seen[0][1] == seen[1][0]:
        seen = [(seen[0][0], seen[1][1])]
    keys, values = (
        torch.cat([x[:, :, first:last] for first, last in seen], dim=2)
        if len(seen) > 1
        else x[:, :, seen[0][0] : seen[0][1]]
        for x in (k, v)
    )
    return scaled_dot_product_attention(q[:, :, rows[0] : rows[1]], keys, values, attn_mask=mask)
