"""Calls the compiled search core. Arguments are checked already; memory passes by address and is never copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, BackendError, TGQError
from tgq_fast.reference import TopK
from tgq_fast.retrieval.topk_arguments import as_tensor

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_OK, _OUT_OF_MEMORY = 0, 2


def shadow_width(columns: int) -> int:
    """Bytes of a row's codes: D padded to a multiple of 64. Also for readers without the compiled core."""
    return -(-columns // 64) * 64


@dataclass(frozen=True)
class Shadow:
    """Byte codes of every row of a pool: a search that has them reads a row itself only where it may be an answer.

    Row r is close to `scale[r] * (codes[r] - 128)`; `norm` and `error` bound, from above, the norm of that vector and
    of the difference. Answers do not depend on a shadow as long as it is that of the pool. docs/topk.md has the layout.
    """

    codes: Tensor  # [N, shadow_width(D)] uint8
    scale: Tensor  # [N] float32
    norm: Tensor  # [N] float32
    error: Tensor  # [N] float32

    def check(self, pool: Tensor) -> None:
        """Raises ArgumentError unless these tensors can be the shadow of `pool`."""
        rows, columns = pool.shape
        for name in ("codes", "scale", "norm", "error"):
            tensor: Tensor = getattr(self, name)
            dtype, shape = torch.float32, [rows]
            if name == "codes":
                dtype, shape = torch.uint8, [rows, shadow_width(columns)]
            fits = tensor.dtype == dtype and list(tensor.shape) == shape and tensor.is_contiguous()
            if not fits or tensor.device.type != "cpu":
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                raise ArgumentError(f"shadow.{name}", got, f"{dtype} {shape}, contiguous, on the CPU")


def build_shadow(pool: Tensor, threads: int | None = None) -> Shadow:
    """Encodes a pool [N, D] (float32, float16 or bfloat16, on the CPU, strided too) for searches to come."""
    module = _native.extension()
    if module is None:
        raise BackendError("build_shadow", "cpp", {"cpp": [_native.why_missing()]})
    pool = as_tensor("pool", pool)
    if pool.ndim != 2 or pool.dtype not in _DTYPE_CODES or pool.device.type != "cpu":
        got = f"{pool.dtype} {list(pool.shape)} on {pool.device}"
        raise ArgumentError("pool", got, "[N, D] float32, float16 or bfloat16 on the CPU")
    rows = pool.shape[0]
    codes = torch.empty((rows, shadow_width(pool.shape[1])), dtype=torch.uint8, device="cpu")
    scale, norm, error = (torch.empty(rows, dtype=torch.float32, device="cpu") for _ in range(3))
    addresses = [tensor.data_ptr() for tensor in (codes, scale, norm, error)]
    status = module.build_shadow(_matrix(pool), *addresses, threads or torch.get_num_threads())
    _raise_for(status, "build_shadow", "out of memory")
    return Shadow(codes, scale, norm, error)


def why_not(queries: Tensor) -> list[str]:
    """Why the compiled core cannot search here; empty when it can."""
    module = _native.extension()
    if module is None:
        return [_native.why_missing()]
    if queries.device.type != "cpu":
        return [f"built for the CPU only, the tensors are on {queries.device}"]
    isa = os.environ.get("TGQ_ISA", "")
    if isa and module.resolve_isa(isa) is None:
        known = " | ".join(module.build_info()["isas"])
        raise ArgumentError("TGQ_ISA", repr(isa), f"an instruction set that this machine runs: {known}")
    return []


def search(
    queries: Tensor,
    pool: Tensor,
    k: int,
    exclude: Tensor | None,
    out: TopK,
    threads: int,
    progress: Callable[[float], None] | None,
    *,
    allowed: Tensor | None = None,
    shadow: Shadow | None = None,
    isa: str | None = None,
    tuning: dict[str, Any] | None = None,
    counters: dict[str, int] | None = None,
) -> TopK:
    """Runs the core; `allowed` [N] bool marks the rows that may be returned, `shadow` is that of the pool.

    `isa`, `tuning` and `counters` are for tests and measurements. Answers depend on none of the last four.
    """
    module = _native.extension()
    if module is None:
        raise BackendError("topk", "cpp", {"cpp": [_native.why_missing()]})
    if shadow is not None:
        shadow.check(pool)
    # The core writes dense rows; a strided output is filled afterwards.
    scores = (
        out.scores
        if out.scores.is_contiguous()
        else torch.empty_like(out.scores, memory_format=torch.contiguous_format)
    )
    rows = (
        out.indices
        if out.indices.is_contiguous()
        else torch.empty_like(out.indices, memory_format=torch.contiguous_format)
    )
    status = module.search_cpu(
        _matrix(queries),
        _matrix(pool),
        k,
        0 if exclude is None else exclude.data_ptr(),
        0 if exclude is None else exclude.shape[1],
        scores.data_ptr(),
        rows.data_ptr(),
        threads,
        _same_memory(queries, pool),
        progress,
        isa,
        tuning or {},
        counters,
        None if shadow is None or shadow.codes.numel() == 0 else _addresses(shadow),
        0 if allowed is None else allowed.data_ptr(),
    )
    _raise_for(status, "topk", "out of memory: search fewer queries at a time")
    if scores is not out.scores:
        out.scores.copy_(scores)
    if rows is not out.indices:
        out.indices.copy_(rows)
    if progress is not None:
        progress(1.0)
    return out


def _raise_for(status: int, what: str, out_of_memory: str) -> None:
    if status == _OUT_OF_MEMORY:
        raise BackendError(what, "cpp", {"cpp": [out_of_memory]})
    if status != _OK:
        raise TGQError(f"{what}: the search core refused checked arguments (status {status}); please report this")


def _addresses(shadow: Shadow) -> tuple[int, int, int, int, int]:
    """(codes, bytes of a row of codes, scale, norm, error), addresses but for the second."""
    width = shadow.codes.shape[1]
    return (shadow.codes.data_ptr(), width, shadow.scale.data_ptr(), shadow.norm.data_ptr(), shadow.error.data_ptr())


def _same_memory(queries: Tensor, pool: Tensor) -> bool:
    """Whether the pool is searched for its own rows: scores are symmetric then, and one triangle is enough."""
    same = queries.data_ptr() == pool.data_ptr() and queries.shape == pool.shape and queries.stride() == pool.stride()
    return same and queries.dtype == pool.dtype


def _matrix(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    """(address, rows, columns, row stride, column stride, dtype code), strides in elements."""
    rows, columns = tensor.shape
    return (tensor.data_ptr(), rows, columns, tensor.stride(0), tensor.stride(1), _DTYPE_CODES[tensor.dtype])
