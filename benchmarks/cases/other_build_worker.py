"""What :mod:`benchmarks.cases.other_build` runs in a process of another checkout: nothing of this one is imported.

Arguments: folder with the problem, whether the queries are the pool, k, threads, whether codes are stored. Then, line
by line: ``i n`` runs n calls from query set i on and answers with their seconds, when the rows of the last are written.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def stored(pool: torch.Tensor, threads: int) -> dict[str, Any]:
    """Codes of the pool as an argument of this checkout's `topk`, whatever they are called there."""
    try:
        from tgq_fast.search import build_codes
    except ImportError:
        try:
            from tgq_fast.retrieval import build_codes  # type: ignore[import-not-found,no-redef]
        except ImportError:
            from tgq_fast.retrieval import build_shadow  # type: ignore[import-not-found]

            return {"shadow": build_shadow(pool, threads)}
    return {"codes": build_codes(pool)}


def main(folder: Path, same: bool, k: int, threads: int, with_codes: bool) -> None:
    torch.set_num_threads(threads)
    from tgq_fast import _native, topk

    dtype = getattr(torch, (folder / "dtype").read_text())

    def load(name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(folder / name)).view(dtype)

    pool = load("pool.npy")
    sets = [pool] if same else list(load("queries.npy"))
    more = stored(pool, threads) if with_codes else {}
    module = _native.extension()
    if module is None:
        raise SystemExit("no compiled extension: " + _native.why_missing())
    found = np.load(folder / "found.npy", mmap_mode="r+")
    print(f"ready {module.build_info()['commit']} {Path(str(module.__file__)).parent}", flush=True)
    for line in sys.stdin:
        first, count = map(int, line.split())
        rows = torch.empty(0)
        begin = time.perf_counter()
        for i in range(first, first + count):
            rows = topk(sets[i % len(sets)], pool, k, num_threads=threads, **more).indices
        seconds = time.perf_counter() - begin
        found[:] = rows.numpy()
        print(repr(seconds), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1", int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")
