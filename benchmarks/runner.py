"""Runs one case: prepare every variant, check it, measure its memory, time the ones that passed, and make rows."""

from __future__ import annotations

import gc
import time
import traceback
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from benchmarks.case import Call, Case, Setting, UnavailableError, Variant, Workload
from benchmarks.ceilings import Work, floor
from benchmarks.memory import peak_bytes
from benchmarks.timing import Timing, measure

_SLOW_S = 0.5  # a CPU call above this is warm after one input set


@dataclass
class _Entry:
    variant: Variant
    row: dict[str, Any]
    call: Call | None = None


def run_case(
    case: Case, setting: Setting, ceilings: dict[str, float], *, budget_s: float = 3.0
) -> list[dict[str, Any]]:
    """Rows of one case, one per variant. Never raises for a variant's fault: its row says what happened.

    Args:
        ceilings: see :func:`benchmarks.ceilings.measure_ceilings`.
        budget_s: sampling seconds; preparing, checking and warming come on top.
    """
    sizes = case.sizes(setting)
    base = {
        "case": case.name,
        "op": case.op,
        "shape_class": case.shape_class,
        "dtype": case.dtype,
        "direction": case.direction,
        "shape": sizes,
        "device": setting.device,
        "tiny": setting.tiny,
    }
    try:
        workload = case.build(case, sizes, setting)
    except UnavailableError as reason:
        return [{**base, "variant": "(case)", "kind": "ours", "status": "skipped", "reason": str(reason)}]
    except (RuntimeError, ValueError, TypeError, ImportError, MemoryError) as error:
        return [{**base, "variant": "(case)", "kind": "ours", "status": "failed", "reason": _brief(error)}]
    entries = []
    for variant in workload.variants:
        if setting.variants and not any(fnmatchcase(variant.name, pattern) for pattern in setting.variants):
            continue
        row = {**base, "variant": variant.name, "kind": variant.kind}
        entries.append(_attempt(variant, row, workload, setting))
    calls = {entry.variant.name: entry.call for entry in entries if entry.call is not None}
    timings = {}
    if not setting.check_only:
        timings = measure(calls, sets=workload.sets, device=setting.device, budget_s=budget_s)
    for entry in entries:
        if entry.variant.name in timings:
            work = entry.variant.work or workload.work
            entry.row |= _figures(timings[entry.variant.name], work, workload.sets, case.dtype, ceilings)
    rows = [entry.row for entry in entries]
    del workload, entries, calls
    _release(setting)
    return rows


def _attempt(variant: Variant, row: dict[str, Any], workload: Workload, setting: Setting) -> _Entry:
    """Prepare, run once on every input set, check, measure memory; a row without times if anything goes wrong."""
    if variant.compiled and not setting.compile:
        return _Entry(variant, {**row, "status": "skipped", "reason": "torch.compile variants were left out"})
    try:
        call = variant.prepare()
        begin = time.perf_counter()
        result = call(0)
        slow = time.perf_counter() - begin > _SLOW_S
        if variant.kind != "ceiling":
            verdict = workload.check(variant, result)
            row["parity"] = {"ok": verdict.ok, "error": verdict.error}
            if not verdict.ok:
                return _Entry(variant, {**row, "status": "parity", "reason": verdict.detail})
        del result
        for i in range(1, 1 if slow and setting.device == "cpu" else workload.sets):
            call(i)
        row["peak_bytes"] = peak_bytes(lambda: call(0), setting.device)
        if variant.describe is not None:
            row["choice"] = variant.describe()
    except UnavailableError as reason:
        return _Entry(variant, {**row, "status": "skipped", "reason": str(reason)})
    except Exception as error:  # any peer may fail in its own way; the run goes on and the row says so
        _release(setting)
        return _Entry(variant, {**row, "status": "failed", "reason": _brief(error)})
    return _Entry(variant, {**row, "status": "ok"}, call)


def _figures(timing: Timing, work: Work, sets: int, dtype: str, ceilings: dict[str, float]) -> dict[str, Any]:
    seconds = timing.median_ms * 1e-3
    least = floor(work, dtype, ceilings)
    return {
        "median_ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
        "samples": timing.samples,
        "timer": timing.timer,
        "flops": work.flops,
        "bytes": work.bytes,
        "gb_s": work.bytes / seconds / 1e9,
        "tflop_s": work.flops / seconds / 1e12,
        "floor_ms": least.seconds * 1e3,
        "floor_share": least.seconds / seconds,
        "bound": least.bound,
        "input_sets": sets,
    }


def _brief(error: BaseException) -> str:
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def _release(setting: Setting) -> None:
    torch._dynamo.reset()
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
