"""The compiled core: the same bits from every instruction set, thread count, split and batch; every hard path forced.

The oracle where dot products round, the definition, is the scalar kernel without filter and sample; C++ tests check it.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tgq_fast import _native
from tgq_fast.errors import ArgumentError, TGQError
from tgq_fast.reference import TopK, exact_topk
from tgq_fast.search import topk_native
from tgq_fast.search.codes import build_codes
from tgq_fast.search.topk import topk

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_missing() or "built")

ISAS = _native.build_info().get("isas", [])
FILTER = {"use_filter": 1}
TUNINGS = [
    {},
    {"use_filter": 0},
    FILTER,
    {**FILTER, "sample_stride": 0, "row_chunk": 96},
    {**FILTER, "sample_stride": 3, "spare_candidates": 1},
    {"forced_threshold": 1e30},  # a sample that fails for every query
    {**FILTER, "forced_threshold": -1e30, "spare_candidates": 2},  # a buffer that overflows again and again
    {**FILTER, "query_tile": 32, "row_chunk": 64},
]


def search(queries, pool, k, *, exclude=None, threads=1, **options) -> TopK:
    out = TopK(torch.full((len(queries), k), 7.0), torch.full((len(queries), k), -7))
    return topk_native.search(queries, pool, k, exclude, out, threads, None, **options)


def oracle(queries, pool, k, exclude=None) -> TopK:
    tuning = {"use_filter": 0, "sample_stride": 0}
    return search(queries, pool, k, exclude=exclude, isa="scalar", tuning=tuning)


def assert_same(found: TopK, expected: TopK, note: object = "") -> None:
    assert torch.equal(found.indices, expected.indices), note
    assert torch.equal(found.scores, expected.scores), note


def clustered(rows: int, width: int) -> torch.Tensor:
    """Unit vectors whose cosines agree within 1e-6."""
    centre = torch.nn.functional.normalize(torch.randn(width), dim=0)
    return torch.nn.functional.normalize(centre + 1e-4 * torch.randn(rows, width) / width**0.5, dim=1)


def dataset(kind: str, rows: int, width: int) -> torch.Tensor:
    if kind == "clustered":
        return clustered(rows, width)
    values = torch.randn(rows, width)
    if kind == "ascending":
        return values[values.sum(1).argsort()]
    if kind == "exponents":
        return values * torch.exp2(torch.randint(-60, 50, (rows, 1)).float())
    if kind == "denormal":
        return values * 1e-40
    if kind == "halfway":  # between two bf16 values: the worst case of rounding
        return values.sign() * (1 + 2.0**-8)
    if kind == "infinite":
        values[::13, 0] = float("inf")
        values[::17, 1] = float("nan")
    return values


KINDS = ["random", "clustered", "ascending", "exponents", "denormal", "halfway", "infinite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.float32, 40), (torch.float32, 64), (torch.bfloat16, 40), (torch.bfloat16, 64), (torch.float16, 40)],
)
def test_same_bits_from_every_instruction_set_path_and_thread_count(kind: str, dtype: torch.dtype, width: int) -> None:
    queries, pool = dataset(kind, 45, width).to(dtype), dataset(kind, 1300, width).to(dtype)
    codes = build_codes(pool)
    exclude = torch.randint(-1, 1300, (45, 2))
    expected = oracle(queries, pool, 30, exclude)
    for isa in ISAS:
        for number, tuning in enumerate(TUNINGS):
            threads = 1 + number % 3
            found = search(queries, pool, 30, exclude=exclude, threads=threads, isa=isa, tuning=tuning)
            assert_same(found, expected, (isa, tuning, threads))
            options = {"exclude": exclude, "threads": threads, "isa": isa, "tuning": {**tuning, "use_codes": 1}}
            options["codes"] = codes
            assert_same(search(queries, pool, 30, **options), expected, ("with codes", isa, tuning, threads))


@pytest.mark.parametrize("kind", KINDS)
def test_a_self_join_by_the_triangle_gives_what_the_square_gives(kind: str) -> None:
    pool = dataset(kind, 2500, 40)
    for exclude in (None, torch.arange(2500)[:, None]):
        expected = search(pool, pool, 20, exclude=exclude, tuning={"use_self_join": 0})
        for tuning in (
            {},
            {"use_filter": 0},
            {**FILTER, "query_tile": 96},
            {"use_self_join": 1, "forced_threshold": 1e30},
        ):
            assert_same(search(pool, pool, 20, exclude=exclude, threads=2, tuning=tuning), expected, (kind, tuning))
    counters: dict[str, int] = {}
    search(pool, pool, 20, tuning={"use_filter": 0, "sample_stride": 0}, counters=counters)
    assert counters["direct"] < 0.6 * 2500 * 2500  # half of the square and the tiles on the diagonal


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_allowed_do_not_count(kind: str) -> None:
    pool = dataset(kind, 3000, 40)
    stretch = torch.arange(3000) // 400 % 3 != 1
    for share in (0.0, 0.01, 0.5, 1.0):
        allowed = (torch.rand(3000) < share) & stretch
        rows = allowed.nonzero()[:, 0]
        if len(rows):
            kept = oracle(pool[:60], pool[rows], 20)
            expected = TopK(kept.scores, torch.where(kept.indices < 0, -1, rows[kept.indices.clamp(min=0)]))
        else:
            expected = TopK(torch.full((60, 20), -torch.inf), torch.full((60, 20), -1))
        stored = build_codes(pool)
        for number, tuning in enumerate(TUNINGS):
            for codes in (None, stored):
                options = {"threads": 1 + number % 3, "tuning": {**tuning, "use_codes": 1}, "codes": codes}
                options["allowed"] = allowed
                assert_same(search(pool[:60], pool, 20, **options), expected, (share, tuning, codes is not None))
        joined = search(pool, pool, 20, threads=2, allowed=allowed, tuning={"use_self_join": 1})
        assert_same(TopK(joined.scores[:60], joined.indices[:60]), expected, ("self-join", share))
        square = search(pool, pool, 20, allowed=allowed, tuning={"use_self_join": 0})
        assert_same(joined, square, ("self-join", share))


def test_same_bits_from_every_batch_of_queries() -> None:
    queries, pool = torch.randn(130, 24), torch.randn(5000, 24)
    whole = topk(queries, pool, 17)
    for size in (1, 7, 64):
        parts = zip(*(topk(part, pool, 17) for part in queries.split(size)), strict=True)
        assert_same(TopK(*map(torch.cat, parts)), whole)
    wide, pool = torch.randn(530, 1500), torch.randn(70, 1500)  # several tiles
    for isa in ISAS:
        assert_same(search(wide, pool, 5, threads=2, isa=isa, tuning=FILTER), oracle(wide, pool, 5), isa)


def test_scores_are_correctly_rounded_sums_within_their_bound() -> None:
    queries, pool = torch.randn(20, 300), torch.randn(2000, 300)
    found = topk(queries, pool, 50, backend="cpp")
    exact = (queries.double()[:, None] * pool.double()[found.indices]).sum(-1)
    norms = queries.double().norm(dim=1)[:, None] * pool.double().norm(dim=1)[found.indices]
    bound = (300 / 16 + 8) * 2.0**-24 * norms
    assert bool(((found.scores.double() - exact).abs() <= bound).all())
    expected = exact_topk(queries.double(), pool.double(), 51)
    clear = (expected.scores[:, :-1] - expected.scores[:, 1:]).min(dim=1).values > 1e-4
    assert bool(clear.any()) and torch.equal(found.indices[clear], expected.indices[clear, :50])


@pytest.mark.parametrize("isa", ISAS)
def test_the_filter_thins_out_and_failed_samples_rescan(isa: str) -> None:
    queries, pool = torch.randn(64, 32), torch.randn(20000, 32)
    counters: dict[str, int] = {}
    search(queries, pool, 20, isa=isa, tuning=FILTER, counters=counters)
    assert counters["filtered"] > 0.9 * 64 * 20000
    assert 64 * 20 <= counters["rescored"] < 64 * 2000 and counters["rescanned"] == 0
    search(queries, pool, 20, isa=isa, tuning={"forced_threshold": 1e30}, counters=counters)
    assert counters["rescanned"] == 64


def test_with_codes_few_rows_are_read() -> None:
    pool = (torch.randn(20000, 96) * torch.exp(-torch.arange(96) / 8)).half()[::2]  # strided
    codes = build_codes(pool)
    for count in (1, 5, 40):
        counters: dict[str, int] = {}
        queries = pool[torch.randint(0, 10000, (count,))].float()
        found = search(queries, pool, 20, codes=codes, counters=counters, threads=2)
        assert_same(found, oracle(queries, pool, 20))
        assert counters["rescored"] + counters["direct"] < 0.2 * count * 10000


def test_codes_that_cannot_be_the_pools_are_refused() -> None:
    pool = torch.randn(50, 40)
    codes = build_codes(pool)
    assert codes.codes.shape == (1, 4, 16, 16, 4) and codes.codes.dtype == torch.uint8
    for name, wrong in {
        "codes": codes.codes[:, :3],
        "scale": codes.scale.double(),
        "rest": codes.rest.repeat(2)[::2],
        "second": codes.second[:9],
    }.items():
        with pytest.raises(ArgumentError, match=rf"codes\.{name}: got .* expected torch"):
            search(pool[:2], pool, 3, codes=dataclasses.replace(codes, **{name: wrong}))
    with pytest.raises(ArgumentError, match=r"codes: got 49 rows"):
        search(pool[:2], pool, 3, codes=dataclasses.replace(codes, rows=49))
    with pytest.raises(ArgumentError, match=r"rows: got .* expected"):
        build_codes(pool.double())
    empty = build_codes(pool[:0])
    assert search(pool[:2], pool[:0], 3, codes=empty).indices.tolist() == [[-1] * 3] * 2


def test_a_periodic_pool_defeats_the_sample_and_not_the_answer() -> None:
    pool = torch.randint(-3, 4, (16000, 16)).float()
    pool[::16] += 8.0  # exactly the sampled rows are the best ones
    queries = torch.ones(32, 16)
    counters: dict[str, int] = {}
    found = search(queries, pool, 1500, counters=counters)
    assert counters["rescanned"] == 32
    assert torch.equal(found.indices, exact_topk(queries, pool, 1500).indices)


@pytest.mark.parametrize("k", [1, 100, 2048])
def test_duplicates_on_every_boundary(k: int) -> None:
    pool = torch.ones(9000, 16)
    queries = torch.ones(33, 16)
    for tuning in TUNINGS:
        found = search(queries, pool, k, threads=3, tuning={**tuning, "row_chunk": 64})
        assert torch.equal(found.indices, torch.arange(k).expand(33, k)), tuning


def test_offsets_beyond_two_to_the_31(tmp_path) -> None:
    path = tmp_path / "sparse.bin"
    rows, stride = 40, 2**26
    with path.open("wb") as file:
        file.truncate(rows * stride * 2)  # sparse: a few pages on disk
    pool = np.memmap(path, dtype=np.float16, mode="r+", shape=(rows, stride))
    values = np.random.default_rng(0).integers(-4, 5, (rows, 8)).astype(np.float16)
    pool[:, :8] = values
    queries = torch.randint(-4, 5, (16, 8)).half()
    found = topk(queries, pool[:, :8], 40, backend="cpp")
    assert torch.equal(found.indices, exact_topk(queries.float(), torch.from_numpy(values).float(), 40).indices)


def test_memory_stays_far_below_all_scores() -> None:
    code = (
        "import resource, torch; from tgq_fast.search.topk import topk\n"
        "q, p = torch.randn(3000, 16), torch.randn(200_000, 16)\n"
        "topk(q[:1], p, 1); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "topk(q, p, 100, backend='cpp', num_threads=2)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.05 * 3000 * 200_000 * 4


def test_concurrent_callers_get_their_own_answers() -> None:
    pool = torch.randn(4000, 32)
    queries = [torch.randn(40, 32) for _ in range(4)]
    expected = [topk(q, pool, 9, num_threads=1) for q in queries]
    found: list[TopK | None] = [None] * 4

    def call(i: int) -> None:
        for _ in range(5):
            found[i] = topk(queries[i], pool, 9, num_threads=2, backend="cpp")

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for got, want in zip(found, expected):
        assert got is not None
        assert_same(got, want)


def _search_in_child(connection: Connection) -> None:
    torch.manual_seed(5)
    torch.set_num_threads(1)  # OpenMP of the parent does not survive the fork; the search's threads do not need to
    idle = threading.Event()
    threading.Thread(target=idle.wait, daemon=True).start()  # a process with threads, but without the parent's pool
    connection.send(topk(torch.randn(40, 32), torch.randn(40000, 32), 5, num_threads=2, backend="cpp").indices.numpy())
    idle.set()


@pytest.mark.skipif(sys.platform != "linux", reason="fork is tested on Linux")
def test_fork_after_use() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(1 << 16).exp()  # the OpenMP pool has workers
    torch.manual_seed(5)
    expected = topk(torch.randn(40, 32), torch.randn(40000, 32), 5, num_threads=2, backend="cpp").indices
    torch.set_num_threads(threads)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_search_in_child, args=(sender,))
    child.start()
    try:
        assert receiver.poll(60), "the search in the child hangs"
        assert np.array_equal(receiver.recv(), expected.numpy())
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()


def test_ctrl_c_ends_a_long_search() -> None:
    code = (
        "import torch; from tgq_fast.search.topk import topk\n"
        "q, p = torch.randn(4096, 256), torch.randn(1, 256).expand(4_000_000, 256)\n"
        "print('start', flush=True)\n"
        "topk(q, p, 10, backend='cpp', num_threads=1)\n"
    )
    environment = {**os.environ, "TGQ_ISA": "scalar"}  # hours of work
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it for all
    )
    assert child.stdout is not None and child.stdout.readline() == "start\n"
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in error and child.returncode != 0


def test_the_lock_is_released_during_a_search() -> None:
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    other = threading.Thread(target=tick)
    other.start()
    begin = time.perf_counter()
    search(torch.randn(256, 64), torch.randn(30000, 64), 10, isa="scalar", tuning={"use_filter": 0})
    end = time.perf_counter()
    stop.set()
    other.join()
    during = [t for t in ticks if begin < t < end]
    assert end - begin > 0.05 and len(during) >= 10


def test_unknown_instruction_set_and_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGQ_ISA", "sse9")
    with pytest.raises(ArgumentError, match=r"TGQ_ISA: got 'sse9', expected an instruction set .* scalar"):
        topk(torch.zeros(1, 1), torch.zeros(1, 1), 1)
    monkeypatch.setenv("TGQ_ISA", "scalar")
    assert _native.build_info()["isa"] == "scalar"
    with pytest.raises(KeyError, match="unknown tuning option"):
        search(torch.zeros(1, 1), torch.zeros(1, 1), 1, tuning={"speed": 1})
    with pytest.raises(TGQError):
        search(torch.zeros(1, 1), torch.zeros(1, 1), 3000)


def test_flush_to_zero_of_the_calling_thread_does_not_change_answers() -> None:
    pool = torch.arange(1, 65, dtype=torch.float32)[:, None].expand(64, 3) * 1e-44
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this machine cannot flush denormals")
        found = topk(torch.ones(2, 3), pool, 3, backend="cpp")
    finally:
        torch.set_flush_denormal(False)
    assert found.indices.tolist() == [[63, 62, 61]] * 2


def test_operator_passes_opcheck_and_compiles_into_one_graph() -> None:
    queries, pool = torch.randn(5, 8), torch.randn(50, 8)
    exclude = torch.arange(5)
    operator = torch.ops.tgq_fast.topk.default
    for arguments in ((queries, pool, 4), (queries, pool, 60, exclude)):
        torch.library.opcheck(operator, arguments)

    @torch.compile(fullgraph=True, backend="eager")
    def nearest(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return topk(q * 2, p, 4, exclude=exclude).indices + 1

    assert torch.equal(nearest(queries, pool), topk(queries * 2, pool, 4, exclude=exclude).indices + 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_path_gives_the_definition(data: st.DataObject) -> None:
    q, n, d = (data.draw(st.integers(1, top), name) for name, top in (("Q", 40), ("N", 600), ("D", 70)))
    k = data.draw(st.integers(1, 50), "k")
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    kind = data.draw(st.sampled_from(KINDS), "kind")
    queries, pool = dataset(kind, q, max(d, 2)), dataset(kind, n, max(d, 2))
    tuning = dict(data.draw(st.sampled_from(TUNINGS), "tuning"))
    isa = data.draw(st.sampled_from(ISAS), "isa")
    found = search(queries, pool, k, threads=data.draw(st.integers(1, 3), "threads"), isa=isa, tuning=tuning)
    assert_same(found, oracle(queries, pool, k))
