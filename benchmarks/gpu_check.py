"""``python -m benchmarks.gpu_check``: everything that only a GPU can show, in one command and one result file.

Builds the extension, runs the GPU tests, the compute sanitizer (memcheck, racecheck) over small shapes, then the
benchmark registry, and tunes chunk sizes and tiles in the time that is left, into a folder beside the result. Every
step has a share of the time budget; the result file is rewritten after each step and each benchmark case, so a
time-out loses one of them; what the steps printed is in the log file beside it. Needs no network, and no package beyond
torch, numpy, pytest and the build tools; pytest-xdist, where installed, compiles kernels on several cores at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
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
    "tests": 0.3,
    "memcheck": 0.14,
    "racecheck": 0.1,
    "memcheck-search": 0.08,
    "racecheck-search": 0.08,
    "registry": 1.0,
    "tune": 1.0,
}
_KEPT = {"registry": 0.35, "tune": 0.1}
_FAILURE_CODE = "86"
# Tests of the search's engines on small shapes, which the tiny benchmark cases are too small to reach.
_SEARCH_TESTS = "test_shapes_off_every_tile or test_few_queries or test_hopper_tiles or test_exclusions_name_rows"
_CUDA_TOOLS = Path("/usr/local/cuda/bin")
_TEST_WORKERS = 6  # each holds a few hundred MB of the GPU, and of them all one at most a tensor of several GB


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

    def run(self, name: str, command: Sequence[str], extra: dict[str, str] | None = None) -> dict[str, Any]:
        """A step within its limit, its output kept in the log."""
        environment = {**_writable_cache(), **(extra or {})}
        log = self.path.with_suffix(".log")
        return run_step(name, command, limit_s=self.limit(name), extra=environment, log_file=log)

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
    code = (
        "import json; from tgq_fast._native import *; module = extension(); "
        "facts = {**build_info(), 'hopper_engine': getattr(module, 'cuda_hopper', False)}; "
        "print(json.dumps(facts if module else {'missing': why_missing()}))"
    )
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


def _writable_cache() -> dict[str, str]:
    """Where Triton may keep what it compiles, when it cannot where it would."""
    if "TRITON_CACHE_DIR" in os.environ:
        return {}
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    nearest = next(p for p in (home / ".triton" / "cache", *(home / ".triton" / "cache").parents) if p.exists())
    if os.access(nearest, os.W_OK):
        return {}
    return {"TRITON_CACHE_DIR": str(Path(tempfile.gettempdir()) / "tgq-triton-cache")}


def _cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, which need not be on the path."""
    return shutil.which(name) or shutil.which(name, path=str(_CUDA_TOOLS))


def _build(check: Check) -> dict[str, Any]:
    if check.dry:
        code = "from tgq_fast import _native; print(_native.build_info() or _native.why_missing())"
        return check.run("build", [sys.executable, "-c", code])
    major, minor = torch.cuda.get_device_capability()
    # Line tables cost nothing at run time and let the sanitizer name lines.
    flags = f"{os.environ.get('CUDAFLAGS', '')} -lineinfo".strip()
    extra = {"TGQ_CUDA_ARCHS": f"{major}{minor}" + ("a" if major >= 9 else ""), "CUDAFLAGS": flags}
    compiler = _cuda_tool("nvcc")
    if compiler is not None:  # then a build without CUDA is a failure, not a choice
        extra = {"TGQ_CUDA": "1", "CUDACXX": compiler, **extra}
    return check.run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], extra)


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
    extra = {}
    if importlib.util.find_spec("xdist") and not check.dry:
        command += ["-n", str(_TEST_WORKERS)]
        extra = {"OMP_NUM_THREADS": "2"}
    return _skipped_if_empty(check.run("tests", command, extra))


def _sanitizer(name: str) -> Callable[[Check], dict[str, Any]]:
    tool, _, part = name.partition("-")

    def run(check: Check) -> dict[str, Any]:
        if part == "search":
            command = [*_PYTEST, "-x", "-k", _SEARCH_TESTS, *(["--collect-only"] if check.dry else []), "tests/cuda"]
        else:
            command = [sys.executable, "-m", "benchmarks.run", "--tiny", "--check-only", "--no-compile"]
            # Not the variants of chunk sizes: some record CUDA graphs, in which nothing can be allocated uncached.
            command += ["--variant", "tgq_fast", "--variant", "tgq_fast *", "--device", "cpu" if check.dry else "cuda"]
            for pattern in check.cases:
                command += ["--case", pattern]
        extra = {}
        if not check.dry:
            program = _cuda_tool("compute-sanitizer") or "compute-sanitizer"
            options = ["--tool", tool, "--error-exitcode", _FAILURE_CODE, "--target-processes", "all"]
            command = [program, *options, *command]
            # Every tensor its own allocation, or an overrun would land in a neighbour unseen.
            extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        return _skipped_if_empty(check.run(name, command, extra))

    return run


def _registry(check: Check) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.run", "--json", str(check.path), "--append"]
    command += ["--sample-s", str(check.sample_s), "--budget-s", str(max(1.0, check.limit("registry") - 30))]
    command += ["--device", "cpu", "--tiny"] if check.dry else ["--device", "cuda"]
    command += [] if check.compile else ["--no-compile"]
    for pattern in check.cases:
        command += ["--case", pattern]
    return check.run("registry", command)


def _tune(check: Check) -> dict[str, Any]:
    code = "from pathlib import Path; from tgq_fast.ops.tuning import tune"
    if not check.dry:
        folder, budget = str(check.path.resolve().parent / "tiles"), max(1.0, check.limit("tune") - 10)
        code += f"; print(tune(Path({folder!r}), budget_s={budget}))"
    return check.run("tune", [sys.executable, "-c", code])


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
    native = results.environment.get("native", {})
    if "missing" in native or native.get("cuda_reason"):
        lines.append(f"  the search core has no CUDA: {native.get('missing') or native['cuda_reason']}")
    elif results.environment.get("capability") == "9.0" and not native.get("hopper_engine", True):
        lines.append("  the search core has no Hopper engine: TGQ_CUTLASS_DIR names no CUTLASS headers")
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
