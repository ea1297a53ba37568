"""``python -m benchmarks.gpu_check``: everything that only a GPU can show, in one command and one result file.

Builds the extension, runs the GPU tests, the compute sanitizer (memcheck, racecheck) over small shapes, then the
benchmark registry, and tunes chunk sizes and tiles in the time that is left, into a folder beside the result. Every
step has a share of the time budget; the result file is rewritten after each step and each benchmark case, so a
time-out loses one of them. Needs no network, and no package beyond torch, numpy, pytest and the build tools.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import default_result_path, environment
from benchmarks.results import Results
from benchmarks.steps import run_step
from benchmarks.targets import best_peer, outcomes

STEPS = ("build", "tests", "memcheck", "racecheck", "memcheck-search", "racecheck-search", "registry", "tune")
# Share of the whole budget that a step may take, and what must be left for the steps after it.
_SHARE = {
    "build": 0.4,
    "tests": 0.25,
    "memcheck": 0.1,
    "racecheck": 0.1,
    "memcheck-search": 0.06,
    "racecheck-search": 0.06,
    "registry": 1.0,
    "tune": 1.0,
}
_KEPT = {"registry": 0.35, "tune": 0.1}
_FAILURE_CODE = "86"
# Tests of the search's engines on small shapes, which the tiny benchmark cases are too small to reach.
_SEARCH_TESTS = "test_shapes_off_every_tile or test_few_queries or test_hopper_tiles or test_exclusions_name_rows"


@dataclass
class Check:
    """What one run does.

    Attributes:
        dry: on a CPU with tiny shapes, no sanitizer and no build: proves that the command itself works.
    """

    path: Path
    budget_s: float
    only: tuple[str, ...]
    cases: tuple[str, ...]
    dry: bool
    sample_s: float
    compile: bool
    begin: float

    def left(self) -> float:
        return self.budget_s - (time.monotonic() - self.begin)

    def limit(self, step: str) -> float:
        later = STEPS[STEPS.index(step) + 1 :]
        kept = sum(share for name, share in _KEPT.items() if name in later and name in self.only)
        return max(1.0, min(_SHARE[step] * self.budget_s, self.left() - kept * self.budget_s))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every step passed or was skipped, 1 otherwise, 2 without a GPU."""
    options = _parser().parse_args(arguments)
    unknown = set(options.only) - set(STEPS)
    if unknown:
        print(f"error: --only takes {', '.join(STEPS)}, not {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if not options.dry_run and not torch.cuda.is_available():
        print("error: no CUDA device; --dry-run tries the command on the CPU", file=sys.stderr)
        return 2
    facts = environment("cpu" if options.dry_run else "cuda", options.threads)
    check = Check(
        path=Path(options.json) if options.json else _default_path(facts, options.dry_run),
        budget_s=options.budget_s,
        only=tuple(options.only) or STEPS,
        cases=tuple(options.case),
        dry=options.dry_run,
        sample_s=0.01 if options.dry_run else options.sample_s,
        compile=not (options.no_compile or options.dry_run),
        begin=time.monotonic(),
    )
    results = Results(environment={**facts, "tiny": check.dry})
    results.save(check.path)
    for name in STEPS:
        if name in check.only:
            results = _run(name, check, results)
    results.environment["native"] = _native_facts()
    results.complete = all(step["status"] != "timeout" for step in results.steps)
    results.save(check.path)
    print("\n".join(summary(results)))
    print(f"wrote {check.path}")
    return 0 if all(step["status"] in ("ok", "skipped") for step in results.steps) else 1


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    found.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="STEP,…", help=", ".join(STEPS))
    found.add_argument("--case", action="append", default=[], metavar="GLOB", help="benchmark cases; default: all")
    found.add_argument("--budget-s", type=float, default=450.0, help="seconds for everything (default 450)")
    found.add_argument("--sample-s", type=float, default=0.5, help="sampling seconds per benchmark case")
    found.add_argument(
        "--json", help="result file; default: $OUT, else benchmarks/results/<device>/<date>-<commit>.json"
    )
    found.add_argument("--threads", type=int, default=2, help="CPU threads")
    found.add_argument("--no-compile", action="store_true", help="leave out the torch.compile peers")
    found.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes: tries the command itself")
    return found


def _native_facts() -> dict[str, Any]:
    """Build facts of the extension that this run built; this process may have loaded an earlier one."""
    code = "import json; from tgq_fast._native import *; print(json.dumps(build_info() or {'missing': why_missing()}))"
    step = run_step("native", [sys.executable, "-c", code], limit_s=60)
    try:
        found: dict[str, Any] = json.loads(step["tail"].strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"missing": step["tail"][-300:]}
    return found


def _default_path(facts: dict[str, Any], dry: bool) -> Path:
    path = default_result_path(facts)
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else path.parent
    return folder / (f"dry-run-{path.name}" if dry else path.name)


def _run(name: str, check: Check, results: Results) -> Results:
    print(f"{name} (at most {check.limit(name):.0f} s)", flush=True)
    step = _RUNNERS[name](check)
    if name == "registry":  # it wrote to the same file
        results = Results.load(check.path)
    results.steps.append(step)
    results.save(check.path)
    print(f"  {step['status']} after {step['seconds']:.0f} s", flush=True)
    if step["status"] != "ok":
        print("\n".join("  " + line for line in step["tail"].splitlines()[-15:]), flush=True)
    return results


def _build(check: Check) -> dict[str, Any]:
    if check.dry:
        code = "from tgq_fast import _native; print(_native.build_info() or _native.why_missing())"
        return run_step("build", [sys.executable, "-c", code], limit_s=check.limit("build"))
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run_step("build", command, limit_s=check.limit("build"), extra={"TGQ_CUDA_ARCHS": arch})


_PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-m",
    "gpu",
    "-p",
    "no:cacheprovider",
    "--continue-on-collection-errors",
)


def _skipped_if_empty(step: dict[str, Any]) -> dict[str, Any]:
    if step["returncode"] == 5:  # pytest's "no tests were collected"
        step["status"] = "skipped"
    return step


def _tests(check: Check) -> dict[str, Any]:
    command = [*_PYTEST, *(["--collect-only"] if check.dry else []), "tests"]
    return _skipped_if_empty(run_step("tests", command, limit_s=check.limit("tests")))


def _sanitizer(name: str) -> Callable[[Check], dict[str, Any]]:
    tool, _, part = name.partition("-")

    def run(check: Check) -> dict[str, Any]:
        if part == "search":
            command = [*_PYTEST, "-x", "-k", _SEARCH_TESTS, *(["--collect-only"] if check.dry else []), "tests/cuda"]
        else:
            command = [sys.executable, "-m", "benchmarks.run", "--tiny", "--check-only", "--no-compile"]
            command += ["--variant", "tgq_fast*", "--device", "cpu" if check.dry else "cuda"]
            for pattern in check.cases:
                command += ["--case", pattern]
        extra = {}
        if not check.dry:
            program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
            options = ["--tool", tool, "--error-exitcode", _FAILURE_CODE, "--target-processes", "all"]
            command = [program, *options, *command]
            # Every tensor its own allocation, or an overrun would land in a neighbour unseen.
            extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        return _skipped_if_empty(run_step(name, command, limit_s=check.limit(name), extra=extra))

    return run


def _registry(check: Check) -> dict[str, Any]:
    limit = check.limit("registry")
    command = [sys.executable, "-m", "benchmarks.run", "--json", str(check.path), "--append"]
    command += ["--sample-s", str(check.sample_s), "--budget-s", str(max(1.0, limit - 30))]
    command += ["--device", "cpu", "--tiny"] if check.dry else ["--device", "cuda"]
    command += [] if check.compile else ["--no-compile"]
    for pattern in check.cases:
        command += ["--case", pattern]
    return run_step("registry", command, limit_s=limit)


def _tune(check: Check) -> dict[str, Any]:
    limit = check.limit("tune")
    code = "from pathlib import Path; from tgq_fast.ops.tuning import tune"
    if not check.dry:
        folder, budget = str(check.path.resolve().parent / "tiles"), max(1.0, limit - 10)
        code += f"; print(tune(Path({folder!r}), budget_s={budget}))"
    return run_step("tune", [sys.executable, "-c", code], limit_s=limit)


_RUNNERS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "build": _build,
    "tests": _tests,
    **{name: _sanitizer(name) for name in STEPS if "check" in name},
    "registry": _registry,
    "tune": _tune,
}


def summary(results: Results) -> list[str]:
    """Short table: steps, then per case our time, the fastest peer's and the share of the floor, then targets."""
    lines = ["", f"{results.environment['device_name']}, commit {results.environment['commit']}"]
    lines += [f"  {step['name']:16} {step['status']:8} {step.get('seconds', 0):6.0f} s" for step in results.steps]
    lines += [f"  {name:18} {value:.3e}" for name, value in results.ceilings.items()]
    for case in dict.fromkeys(row["case"] for row in results.rows):
        rows = [row for row in results.rows if row["case"] == case]
        ours = next((row for row in rows if row["variant"] == "tgq_fast"), rows[0])
        if "median_ms" not in ours:
            lines.append(f"  {case:48} {ours['status']}: {ours.get('reason', '')[:80]}")
            continue
        theirs = best_peer(rows)
        peer = "no peer" if theirs is None else f"{theirs['median_ms'] / ours['median_ms']:6.2f}x {theirs['variant']}"
        lines.append(f"  {case:48} {ours['median_ms']:9.4f} ms {100 * ours['floor_share']:4.0f} % of floor {peer}")
    for outcome in outcomes(results.rows, results.environment["device"]):
        if outcome.value is not None:
            sign = "<=" if outcome.target.at_most else ">="
            label = f"{outcome.target.case} {outcome.target.metric} vs {outcome.against}"
            lines.append(
                f"  {'met' if outcome.met else 'MISSED':7}{outcome.value:7.2f} {sign} {outcome.target.goal:.2f} {label}"
            )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
