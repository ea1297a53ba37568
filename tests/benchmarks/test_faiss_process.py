"""The faiss that is held to AVX2: the restriction takes effect, is proved, and touches nobody else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.case import UnavailableError
from benchmarks.cases import faiss_process

pytest.importorskip("faiss")
pytest.importorskip("threadpoolctl")

K = 7


def data() -> tuple[np.ndarray, list[np.ndarray]]:
    generator = np.random.default_rng(0)
    pool = generator.standard_normal((900, 32), dtype=np.float32)
    return pool, [generator.standard_normal((40, 32), dtype=np.float32) for _ in range(2)]


def wide() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "avx512f" in cpu.read_text()


def test_answers_come_from_a_process_held_to_avx2() -> None:
    pool, queries = data()
    before = dict(os.environ)
    held = faiss_process.Avx2Process(pool, queries, K, 1)
    assert dict(os.environ) == before
    assert "SIMD level AVX2" in held.facts and ("Haswell" in held.facts or "Zen" in held.facts)
    for i in (1, 0):
        expected = (torch.from_numpy(queries[i]) @ torch.from_numpy(pool).T).topk(K).indices
        assert np.array_equal(held.search(i), expected.numpy())
    if wide():  # here the same libraries choose more
        level, blas = faiss_process.restriction()
        assert level != "AVX2" and blas and not set(blas) <= {"Haswell", "Zen"}


@pytest.mark.skipif(not wide(), reason="nothing to hold back on this machine")
@pytest.mark.parametrize("restrictions", [{"FAISS_SIMD_LEVEL": "AVX2"}, {"OPENBLAS_CORETYPE": "Haswell"}])
def test_half_a_restriction_is_refused(restrictions: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_process, "RESTRICTIONS", restrictions)
    pool, queries = data()
    with pytest.raises(UnavailableError, match="cannot be held to AVX2"):
        faiss_process.Avx2Process(pool, queries, K, 1)


def test_what_goes_wrong_in_the_process_is_said_here() -> None:
    pool, queries = data()
    with pytest.raises(UnavailableError, match="Error"):
        faiss_process.Avx2Process(pool, [q[:, :5] for q in queries], K, 1)
