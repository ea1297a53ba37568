"""`tgq-fast tune`: the tile rows of :mod:`tgq_fast.kernels.tune`, then the numbers that the operators go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tgq_fast.errors import BackendError
from tgq_fast.ops.cross_attention_triton import absorbed_attention
from tgq_fast.ops.dispatch import triton_importable

__all__ = ["tune"]

_HEADS, _QUERIES, _LENGTH, _WIDTH = 12, 16, 197, 768  # the paper's size, roughly
_CHUNKS = tuple(2**20 * n for n in (8, 12, 16, 24, 32, 64, 128))
_BATCHES = (1, 2, 4, 8, 16)


def tune(
    out: Path,
    *,
    only: str = "*",
    budget_s: float = float("inf"),
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    **stand_ins: Any,
) -> dict[str, Any]:
    """Extend the tile table of the GPU at hand.

    Args:
        out: folder of the table; set ``TGQ_TILES`` to it to use the table.
        only: shell glob over kernel names and "limits" (chunk sizes and the model of fusion).
        budget_s: nothing is begun after so many seconds; what was found is kept.
        stand_ins: `clock` and `work` in the place of a GPU's, for tests.

    Returns:
        {"table": path, "gpu": name, "timed": what was tuned → milliseconds or value, all runs together}.

    Raises:
        BackendError: there is no CUDA device, or no Triton.
    """
    if not triton_importable():
        raise BackendError("tune", "triton", {"triton": ["triton is not installed"]})
    from tgq_fast.kernels.tune import Tuning

    work = stand_ins.pop("work", None)
    tuning = Tuning(out, only=only, budget_s=budget_s, dtype=dtype, device=device, **stand_ins)
    tuning.tiles(work)
    if tuning.wants("limits"):
        _limits(tuning)
    return {"table": tuning.path, "gpu": tuning.table["gpu"], "timed": tuning.table["timed"]}


def _attend(tuning: Any, batch: int) -> Callable[[bool], Tensor]:
    """The absorbed attention of `batch` items, fused or not."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=tuning.device, dtype=tuning.dtype)

    q, x, weight = new(batch, _QUERIES, _WIDTH), new(batch, _LENGTH, _WIDTH), new(_WIDTH, _WIDTH)
    return lambda fused: absorbed_attention(q, x, weight, weight, *(None,) * 5, _HEADS, False, fused)[0]


def _limits(tuning: Any, batch: int = 1024) -> None:
    """Chunk sizes with and without a CUDA graph, and how far the model misjudges fused against separate launches."""
    from tgq_fast.kernels import tiling
    from tgq_fast.kernels.cross_attention_fusion import fusion_cost
    from tgq_fast.kernels.launch import multiprocessors

    limits = tuning.table.setdefault("limits", {})
    attend = _attend(tuning, batch)

    def chunked(size: int) -> Callable[[], None]:
        def call() -> None:
            with tiling.forced("limits", {"chunk_bytes": size, "graph_chunk_bytes": size}):
                attend(False)

        return call

    def sizes() -> Iterator[tuple[int, Callable[[], None]]]:
        return ((size, chunked(size)) for size in _CHUNKS)

    for name, graph in (("chunk_bytes", False), ("graph_chunk_bytes", True)):
        best = tuning.fastest(sizes(), graph=graph)
        if best is not None:
            limits[name] = best[0]
            tuning.save(name, best[0])

    ratios = []
    for items in _BATCHES:
        both = [(fused, partial(_attend(tuning, items), fused)) for fused in (True, False)]
        measured = [tuning.fastest(iter([one]), graph=True) for one in both]
        if None in measured:
            continue
        cost = fusion_cost(
            batch=items,
            queries=_QUERIES,
            length=_LENGTH,
            visual_width=_WIDTH,
            num_heads=_HEADS,
            head=_WIDTH // _HEADS,
            item_size=tuning.dtype.itemsize,
            processors=multiprocessors(tuning.device),
        )
        ratios.append(measured[0][1] / measured[1][1] * cost.separate / cost.fused)
    if ratios:
        limits["fused_correction"] = median(ratios)
        tuning.save("fused_correction", limits["fused_correction"])
