"""The 2× rule: a variant's error against a higher-precision reference may be twice the plain PyTorch version's.

A peer only has to show that it computes the same function: hiding a fast peer for its last bits would flatter us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """Outcome of a parity check.

    Attributes:
        ok: whether every tensor passed.
        error: largest ‖out − ref‖ / ‖ref‖ over the tensors.
        detail: the first tensor that failed, and why; empty if none did.
    """

    ok: bool
    error: float
    detail: str = ""


Named = Mapping[str, Tensor]


def higher_precision(dtype: torch.dtype) -> torch.dtype:
    """The reference's dtype: fp64 for fp32, fp32 for fp16 and bf16."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


OWN_SLACK, PEER_SLACK = 1.0, 4.0


def check(
    out: Named,
    reference: Named,
    baselines: list[Named],
    dtype: torch.dtype,
    weights: frozenset[str] = frozenset(),
    slack: float = OWN_SLACK,
) -> Verdict:
    """Compare with the reference under the 2× rule (3× for weight gradients), in the largest and the L2 norm.

    Args:
        reference: name → tensor in higher precision; `out` must have the same names and shapes.
        baselines: the reference computed in `dtype`, in each of its algebraic forms; the least exact one counts.
        dtype: the precision under test; one unit in its last place at the largest value is the noise floor.
        weights: names whose factor is 3.
        slack: multiplies what is allowed; `PEER_SLACK` for peers.
    """
    worst, detail = 0.0, ""
    if set(out) != set(reference):
        return Verdict(False, float("inf"), f"tensors {sorted(out)} where {sorted(reference)} were expected")
    ulp = torch.finfo(dtype).eps
    for name, ref in reference.items():
        mine = out[name]
        if mine.shape != ref.shape:
            return Verdict(False, float("inf"), f"{name}: shape {tuple(mine.shape)}, expected {tuple(ref.shape)}")
        if not mine.numel():
            continue
        factor = 3.0 if name in weights else 2.0
        delta = mine.to(ref.dtype) - ref
        norm = ref.norm()
        error = (delta.norm() / norm.clamp_min(torch.finfo(ref.dtype).tiny)).item()
        worst = max(worst, error) if error == error else float("inf")
        base = [b[name].to(ref.dtype) - ref for b in baselines]
        for kind, got, allowed in (
            ("largest", delta.abs().max(), factor * max(d.abs().max() for d in base) + ulp * ref.abs().max()),
            ("L2", delta.norm(), factor * max(d.norm() for d in base) + ulp * norm),
        ):
            if not got <= slack * allowed:  # also true for NaN
                detail = detail or f"{name}: {kind} error {got.item():.3g} above the allowed {allowed.item():.3g}"
    return Verdict(not detail, worst, detail)
