"""Pools in host memory, streamed through a GPU, against the CPU core. Needs a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda.test_cuda_search import DTYPES, ENGINES, KINDS, REASON, assert_same, dataset
from tgq_fast.errors import ArgumentError
from tgq_fast.reference import TopK
from tgq_fast.search import topk_stream
from tgq_fast.search.topk import topk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON)]


def streamed(queries: torch.Tensor, pool: torch.Tensor, k: int, rows: int = 1024, **options) -> TopK:
    """Searches in parts of `rows` rows."""
    out = TopK(torch.full((len(queries), k), 7.0, device="cuda"), torch.full((len(queries), k), -7, device="cuda"))
    width = pool.shape[1] * pool.element_size()
    return topk_stream.search(
        queries.cuda(), pool, k, options.pop("exclude", None), out, chunk_bytes=rows * width, **options
    )


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_cpu_bit_for_bit(engine: str, dtype: torch.dtype, kind: str) -> None:
    queries, pool = dataset(kind, 40, 40).to(dtype), dataset(kind, 9003, 40).to(dtype)
    expected = topk(queries, pool, 100)
    for host in (pool, pool.pin_memory()):
        for rows in (128, 2048, 8960):
            assert_same(
                streamed(queries, host, 100, rows, tuning={"engine": engine}), expected, (rows, host.is_pinned())
            )


def test_exclusions_name_rows_of_the_whole_pool() -> None:
    pool = torch.randint(-3, 4, (370, 24)).float().repeat(20, 1)
    own = torch.arange(50)[:, None] * 140
    expected = topk(pool[::140][:50], pool, 30, exclude=own)
    assert_same(streamed(pool[::140][:50], pool, 30, exclude=own.cuda()), expected)


def test_the_public_function_streams(tmp_path: Path) -> None:
    queries, pool = torch.randn(20, 32), torch.randn(30000, 32)
    path = tmp_path / "pool.npy"
    np.save(path, pool.numpy())
    expected = topk(queries, pool, 10, exclude=list(range(20)))
    shares: list[float] = []
    out = (torch.zeros(10, 20, device="cuda").T, torch.zeros(10, 20, dtype=torch.int64, device="cuda").T)
    for host in (pool, pool.pin_memory(), np.load(path, mmap_mode="r"), pool.repeat(1, 2)[:, :32]):
        for backend in ("auto", "cpp", "torch"):
            found = topk(queries.cuda(), host, 10, exclude=list(range(20)), backend=backend, progress=shares.append)
            assert found.scores.is_cuda and shares[-1] == 1.0
            assert torch.equal(found.indices.cpu(), expected.indices)
        assert_same(topk(queries.cuda(), host, 10, exclude=list(range(20)), out=out), expected)


@pytest.mark.parametrize(("q", "n", "d"), [(0, 5, 4), (3, 0, 4), (2, 5, 0)])
def test_empty_sides(q: int, n: int, d: int) -> None:
    queries, pool = torch.zeros(q, d), torch.zeros(n, d)
    assert_same(topk(queries.cuda(), pool, 3), topk(queries, pool, 3))


def test_what_progress_raises_ends_the_search() -> None:
    queries, pool = torch.randn(4, 64), torch.randn(20000, 64)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed(queries, pool, 5, 128, progress=interrupt)
    assert_same(streamed(queries, pool, 5, 128), topk(queries, pool, 5))


def test_a_graph_cannot_hold_it() -> None:
    queries, pool = torch.randn(20, 32, device="cuda"), torch.randn(30000, 32)
    topk(queries, pool, 5)
    with pytest.raises(ArgumentError, match="graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        topk(queries, pool, 5)


def test_memory_is_bounded() -> None:
    queries, pool = torch.randn(4096, 256), torch.randn(400_000, 256)
    queries = queries.cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = topk(queries, pool, 100)
    torch.cuda.synchronize()
    results = found.scores.nbytes + found.indices.nbytes
    assert torch.cuda.max_memory_allocated() - before - results < 256 << 20
