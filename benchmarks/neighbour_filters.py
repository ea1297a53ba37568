"""The neighbour table of a whole pool under conditions against the one without: ratios in one interleaved run.

    python -m benchmarks.neighbour_filters --json docs/results/scale/neighbours.json

Items lie in 45 categories and in styles of about four, prices vary about a category's own: neighbours are alike in
both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.environment import write_figures
from tgq_fast import ItemPool
from tgq_fast.pool import neighbours

__all__ = ["main"]

CONDITIONS = (
    None,
    "category = same",
    "category != same",
    "price < 50",
    "price within 10%",
    "price within 30%",
    "price within 60%",
    "category = same, price within 30%",
)


def make_pool(folder: Path, rows: int, dims: int) -> pa.Table:
    """A pool with codes; its items' columns."""
    rng = np.random.default_rng(0)
    category, style = rng.integers(45, size=rows), rng.integers(max(1, rows // 4), size=rows)
    centres, styles = 1.5 * rng.normal(size=(45, dims)), rng.normal(size=(style.max() + 1, dims))
    vectors = torch.from_numpy(centres[category] + styles[style] + 0.7 * rng.normal(size=(rows, dims))).float()
    price = np.exp(rng.normal(3.5, 0.7, 45))[category] * np.exp(rng.normal(0, 0.5, rows))
    ids = [f"item-{row}" for row in range(rows)]
    with ItemPool.create(folder, dims=dims) as pool:
        pool.append(ids, torch.nn.functional.normalize(vectors, dim=1))
        pool.build_codes()
    columns = {"id": ids, "category": [f"c{one}" for one in category], "price": np.round(price, 2)}
    return pa.table({**columns, "group_id": [f"g{one}" for one in style]})


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=9572)
    options.add_argument("--dims", type=int, default=256)
    options.add_argument("-k", type=int, default=20)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="tgq-neighbour-filters-") as place:
        table = make_pool(Path(place, "pool"), chosen.rows, chosen.dims)
        pool = ItemPool.open(Path(place, "pool"))
        times: dict[str | None, list[float]] = {where: [] for where in CONDITIONS}
        for _ in range(1 + chosen.rounds):
            for where, each in times.items():
                begin = time.perf_counter()
                neighbours(pool, Path(place, "out.parquet"), k=chosen.k, where=where, table=table)
                each.append(time.perf_counter() - begin)
    found = []
    for where, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each[1:], times[None][1:], strict=True))
        found.append({"where": where, "seconds": statistics.median(each[1:]), "ratio": ratio})
        print(f"{where or 'none':36} {1e3 * statistics.median(each[1:]):8.1f} ms {ratio:6.2f}x")
    if chosen.json is not None:
        write_figures(chosen.json, pool=[chosen.rows, chosen.dims], k=chosen.k, rounds=chosen.rounds, results=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
