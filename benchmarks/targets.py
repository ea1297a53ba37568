"""What the figures are held against: goals as ratios within one run, and whether a result file meets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.results import OK

BEST_PEER = "best peer"
Metric = Literal["time", "memory", "floor"]


@dataclass(frozen=True)
class Target:
    """One goal.

    Attributes:
        device: "cpu" or "cuda".
        case: full name of the case.
        against: a variant, or BEST_PEER (the fastest peer or reference).
        goal: at least this speed-up, or with `at_most` at most this ratio of ours to theirs; for "floor" at least this
            share of the measured floor.
        variant: which of ours.
    """

    device: str
    case: str
    against: str
    goal: float
    at_most: bool = False
    metric: Metric = "time"
    variant: str = "tgq_fast"


@dataclass(frozen=True)
class Outcome:
    """A target and what was measured; `value` is None when a row is missing."""

    target: Target
    value: float | None
    against: str

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.target.goal if self.target.at_most else self.value >= self.target.goal


_SDPA, _EAGER = "transformers, SDPA", "reference"
_COMPILED = "torch.compile of transformers, SDPA"
_GEMM, _TORCH = "GEMM only", "torch mm + topk"
_FAISS, _TUNED = "faiss-cpu flat, default", "faiss-cpu flat, tuned"
_AVX2, _FAISS_AVX2 = "tgq_fast, AVX2 forced", "faiss-cpu flat, tuned, AVX2"
_PACKED = "tgq_fast, packed weights"  # as `encode` runs

TARGETS = (
    Target("cpu", "connector/paper-b16/float32/forward", _SDPA, 1.8, variant=_PACKED),
    Target("cpu", "connector/paper-b16/bfloat16/forward", _SDPA, 1.8, variant=_PACKED),
    Target("cpu", "connector/paper-b16-every-layer/float32/forward", _SDPA, 1.8, variant=_PACKED),
    Target("cpu", "connector/paper-b16-every-layer/bfloat16/forward", _SDPA, 1.8, variant=_PACKED),
    Target("cpu", "topk/q256-n200k-d768/float32/forward", _GEMM, 0.40, at_most=True),
    Target("cpu", "topk/q256-n200k-d256/float32/forward", _GEMM, 0.50, at_most=True),
    Target("cpu", "topk/q256-n1m-d256/float32/forward", _GEMM, 0.25, at_most=True),
    Target("cpu", "topk/q256-n200k-d256/float32/forward", _TUNED, 8.0),
    Target("cpu", "topk/q256-n200k-d256/float32/forward", _FAISS, 10.0),
    Target("cpu", "topk/q256-n1m-d256/bfloat16/forward", _GEMM, 0.8, at_most=True),
    Target("cpu", "topk/q1-n200k-d256/float32/forward", _FAISS, 2.2),
    Target("cpu", "topk/q1-n200k-d768/float32/forward", _FAISS, 2.2),
    Target("cpu", "topk/q256-n200k-d256/float32/forward", _FAISS_AVX2, 2.0, variant=_AVX2),
    Target("cpu", "topk/q256-n200k-d256/float32/forward", _TORCH, 1.0),
    Target("cpu", "topk/clustered-q256-n200k-d256/float32/forward", _TORCH, 1.0),
    Target("cuda", "attention/paper-b1024/bfloat16/forward", BEST_PEER, 3.0),
    Target("cuda", "attention/paper-b1024/bfloat16/forward", _EAGER, 5.0),
    Target("cuda", "attention/paper-b1024/bfloat16/full", BEST_PEER, 2.5),
    Target("cuda", "attention/paper-b1024/bfloat16/forward", BEST_PEER, 0.35, at_most=True, metric="memory"),
    Target("cuda", "attention/paper-b1024/bfloat16/forward", "measured floor", 0.5, metric="floor"),
    Target("cuda", "attention/siglip-b256/bfloat16/forward", BEST_PEER, 4.0),
    Target("cuda", "attention/siglip-b256/bfloat16/full", BEST_PEER, 3.0),
    Target("cuda", "attention/wide-b256/bfloat16/forward", "projected + SDPA flash", 1.0),
    Target("cuda", "attention/wide-b256/bfloat16/full", "projected + SDPA flash", 1.0),
    Target("cuda", "attention/paper-b1/bfloat16/forward", BEST_PEER, 1.5),
    Target("cuda", "attention/paper-b8/bfloat16/forward", BEST_PEER, 1.5),
    Target("cuda", "modulation/paper-b1024/bfloat16/forward", _EAGER, 4.0),
    Target("cuda", "modulation/paper-b1024/bfloat16/forward", "torch.compile of reference", 1.5),
    Target("cuda", "modulation/paper-b1024/bfloat16/full", "torch.compile of reference", 1.5),
    Target("cuda", "modulation/paper-b1024/bfloat16/forward", "measured floor", 1 / 1.5, metric="floor"),
    Target("cuda", "connector/paper-b256/bfloat16/forward", _SDPA, 3.0),
    Target("cuda", "connector/paper-b256/bfloat16/forward", _COMPILED, 3.0),
    Target("cuda", "connector/paper-b256/bfloat16/full", _SDPA, 2.0),
    Target("cuda", "connector/paper-b256/bfloat16/full", _COMPILED, 2.0),
    Target("cuda", "connector/paper-b256/bfloat16/full", _SDPA, 0.5, at_most=True, metric="memory"),
    Target("cuda", "topk/q4096-n1m-d256/bfloat16/forward", _GEMM, 1.6, at_most=True),
    Target("cuda", "topk/q1024-n1m-d768/bfloat16/forward", _GEMM, 1.6, at_most=True),
    Target("cuda", "topk/q4096-n1m-d256/bfloat16/forward", _TORCH, 4.0),
    Target("cuda", "topk/q4096-n1m-d256/float32/forward", _TORCH, 8.0),
    Target("cuda", "topk/q16-n1m-d256/bfloat16/forward", "measured floor", 1 / 1.15, metric="floor"),
    Target("cuda", "topk/q1-n1m-d256/bfloat16/forward", "measured floor", 1 / 1.15, metric="floor"),
    Target("cuda", "topk/self-n200k-d256/bfloat16/forward", _GEMM, 0.65, at_most=True),
)


def best_peer(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest peer or reference among the rows of one case."""
    timed = [row for row in rows if row["kind"] in ("peer", "reference") and "median_ms" in row]
    return min(timed, key=lambda row: row["median_ms"], default=None)


def outcomes(rows: Sequence[dict[str, Any]], device: str) -> Iterator[Outcome]:
    """Every target of a device against the rows of a result file."""
    for target in TARGETS:
        if target.device == device:
            yield _outcome(target, [row for row in rows if row["case"] == target.case and row["status"] == OK])


def _outcome(target: Target, rows: Sequence[dict[str, Any]]) -> Outcome:
    named = {row["variant"]: row for row in rows if "median_ms" in row}
    ours = named.get(target.variant)
    if target.metric == "floor":
        return Outcome(target, None if ours is None else ours["floor_share"], target.against)
    theirs = best_peer(rows) if target.against == BEST_PEER else named.get(target.against)
    label = target.against
    if theirs is not None and target.against == BEST_PEER:
        label = f"best peer ({theirs['variant']})"
    if ours is None or theirs is None:
        return Outcome(target, None, label)
    field = "median_ms" if target.metric == "time" else "peak_bytes"
    if not ours.get(field) or not theirs.get(field):
        return Outcome(target, None, label)
    ratio = ours[field] / theirs[field]
    return Outcome(target, ratio if target.at_most else 1 / ratio, label)
