"""``python -m benchmarks.tables``: write the tables of README.md and benchmarks/results/README.md from result files.

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; everything between is replaced. NAME is
`figures` (a few headline cases) or ``benchmarks:DEVICE:VIEW`` with DEVICE cpu or gpu and VIEW an operator of
the registry, `targets` or `run`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.results import Results, result_files
from benchmarks.targets import Target, best_peer, outcomes
from tgq_fast.io.files import write_atomic

Files = Sequence[tuple[Path, Results]]
_MARKER = re.compile(r"(<!-- (figures|benchmarks:(?:cpu|gpu):\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
_DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "results" / "README.md")
_COMMANDS = {"cpu": "python -m benchmarks.run --device cpu --json auto", "gpu": "python -m benchmarks.gpu_check"}


def fill(text: str, files: Files) -> str:
    """A document with every marked table made anew."""
    return _MARKER.sub(lambda m: f"{m[1]}{table(m[2], files).rstrip()}\n{m[3]}", text)


def table(name: str, files: Files) -> str:
    """Markdown of one named table."""
    if name == "figures":
        return _figures(files)
    _, device, view = name.split(":")
    chosen = [(path, results) for path, results in files if _device(results) == device]
    if not chosen:
        return f"No result file yet; `{_COMMANDS[device]}` writes one.\n"
    measured = {row["case"] for _, results in chosen for row in results.rows}
    parts = []
    for path, results in chosen:
        if view == "run":
            body = _run(results)
        elif view == "targets":
            body = _targets(results, measured)
        elif len(chosen) > 1 and all(row["op"] != view for row in results.rows):
            continue  # a file of other cases
        else:
            body = _operator(results, view)
        parts.append(f"{results.environment['device_name']} ({_link(path)})\n\n{body}")
    return "\n".join(parts)


def _device(results: Results) -> str:
    return "gpu" if results.environment.get("device") == "cuda" else "cpu"


def _link(path: Path) -> str:
    try:
        return f"`{path.resolve().relative_to(ROOT)}`"
    except ValueError:
        return f"`{path.name}`"


def _rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)) + "\n"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mib(row: dict[str, Any]) -> str:
    return "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.1f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def _by_case(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(case, list(group)) for case, group in groupby(rows, key=lambda row: row["case"])]


# What README.md shows, at most a few rows: case, and the variant of ours that a user gets there.
_HEADLINES = (
    ("topk/q256-n200k-d256/float32/forward", "tgq_fast"),
    ("topk/q256-n1m-d256/float32/forward", "tgq_fast"),
    ("topk/q1-n200k-d256/float32/forward", "tgq_fast"),
    ("topk/self-n20k-d256/float32/forward", "tgq_fast"),
    ("connector/paper-b16/float32/forward", "tgq_fast, packed weights"),
    ("connector/paper-b16/bfloat16/forward", "tgq_fast, packed weights"),
    ("connector/paper-b16-step/float32/full", "tgq_fast"),
    ("streams/paper-b32/float32/forward", "tgq_fast"),
)


def _figures(files: Files) -> str:
    lines = []
    for headline, variant in _HEADLINES:
        for _, results in files:
            for case, rows in _by_case(results.rows):
                theirs = best_peer(rows)
                ours = next((r for r in rows if r["variant"] == variant and "median_ms" in r), None)
                if case != headline or theirs is None or ours is None:
                    continue
                both = f"{_ms(ours['median_ms'])} ms", f"{_ms(theirs['median_ms'])} ms, {theirs['variant']}"
                speed = _times(theirs["median_ms"] / ours["median_ms"])
                lines.append((results.environment["device_name"], f"`{case}`", *both, speed))
    if not lines:
        commands = " and ".join(f"`{command}`" for command in _COMMANDS.values())
        return f"No result files yet; {commands} write them.\n"
    sources = ", ".join(_link(path) for path, _ in files)
    head = ("machine", "case", "tgq_fast", "fastest peer", "speed-up")
    everything = "every case, also where a peer is ahead, is in benchmarks/results/README.md"
    return f"{_rows(head, lines)}\nMedians of interleaved runs, from {sources}; {everything}.\n"


def _operator(results: Results, op: str) -> str:
    lines = []
    for case, rows in _by_case([row for row in results.rows if row["op"] == op]):
        ours = next((r for r in rows if r["variant"] == "tgq_fast" and "median_ms" in r), None)
        for i, row in enumerate(rows):
            label = f"`{case.split('/', 1)[1]}`" if i == 0 else ""
            if "median_ms" not in row:
                lines.append((label, row["variant"], f"{row['status']}: {row.get('reason', 'not timed')}", *[""] * 6))
                continue
            lines.append(
                (
                    label,
                    row["variant"],
                    _ms(row["median_ms"]),
                    f"{_ms(row['p20_ms'])} – {_ms(row['p80_ms'])}",
                    "" if ours is None else _times(row["median_ms"] / ours["median_ms"]),
                    _mib(row),
                    f"{row['gb_s']:.3g}",
                    f"{row['tflop_s']:.3g}",
                    f"{100 * row['floor_share']:.0f} % ({row['bound']})",
                )
            )
    if not lines:
        return f"No rows of {op} in this file.\n"
    head = (
        "case",
        "variant",
        "median ms",
        "p20 – p80",
        "time / tgq_fast",
        "peak MiB",
        "GB/s",
        "TFLOP/s",
        "share of floor",
    )
    return _rows(head, lines)


def _goal(target: Target) -> str:
    if target.metric == "floor":
        return f"≥ {100 * target.goal:.0f} % of the floor"
    unit = "of the memory" if target.metric == "memory" else "of the time"
    return f"≤ {target.goal:.2f}× {unit}" if target.at_most else f"≥ {target.goal:g}× faster"


def _targets(results: Results, measured: set[str]) -> str:
    """`measured`: cases of any file; what this file leaves to others is not listed."""
    lines = []
    left_out = measured - {row["case"] for row in results.rows}
    for outcome in outcomes(results.rows, results.environment["device"]):
        target, value = outcome.target, outcome.value
        if target.case in left_out:
            continue
        reached = "" if value is None else f"{100 * value:.0f} %" if target.metric == "floor" else _times(value)
        verdict = {None: "not measured", True: "met", False: "missed"}[outcome.met]
        against = "" if target.metric == "floor" else outcome.against
        ours = "" if target.variant == "tgq_fast" else f" ({target.variant})"
        lines.append((f"`{target.case}`{ours}", against, _goal(target), reached, verdict))
    return _rows(("case", "against", "goal", "measured", ""), lines)


def _run(results: Results) -> str:
    facts = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    ceilings = ", ".join(
        f"{name.removesuffix('_bytes_s')} {value / 1e9:.1f} GB/s"
        if name.endswith("_bytes_s")
        else f"{name.removesuffix('_flop_s')} {value / 1e12:.2f} TFLOP/s"
        for name, value in results.ceilings.items()
    )
    lines = [
        ("started", facts["started"] + ("" if results.complete else " (incomplete run)")),
        ("commit", f"`{facts['commit']}`"),
        ("command", f"`{facts['command']}`"),
        ("threads", str(facts["threads"])),
        ("versions", versions),
        ("measured ceilings", ceilings),
    ]
    if facts.get("driver"):
        lines.append(("driver", facts["driver"][0]))
    lines += [(f"step: {step['name']}", step["status"]) for step in results.steps]
    return _rows(("", ""), lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when --check finds a document that differs from what would be written."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of result files")
    options.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    options.add_argument("documents", nargs="*", type=Path, default=list(_DOCUMENTS))
    given = options.parse_args(arguments)
    files = list(result_files(given.results))
    stale = []
    for document in given.documents:
        before = document.read_text(encoding="utf-8")
        after = fill(before, files)
        if after != before:
            stale.append(document)
            if not given.check:
                write_atomic(document, after.encode())
                print(f"wrote {document}")
    for document in stale if given.check else ():
        print(f"{document}: tables differ from the result files; run python -m benchmarks.tables", file=sys.stderr)
    return 1 if given.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
