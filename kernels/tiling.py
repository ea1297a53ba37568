"""Tile choices: which block sizes, warps and pipeline depth a kernel is launched with.

A table `tiles/<gpu>.json` maps kernel → element class ("16" or "32" bit) → rows tried in order. A row fits when every
`max_…` bound of it holds; the last row of an architecture's table serves whatever fits nowhere. Bounds are shape
classes, never exact lengths, so that a new length does not compile a new kernel. A table named after the device
("NVIDIA_H100_80GB_HBM3") comes before the one of its architecture ("sm_90"). `TGQ_TILES` names a folder that is
searched first. Under "limits" a tuned table may hold numbers that rules compute otherwise (:func:`limit`). "measured"
in a table tells whether its rows were timed on that GPU or only follow from the performance model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgq_fast.errors import ArgumentError
from tgq_fast.io.json_text import read_json

FOLDER = Path(__file__).parent / "tiles"
INTERPRETER = "interpreter"


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1 when the kernels are first imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def gpu_names(index: int) -> tuple[str, ...]:
    """Names under which tables of CUDA device `index` are looked up, most specific first."""
    properties = torch.cuda.get_device_properties(index)
    return re.sub(r"[^A-Za-z0-9]+", "_", properties.name).strip("_"), f"sm_{properties.major}{properties.minor}"


@functools.cache
def table(name: str) -> dict[str, Any] | None:
    """The table of one GPU or architecture, None where there is none; ArgumentError for a file that holds none."""
    folders = [Path(os.environ["TGQ_TILES"])] if os.environ.get("TGQ_TILES") else []
    for folder in (*folders, FOLDER):
        path = folder / f"{name}.json"
        if path.is_file():
            try:
                found = read_json(path.read_bytes())
                if not isinstance(found, dict):
                    raise ValueError(f"a {type(found).__name__}")
            except ValueError as error:
                raise ArgumentError("TGQ_TILES", path, "tables that tgq-fast tune wrote", f"{error}") from None
            return found
    return None


_forced: dict[str, dict[str, Any]] = {}


@contextlib.contextmanager
def forced(kernel: str, options: dict[str, Any]) -> Iterator[None]:
    """Launch one kernel with these options, whatever the tables say; `kernel` "limits": see :func:`limit`."""
    _forced[kernel] = options
    try:
        yield
    finally:
        del _forced[kernel]


def _nearest(name: str) -> str:
    """The shipped architecture with the highest number not above this one (sm_86 → sm_80)."""
    wanted = int(name.removeprefix("sm_"))
    shipped = sorted(int(p.stem.removeprefix("sm_")) for p in FOLDER.glob("sm_*.json"))
    return f"sm_{max((s for s in shipped if s <= wanted), default=shipped[0])}"


def _fits(row: dict[str, int], sizes: dict[str, int]) -> bool:
    return all(sizes[key.removeprefix("max_")] <= bound for key, bound in row.items() if key.startswith("max_"))


def first_fit(rows: list[dict[str, int]], sizes: dict[str, int]) -> int:
    """Place of the first row all of whose bounds hold, of the last where none fits."""
    return next((place for place, row in enumerate(rows) if _fits(row, sizes)), len(rows) - 1)


def rows(kernel: str, names: tuple[str, ...], bits: int) -> list[dict[str, int]]:
    """All rows of a kernel in the first of these tables (or in that of the nearest architecture) that has it.

    Raises:
        KeyError: none has.
    """
    for name in (*names, _nearest(names[-1])) if names[-1].startswith("sm_") else names:
        found: list[dict[str, int]] = (table(name) or {}).get("kernels", {}).get(kernel, {}).get(str(bits), [])
        if found:
            return found
    raise KeyError(f"no tiles for {kernel} ({bits} bit) in tables {names}")


def pick(kernel: str, names: tuple[str, ...], bits: int, **sizes: int) -> dict[str, int]:
    """Launch options of one kernel: block sizes plus num_warps and num_stages.

    Args:
        kernel: kernel name.
        names: tables to look in, most specific first.
        bits: 16 or 32, width of an element.
        sizes: what the rows' `max_…` bounds are compared with, for example keys=197.
    """
    if kernel in _forced:
        return _forced[kernel]
    found = rows(kernel, names, bits)
    return {key: value for key, value in found[first_fit(found, sizes)].items() if not key.startswith("max_")}


def _names(device: torch.device) -> tuple[str, ...]:
    return (INTERPRETER,) if device.type != "cuda" else gpu_names(device.index or 0)


def tile(kernel: str, like: Tensor, **sizes: int) -> dict[str, int]:
    """:func:`pick` for the device and element width of a tensor."""
    return pick(kernel, _names(like.device), 32 if like.element_size() >= 4 else 16, **sizes)


def limit(name: str, device: torch.device) -> float | None:
    """A number that tuning found for a device, None where the rule in its place decides.

    Args:
        name: "chunk_bytes" or "graph_chunk_bytes" (:func:`tgq_fast.ops.cross_attention_triton.chunk_bytes`), or
            "fused_correction" (:func:`tgq_fast.kernels.cross_attention_fusion.fusion_cost`).
    """
    for limits in (_forced.get("limits", {}), *((table(n) or {}).get("limits", {}) for n in _names(device))):
        if name in limits:
            return float(limits[name])
    return None


def precision(like: Tensor) -> str:
    """How fp32 products are computed: TF32 only where PyTorch's own switch allows it."""
    if like.dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # The older switch cannot be read once the newer one was written.
    chosen = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if chosen is None else chosen == "tf32"
    return "tf32" if allowed else "ieee"
