"""Calls the compiled search core on CUDA tensors. Arguments are checked already.

Everything is put on the current stream of the tensors' device and nothing waits for it, so the call can be captured in
a CUDA graph; the results are there when the stream gets to them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, BackendError, TGQError
from tgq_fast.reference import TopK

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_OK, _OUT_OF_MEMORY, _UNSUPPORTED = 0, 2, 4
ENGINES = {"auto": 0, "direct": 1, "portable": 2, "hopper": 3, "skinny": 4}
HOPPER_TILES = {"auto": 0, "128x128": 1, "64x256": 2, "128x256": 3}  # queries x rows of a block
TUNING_VARIABLE = "TGQ_CUDA_TUNING"
_WHOLE_NUMBERS = (
    "sample_stride",
    "first_rows",
    "chunk_rows",
    "tile_queries",
    "hit_capacity",
    "direct_blocks",
    "self_join",
)


def why_not(queries: Tensor) -> list[str]:
    """Why the compiled core cannot search on the tensors' device; empty when it can."""
    module = _native.extension()
    if module is None:
        return [_native.why_missing()]
    if not hasattr(module, "search_cuda"):
        return [f"built without CUDA: {module.build_info()['cuda_reason']}"]
    reason = module.why_no_cuda(_device_index(queries))
    return [] if reason is None else [reason]


def search(
    queries: Tensor,
    pool: Tensor,
    k: int,
    exclude: Tensor | None,
    out: TopK,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
    *,
    tuning: dict[str, Any] | None = None,
    first_row: int = 0,
    resume: bool = False,
) -> TopK:
    """Queues the search of queries [Q, D] against pool [N, D], both on one CUDA device, and returns `out`.

    Scores and rows equal those of the CPU core bit for bit. `tuning` (see :func:`tuning_options`) is for tests and
    measurements; answers do not depend on it. `threads` is for the CPU. `progress` is called once, when all is queued.
    The pool may be part of a larger one: its rows count from `first_row`, in exclusions too, and with `resume` its hits
    join those of other parts that `out` holds. Where the queries are the pool (the same memory) and there are many of
    them, one triangle of the scores is computed.

    Raises:
        BackendError: the device cannot run the search, or its memory is exhausted.
    """
    module = _native.extension()
    if module is None or not hasattr(module, "search_cuda"):
        raise BackendError("topk", "cpp", {"cpp": why_not(queries)})
    device, options = _device_index(queries), tuning_options(tuning)
    request = (
        _matrix(queries),
        _matrix(pool),
        k,
        0 if exclude is None else exclude.data_ptr(),
        0 if exclude is None else exclude.shape[1],
        first_row,
        resume,
    )
    # The core writes dense rows; a strided output is filled afterwards.
    scores, rows = _dense(out.scores, resume), _dense(out.indices, resume)
    with torch.cuda.device(device):
        # Freed when this returns: the allocator hands it out again only to work that comes later on this stream.
        workspace = _workspace(module, request, device, options)
        stream = torch.cuda.current_stream(device).cuda_stream
        memory = scores.data_ptr(), rows.data_ptr(), stream, workspace.data_ptr(), len(workspace)
        status, reason = module.search_cuda(*request, *memory, device, options)
        _check(status, reason)
        if scores is not out.scores:
            out.scores.copy_(scores)
        if rows is not out.indices:
            out.indices.copy_(rows)
    if progress is not None:
        progress(1.0)
    return out


def _workspace(module: ModuleType, request: tuple[Any, ...], device: int, options: dict[str, int | float]) -> Tensor:
    """What the request needs. A self-join over one triangle keeps more than its result takes: without room for that,
    `options` are changed to compute the square, which needs little.
    """
    status, reason, size = module.cuda_workspace(*request, device, options)
    _check(status, reason)
    try:
        return torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
    except torch.OutOfMemoryError:
        if options.get("self_join") == 0:
            raise
        options["self_join"] = 0
        return _workspace(module, request, device, options)


def tuning_options(tuning: dict[str, Any] | None = None) -> dict[str, int | float]:
    """Options of the core from `tuning`, and for what it lacks from the variable TGQ_CUDA_TUNING ("name=value,…").

    "engine" is one of ENGINES, "hopper_tile" one of HOPPER_TILES, "forced_threshold" a score; the others are whole
    numbers.

    Raises:
        ArgumentError: an unknown option, or a value that it does not take.
    """
    given: dict[str, Any] = {}
    for entry in filter(None, os.environ.get(TUNING_VARIABLE, "").split(",")):
        name, _, value = entry.partition("=")
        given[name.strip()] = value.strip()
    given.update(tuning or {})
    return {name: _option(name, value) for name, value in given.items()}


def _option(name: str, value: Any) -> int | float:
    choices = {"engine": ENGINES, "hopper_tile": HOPPER_TILES}.get(name)
    if choices is not None:
        if value in choices:
            return choices[value]
        raise ArgumentError(f"tuning {name}", repr(value), " | ".join(choices))
    if name != "forced_threshold" and name not in _WHOLE_NUMBERS:
        known = ["engine", "hopper_tile", "forced_threshold", *_WHOLE_NUMBERS]
        raise ArgumentError("tuning", repr(name), " | ".join(known))
    try:
        return float(value) if name == "forced_threshold" else int(value)
    except ValueError as error:
        raise ArgumentError(f"tuning {name}", repr(value), "a number") from error


def _dense(tensor: Tensor, keep: bool) -> Tensor:
    """The tensor itself, or when it is strided dense memory of its shape, with its values if they are to be kept."""
    if tensor.is_contiguous() or keep:
        return tensor.contiguous()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _check(status: int, reason: str) -> None:
    if status == _OK:
        return
    if status in (_OUT_OF_MEMORY, _UNSUPPORTED):
        raise BackendError("topk", "cpp", {"cpp": [reason]})
    raise TGQError(f"topk: the search core refused checked arguments ({reason}); please report this")


def _device_index(tensor: Tensor) -> int:
    return torch.cuda.current_device() if tensor.device.index is None else tensor.device.index


def _matrix(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    """(address, rows, columns, row stride, column stride, dtype code), strides in elements."""
    rows, columns = tensor.shape
    return (tensor.data_ptr(), rows, columns, tensor.stride(0), tensor.stride(1), _DTYPE_CODES[tensor.dtype])
