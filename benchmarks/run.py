"""``python -m benchmarks.run``: run cases of the registry, print each as a table, keep the rows in a result file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Setting
from benchmarks.ceilings import measure_ceilings
from benchmarks.environment import default_result_path, environment, usable_cores
from benchmarks.registry import cases
from benchmarks.results import OK, Results
from benchmarks.runner import run_case


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    found.add_argument(
        "--case", action="append", default=[], metavar="GLOB", help="cases to run, e.g. 'topk/*' or attention"
    )
    found.add_argument("--variant", action="append", default=[], metavar="GLOB", help="variants to run; default: all")
    found.add_argument("--list", action="store_true", help="name the cases and exit")
    found.add_argument(
        "--json", metavar="FILE", help="result file; 'auto': benchmarks/results/<device>/<date>-<commit>.json"
    )
    found.add_argument("--append", action="store_true", help="add to an existing result file")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--threads", type=int, default=min(2, usable_cores()), help="CPU threads of torch and the peers")
    found.add_argument("--sample-s", type=float, default=3.0, help="sampling seconds per case")
    found.add_argument("--budget-s", type=float, default=0.0, help="start no case after this many seconds; 0: run all")
    found.add_argument("--embeddings", type=Path, help="item pool folder or .npy file of real embeddings")
    found.add_argument("--against", type=Path, help="another checkout with its extension built: the build before")
    found.add_argument("--no-compile", action="store_true", help="leave out the torch.compile variants")
    found.add_argument(
        "--tiny", action="store_true", help="small shapes, every device's cases: tries the plumbing only"
    )
    found.add_argument("--check-only", action="store_true", help="check every variant and time none")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 when one of our variants failed or missed parity, 2 for wrong usage."""
    options = parser().parse_args(arguments)
    device = None if options.tiny else options.device
    try:
        chosen = cases(device, options.case)
    except LookupError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{case.name:60} {' '.join(sorted(case.devices))}" for case in chosen))
        return 0
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    # Backward passes are timed on one graph again and again, which compiled graphs allow only so.
    torch._functorch.config.donated_buffer = False
    setting = Setting(
        device=options.device,
        threads=options.threads,
        tiny=options.tiny,
        compile=not options.no_compile,
        check_only=options.check_only,
        variants=tuple(options.variant),
        embeddings=options.embeddings,
        against=options.against,
    )
    results, path = _open(options, setting)
    finished = _run(chosen, setting, results, path, options)
    if finished and not options.append:
        results.complete = True
    _save(results, path)
    if path is not None:
        print(f"wrote {path}")
    wrong = [row for row in results.rows if row["kind"] == "ours" and row["status"] in ("parity", "failed")]
    for row in wrong:
        print(f"{row['status']}: {row['case']} {row['variant']}: {row['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def _open(options: argparse.Namespace, setting: Setting) -> tuple[Results, Path | None]:
    facts = {**environment(setting.device, setting.threads), "tiny": setting.tiny}
    path = None
    if options.json:
        path = default_result_path(facts) if options.json == "auto" else Path(options.json)
    if path is not None and options.append and path.exists():
        return Results.load(path), path
    return Results(environment=facts), path


def _save(results: Results, path: Path | None) -> None:
    if path is not None:
        results.save(path)


def _run(
    chosen: Sequence[Case], setting: Setting, results: Results, path: Path | None, options: argparse.Namespace
) -> bool:
    """False when the budget ended the run early."""
    begin = time.monotonic()
    if not results.ceilings:
        results.ceilings = measure_ceilings(setting.device, tiny=setting.tiny, budget_s=min(3.0, options.sample_s))
    _save(results, path)
    for name, value in results.ceilings.items():
        print(f"ceiling {name} {value:.3e}")
    for position, case in enumerate(chosen):
        spent = time.monotonic() - begin
        if options.budget_s and spent > options.budget_s:
            left = [c.name for c in chosen[position:]]
            results.steps.append({"name": "registry", "status": "partial", "seconds": spent, "not_run": left})
            print(f"out of time after {spent:.0f} s; not run: {', '.join(left)}")
            return False
        rows = run_case(case, setting, results.ceilings, budget_s=options.sample_s)
        for row in rows:
            results.add(row)
        _save(results, path)
        seconds = time.monotonic() - begin - spent
        print(f"\n{case.name}  ({', '.join(f'{k}={v}' for k, v in case.sizes(setting).items())}; {seconds:.0f} s)")
        print("\n".join(table_lines(rows)), flush=True)
    return True


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per row: times, ratio to our default variant, peak memory, share of the floor."""
    ours = next((row for row in rows if row["variant"] == "tgq_fast" and "median_ms" in row), None)
    lines = []
    for row in rows:
        if "median_ms" not in row:
            outcome = "parity ok" if row["status"] == OK else f"{row['status']}: {row['reason']}"
            lines.append(f"  {row['variant']:36} {outcome}")
            continue
        ratio = "" if ours is None else f"{row['median_ms'] / ours['median_ms']:6.2f}x"
        peak = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:9.1f} MiB"
        lines.append(
            f"  {row['variant']:36} {row['median_ms']:10.4f} ms [{row['p20_ms']:.4f} {row['p80_ms']:.4f}] "
            f"{ratio} {peak} {100 * row['floor_share']:5.1f} % of the {row['bound']} floor, "
            f"{row['timer']} x {row['samples']}"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
