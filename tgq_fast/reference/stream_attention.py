"""Block-masked self-attention of both query streams and the metadata, by definition.

Symbols: [A; E; T] are Na anchored and Ne exploratory queries and M metadata tokens, S = Na + Ne + M of them; H heads of
width dh.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tgq_fast.errors import ArgumentError
from tgq_fast.reference.cross_attention import masked_softmax

Mixing = Literal["block", "one_way", "full"]


def stream_mask(
    lengths: tuple[int, int, int],
    *,
    mixing: Mixing = "block",
    explore_sees_text: bool = False,
    text_mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which token of [A; E; T] may attend to which, as a dense boolean mask.

    * ``block``: A sees {A, T}, E sees {E}, T sees {T}: the streams never see each other.
    * ``one_way``: as block, and A also sees E; E still never sees A or, through A, the metadata.
    * ``full``: every token sees every token, as in InstructBLIP's Q-Former.

    ``explore_sees_text`` lets E see T in the first two.

    Args:
        lengths: (Na, Ne, M).
        text_mask: [B, M] bool, True for real tokens; hides padded text from every row.

    Returns:
        [1 or B, 1, S, S] bool with S = Na + Ne + M, True = may attend (row attends to column).

    Source: ours, the direct reading of the paper's "disentangle".
    """
    if mixing not in ("block", "one_way", "full"):
        raise ArgumentError("mixing", repr(mixing), "'block', 'one_way' or 'full'")
    num_anchored, num_exploratory, num_text = lengths
    a = slice(0, num_anchored)
    e = slice(num_anchored, num_anchored + num_exploratory)
    t = slice(num_anchored + num_exploratory, sum(lengths))
    size = sum(lengths)
    mask = torch.zeros(size, size, dtype=torch.bool, device=device)
    if mixing == "full":
        mask[:] = True
    else:
        mask[a, a] = mask[a, t] = mask[e, e] = mask[t, t] = True
        if mixing == "one_way":
            mask[a, e] = True
        if explore_sees_text:
            mask[e, t] = True
    mask = mask[None, None]
    if text_mask is not None and num_text:
        keys = torch.ones(text_mask.shape[0], size, dtype=torch.bool, device=device)
        keys[:, t] = text_mask
        mask = mask & keys[:, None, None, :]
    return mask


def stream_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, int, int],
    *,
    mixing: Mixing = "block",
    explore_sees_text: bool = False,
    text_mask: Tensor | None = None,
) -> Tensor:
    """Self-attention over [A; E; T] whose visibility follows from three lengths (:func:`stream_mask`).

    Args:
        q, k, v: [B, S, H, dh] projected heads, S = Na + Ne + M, unscaled.
        lengths: (Na, Ne, M).
        text_mask: [B, M] bool, True for real metadata tokens.

    Returns:
        [B, S, H, dh]; a row that sees no key is exactly zero.

    Raises:
        ArgumentError: lengths do not sum to S.
    """
    if sum(lengths) != q.shape[1]:
        raise ArgumentError("lengths", lengths, f"three lengths that sum to the sequence length {q.shape[1]}")
    mask = stream_mask(
        lengths, mixing=mixing, explore_sees_text=explore_sees_text, text_mask=text_mask, device=q.device
    )
    scores = torch.einsum("bshc,bthc->bhst", q * q.shape[-1] ** -0.5, k)
    p = masked_softmax(scores, mask.expand(q.shape[0], 1, -1, -1))
    return torch.einsum("bhst,bthc->bshc", p, v)
