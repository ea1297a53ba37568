"""Exact maximum inner product search of many queries over a whole item pool.

One function, :func:`topk`, with one contract for every backend; docs/topk.md states it and proves the filter's margin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgq_fast.defaults import plain_defaults, plain_tensors
from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.reference import TopK
from tgq_fast.search import topk_arguments as arguments
from tgq_fast.search import topk_cuda, topk_native, topk_stream
from tgq_fast.search.codes import Codes
from tgq_fast.search.rules import Rule
from tgq_fast.search.topk_torch import topk_torch

__all__ = ["TopK", "merge_topk", "topk", "topk_by_rules"]

BACKENDS = ("auto", "cpp", "torch")


def topk(
    queries: Any,
    pool: Any,
    k: int,
    *,
    exclude: Any = None,
    allowed: Any = None,
    backend: str = "auto",
    precision: str = "exact",
    num_threads: int | None = None,
    out: Any = None,
    progress: Callable[[float], None] | None = None,
    codes: Codes | None = None,
) -> TopK:
    """The k pool rows with the largest inner product for every query, exactly.

    Order: score descending, then pool row ascending; -0 and +0 tie. A NaN score is never returned, -inf is an
    ordinary score. Fewer than k valid rows pad with (-inf, -1). Nothing of size Q × N is allocated. Q = 0, N = 0 and
    k > N work.

    Args:
        queries: [Q, D] float32, float16 or bfloat16; torch tensor, numpy array or anything with DLPack, strided too.
        pool: [N, D] on the same device; a read-only memory map is searched in place. With queries on a CUDA device it
            may lie in host memory, of any size: it is streamed through the device, fastest from pinned memory, and the
            call returns when it has been read.
        k: 1 … 2048.
        exclude: pool rows that a query must not return: [Q] or [Q, X] integers, or one list per query; entries below
            zero mean none.
        allowed: [N] bool, false for pool rows that no query may return: what a filter or deletions leave. Tested on
            hits only; blocks without an allowed row are not read.
        backend: "auto", "cpp" (the compiled core: C++ on the CPU, CUDA on a GPU) or "torch" (PyTorch in chunks).
        precision: "exact" scores the values as stored, each raised exactly to fp32; "native" first rounds the
            queries to the pool's dtype. Both accumulate in fp32, and are the same when the dtypes are.
        num_threads: worker threads on the CPU; default: as many as torch uses.
        out: a pair (scores [Q, k] float32, indices [Q, k] int64) to write to.
        progress: called now and then with the share done, 0 … 1; what it raises ends the search.
        codes: what :func:`tgq_fast.search.build_codes` made of this pool, for searching it again and again on the
            CPU: most rows are then not read. Answers are the same; other backends do not use them.

    Returns:
        TopK of tensors on the queries' device: scores [Q, k] float32 and indices [Q, k] int64.

    Raises:
        ArgumentError: a wrong dtype, shape, k, device mix, exclusion or output; names the argument.
        BackendError: the forced backend cannot run; says why.
        KeyboardInterrupt: Ctrl-C during a long search.

    [ours]
    """
    if torch.compiler.is_compiling():
        return TopK(*_topk_op(queries, pool, k, exclude, backend, precision, num_threads, allowed))
    return _topk(queries, pool, k, exclude, allowed, backend, precision, num_threads, out, progress, codes)


def topk_by_rules(
    queries: Tensor,
    pool: Tensor,
    k: int,
    rules: Sequence[Rule],
    *,
    exclude: Tensor | None = None,
    allowed: Tensor | None = None,
    sampled_k: int = 0,
    progress: Callable[[float], None] | None = None,
    codes: Codes | None = None,
) -> TopK:
    """:func:`topk` on a CPU among the rows that meet every rule with their query.

    Args:
        sampled_k: about k over the share of the rows that rules leave a query: a first threshold must let so many pass.
            Answers do not depend on it.
    """
    return _topk(queries, pool, k, exclude, allowed, "auto", "exact", None, None, progress, codes, rules, sampled_k)


def _topk(
    queries: Any,
    pool: Any,
    k: int,
    exclude: Any,
    allowed: Any,
    backend: str,
    precision: str,
    num_threads: int | None,
    out: Any,
    progress: Callable[[float], None] | None,
    codes: Codes | None,
    rules: Sequence[Rule] = (),
    sampled_k: int = 0,
) -> TopK:
    arguments.check_choice("backend", backend, BACKENDS)
    arguments.check_choice("precision", precision, arguments.PRECISIONS)
    k = arguments.check_k(k)
    threads = arguments.check_threads(num_threads)
    q, p = arguments.check_matrices(queries, pool)
    if progress is not None and not callable(progress):
        raise ArgumentError("progress", type(progress).__name__, "a function of one float, or None")
    if codes is not None and not isinstance(codes, Codes):
        raise ArgumentError("codes", type(codes).__name__, "what tgq_fast.search.build_codes made, or None")
    excluded = arguments.check_exclude(exclude, q.shape[0], p.shape[0], q.device)
    mask = arguments.check_allowed(allowed, p.shape[0], p.device)
    result = arguments.check_out(out, q.shape[0], k, q.device)
    if precision == "native" and q.dtype != p.dtype:
        q = q.to(p.dtype)
    if backend != "torch":
        compiled = topk_cuda if q.is_cuda else topk_native
        reasons = compiled.why_not(q)
        if not reasons and compiled is topk_native:  # its tensors name dtype and device, and it has no products
            return topk_native.search(
                q, p, k, excluded, result, threads, progress,
                allowed=mask, codes=codes, rules=rules, sampled_k=sampled_k,
            )  # fmt: skip
        if not reasons:
            with plain_defaults():
                return _on_device(q, p, k, excluded, mask, result, threads, progress)
        if backend == "cpp":
            raise BackendError("topk", "cpp", {"cpp": reasons})
    with plain_tensors():  # it holds the products itself
        return topk_torch(q, p, k, excluded, result, progress, allowed=mask, rules=rules)


def _on_device(
    queries: Tensor,
    pool: Tensor,
    k: int,
    excluded: Tensor | None,
    mask: Tensor | None,
    result: TopK,
    threads: int,
    progress: Callable[[float], None] | None,
) -> TopK:
    """The compiled search of queries on a CUDA device; rows that `mask` leaves out are not sent to it."""
    search = topk_cuda.search if queries.device == pool.device else topk_stream.search
    if mask is None:
        return search(queries, pool, k, excluded, result, threads, progress)
    rows = mask.nonzero()[:, 0]
    position = torch.where(mask, mask.cumsum(0) - 1, -1).to(queries.device)
    if excluded is not None:
        excluded = torch.where(excluded < 0, -1, position[excluded.clamp(min=0)])
    search(queries, pool[rows], k, excluded, result, threads, progress)
    result.indices.copy_(_rows_at(rows.to(queries.device), result.indices))
    return result


@torch.library.custom_op("tgq_fast::topk", mutates_args=())
def _topk_op(
    queries: Tensor,
    pool: Tensor,
    k: int,
    exclude: Tensor | None = None,
    backend: str = "auto",
    precision: str = "exact",
    num_threads: int | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`topk` as a torch operator: what a compiled graph calls. Hits have no gradient."""
    found = topk(
        queries,
        pool,
        k,
        exclude=exclude,
        allowed=allowed,
        backend=backend,
        precision=precision,
        num_threads=num_threads,
    )
    return found.scores, found.indices


@_topk_op.register_fake
def _(
    queries: Tensor,
    pool: Tensor,
    k: int,
    exclude: Tensor | None = None,
    backend: str = "auto",
    precision: str = "exact",
    num_threads: int | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def merge_topk(parts: Sequence[TopK], k: int, offsets: Sequence[int] | None = None) -> TopK:
    """Merges the results of disjoint pool parts into the result of the whole pool, exactly.

    Args:
        parts: results [Q, k_i] of the same queries over each part, in any order.
        offsets: the first pool row of each part, added to its indices; default: indices are whole-pool rows already.

    Raises:
        ArgumentError: no parts, other shapes or dtypes than those of results, or offsets of another number.
    """
    k = arguments.check_k(k)
    checked = arguments.check_results(parts)
    shifts = arguments.check_offsets(offsets, len(checked))
    if len({(part.scores.shape[0], part.scores.device) for part in checked}) > 1:
        shapes = [tuple(part.scores.shape) for part in checked]
        raise ArgumentError("parts", shapes, "one number of queries, one device")
    scores = torch.cat([part.scores for part in checked], dim=1)  # [Q, sum k_i]
    indices = torch.cat([_shift(part.indices, shift) for part, shift in zip(checked, shifts)], dim=1)
    # Rows ascending first, then a stable sort by score; missing hits (row -1) go last.
    missing = indices < 0
    order = torch.where(missing, torch.iinfo(torch.int64).max, indices).argsort(dim=1, stable=True)
    scores, indices = scores.gather(1, order), indices.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    scores, indices = scores.gather(1, order), indices.gather(1, order)
    lacking = k - scores.shape[1]
    if lacking > 0:
        scores = torch.nn.functional.pad(scores, (0, lacking), value=float("-inf"))
        indices = torch.nn.functional.pad(indices, (0, lacking), value=-1)
    return TopK(scores, indices)


def _rows_at(rows: Tensor, indices: Tensor) -> Tensor:
    """`rows[indices]`, and -1 where the index is."""
    if not len(rows):
        return indices
    return torch.where(indices < 0, indices, rows[indices.clamp(min=0)])


def _shift(indices: Tensor, offset: int) -> Tensor:
    return torch.where(indices < 0, indices, indices + offset)
