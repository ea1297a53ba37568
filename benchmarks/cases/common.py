"""Pieces that the cases of plain operators share: one case per dtype and direction, candidates of forced backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Direction, Setting, Workload
from benchmarks.cases.tensors import Candidate, Function

Build = Callable[[Case, dict[str, Any], Setting], Workload]


def each(
    op: str,
    shape_class: str,
    shape: dict[str, Any],
    tiny: dict[str, Any],
    build: Build,
    *,
    device: str,
    dtypes: tuple[str, ...],
    directions: tuple[Direction, ...],
    priority: int,
) -> list[Case]:
    """One case per dtype and direction."""
    return [
        Case(op, shape_class, dtype, direction, shape, tiny, frozenset({device}), build, priority)
        for dtype in dtypes
        for direction in directions
    ]


def own_candidates(
    function: Callable[..., dict[str, Tensor]], explain: Callable[..., Any], device: str
) -> list[Candidate]:
    """`function(tensors, backend=...)` as "tgq_fast" (its own choice) and, on a GPU, each backend by name."""
    names: dict[str, str | None] = {"tgq_fast": None}
    if device == "cuda":
        names |= {"tgq_fast triton": "triton", "tgq_fast torch": "torch"}
    return [
        Candidate(
            label,
            "ours",
            partial(function, backend=backend),
            describe=lambda t, backend=backend: str(explain(t, backend=backend)),  # type: ignore[misc]
        )
        for label, backend in names.items()
    ]


def reference_candidates(function: Function, *, compiled: bool) -> list[Candidate]:
    """The definition run eagerly and, on request, through torch.compile."""
    found = [Candidate("reference", "reference", function)]
    if compiled:
        found.append(Candidate("torch.compile of reference", "peer", function, compiled=True))
    return found


class Normal:
    """Draws normal tensors of one dtype on one device from a generator."""

    def __init__(self, generator: torch.Generator, device: str, dtype: torch.dtype) -> None:
        self.generator, self.device, self.dtype = generator, device, dtype

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, device=self.device) * std).to(self.dtype)
