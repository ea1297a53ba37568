"""Dual-gated vector modulation: bytes are its floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Setting, Workload
from benchmarks.cases.common import Normal, each, own_candidates, reference_candidates
from benchmarks.cases.tensors import dtype_of, tensor_workload
from benchmarks.ceilings import Work
from tgq_fast import ops, reference
from tgq_fast.reference import GateParameters

_GATES = tuple(f"{stream}_{name}" for stream in ("a", "e") for name in ("w1", "b1", "w2", "b2"))
_STREAMS = ("anchored", "exploratory")


def _arguments(t: dict[str, Tensor]) -> tuple[Any, ...]:
    gates = [GateParameters(*(t[f"{s}_{name}"] for name in ("w1", "b1", "w2", "b2"))) for s in ("a", "e")]
    return (*(t[name] for name in (*_STREAMS, "agreement", "has_metadata", "global_image")), *gates)


def _named(out: Any) -> dict[str, Tensor]:
    return {"anchored": out.anchored, "exploratory": out.exploratory}


def _reference(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return _named(reference.dual_gated_modulation(*_arguments(t)))


def _ours(t: dict[str, Tensor], *, backend: str | None) -> dict[str, Tensor]:
    return _named(ops.dual_gated_modulation(*_arguments(t), backend=backend))


def _explain(t: dict[str, Tensor], *, backend: str | None) -> Any:
    return ops.explain("dual_gated_modulation", *_arguments(t), backend=backend)


def _work(sizes: dict[str, Any], direction: str, item: int) -> Work:
    b, n, d, dg, r = (sizes[s] for s in ("B", "N", "d", "dg", "r"))
    macs = (2 + dg + 2 * d) * r + (dg + d) * r + 2 * r * d
    parameters = macs * item
    forward = Work(2.0 * b * macs + 3.0 * b * n * d, (2.0 * b * n * d + b * dg) * item + parameters)
    # Tokens and output gradients in, input gradients out; weights read and their gradients written.
    backward = Work(4.0 * b * macs + 6.0 * b * n * d, (3.0 * b * n * d + b * dg) * item + 2 * parameters)
    if direction == "full":
        return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return forward if direction == "forward" else backward


def _build(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
    dtype = dtype_of(case)
    b, n, d, dg, r = (sizes[s] for s in ("B", "N", "d", "dg", "r"))

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        normal = Normal(generator, setting.device, dtype)
        found = {
            "anchored": normal(b, n // 2, d),
            "exploratory": normal(b, n - n // 2, d),
            "agreement": normal(b),
            "has_metadata": (torch.rand(b, generator=generator, device=setting.device) < 0.9).to(dtype),
            "global_image": normal(b, dg),
        }
        for stream, width in (("a", 2 + dg + 2 * d), ("e", dg + d)):
            found |= {
                f"{stream}_w1": normal(r, width, std=width**-0.5),
                f"{stream}_b1": normal(r, std=0.1),
                f"{stream}_w2": normal(d, r, std=2 * r**-0.5),
                f"{stream}_b2": normal(d, std=0.1),
            }
        return found

    return tensor_workload(
        case,
        setting,
        make=make,
        candidates=[
            *own_candidates(_ours, _explain, setting.device),
            *reference_candidates(_reference, compiled=setting.device == "cuda"),
        ],
        references=[_reference],
        wrt=(*_STREAMS, *_GATES),
        weights=_GATES,
        work=_work(sizes, case.direction, dtype.itemsize),
    )


_TINY = {"B": 3, "N": 6, "d": 32, "dg": 16, "r": 16}
_SHAPE = {"N": 16, "d": 768, "dg": 512, "r": 128}
CASES: list[Case] = []
for _device, _batch, _dtypes, _priority in (
    ("cuda", 1024, ("bfloat16",), 2),
    ("cuda", 64, ("bfloat16",), 5),
    ("cpu", 256, ("float32",), 5),
):
    CASES += each(
        "modulation",
        f"paper-b{_batch}",
        {"B": _batch, **_SHAPE},
        _TINY,
        _build,
        device=_device,
        dtypes=_dtypes,
        directions=("forward", "full"),
        priority=_priority,
    )
