"""The ways to search a pool: ours, the product alone, and every exact library route. Each returns the rows [Q, k]."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Call, Setting, UnavailableError, Variant
from benchmarks.cases.faiss_process import Avx2Process
from benchmarks.cases.other_build import OtherBuild
from benchmarks.cases.panorama import panorama
from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.search import Codes, TopK, build_codes, topk, topk_cuda, topk_native

_TILE_ROWS = 65536
_WHOLE_BYTES = {"cpu": 4 << 30, "cuda": 24 << 30}  # a score matrix above this is not tried
# Products Q × N × D above which a peer that takes seconds at it is left to the smaller cases.
_FAISS_PRODUCTS, _PANORAMA_PRODUCTS, _USEARCH_PRODUCTS = 5e10, 5e10, 1.5e10
_FEW_QUERIES = 16
_NUMPY_BYTES = 512 << 20
_ENGINES = ("hopper", "portable", "skinny", "direct")
# (distance_compute_blas_threshold, query block, database block): the first is faiss' default.
_FAISS_SETTINGS = ((20, 4096, 1024), (1, 4096, 1024), (1, 256, 16384), (1, 64, 65536), (1 << 30, 4096, 1024))


@dataclass
class Problem:
    """One search job: pool [N, D], query sets [Q, D] that rotate, k, and CPU threads."""

    pool: Tensor
    queries: list[Tensor]
    k: int
    threads: int

    def products(self) -> int:
        """Q × N × D."""
        return len(self.queries[0]) * self.pool.numel()

    def whole_matrix(self) -> int:
        """Bytes of all scores."""
        return len(self.queries[0]) * len(self.pool) * self.pool.element_size()


def variants(problem: Problem, setting: Setting) -> list[Variant]:
    """Every variant for this pool's dtype and device."""
    found = [
        Variant("tgq_fast", "ours", lambda: _ours(problem)),
        Variant("GEMM only", "ceiling", lambda: _product_only(problem)),
        Variant("torch mm + topk", "peer", lambda: _torch_whole(problem)),
        Variant("torch mm + topk, tiled", "peer", lambda: _torch_tiled(problem)),
    ]
    if setting.device == "cuda":
        found += [
            Variant(f"tgq_fast, {engine} engine", "ours", partial(_ours_tuned, problem, engine=engine))
            for engine in _ENGINES
        ]
        found += [
            Variant(f"tgq_fast, tile {tile}", "ours", partial(_ours_tuned, problem, engine="hopper", hopper_tile=tile))
            for tile in topk_cuda.HOPPER_TILES
            if tile != "auto"
        ]
        found.append(Variant("tgq_fast, torch backend", "ours", lambda: _ours(problem, backend="torch")))
        if problem.pool.dtype is torch.float32:
            found.append(Variant("faiss-gpu flat", "peer", lambda: _faiss_gpu(problem)))
        return found
    found.append(_ours_codes(problem))
    if setting.against is not None:
        found += [_before(problem, setting.against, codes) for codes in (False, True)]
    if problem.queries[0] is problem.pool:
        found.append(Variant("tgq_fast, not as a self-join", "ours", lambda: _ours_square(problem)))
    found.append(Variant("tgq_fast, AVX2 forced", "ours", lambda: _ours_isa(problem, "avx2")))
    if problem.pool.dtype is torch.float32:
        found += [
            Variant("faiss-cpu flat, default", "peer", lambda: faiss_cpu(problem, tuned=False)),
            Variant("faiss-cpu flat, tuned", "peer", lambda: faiss_cpu(problem, tuned=True)),
            _faiss_avx2(problem, setting),
            _faiss_panorama(problem),
            Variant("numpy argpartition", "peer", lambda: _numpy(problem)),
            Variant("usearch exact", "peer", lambda: _usearch(problem)),
        ]
    return found


def _ours(problem: Problem, backend: str = "auto") -> Call:
    def call(i: int) -> Tensor:
        return topk(problem.queries[i], problem.pool, problem.k, backend=backend, num_threads=problem.threads).indices

    return call


def _ours_codes(problem: Problem) -> Variant:
    """With the codes of the pool made beforehand, as an item pool keeps them on disk."""
    made: list[Codes] = []

    def prepare() -> Call:
        try:
            made.append(build_codes(problem.pool))
        except BackendError as error:
            raise UnavailableError(str(error)) from error
        return lambda i: (
            topk(problem.queries[i], problem.pool, problem.k, num_threads=problem.threads, codes=made[-1]).indices
        )

    return Variant("tgq_fast, stored codes", "ours", prepare, describe=lambda: _read_with(problem, made[-1]))


def _read_with(problem: Problem, codes: Codes) -> str:
    """What the first set of queries reads: the codes, and rows that may be answers; or all rows as they are."""
    queries, counters = problem.queries[0], dict[str, int]()
    out = TopK(torch.empty(len(queries), problem.k), torch.empty(len(queries), problem.k, dtype=torch.int64))
    found = (queries, problem.pool, problem.k, None, out, problem.threads, None)
    topk_native.search(*found, codes=codes, counters=counters)
    basis, width = codes.basis, problem.pool.shape[1]
    levels = f"codes of {basis.first} of {width} columns" + (", in two levels" if basis.second else "")
    if not counters["coded"]:
        return f"{levels}, left aside: all rows are read"
    row, scored = width * problem.pool.element_size(), counters["rescored"] / len(queries)
    once = len(problem.pool) * (basis.first + 8)
    each = f"{scored * row / 2**20:.3g} MiB of {scored:.0f} rows for each"
    return f"{levels}: {once / 2**20:.3g} MiB for all queries, {each}"


def _before(problem: Problem, checkout: Path, codes: bool) -> Variant:
    """The same search by another checkout of this package."""
    made: list[OtherBuild] = []

    def prepare() -> Call:
        made.append(OtherBuild(checkout, problem.pool, problem.queries, problem.k, problem.threads, codes))
        return made[-1]

    name = "tgq_fast before" + (", stored codes" if codes else "")
    return Variant(name, "before", prepare, describe=lambda: made[-1].facts)


def _ours_square(problem: Problem) -> Call:
    """The queries in memory of their own: all scores are computed, not one triangle."""
    queries = problem.pool.clone()
    return lambda i: topk(queries, problem.pool, problem.k, num_threads=problem.threads).indices


def _ours_isa(problem: Problem, isa: str) -> Call:
    def call(i: int) -> Tensor:
        with _environment("TGQ_ISA", isa):
            found = topk(problem.queries[i], problem.pool, problem.k, backend="cpp", num_threads=problem.threads)
        return found.indices

    try:
        with _environment("TGQ_ISA", isa):
            topk(problem.queries[0][:1], problem.pool[:1], 1, backend="cpp")
    except (ArgumentError, BackendError) as error:
        raise UnavailableError(str(error)) from error
    return call


def _ours_tuned(problem: Problem, **tuning: str) -> Call:
    reasons = topk_cuda.why_not(problem.pool)
    if reasons:
        raise UnavailableError("; ".join(reasons))

    def call(i: int) -> Tensor:
        queries = problem.queries[i]
        scores = torch.empty(len(queries), problem.k, device=queries.device)
        rows = torch.empty(len(queries), problem.k, dtype=torch.int64, device=queries.device)
        found = topk_cuda.search(queries, problem.pool, problem.k, None, TopK(scores, rows), tuning=tuning)
        return found.indices

    try:
        call(0)
    except BackendError as error:  # not built, not this device, or not these sizes
        raise UnavailableError(str(error)) from error
    return call


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _product_only(problem: Problem) -> Call:
    """The whole product, in tiles where its result would not fit; writes to buffers that exist already."""
    queries, rows = len(problem.queries[0]), len(problem.pool)
    step = min(rows, max(1, (2 << 30) // (problem.pool.element_size() * queries)))
    buffer = torch.empty(queries, step, dtype=problem.pool.dtype, device=problem.pool.device)

    def call(i: int) -> Tensor:
        for first in range(0, rows, step):
            part = problem.pool[first : first + step]
            out = buffer if len(part) == step else buffer[:, : len(part)].contiguous()
            torch.mm(problem.queries[i], part.T, out=out)
        return buffer

    return call


def _torch_whole(problem: Problem) -> Call:
    if problem.whole_matrix() > _WHOLE_BYTES[problem.pool.device.type]:
        raise UnavailableError(f"all scores would take {problem.whole_matrix() / 2**30:.0f} GiB")
    k = min(problem.k, len(problem.pool))
    return lambda i: (problem.queries[i] @ problem.pool.T).topk(k, dim=1).indices


def _torch_tiled(problem: Problem) -> Call:
    k = min(problem.k, len(problem.pool))
    query_step = 4096

    def one(queries: Tensor) -> Tensor:
        best: tuple[Tensor, Tensor] | None = None
        for first in range(0, len(problem.pool), _TILE_ROWS):
            scores = queries @ problem.pool[first : first + _TILE_ROWS].T
            values, rows = scores.topk(min(k, scores.shape[1]), dim=1)
            rows = rows + first
            if best is not None:
                values, rows = torch.cat((best[0], values), dim=1), torch.cat((best[1], rows), dim=1)
                values, order = values.topk(min(k, values.shape[1]), dim=1)
                rows = rows.gather(1, order)
            best = values, rows
        if best is None:
            raise UnavailableError("an empty pool")
        return best[1]

    def call(i: int) -> Tensor:
        queries = problem.queries[i]
        return torch.cat([one(queries[first : first + query_step]) for first in range(0, len(queries), query_step)])

    return call


def _need(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} is not installed") from error


def _affordable(problem: Problem, most: float) -> None:
    if problem.products() > most:
        raise UnavailableError("takes too long at this size; see the smaller cases")


def faiss_cpu(problem: Problem, *, tuned: bool) -> Call:
    faiss = _need("faiss")
    _affordable(problem, _FAISS_PRODUCTS)
    index = faiss.IndexFlatIP(problem.pool.shape[1])
    index.add(problem.pool.numpy())
    queries = [q.numpy() for q in problem.queries]

    def search(setting: tuple[int, int, int], i: int) -> Tensor:
        names = [f"distance_compute_blas_{name}" for name in ("threshold", "query_bs", "database_bs")]
        before = [getattr(faiss.cvar, name) for name in names]
        faiss.omp_set_num_threads(problem.threads)
        for name, value in zip(names, setting, strict=True):
            setattr(faiss.cvar, name, value)
        try:
            return torch.from_numpy(index.search(queries[i], problem.k)[1])
        finally:
            for name, value in zip(names, before, strict=True):
                setattr(faiss.cvar, name, value)

    # Without BLAS, faiss is worth trying for a handful of queries only.
    tried = _FAISS_SETTINGS if len(queries[0]) <= _FEW_QUERIES else _FAISS_SETTINGS[:-1]
    chosen = _fastest(lambda s: search(s, 0), tried) if tuned else _FAISS_SETTINGS[0]
    return lambda i: search(chosen, i)


def _faiss_avx2(problem: Problem, setting: Setting) -> Variant:
    """Tuned faiss held to AVX2, in a process of its own: what ours with AVX2 forced is to be compared with."""
    facts: list[str] = []

    def prepare() -> Call:
        _need("faiss")
        _affordable(problem, _FAISS_PRODUCTS)
        if setting.tiny or len(problem.queries[0]) <= _FEW_QUERIES:
            raise UnavailableError("starts a process: left to full sizes with many queries")
        child = Avx2Process(problem.pool.numpy(), [q.numpy() for q in problem.queries], problem.k, problem.threads)
        facts.append(child.facts)
        return lambda i: torch.from_numpy(child.search(i))

    return Variant("faiss-cpu flat, tuned, AVX2", "peer", prepare, describe=lambda: facts[-1])


def _faiss_panorama(problem: Problem) -> Variant:
    found = panorama(problem.pool.numpy(), [q.numpy() for q in problem.queries], problem.k, problem.threads)

    def prepare() -> Call:
        _affordable(problem, _PANORAMA_PRODUCTS)
        return found.prepare()

    return replace(found, prepare=prepare)


def _fastest(run: Callable[[Any], Any], settings: tuple[Any, ...]) -> Any:
    """The setting whose one call took least."""
    took = {}
    for setting in settings:
        begin = time.perf_counter()
        run(setting)
        took[setting] = time.perf_counter() - begin
    return min(took, key=lambda setting: took[setting])


def _faiss_gpu(problem: Problem) -> Call:
    faiss = _need("faiss")
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise UnavailableError("this faiss is built without GPU support")
    _need("faiss.contrib.torch_utils")
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), problem.pool.shape[1])
    index.add(problem.pool)
    return lambda i: index.search(problem.queries[i], problem.k)[1]


def _numpy(problem: Problem) -> Call:
    import numpy as np

    if problem.whole_matrix() > _NUMPY_BYTES:
        raise UnavailableError(f"all scores and their order would take {3 * problem.whole_matrix() / 2**30:.1f} GiB")
    pool, queries = problem.pool.numpy(), [q.numpy() for q in problem.queries]
    k = min(problem.k, len(pool))
    limits = _need("threadpoolctl").threadpool_limits

    def call(i: int) -> Tensor:
        with limits(problem.threads):
            scores = queries[i] @ pool.T
        part = np.argpartition(scores, -k, axis=1)[:, -k:]
        order = np.argsort(-np.take_along_axis(scores, part, axis=1), axis=1)
        return torch.from_numpy(np.take_along_axis(part, order, axis=1))

    return call


def _usearch(problem: Problem) -> Call:
    index = _need("usearch.index")
    _affordable(problem, _USEARCH_PRODUCTS)
    pool, queries = problem.pool.numpy(), [q.numpy() for q in problem.queries]

    def call(i: int) -> Tensor:
        found = index.search(pool, queries[i], problem.k, index.MetricKind.IP, exact=True, threads=problem.threads)
        keys = found.keys
        return torch.from_numpy((keys if keys.ndim == 2 else keys[None]).astype("int64"))

    return call
