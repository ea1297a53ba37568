"""Exact top-k over a whole pool against every exact peer that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.case import Case, Setting, UnavailableError, Variant, Workload
from benchmarks.cases.common import each
from benchmarks.cases.search_peers import Problem, variants
from benchmarks.cases.tensors import dtype_of, slack_of
from benchmarks.ceilings import Work
from benchmarks.parity import Verdict

_CHECKED_QUERIES = 64
_ROWS_AT_A_TIME = 65536


def _random(rows: int, width: int, generator: torch.Generator, device: str) -> Tensor:
    return normalize(torch.randn(rows, width, generator=generator, device=device), dim=-1)


def _clustered(rows: int, width: int, generator: torch.Generator, device: str) -> Tensor:
    """Tight clusters of about a thousand items: cosines inside one differ by about 1e-6."""
    centres = _random(max(2, rows // 1000), width, generator, device)
    chosen = torch.randint(0, len(centres), (rows,), generator=generator, device=device)
    noise = torch.randn(rows, width, generator=generator, device=device) * (1e-3 * width**-0.5)
    return normalize(centres[chosen] + noise, dim=-1)


# Energy of direction i is (i + 1 + offset) ** -power, the rows' mean has norm `mean`. "trained" has 91, 97 and 99 % of
# the centred energy in its first 16, 32 and 64 directions, as embeddings of a trained connector do; "texts" has 29, 41
# and 56 %, as MiniLM's sentence embeddings do.
_SPECTRA = {"trained": (2.6, 4, 0.5), "texts": (0.9, 4, 0.15)}


def _spectrum(kind: str, rows: int, width: int, generator: torch.Generator, device: str) -> Tensor:
    """Normal rows whose energy falls as that of real embeddings, in directions that no column follows."""
    power, offset, mean = _SPECTRA[kind]
    energy = (torch.arange(width, device=device) + 1.0 + offset) ** -power
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, device=device)).Q
    found = torch.randn(rows, width, generator=generator, device=device) * (energy / energy.sum()).sqrt() @ turn
    return normalize((1 - mean**2) ** 0.5 * found + mean * _random(1, width, generator, device), dim=-1)


def _grown(real: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """More rows of the same mean and covariance as real ones: x = mean + a (u - mean) + b (v - mean), a² + b² = 1."""
    mean = real.mean(dim=0)
    angle = torch.rand(rows, 1, generator=generator) * torch.pi / 2
    u, v = (real[torch.randint(0, len(real), (rows,), generator=generator)] - mean for _ in range(2))
    return normalize(mean + angle.cos() * u + angle.sin() * v, dim=-1)


def load_embeddings(path: Path | None) -> Tensor:
    """Real embeddings [n, D] fp32 from an item pool folder or a .npy file.

    Raises:
        UnavailableError: no path was given, or nothing is there.
    """
    if path is None:
        raise UnavailableError("no real embeddings: name an item pool folder or .npy file with --embeddings")
    if path.is_dir():
        from tgq_fast.pool import ItemPool

        with ItemPool.open(path) as pool:
            return pool.embeddings().float()
    if not path.is_file():
        raise UnavailableError(f"no real embeddings at {path}")
    import numpy as np

    return normalize(torch.from_numpy(np.load(path, allow_pickle=False)).float(), dim=-1)


def _problem(case: Case, sizes: dict[str, Any], setting: Setting) -> Problem:
    generator = torch.Generator(setting.device).manual_seed(0)
    rows, width, queries = sizes["pool"], sizes["D"], sizes["Q"]
    data = sizes["data"]
    if data == "real" and not setting.tiny:
        found = load_embeddings(setting.embeddings).to(setting.device)
        sizes |= {"pool": len(found), "D": found.shape[1]}
        pool = found
    elif data == "grown" and not setting.tiny:
        found = _grown(load_embeddings(setting.embeddings), rows, generator).to(setting.device)
        sizes |= {"D": found.shape[1]}
        pool = found
    elif data in _SPECTRA:
        pool = _spectrum(data, rows, width, generator, setting.device)
    else:
        draw = _clustered if data == "clustered" else _random
        pool = draw(rows, width, generator, setting.device)
    pool = pool.to(dtype_of(case))
    if sizes["self_join"]:
        sizes["Q"] = len(pool)
        query_sets = [pool]
    elif data == "random":
        query_sets = [_random(queries, pool.shape[1], generator, setting.device).to(pool.dtype) for _ in range(3)]
    else:  # items of the pool, as in item-to-item retrieval
        query_sets = []
        for _ in range(3):
            chosen = torch.randint(0, len(pool), (queries,), generator=generator, device=setting.device)
            query_sets.append(pool[chosen])
    return Problem(pool, query_sets, sizes["k"], setting.threads)


class _Truth:
    """Exact scores in fp64 of a few queries, and how far a result falls short of them."""

    def __init__(self, problem: Problem) -> None:
        self.queries = problem.queries[0][:_CHECKED_QUERIES].double()
        self.pool, self.k = problem.pool, min(problem.k, len(problem.pool))
        self.best = self._best(torch.float64)[0]  # [q, k]

    def _best(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The k best scores and their rows when products run in `dtype`."""
        queries = self.queries.to(dtype)
        scores, rows = queries.new_empty(len(queries), 0), self.queries.new_empty(len(queries), 0, dtype=torch.int64)
        for first in range(0, len(self.pool), _ROWS_AT_A_TIME):
            part = queries @ self.pool[first : first + _ROWS_AT_A_TIME].to(dtype).T
            here = torch.arange(first, first + part.shape[1], device=rows.device).expand(len(queries), -1)
            scores, rows = torch.cat((scores, part), dim=1), torch.cat((rows, here), dim=1)
            scores, order = scores.topk(min(self.k, scores.shape[1]), dim=1)
            rows = rows.gather(1, order)
        return scores, rows

    def allowed(self, dtype: torch.dtype) -> float:
        """Twice the shortfall of products in `dtype`, and one unit in the last place of the largest score."""
        largest = float(self.best.abs().max())
        return 2 * self.shortfall(self._best(dtype)[1]) + torch.finfo(dtype).eps * largest

    def shortfall(self, indices: Tensor) -> float:
        """Largest loss of true score at any rank; infinite for repeated or impossible rows."""
        rows = indices[: len(self.queries), : self.k].to(self.pool.device).long()
        if rows.shape != self.best.shape or int(rows.min()) < 0 or int(rows.max()) >= len(self.pool):
            return float("inf")
        ordered = rows.sort(dim=1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            return float("inf")
        found = torch.stack([self.pool[r].double() @ q for q, r in zip(self.queries, rows, strict=True)])
        return float((self.best - found.sort(dim=1, descending=True).values).max())


def _build(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
    problem = _problem(case, sizes, setting)
    known: dict[str, Any] = {}

    def verdict(variant: Variant, indices: Tensor) -> Verdict:
        if not known:
            known["truth"] = _Truth(problem)
            # Ours accumulates in fp32 whatever the stored dtype; a peer may round its scores to that dtype.
            known["ours"] = known["truth"].allowed(torch.float32)
            known["peer"] = known["truth"].allowed(problem.pool.dtype)
        lost = known["truth"].shortfall(indices)
        allowed = slack_of(variant) * known["ours" if variant.kind in ("ours", "before") else "peer"]
        if lost <= allowed:
            return Verdict(True, max(0.0, lost))
        return Verdict(False, lost, f"true scores fall short by {lost:.3g}, allowed {allowed:.3g}")

    return Workload(len(problem.queries), variants(problem, setting), _work(sizes, problem), verdict)


def _work(sizes: dict[str, Any], problem: Problem) -> Work:
    rows, width = problem.pool.shape
    queries, item = len(problem.queries[0]), problem.pool.element_size()
    products = 0.5 if sizes["self_join"] else 1.0  # scores of a self-join are symmetric
    moved = (rows + (0 if sizes["self_join"] else queries)) * width * item + queries * problem.k * 12
    return Work(2.0 * products * queries * rows * width, float(moved))


_TINY = {"Q": 5, "pool": 700, "D": 24, "k": 9}


CASES: list[Case] = []


def _add(
    name: str, shape: dict[str, Any], *, device: str, dtypes: tuple[str, ...] = ("float32",), priority: int = 4
) -> None:
    full = {"k": 100, "data": "random", "self_join": False, **shape}
    CASES.extend(
        each(
            "topk", name, full, _TINY, _build, device=device, dtypes=dtypes, directions=("forward",), priority=priority
        )
    )


_K, _M = 1000, 1_000_000
_add("q256-n200k-d256", {"Q": 256, "pool": 200 * _K, "D": 256}, device="cpu", priority=1)
_add("q256-n200k-d768", {"Q": 256, "pool": 200 * _K, "D": 768}, device="cpu", priority=2)
_add("q1024-n100k-d768", {"Q": 1024, "pool": 100 * _K, "D": 768}, device="cpu", priority=4)
_add("q1-n200k-d256", {"Q": 1, "pool": 200 * _K, "D": 256}, device="cpu", priority=2)
_add("q1-n200k-d768", {"Q": 1, "pool": 200 * _K, "D": 768}, device="cpu", priority=3)
_add("q256-n1m-d256", {"Q": 256, "pool": _M, "D": 256}, device="cpu", dtypes=("bfloat16", "float32"), priority=3)
_add("clustered-q256-n200k-d256", {"Q": 256, "pool": 200 * _K, "D": 256, "data": "clustered"}, device="cpu")
_add("self-n20k-d256", {"Q": 20 * _K, "pool": 20 * _K, "D": 256, "self_join": True}, device="cpu")
_add(
    "clustered-self-n20k-d256",
    {"Q": 20 * _K, "pool": 20 * _K, "D": 256, "data": "clustered", "self_join": True},
    device="cpu",
)
for _queries, _more in ((1, {}), (8, {}), (16, {}), (256, {}), (256, {"k": 10}), (4096, {})):
    _name = "-".join([f"trained-q{_queries}-n200k-d256", *(f"k{k}" for k in _more.values())])
    _shape = {"Q": _queries, "pool": 200 * _K, "D": 256, "data": "trained", **_more}
    _add(_name, _shape, device="cpu", priority=2 if _queries < 4096 else 4)
_add("trained-q20k-n1m-d256", {"Q": 20 * _K, "pool": _M, "D": 256, "data": "trained"}, device="cpu", priority=5)
for _queries in (1, 16, 256):
    _shape = {"Q": _queries, "pool": 100 * _K, "D": 384, "data": "texts"}
    _add(f"texts-q{_queries}-n100k-d384", _shape, device="cpu", priority=3)
    _add(f"grown-q{_queries}-n200k", {"Q": _queries, "pool": 200 * _K, "D": 0, "data": "grown"}, device="cpu")
for _queries, _rows in ((256, 2 * _K), (256, 9 * _K), (1, 9 * _K)):  # a small shop, and the products of a test
    _shape = {"Q": _queries, "pool": _rows, "D": 256, "data": "trained"}
    _add(f"small-q{_queries}-n{_rows // _K}k-d256", _shape, device="cpu")
_add("real-q256", {"Q": 256, "pool": 0, "D": 0, "data": "real"}, device="cpu")
_add("real-self", {"Q": 0, "pool": 0, "D": 0, "data": "real", "self_join": True}, device="cpu")

_add("q4096-n1m-d256", {"Q": 4096, "pool": _M, "D": 256}, device="cuda", dtypes=("bfloat16",), priority=1)
_add("q4096-n1m-d256", {"Q": 4096, "pool": _M, "D": 256}, device="cuda", dtypes=("float32",), priority=2)
_add("q1024-n1m-d768", {"Q": 1024, "pool": _M, "D": 768}, device="cuda", dtypes=("bfloat16",), priority=3)
_add("q1-n1m-d256", {"Q": 1, "pool": _M, "D": 256}, device="cuda", dtypes=("bfloat16",), priority=3)
_add("q16-n1m-d256", {"Q": 16, "pool": _M, "D": 256}, device="cuda", dtypes=("bfloat16",), priority=2)
_add(
    "clustered-q1024-n1m-d256",
    {"Q": 1024, "pool": _M, "D": 256, "data": "clustered"},
    device="cuda",
    dtypes=("bfloat16", "float32"),
    priority=5,
)
_add(
    "self-n200k-d256",
    {"Q": 200 * _K, "pool": 200 * _K, "D": 256, "self_join": True},
    device="cuda",
    dtypes=("bfloat16",),
    priority=5,
)
