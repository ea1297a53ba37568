"""``python -m benchmarks.builds CHECKOUT``: the registry's cases of two builds of this package, by turns.

No two files of a shared machine can be compared, since its speed changes meanwhile, so both builds run side by side,
each in a process of its own on its own registry's inputs: one waits while the other runs, who goes first changes from
round to round, and the ratio is the median over the rounds of one median over the other. Each variant is checked in its
own process first; a row that fails shows why and no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.case import UnavailableError
from benchmarks.checkout_process import CheckoutProcess
from benchmarks.environment import ROOT, write_figures
from benchmarks.registry import cases
from benchmarks.timing import SETTLE_S

_WORKER = Path(__file__).with_name("builds_worker.py")


def compare(
    before: CheckoutProcess, now: CheckoutProcess, case: str, rounds: int, sample_s: float, renamed: dict[str, str]
) -> list[dict[str, Any]]:
    """Rows of a case: of each variant that both builds have, times in ms and the ratio, or why there is none.

    Args:
        rounds: pairs of samples.
        sample_s: seconds a sample should take; at least one call.
        renamed: name of a variant in the build before → its name now.
    """
    opened = [json.loads(side.ask(json.dumps(["open", case]))) for side in (before, now)]
    if opened[0]["shape"] != opened[1]["shape"]:
        return [{"case": case, "reason": f"other shapes: {opened[0]['shape']} before, {opened[1]['shape']} now"}]
    old = {renamed.get(name, name): name for name in opened[0]["variants"]}
    rows = []
    for name, outcome in opened[1]["variants"].items():
        if name not in old:
            continue
        row: dict[str, Any] = {"case": case, "variant": name}
        refused = outcome or opened[0]["variants"][old[name]]
        if refused:
            rows.append(row | {"reason": refused})
            continue
        rows.append(row | _rounds([(before, old[name]), (now, name)], rounds, sample_s))
    return rows


def _rounds(sides: Sequence[tuple[CheckoutProcess, str]], rounds: int, sample_s: float) -> dict[str, Any]:
    count = max(1, int(sample_s / min(_median(*side, 1) for side in sides)))
    found: list[list[float]] = [[], []]
    for turn in range(rounds):
        for i in (0, 1) if turn % 2 else (1, 0):
            time.sleep(SETTLE_S)
            found[i].append(_median(*sides[i], count))
    paired = sorted(now / before for before, now in zip(*found, strict=True))
    p20, p80 = (paired[round(q * (rounds - 1))] for q in (0.2, 0.8))
    return {
        "before_ms": round(statistics.median(found[0]) * 1e3, 4),
        "now_ms": round(statistics.median(found[1]) * 1e3, 4),
        "ratio": round(statistics.median(paired), 3),
        "ratio_p20": round(p20, 3),
        "ratio_p80": round(p80, 3),
        "rounds": rounds,
    }


def _median(side: CheckoutProcess, variant: str, count: int) -> float:
    seconds: list[float] = json.loads(side.ask(json.dumps(["time", variant, count])))
    return statistics.median(seconds)


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    name = f"{row['case']}  {row.get('variant', '')}"
    if "ratio" not in row:
        return f"{name}: {row['reason']}"
    return (
        f"{row['ratio']:5.2f} [{row['ratio_p20']:.2f} {row['ratio_p80']:.2f}] "
        f"{row['before_ms']:10.3f} ms before {row['now_ms']:10.3f} ms now  {name}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.builds", description=__doc__)
    parser.add_argument("checkout", type=Path, help="the build before: another checkout with its extension built")
    parser.add_argument("--case", action="append", default=[], metavar="GLOB", help="cases; default: all of the CPU's")
    parser.add_argument("--rename", action="append", default=[], metavar="BEFORE=NOW", help="a variant's two names")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sample-s", type=float, default=0.15, help="seconds of a sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--embeddings", type=Path, help="item pool folder or .npy file of real embeddings")
    parser.add_argument("--json", type=Path, help="result file; rows of other cases in it stay")
    given = parser.parse_args(arguments)
    renamed = dict(pair.split("=", 1) for pair in given.rename)
    settings = [str(given.threads)] + ([] if given.embeddings is None else [str(given.embeddings.resolve())])
    try:
        sides = [CheckoutProcess(where, _WORKER, *settings) for where in (given.checkout, ROOT)]
    except UnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    before, now = sides
    theirs = set(json.loads(before.ask('["cases"]')))
    try:
        chosen = [case.name for case in cases("cpu", given.case) if case.name in theirs]
    except LookupError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 2
    if not chosen:
        print("error: no case that both builds have is asked for", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    if given.json is not None and given.json.exists():
        rows = [row for row in json.loads(given.json.read_text())["rows"] if row["case"] not in chosen]
    for case in chosen:
        found = compare(before, now, case, given.rounds, given.sample_s, renamed)
        print("\n".join(map(line, found)), flush=True)
        rows += found
        if given.json is not None:
            write_figures(given.json, before=before.facts, now=now.facts, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
