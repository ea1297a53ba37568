"""``python -m benchmarks.plot``: one figure per device and operator, times of every variant relative to tgq_fast."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, slug
from benchmarks.results import Results, result_files
from tgq_fast.io.files import atomic_writer

_COLOURS = {"ours": "#2a6fbb", "before": "#8fb4da", "reference": "#9a9a9a", "peer": "#d98032", "ceiling": "#6b9e5b"}


def plot_operator(results: Results, op: str, path: Path) -> bool:
    """Write one figure; False when the file holds no timed rows of this operator."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = _bars([row for row in results.rows if row["op"] == op])
    if not bars:
        return False
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.24 * len(bars)))
    positions, gap = [], 0.0
    for i, (case, *_) in enumerate(bars):
        gap += 0.8 if i and case != bars[i - 1][0] else 0.0
        positions.append(i + gap)
    for position, (_, _, row, ratio) in zip(positions, bars, strict=True):
        axes.barh(position, ratio, color=_COLOURS[row["kind"]])
        axes.text(ratio, position, f" {row['median_ms']:.3g} ms", va="center", fontsize=7)
    axes.set_yticks(positions, [label for _, label, *_ in bars], fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.6)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("time relative to tgq_fast")
    axes.set_title(f"{op}, {results.environment['device_name']}, commit {results.environment['commit']}", fontsize=9)
    figure.tight_layout()
    with atomic_writer(path) as file:
        kind = path.suffix.removeprefix(".") or None
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    return True


def _bars(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, dict[str, Any], float]]:
    """(case, label, row, time relative to ours) of every timed row whose case has a timed row of ours."""
    ours = {row["case"]: row["median_ms"] for row in rows if row["variant"] == "tgq_fast" and "median_ms" in row}
    return [
        (row["case"], f"{row['case'].split('/', 1)[1]}: {row['variant']}", row, row["median_ms"] / ours[row["case"]])
        for row in rows
        if "median_ms" in row and row["case"] in ours
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Plots every operator of the newest measurements of each device."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of result files")
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="folder of the figures")
    options.add_argument("--format", choices=("svg", "png"), default="svg")
    given = options.parse_args(arguments)
    for _, results in result_files(given.results):
        for op in dict.fromkeys(row["op"] for row in results.rows):
            name = f"{slug(results.environment['device_name'])}-{op}-{results.environment['commit']}"
            path = given.out / f"{name}.{given.format}"
            if plot_operator(results, op, path):
                print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
