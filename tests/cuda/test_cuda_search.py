"""The CUDA search against the CPU core and the plain definition: the same rows and the same bits. Needs a GPU."""

from __future__ import annotations

import threading

import pytest
import torch

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.reference import TopK, exact_topk
from tgq_fast.search import topk_cuda
from tgq_fast.search.topk import topk


def missing() -> str:
    """Why there is nothing to test here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not _native.available():
        return _native.why_missing()
    return "; ".join(topk_cuda.why_not(torch.empty(0, device="cuda")))


REASON = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON)]


def engines() -> list[str]:
    hopper = not REASON and torch.cuda.get_device_capability() == (9, 0) and _native.extension().cuda_hopper
    return ["direct", "portable", "skinny", *(["hopper"] if hopper else [])]


ENGINES = engines()
TUNINGS = [
    {},
    {"sample_stride": 0},
    {"sample_stride": 3, "first_rows": 32},
    {"hit_capacity": 40, "first_rows": 32},  # overflows again and again
    {"forced_threshold": 1e30},  # a sample that failed for every query
    {"forced_threshold": -1e30, "hit_capacity": 3000},
    {"chunk_rows": 128},
    {"tile_queries": 33, "direct_blocks": 1},
]
KINDS = ["normal", "clustered", "ascending", "exponents", "denormal", "halfway", "special", "equal"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dataset(kind: str, rows: int, width: int) -> torch.Tensor:
    values = torch.randn(rows, width)
    if kind == "clustered":  # cosines agree within 1e-6
        centre = torch.nn.functional.normalize(torch.randn(width), dim=0)
        return torch.nn.functional.normalize(centre + 1e-4 * values / width**0.5, dim=1)
    if kind == "ascending":
        return values[values.sum(1).argsort()]
    if kind == "exponents":
        return values * torch.exp2(torch.randint(-60, 50, (rows, 1)).float())
    if kind == "denormal":
        return values * 1e-40
    if kind == "halfway":
        return values.sign() * (1 + 2.0**-8)
    if kind == "special":
        chosen = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38, -0.0])
        places = torch.rand(rows, width) < 0.002
        values[places] = chosen[torch.randint(0, 5, (int(places.sum()),))]
        return values
    return torch.ones(rows, width) if kind == "equal" else values


def search(queries: torch.Tensor, pool: torch.Tensor, k: int, exclude: torch.Tensor | None = None, **tuning) -> TopK:
    shape = (len(queries), k)
    out = TopK(torch.full(shape, 7.0, device="cuda"), torch.full(shape, -7, device="cuda"))
    return topk_cuda.search(
        queries.cuda(), pool.cuda(), k, None if exclude is None else exclude.cuda(), out, tuning=tuning
    )


def assert_same(found: TopK, expected: TopK, note: object = "") -> None:
    assert torch.equal(found.indices.cpu(), expected.indices), note
    assert torch.equal(found.scores.cpu(), expected.scores), note


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_cpu_bit_for_bit(engine: str, dtype: torch.dtype, kind: str) -> None:
    queries, pool = dataset(kind, 70, 72).to(dtype), dataset(kind, 5003, 72).to(dtype)
    for k in (1, 100):
        expected = topk(queries, pool, k, backend="cpp")
        for tuning in TUNINGS:
            assert_same(search(queries, pool, k, engine=engine, **tuning), expected, (k, tuning))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 127, 8), (129, 129, 64), (33, 40000, 40), (300, 70001, 33)])
def test_shapes_off_every_tile(engine: str, shape: tuple[int, int, int]) -> None:
    q, n, d = shape
    for dtype in DTYPES:
        queries, pool = (torch.randint(-4, 5, size).to(dtype) for size in ((q, d), (n, d)))
        k = min(200, n + 1)
        expected = exact_topk(queries.double(), pool.double(), k)
        found = search(queries, pool, k, engine=engine)
        assert torch.equal(found.indices.cpu(), expected.indices)
        assert torch.equal(found.scores.cpu(), expected.scores.float())


@pytest.mark.parametrize("q_dtype", DTYPES)
@pytest.mark.parametrize("p_dtype", DTYPES)
def test_few_queries(q_dtype: torch.dtype, p_dtype: torch.dtype) -> None:
    """The skinny filter: each number of query groups, slabs that end early, rows off its tiles, rows with a pitch."""
    for q, n, d in [
        (1, 4097, 8),
        (8, 5000, 40),
        (16, 40003, 256),
        (17, 9999, 72),
        (32, 6001, 1024),
        (64, 5000, 72),
        (100, 4500, 64),
    ]:
        for kind in ("normal", "special", "exponents"):
            queries, base = dataset(kind, q, d).to(q_dtype), dataset(kind, n, d + 8).to(p_dtype)
            pool = base[:, 8:]
            expected = topk(queries, pool, 50)
            out = TopK(torch.empty(q, 50, device="cuda"), torch.empty(q, 50, dtype=torch.int64, device="cuda"))
            found = topk_cuda.search(queries.cuda(), base.cuda()[:, 8:], 50, None, out, tuning={"engine": "skinny"})
            assert_same(found, expected, (q, n, d, kind))


@pytest.mark.skipif("hopper" not in ENGINES, reason="needs compute capability 9.0")
@pytest.mark.parametrize("tile", topk_cuda.HOPPER_TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hopper_tiles(tile: str, dtype: torch.dtype) -> None:
    for q, n, d in [(33, 4200, 64), (129, 5121, 72), (300, 40000, 256)]:
        queries, pool = torch.randn(q, d).to(dtype), torch.randn(n, d).to(dtype)
        tuning = {"engine": "hopper", "hopper_tile": tile}
        assert_same(search(queries, pool, 100, **tuning), topk(queries, pool, 100), (q, n, d))
        assert_same(search(queries, pool, 100, chunk_rows=384, **tuning), topk(queries, pool, 100), (q, n, d))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("k", [1, 1000, 2047, 2048])
def test_large_k(engine: str, k: int) -> None:
    queries, pool = torch.randn(40, 64).bfloat16(), torch.randn(50000, 64).bfloat16()
    assert_same(search(queries, pool, k, engine=engine), topk(queries, pool, k, backend="cpp"))


@pytest.mark.parametrize("engine", ENGINES)
def test_duplicates_and_self_exclusion(engine: str) -> None:
    pool = torch.randint(-3, 4, (370, 24)).float().repeat(40, 1)
    queries, own = pool[:130], torch.arange(130)[:, None]
    for k in (1, 39, 40, 41, 100):
        assert_same(search(queries, pool, k, own, engine=engine), topk(queries, pool, k, exclude=own, backend="cpp"), k)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine in ("portable", "hopper")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_self_join(engine: str, dtype: torch.dtype, kind: str) -> None:
    """Over one triangle: tiles that end within a tile of the filter, each Hopper tile, what waits overflowing."""
    pool, own = dataset(kind, 3001, 72).to(dtype), torch.arange(3001)[:, None]
    expected, on_device = topk(pool, pool, 20, exclude=own, backend="cpp"), pool.cuda()
    tiles = topk_cuda.HOPPER_TILES if engine == "hopper" else ["auto"]
    tunings = [{"hopper_tile": tile, "tile_queries": 640} for tile in tiles]
    tunings += [
        {"hit_capacity": 40, "tile_queries": 128},
        {"chunk_rows": 384},
        {"forced_threshold": 1.0},
        {"self_join": 0},
    ]
    for tuning in tunings:
        out = TopK(torch.empty(3001, 20, device="cuda"), torch.empty(3001, 20, dtype=torch.int64, device="cuda"))
        options = {"engine": engine, "self_join": 1, "sample_stride": 8, **tuning}
        assert_same(topk_cuda.search(on_device, on_device, 20, own.cuda(), out, tuning=options), expected, tuning)


def test_a_large_self_join_is_one_by_itself() -> None:
    pool = torch.nn.functional.normalize(torch.randn(150_000, 64, device="cuda")).bfloat16()
    whole = topk(pool, pool.clone(), 50)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert_same(topk(pool, pool, 50), TopK(whole.scores.cpu(), whole.indices.cpu()))
    assert torch.cuda.max_memory_allocated() - before > 150_000 * 1024 * 2  # what waits for its turn


@pytest.mark.parametrize("engine", ENGINES)
def test_mixed_dtypes_and_strided_views(engine: str) -> None:
    base = torch.randn(9000, 100)
    for q_dtype in DTYPES:
        for p_dtype in DTYPES:
            queries, pool = base[:77, 3:99:3].to(q_dtype), base[::3, 1:97:3].to(p_dtype)
            expected, tuning = topk(queries, pool, 50, backend="cpp"), {"engine": engine}
            out = TopK(torch.zeros(50, 77, device="cuda").T, torch.zeros(50, 77, dtype=torch.int64, device="cuda").T)
            views = base.to(q_dtype).cuda()[:77, 3:99:3], base.to(p_dtype).cuda()[::3, 1:97:3]
            assert_same(topk_cuda.search(*views, 50, None, out, tuning=tuning), expected, (q_dtype, p_dtype))


def test_the_public_function_on_cuda_tensors() -> None:
    queries, pool = torch.randn(50, 32), torch.randn(6000, 32)
    expected = topk(queries, pool, 10, exclude=list(range(50)))
    for backend in ("auto", "cpp"):
        found = topk(queries.cuda(), pool.cuda(), 10, exclude=list(range(50)), backend=backend)
        assert found.scores.is_cuda and found.indices.is_cuda
        assert_same(found, expected)
    with pytest.raises(ArgumentError, match="device"):
        topk(queries, pool.cuda(), 10)


@pytest.mark.parametrize(("q", "n", "d"), [(0, 5, 4), (3, 0, 4), (2, 5, 0)])
def test_empty_sides(q: int, n: int, d: int) -> None:
    queries, pool = torch.zeros(q, d), torch.zeros(n, d)
    assert_same(topk(queries.cuda(), pool.cuda(), 3), topk(queries, pool, 3))


def test_works_on_the_current_stream_without_waiting() -> None:
    queries, pool = torch.randn(600, 64).cuda().bfloat16(), torch.randn(40000, 64).cuda().bfloat16()
    expected = topk(queries, pool, 20)
    topk(queries[:1], pool, 20)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            late = torch.zeros_like(pool)
            torch.cuda._sleep(20_000_000)
            late.copy_(pool)  # the search must see it
            found = topk(queries, late, 20)
            assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_replays_on_new_data(engine: str) -> None:
    queries, pool = torch.randn(100, 64, device="cuda"), torch.randn(40000, 64, device="cuda")
    out = TopK(torch.empty(100, 10, device="cuda"), torch.empty(100, 10, dtype=torch.int64, device="cuda"))
    topk_cuda.search(queries, pool, 10, None, out, tuning={"engine": engine})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk_cuda.search(queries, pool, 10, None, out, tuning={"engine": engine})
    for kind in ("normal", "clustered"):  # the second falls back to the exact scan: decided on the device
        queries.copy_(dataset(kind, 100, 64))
        pool.copy_(dataset(kind, 40000, 64))
        graph.replay()
        assert_same(out, topk(queries.cpu(), pool.cpu(), 10), kind)


def test_concurrent_callers() -> None:
    pool = torch.randn(30000, 48)
    on_device, failures = pool.cuda(), []

    def call(seed: int) -> None:
        queries = torch.randn(90, 48, generator=torch.Generator().manual_seed(seed))
        with torch.cuda.stream(torch.cuda.Stream()):
            found = topk(queries.cuda(), on_device, 30)
            torch.cuda.current_stream().synchronize()
        if not torch.equal(found.indices.cpu(), topk(queries, pool, 30, num_threads=1).indices):
            failures.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_is_bounded(dtype: torch.dtype) -> None:
    pool = torch.randn(1_000_000, 256, device="cuda", dtype=dtype)
    queries = torch.randn(4096, 256, device="cuda", dtype=dtype)
    for k in (100, 2048):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = topk(queries, pool, k)
        torch.cuda.synchronize()
        results = found.scores.nbytes + found.indices.nbytes
        assert torch.cuda.max_memory_allocated() - before - results < 256 << 20


def test_more_than_two_to_the_31_values() -> None:
    rows, width = 9_000_000, 256
    if torch.cuda.get_device_properties(0).total_memory < 3 * rows * width * 2:
        pytest.skip("too little device memory")
    pool = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    places = torch.tensor([3, rows // 2, rows - 2, rows - 1], device="cuda")
    pool[places, 5] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16, device="cuda")
    queries = torch.zeros(20, width, dtype=torch.bfloat16, device="cuda")
    queries[:, 5] = 1.0
    for engine in ENGINES:
        out = TopK(torch.empty(20, 4, device="cuda"), torch.empty(20, 4, dtype=torch.int64, device="cuda"))
        found = topk_cuda.search(queries, pool, 4, None, out, tuning={"engine": engine})
        assert found.indices.tolist() == [places.flip(0).tolist()] * 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "halfway", "clustered", "equal"])
def test_tensor_cores_keep_within_the_margin(dtype: torch.dtype, kind: str) -> None:
    """The one assumption of the margin that no manual states: the error of the accumulation."""
    for width in (64, 1024, 8192):
        a, b = dataset(kind, 256, width).cuda().to(dtype), dataset(kind, 512, width).cuda().to(dtype)
        scores = torch.mm(a, b.T, out_dtype=torch.float32).double()
        norms = a.double().norm(dim=1)[:, None] * b.double().norm(dim=1)
        error = ((scores - a.double() @ b.double().T).abs() / norms).max().item()
        assert error <= (4 * width + 64) * 2.0**-24


def test_a_missing_engine_says_so() -> None:
    if "hopper" in ENGINES:
        pytest.skip("this device has every engine")
    with pytest.raises(BackendError, match="Hopper"):
        search(torch.zeros(2, 8), torch.zeros(9000, 8), 3, engine="hopper")
