"""faiss in a process of its own that may use nothing above AVX2, on whatever machine it runs.

A library picks its instruction set when it is loaded, so a process that has loaded it cannot be held back any more.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import UnavailableError

# faiss' own code, and the BLAS in its wheel.
RESTRICTIONS = {"FAISS_SIMD_LEVEL": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}
_AVX2_BLAS = {"Haswell", "Zen"}  # OpenBLAS' names for its AVX2 kernels


def restriction() -> tuple[str, list[str]]:
    """What faiss and its BLAS run with in this process: the SIMD level, and the architectures that OpenBLAS chose."""
    import faiss
    from threadpoolctl import threadpool_info

    config = getattr(faiss, "SIMDConfig", None)
    level = "unknown" if config is None else str(config.get_level_name())
    blas = [i for i in threadpool_info() if i["user_api"] == "blas" and "faiss" in i["filepath"]]
    return level, [str(i.get("architecture", i["internal_api"])) for i in blas]


class Avx2Process:
    """Tuned faiss over one pool, held to AVX2.

    Args:
        pool: [N, D] float32.
        queries: sets [Q, D] float32.
        k: rows per query.
        threads: of faiss.

    Raises:
        UnavailableError: the restriction did not take effect, or the process ended.
    """

    def __init__(self, pool: np.ndarray, queries: Sequence[np.ndarray], k: int, threads: int) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._shape = (len(queries[0]), min(k, len(pool)))
        self._found = SharedMemory(create=True, size=max(1, 8 * self._shape[0] * self._shape[1]))
        before = {name: os.environ.get(name) for name in RESTRICTIONS}
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "pool.npy", pool)
            np.save(Path(folder) / "queries.npy", np.stack(queries))
            os.environ.update(RESTRICTIONS)
            try:
                arguments = (theirs, folder, self._found.name, k, threads)
                self._process = context.Process(target=_serve, args=arguments, daemon=True)
                self._process.start()
            finally:
                for name, value in before.items():
                    if value is None:
                        del os.environ[name]
                    else:
                        os.environ[name] = value
            theirs.close()
            weakref.finalize(self, _end, self._connection, self._process, self._found)
            level, blas = self._receive()
        if level != "AVX2" or not blas or not set(blas) <= _AVX2_BLAS:
            raise UnavailableError(f"faiss cannot be held to AVX2 here: SIMD level {level}, BLAS for {blas}")
        self.facts = f"own process, SIMD level {level}, OpenBLAS kernels for {', '.join(blas)}; memory not counted"

    def search(self, i: int) -> np.ndarray:
        """Rows [Q, k] int64 for query set `i`."""
        self._connection.send(i)
        self._receive()
        return np.array(np.ndarray(self._shape, np.int64, self._found.buf))

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UnavailableError("the process of faiss ended") from None
        if isinstance(answer, str):
            raise UnavailableError(answer)
        return answer


def _end(connection: Connection, process: BaseProcess, found: SharedMemory) -> None:
    connection.close()  # the process ends when it reads from it
    process.join()
    found.close()
    found.unlink()


def _serve(connection: Connection, folder: str, found: str, k: int, threads: int) -> None:
    """The body of the process: builds the index, says what it runs with, then answers until the connection closes."""
    import torch

    from benchmarks.cases.search_peers import Problem, faiss_cpu

    try:
        pool = torch.from_numpy(np.load(Path(folder) / "pool.npy"))
        queries = [torch.from_numpy(q) for q in np.load(Path(folder) / "queries.npy")]
        call = faiss_cpu(Problem(pool, queries, k, threads), tuned=True)
        memory = SharedMemory(name=found)
        connection.send(restriction())
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    while True:
        try:
            i = connection.recv()
        except EOFError:
            return
        rows = call(i).numpy()
        np.ndarray(rows.shape, np.int64, memory.buf)[:] = rows
        connection.send(True)
