"""Calls the compiled search core on CUDA tensors. Arguments are checked already.

Everything is put on the current stream of the tensors' device and nothing waits for it, so the call can be captured in
a CUDA graph; the results are there when the stream gets to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tgq_fast import _native
from tgq_fast.errors import BackendError, TGQError
from tgq_fast.reference import TopK

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_OK, _OUT_OF_MEMORY, _UNSUPPORTED = 0, 2, 4
ENGINES = {"auto": 0, "direct": 1, "portable": 2, "hopper": 3}


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

    Scores and rows equal those of the CPU core bit for bit. `tuning` is for tests and measurements (its "engine" is one
    of ENGINES); answers do not depend on it. `threads` is for the CPU. `progress` is called once, when all is queued.
    The pool may be part of a larger one: its rows count from `first_row`, in exclusions too, and with `resume` its hits
    join those of other parts that `out` holds.

    Raises:
        BackendError: the device cannot run the search, or its memory is exhausted.
    """
    module = _native.extension()
    if module is None or not hasattr(module, "search_cuda"):
        raise BackendError("topk", "cpp", {"cpp": why_not(queries)})
    device, options = _device_index(queries), dict(tuning or {})
    if "engine" in options:
        options["engine"] = ENGINES[options["engine"]]
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
        status, reason, size = module.cuda_workspace(*request, device, options)
        _check(status, reason)
        # Freed when this returns: the allocator hands it out again only to work that comes later on this stream.
        workspace = torch.empty(size, dtype=torch.uint8, device=queries.device)
        stream = torch.cuda.current_stream(device).cuda_stream
        status, reason = module.search_cuda(
            *request, scores.data_ptr(), rows.data_ptr(), stream, workspace.data_ptr(), size, device, options
        )
        _check(status, reason)
        if scores is not out.scores:
            out.scores.copy_(scores)
        if rows is not out.indices:
            out.indices.copy_(rows)
    if progress is not None:
        progress(1.0)
    return out


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
