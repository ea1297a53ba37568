"""Timing, memory, ceilings and the runner, on a case made for the purpose."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import memory, timing
from benchmarks.case import Case, Setting, UnavailableError, Variant, Workload
from benchmarks.ceilings import Work, floor, measure_ceilings
from benchmarks.parity import Verdict
from benchmarks.run import table_lines
from benchmarks.runner import run_case

CEILINGS = {"copy_bytes_s": 1e9, "float32_flop_s": 1e12}


class Clock:
    """A clock that only calls move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[tuple[str, int]] = []

    def call(self, name: str, seconds: float) -> Any:
        def run(i: int) -> None:
            self.log.append((name, i))
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: found.now)
    return found


@pytest.mark.parametrize("seconds", [1e-5, 0.25])
def test_every_sample_waits_for_the_workers_of_the_one_before(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(timing.time, "sleep", lambda pause: clock.log.append(("pause", round(pause * 1e3))))
    timing.measure({"a": clock.call("a", seconds)}, sets=1, device="cpu", budget_s=0, min_samples=6)
    pauses = clock.log.count(("pause", 20))
    assert pauses == len([e for i, e in enumerate(clock.log) if e[0] == "a" and clock.log[i - 1][0] == "pause"]) >= 7


def test_blas_workers_end_soon_in_every_benchmark() -> None:
    code = "import benchmarks, os, sys; print(os.environ['OPENBLAS_THREAD_TIMEOUT'], 'numpy' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_THREAD_TIMEOUT"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["22", "False"]  # read when numpy is loaded: afterwards it would be too late


def test_medians_and_rotation_of_input_sets(clock: Clock) -> None:
    calls = {"a": clock.call("a", 0.25), "b": clock.call("b", 0.5)}
    found = timing.measure(calls, sets=3, device="cpu", budget_s=0, min_samples=6)
    assert found["a"].median_ms == pytest.approx(250) and found["b"].median_ms == pytest.approx(500)
    assert found["a"].samples == 6 and found["a"].timer == "wall"
    assert [i for name, i in clock.log if name == "a"] == [0, 1, 2, 0, 1, 2, 0]  # the estimate, then six samples


def test_variants_take_turns_and_nobody_always_follows_the_same_one(clock: Clock) -> None:
    calls = {name: clock.call(name, 0.5) for name in "abc"}
    timing.measure(calls, sets=1, device="cpu", budget_s=0, min_samples=8)
    log = "".join(name for name, _ in clock.log)
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]  # the first is the estimates'
    assert len(rounds) == 9 and all(sorted(each) == list("abc") for each in rounds)
    assert len(set(rounds[1:])) > 3  # more than the rotations of one order


def test_slow_variants_are_sampled_less(clock: Clock) -> None:
    calls = {"fast": clock.call("fast", 0.1), "slow": clock.call("slow", 5.0)}
    found = timing.measure(calls, sets=1, device="cpu", budget_s=2.0)
    assert found["slow"].samples == 3 and found["fast"].samples == 20
    assert len([name for name, _ in clock.log if name == "slow"]) == 3  # the estimate is one of them


def test_short_calls_are_repeated_within_a_sample(clock: Clock) -> None:
    found = timing.measure({"a": clock.call("a", 1e-5)}, sets=2, device="cpu", budget_s=0, min_samples=5)
    assert found["a"].median_ms == pytest.approx(1e-2)
    assert len(clock.log) > 5 * 50


def test_quantiles() -> None:
    found = timing.Timing.of([5.0, 1.0, 4.0, 2.0, 3.0], "wall")
    assert (found.p20_ms, found.median_ms, found.p80_ms) == (2000, 3000, 4000)


def test_input_sets_exceed_the_cache() -> None:
    assert timing.input_sets(1 << 30, "cpu") == 1  # more would not fit, and one already exceeds any cache
    assert timing.input_sets(40 << 20, "cpu") * (40 << 20) >= 2 * (64 << 20)
    assert timing.input_sets(1, "cpu") == 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_peak_memory_sees_a_temporary() -> None:
    megabyte = 1 << 20

    def call() -> torch.Tensor:
        return torch.ones(64 * megabyte, dtype=torch.uint8).max()

    found = memory.peak_bytes(call, "cpu")
    if found is None:
        pytest.skip("this system does not reset the high-water mark")
    assert 60 * megabyte <= found <= 96 * megabyte


def test_floor_is_the_larger_bound() -> None:
    assert floor(Work(2e12, 1e9), "float32", CEILINGS) == (2.0, "flops")
    assert floor(Work(1e12, 3e9), "float32", CEILINGS) == (3.0, "bytes")
    assert floor(Work(1e12, 0), "float16", CEILINGS).seconds == 1.0  # a rate that was not measured falls back to fp32


def test_ceilings_are_measured() -> None:
    found = measure_ceilings("cpu", tiny=True, budget_s=0.0)
    assert set(found) == {"copy_bytes_s", "float32_flop_s", "bfloat16_flop_s"}
    assert all(value > 0 for value in found.values())


def unavailable() -> Any:
    raise UnavailableError("no such package")


def broken(_: int) -> Any:
    raise RuntimeError("first line\nsecond line")


def workload(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
    def check(variant: Variant, out: float) -> Verdict:
        return Verdict(out == 1.0, abs(out - 1.0), "" if out == 1.0 else "off")

    variants = [
        Variant("tgq_fast", "ours", lambda: lambda i: 1.0, describe=lambda: "chosen"),
        Variant("wrong", "ours", lambda: lambda i: 2.0),
        Variant("peer", "peer", lambda: lambda i: 1.0),
        Variant("compiled", "peer", lambda: lambda i: 1.0, compiled=True),
        Variant("missing", "peer", unavailable),
        Variant("broken", "peer", lambda: broken),
        Variant("less work", "ceiling", lambda: lambda i: None),
    ]
    return Workload(2, variants, Work(1e6, 1e6), check)


CASE = Case("toy", "small", "float32", "forward", {"n": 100}, {"n": 3}, frozenset({"cpu"}), workload)


def rows(**setting: Any) -> dict[str, dict[str, Any]]:
    found = run_case(CASE, Setting(compile=False, **setting), CEILINGS, budget_s=0.0)
    return {row["variant"]: row for row in found}


def test_every_variant_gets_a_row() -> None:
    found = rows(tiny=True)
    assert {name: row["status"] for name, row in found.items()} == {
        "tgq_fast": "ok",
        "wrong": "parity",
        "peer": "ok",
        "compiled": "skipped",
        "missing": "skipped",
        "broken": "failed",
        "less work": "ok",
    }
    assert found["missing"]["reason"] == "no such package"
    assert found["broken"]["reason"] == "RuntimeError: first line"
    assert found["tgq_fast"]["shape"] == {"n": 3} and found["tgq_fast"]["choice"] == "chosen"
    assert found["tgq_fast"]["floor_ms"] == pytest.approx(1.0)
    assert "parity" not in found["less work"]


def test_a_wrong_answer_shows_no_speed() -> None:
    found = rows()
    assert not {"median_ms", "gb_s", "tflop_s", "floor_share", "peak_bytes"} & set(found["wrong"])
    text = "\n".join(table_lines(list(found.values())))
    assert "parity: off" in text and "wrong" in text
    assert not any(" ms " in line for line in text.splitlines() if "wrong" in line)


def test_checking_alone_times_nothing() -> None:
    found = rows(check_only=True, variants=("tgq*", "wrong"))
    assert set(found) == {"tgq_fast", "wrong"}
    assert "median_ms" not in found["tgq_fast"] and found["tgq_fast"]["status"] == "ok"


def test_a_case_that_cannot_be_built_is_a_row() -> None:
    def build(*_: Any) -> Workload:
        raise UnavailableError("no data")

    case = dataclasses.replace(CASE, build=build)
    (row,) = run_case(case, Setting(), CEILINGS)
    assert (row["status"], row["reason"]) == ("skipped", "no data")
