"""faiss' IndexFlatIPPanorama: exact, and it too leaves a row as soon as the first columns rule it out."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks.case import Call, UnavailableError, Variant

# What is tried; the faster of all is the row, and its choice says which it was.
_LEVELS, _BATCHES = (4, 8, 16, 32), (128, 1024)


def panorama(pool: np.ndarray, queries: list[np.ndarray], k: int, threads: int) -> Variant:
    """The index over rows rotated by their principal directions, at its best number of levels and batch size.

    Args:
        pool: [N, D] float32.
        queries: sets [Q, D] float32 that calls rotate over.
        k: rows per query.
        threads: of faiss.
    """
    chosen: list[str] = []

    def prepare() -> Call:
        faiss = _faiss()
        faiss.omp_set_num_threads(threads)
        dims = pool.shape[1]
        rotation = faiss.PCAMatrix(dims, dims)
        rotation.train(pool[:: -(-len(pool) // 65_536)])
        # It also centres, queries too, and that changes the order of inner products.
        faiss.copy_array_to_vector(np.zeros(dims, np.float32), rotation.b)
        turned = rotation.apply(pool)
        best: tuple[float, Any, tuple[int, int]] | None = None
        for levels, batch in product(_LEVELS, _BATCHES):
            if levels > dims:
                continue
            index = faiss.IndexFlatIPPanorama(dims, levels, batch)
            index.add(turned)
            begin = time.perf_counter()
            index.search(rotation.apply(queries[0]), k)
            took = time.perf_counter() - begin
            if best is None or took < best[0]:
                best = took, index, (levels, batch)
        if best is None:
            raise UnavailableError(f"no levels for {dims} columns")
        index = best[1]
        chosen.append("PCA, {} levels, batches of {}".format(*best[2]))

        def call(i: int) -> torch.Tensor:
            faiss.omp_set_num_threads(threads)
            return torch.from_numpy(index.search(rotation.apply(queries[i]), k)[1])

        return call

    return Variant("faiss-cpu Panorama, tuned", "peer", prepare, describe=lambda: chosen[-1])


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UnavailableError("faiss is not installed") from error
    if not hasattr(faiss, "IndexFlatIPPanorama"):
        raise UnavailableError(f"faiss {faiss.__version__} has no IndexFlatIPPanorama")
    return faiss
