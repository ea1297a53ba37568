"""Cost model that picks the algebraic form of hybrid-query cross-attention.

Multiply-accumulates per item, with R = N * H pooled rows:

* projected: 2 L dv d (keys and values) + 2 N L d (attention)
* absorbed:  2 R L dv (attention over raw tokens) + 2 N d dv (queries in, heads out)

The two kinds of product do not run at the same rate: the key and value projections are one large matrix product over
B * L rows, the absorbed attention is a batch of small ones with a softmax in between. :func:`attention_penalty` is the
ratio of the two rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def attention_penalty(device: str, dtype: torch.dtype) -> float:
    """How many times slower an attention product runs than the projections, per multiply-accumulate.

    CPU: fitted to the crossover of both forms over N = 8 … 64 at L = 197, d = 768 and L = 729, d = 1152, with PyTorch's
    own products on two cores with AVX-512 and AMX, whose matrix unit makes large 16-bit products cheaper still. CUDA:
    assumed by the performance model of docs/kernels.md, not measured.
    """
    if device != "cpu":
        return 1.3
    return 1.45 if dtype in (torch.float32, torch.float64) else 1.9


@dataclass(frozen=True)
class FormCost:
    """Weighted multiply-accumulates per item of both forms, forward plus whatever backward is asked for."""

    projected: float
    absorbed: float

    @property
    def best(self) -> str:
        return "absorbed" if self.absorbed < self.projected else "projected"

    def __str__(self) -> str:
        return f"{self.projected / 1e6:.1f} M weighted MAC projected, {self.absorbed / 1e6:.1f} M absorbed"


def form_cost(
    *,
    queries: int,
    length: int,
    visual_width: int,
    width: int,
    num_heads: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    grad_queries: bool = False,
    grad_weights: bool = False,
    grad_visual: bool = False,
) -> FormCost:
    """Cost of both forms for one item; see the module docstring for the terms."""
    penalty = attention_penalty(device, dtype)
    rows = queries * num_heads
    projection = 2 * length * visual_width * width
    attention = 2 * queries * length * width * penalty
    pooled = 2 * rows * length * visual_width * penalty
    ends = 2 * queries * width * visual_width
    projected: float = projection + attention
    absorbed: float = pooled + ends
    if grad_queries or grad_weights or grad_visual:
        # Scores are rebuilt, then dP and dq (or dK): each form repeats its attention products.
        projected += 1.5 * attention
        absorbed += 1.5 * pooled + ends
    if grad_weights:
        projected += projection + attention
        absorbed += ends
    if grad_visual:
        projected += projection + (0 if grad_weights else attention)
        absorbed += pooled
    return FormCost(projected, absorbed)
