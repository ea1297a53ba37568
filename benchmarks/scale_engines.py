"""Embedding by several workers against one process, and streaming against a feature cache: ratios within one run.

    python -m benchmarks.scale_engines --work FOLDER --json docs/results/scale/engines.json
    python -m benchmarks.scale_engines --only streaming --items 1500 --work FOLDER --json …/engines.json
    python -m benchmarks.scale_engines --json docs/results/scale/engines.json --table docs/scaling.md

The model is the `tiny` preset with its frozen towers and random weights; pictures are of 240 × 320. Every way is a
process of its own, in turn, and begins with an empty pool and an empty cache. A run adds its figures to those in the
file; ratios are medians over runs. Pools must be the same, byte for byte, whichever way they are made.
`--against CHECKOUT` adds the cache of another checkout of the package, with its extension built.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, commit, write_figures
from benchmarks.scale_losses import contents
from benchmarks.scale_sizes import filled, make_pictures
from tgq_fast.io.files import write_atomic

__all__ = ["WAYS", "measure", "table"]

WAYS = {
    "engines": ("one process on one processor", "one process", "two processes", "two actors"),
    "streaming": ("cache, then embed", "streaming"),
}
"""The ways of each comparison."""
BEFORE = "cache, then embed, build before"
_RATIOS = (  # of what, which way over which
    ("items per second", "two processes", "one process on one processor"),
    ("items per second", "two actors", "one process on one processor"),
    ("items per second", "two processes", "one process"),
    ("items per second", "two actors", "one process"),
    ("seconds", "cache, then embed", "streaming"),
    ("seconds", BEFORE, "streaming"),
    ("peak, MB", "streaming", "cache, then embed"),
    ("peak, MB", "streaming", BEFORE),
    ("peak above the start, MB", "streaming", "cache, then embed"),
    ("peak above the start, MB", "streaming", BEFORE),
)


def measure(
    comparison: str, work: Path, items: int, against: Path | None = None, only: list[str] | None = None
) -> dict[str, Any]:
    """One run: figures by way, of all or of some. AssertionError where pools are not the same."""
    folder = work / f"shop-{items}"
    if not folder.exists():
        make_pictures(folder, items)
    ways = [(way, ROOT) for way in WAYS[comparison] if way in (only or WAYS[comparison])]
    if against is not None and comparison == "streaming":
        ways.append((BEFORE, against))
    told: dict[str, Any] = {}
    pools = []
    for way, checkout in ways:
        for name in ("pool", "cache", "parts"):
            shutil.rmtree(folder / name, ignore_errors=True)
        ran = subprocess.run(
            [sys.executable, "-P", str(ROOT / "benchmarks" / "scale_engines_worker.py"), way, str(folder)],
            stdout=subprocess.PIPE, text=True, check=True, cwd=folder,
            env={**os.environ, "PYTHONPATH": str(checkout), "TGQ_CACHE": str(work / "towers")},
        )  # fmt: skip
        told[way] = json.loads(ran.stdout.splitlines()[-1]) | {"commit": commit(checkout)}
        print(json.dumps({way: told[way]}), flush=True)
        if checkout == ROOT:
            pools.append(contents(folder / "pool"))
    assert all(pool == pools[0] for pool in pools), "the ways give different pools"
    return {"comparison": comparison, "items": items, "load": round(os.getloadavg()[0], 2), "ways": told}


def ratios(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the runs that hold both ways."""
    found = []
    for name, way, base in _RATIOS:
        both = [run["ways"] for run in runs if way in run["ways"] and base in run["ways"]]
        if both:
            values = [ways[way][name] / ways[base][name] for ways in both]
            found.append(
                {"of": name, "way": way, "over": base, "ratio": round(statistics.median(values), 3), "runs": len(both)}
            )
    return found


def table(document: dict[str, Any]) -> str:
    """The ratios as Markdown."""
    commits = dict.fromkeys(told["commit"] for run in document["runs"] for told in run["ways"].values())
    items = sorted({run["items"] for run in document["runs"]})
    lines = [
        f"{document['machine']}; {' or '.join(map(str, items))} items; "
        f"commit {', '.join(f'`{name}`' for name in commits)}.",
        "", "| of | way | over | ratio | runs |", "|---|---|---|---:|---:|",
    ]  # fmt: skip
    lines += [f"| {r['of']} | {r['way']} | {r['over']} | {r['ratio']:.2f} | {r['runs']} |" for r in document["ratios"]]
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--way", action="append", help="of a comparison, this way alone; repeatable")
    parser.add_argument("--items", type=int, default=768)
    parser.add_argument("--work", type=Path, help="folder for data, which stays; none: nothing is measured")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, to compare its cache with")
    parser.add_argument("--json", type=Path, required=True, help="results; those of earlier runs stay")
    parser.add_argument("--table", type=Path, help="page to write the ratios into")
    given = parser.parse_args()
    document: dict[str, Any] = {"runs": []}
    if given.json.exists():
        document = json.loads(given.json.read_text())
    for comparison in given.only.split(",") if given.work is not None else ():
        runs = [*document["runs"], measure(comparison, given.work, given.items, given.against, given.way)]
        write_figures(given.json, ratios=ratios(runs), runs=runs)
        document = json.loads(given.json.read_text())
    if given.table is not None:
        write_atomic(given.table, filled(given.table.read_text(), "engines", table(document)).encode())


if __name__ == "__main__":
    main()
