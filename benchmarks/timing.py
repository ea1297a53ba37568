"""Timing of several variants of one job: warm, cold caches, interleaved, medians with their spread.

Variants take turns in rounds of random order, so that a change of clock or a noisy neighbour meets all of them.
Each call takes the next of several input sets that together exceed the cache. On a CPU a sample is wall time; on a GPU
it is a pair of events, or, when the fastest variant takes less than 100 µs, the replay of a CUDA graph that holds one
call per input set.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

GRAPH_BELOW_S = 100e-6
_CPU_SAMPLE_S = 1e-3  # shorter calls are repeated within a sample
SETTLE_S = 0.02  # after another variant's call: the workers of its thread pool spin on for about 15 ms and hold a core
_CPU_SAMPLES = 60  # at most, as each of them waits so long
_SLOW_S = 1.0  # calls above this are sampled in the first rounds only
_SLOW_SAMPLES = 3
_BURST = 4  # event pairs in flight
_SPIN_CYCLES = 400_000  # keeps the GPU busy while the host fills the queue


@dataclass(frozen=True)
class Timing:
    """Times of one call in milliseconds.

    Attributes:
        timer: "wall", "events" or "graph".
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    timer: str

    @classmethod
    def of(cls, seconds: list[float], timer: str) -> Timing:
        ordered = sorted(seconds)
        p20, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
        return cls(statistics.median(ordered) * 1e3, p20 * 1e3, p80 * 1e3, len(ordered), timer)


Call = Callable[[int], Any]  # takes the number of an input set


def measure(
    calls: Mapping[str, Call], *, sets: int, device: str, budget_s: float, min_samples: int = 5, max_samples: int = 200
) -> dict[str, Timing]:
    """Time every variant; all must have run once before, so that nothing compiles here.

    Args:
        calls: variant → function of the number of an input set.
        sets: how many input sets there are.
        budget_s: wanted seconds of sampling over all variants; at least `min_samples` rounds run whatever it says.
    """
    if not calls:
        return {}
    if device == "cpu":
        walls = {name: _CpuSampler(call, sets) for name, call in calls.items()}
        return _rounds(walls, budget_s, min_samples, min(max_samples, _CPU_SAMPLES))
    events: dict[str, _Sampler] = {name: _EventSampler(call, sets) for name, call in calls.items()}
    samplers = events
    if min(sampler.estimate for sampler in events.values()) < GRAPH_BELOW_S:
        samplers = {name: _graph_or(events[name], call, sets) for name, call in calls.items()}
    return _rounds(samplers, budget_s, min_samples, max_samples)


class _Sampler:
    timer = ""
    estimate = 0.0  # seconds of one call
    cost = 0.0  # seconds of one sample

    def sample(self) -> list[float]:
        raise NotImplementedError


def _rounds(samplers: Mapping[str, _Sampler], budget_s: float, min_samples: int, max_samples: int) -> dict[str, Timing]:
    # The estimate of a slow call is one of its samples.
    times = {name: [s.estimate] if s.estimate > _SLOW_S else [] for name, s in samplers.items()}
    fast = sum(s.cost for s in samplers.values() if s.estimate <= _SLOW_S)
    wanted = max_samples if fast == 0 else int(budget_s / fast)
    rounds = max(min_samples, min(max_samples, wanted))
    if fast == 0:
        rounds = min(min_samples, _SLOW_SAMPLES)
    names, order = list(samplers), random.Random(0)
    for _ in range(rounds):
        # A variant finds in the caches what the one before it left: nobody always comes after the same one.
        order.shuffle(names)
        for name in names:
            if samplers[name].estimate > _SLOW_S and len(times[name]) >= _SLOW_SAMPLES:
                continue
            times[name] += samplers[name].sample()
    return {name: Timing.of(found, samplers[name].timer) for name, found in times.items()}


class _CpuSampler(_Sampler):
    timer = "wall"

    def __init__(self, call: Call, sets: int) -> None:
        self.call, self.sets, self.next = call, sets, 0
        self.inner = 1
        self.estimate = self.sample()[0]
        if self.estimate < _CPU_SAMPLE_S:
            self.estimate = min(self.estimate, *self.sample())
            self.inner = math.ceil(_CPU_SAMPLE_S / max(self.estimate, 1e-7))
        self.cost = self.estimate * self.inner

    def sample(self) -> list[float]:
        time.sleep(SETTLE_S)
        timed = getattr(self.call, "timed", None)
        if timed is not None:  # has a clock of its own: another process
            seconds = timed(self.next, self.inner)
            self.next = (self.next + self.inner) % self.sets
            return [seconds / self.inner]
        begin = time.perf_counter()
        for _ in range(self.inner):
            self.call(self.next)
            self.next = (self.next + 1) % self.sets
        return [(time.perf_counter() - begin) / self.inner]


class _EventSampler(_Sampler):
    timer = "events"

    def __init__(self, call: Call, sets: int) -> None:
        self.call, self.sets, self.next = call, sets, 0
        self.estimate = min(self.sample())
        self.cost = self.estimate * _BURST

    def sample(self) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_BURST)]
        torch.cuda._sleep(_SPIN_CYCLES)
        for begin, end in pairs:
            begin.record()
            self.call(self.next)
            end.record()
            self.next = (self.next + 1) % self.sets
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


class _GraphSampler(_Sampler):
    timer = "graph"

    def __init__(self, call: Call, sets: int) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # captured libraries want a warm-up on the capturing side
            for i in range(min(sets, 3)):
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph, self.sets = torch.cuda.CUDAGraph(), sets
        with torch.cuda.graph(self.graph):
            for i in range(sets):
                call(i)
        self.estimate = min(self.sample())
        self.cost = self.estimate * sets

    def sample(self) -> list[float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_SPIN_CYCLES)
        begin.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 / self.sets]


def _graph_or(fallback: _Sampler, call: Call, sets: int) -> _Sampler:
    """A graph sampler where the call can be captured; else the events, which the row's `timer` then tells."""
    try:
        return _GraphSampler(call, sets)
    except RuntimeError:
        torch.cuda.synchronize()
        return fallback


def input_sets(bytes_per_set: int, device: str) -> int:
    """How many input sets to rotate so that none is still in the cache when its turn comes again."""
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        room = int(0.25 * torch.cuda.mem_get_info()[0])
        most = 32
    else:
        # The level that belongs to the cores in use: a virtual machine reports its host's whole last level.
        cache, room, most = 64 << 20, 1 << 30, 8
    wanted = math.ceil(2.5 * cache / max(1, bytes_per_set))
    return max(1, min(max(2, wanted), most, max(1, room // max(1, bytes_per_set))))
