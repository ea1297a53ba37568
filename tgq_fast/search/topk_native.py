"""Calls the compiled search core. Arguments are checked already; memory passes by address and is never copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, BackendError, TGQError
from tgq_fast.reference import TopK
from tgq_fast.search.codes import Codes
from tgq_fast.search.rules import Rule

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_OK, _OUT_OF_MEMORY, _UNSUPPORTED = 0, 2, 4


def why_not(queries: Tensor) -> list[str]:
    """Why the compiled core cannot search here; empty when it can."""
    module = _native.extension()
    if module is None:
        return [_native.why_missing()]
    if not queries.is_cpu:
        return [f"built for the CPU only, the tensors are on {queries.device}"]
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
    codes: Codes | None = None,
    rules: Sequence[Rule] = (),
    sampled_k: int = 0,
    isa: str | None = None,
    tuning: dict[str, Any] | None = None,
    counters: dict[str, int] | None = None,
) -> TopK:
    """Runs the core; `allowed` [N] bool marks the rows that may be returned, `codes` are those of the pool.

    `sampled_k` is the k that a sample assumes where `rules` keep few of the rows. `isa`, `tuning` and `counters` are
    for tests and measurements. Answers depend on none of these, nor on the codes.
    """
    module = _module("topk")
    if codes is not None:
        codes.check(pool)
    # The core writes dense rows; a strided output is filled afterwards.
    scores, rows = (
        tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (out.scores, out.indices)
    )
    asked, stored = _matrix(queries), _matrix(pool)
    status = module.search_cpu(
        asked,
        stored,
        k,
        exclude=0 if exclude is None else exclude.data_ptr(),
        exclude_width=0 if exclude is None else exclude.shape[1],
        scores=scores.data_ptr(),
        rows=rows.data_ptr(),
        threads=threads,
        self_join=asked == stored,  # scores are symmetric then, and one triangle is enough
        progress=progress,
        isa=isa,
        tuning=tuning or {},
        counters=counters,
        codes=None if codes is None else codes.addresses,
        allowed=0 if allowed is None else allowed.data_ptr(),
        rules=tuple(rule.addresses() for rule in rules),
        sampled_k=sampled_k,
    )
    _raise_for(status, "topk", "out of memory: search fewer queries at a time")
    if scores is not out.scores:
        out.scores.copy_(scores)
    if rows is not out.indices:
        out.indices.copy_(rows)
    if progress is not None:
        progress(1.0)
    return out


def count_before(
    queries: Tensor,
    pool: Tensor,
    first_row: int,
    marks: tuple[Tensor, Tensor, Tensor, Tensor],
    threads: int,
    progress: Callable[[float], None] | None,
    *,
    isa: str | None = None,
) -> None:
    """Counts the rows before marks (starts, scores, rows), contiguous, into the last of the four tensors."""
    addresses = tuple(tensor.data_ptr() for tensor in marks)
    status = _module("count_before").count_before(
        _matrix(queries), _matrix(pool), first_row, addresses, threads, isa, progress
    )
    _raise_for(status, "count_before", "out of memory: count for fewer queries at a time")


def score_rows(queries: Tensor, rows: Tensor, scores: Tensor, *, isa: str | None = None) -> None:
    """Scores row by row, into `scores`."""
    status = _module("score_rows").score_rows(_matrix(queries), _matrix(rows), isa, scores.data_ptr())
    _raise_for(status, "score_rows", "out of memory")


def _module(what: str) -> Any:
    module = _native.extension()
    if module is None:
        raise BackendError(what, "cpp", {"cpp": [_native.why_missing()]})
    return module


def _raise_for(status: int, what: str, out_of_memory: str) -> None:
    if status == _OUT_OF_MEMORY:
        raise BackendError(what, "cpp", {"cpp": [out_of_memory]})
    if status == _UNSUPPORTED:
        known = " | ".join(_native.build_info()["isas"])
        given = repr(os.environ.get("TGQ_ISA", ""))
        raise ArgumentError("TGQ_ISA", given, f"an instruction set that this machine runs: {known}")
    if status != _OK:
        raise TGQError(f"{what}: the search core refused checked arguments (status {status}); please report this")


def _matrix(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    """(address, rows, columns, row stride, column stride, dtype code), strides in elements."""
    rows, columns = tensor.shape
    return (tensor.data_ptr(), rows, columns, tensor.stride(0), tensor.stride(1), _DTYPE_CODES[tensor.dtype])
