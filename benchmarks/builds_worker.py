"""What :mod:`benchmarks.builds` runs in a process of either checkout: nothing but that checkout's own is imported.

Arguments: threads, and optionally a file of real embeddings. Then, line by line, JSON: ``["cases"]`` answers with the
names of the CPU's cases; ``["open", name]`` prepares and checks the variants of ours and answers with the shape and, by
variant, null or why it gives no time; ``["time", variant, n]`` answers with the seconds of each of n calls, over input
sets in turn.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


class Worker:
    """The case that is open, and the calls of its variants."""

    def __init__(self, threads: int, embeddings: Path | None = None) -> None:
        self.threads, self.embeddings = threads, embeddings
        self.calls: dict[str, Any] = {}
        self.sets = self.next = 0

    def cases(self) -> list[str]:
        from benchmarks.registry import cases

        return [case.name for case in cases("cpu")]

    def open(self, name: str) -> dict[str, Any]:
        from benchmarks import registry

        try:
            settings = importlib.import_module("benchmarks.case")
        except ImportError:  # a checkout from before that module
            settings = registry
        self.calls = {}
        gc.collect()
        (case,) = [case for case in registry.cases("cpu") if case.name == name]
        setting = settings.Setting(device="cpu", threads=self.threads, compile=False, embeddings=self.embeddings)
        shape = case.sizes(setting)
        outcomes: dict[str, str | None] = {}
        try:
            workload = case.build(case, shape, setting)
        except RuntimeError as error:
            return {"shape": shape, "variants": {"(case)": str(error)}}
        for variant in workload.variants:
            if variant.kind == "ours":
                outcomes[variant.name] = self._prepare(workload, variant)
        self.sets = workload.sets
        return {"shape": shape, "variants": outcomes}

    def _prepare(self, workload: Any, variant: Any) -> str | None:
        try:
            call = variant.prepare()
            verdict = workload.check(variant, call(0))
            for i in range(1, min(3, workload.sets)):
                call(i)
        except Exception as error:  # the row says so, and the others run
            return f"{type(error).__name__}: {error}"
        if not verdict.ok:
            return f"parity: {verdict.detail}"
        self.calls[variant.name] = call
        return None

    def time(self, variant: str, count: int) -> list[float]:
        call, found = self.calls[variant], []
        for _ in range(count):
            begin = time.perf_counter()
            call(self.next % self.sets)
            found.append(time.perf_counter() - begin)
            self.next += 1
        return found


def main(threads: int, *embeddings: str) -> None:
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    from tgq_fast import _native

    module = _native.extension()
    if module is None:
        raise SystemExit("no compiled extension: " + _native.why_missing())
    worker = Worker(threads, *map(Path, embeddings))
    print(f"ready {module.build_info()['commit']} {Path(str(module.__file__)).parent}", flush=True)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, verb)(*arguments)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
