"""Redundancy of the two streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Setting, Workload
from benchmarks.cases.common import Normal, each, own_candidates, reference_candidates
from benchmarks.cases.tensors import dtype_of, tensor_workload
from benchmarks.ceilings import Work
from tgq_fast import ops, reference


def _reference(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": reference.redundancy_loss(t["anchored"], t["exploratory"])}


def _ours(t: dict[str, Tensor], *, backend: str | None) -> dict[str, Tensor]:
    return {"loss": ops.redundancy_loss(t["anchored"], t["exploratory"], backend=backend)}


def _explain(t: dict[str, Tensor], *, backend: str | None) -> Any:
    return ops.explain("redundancy_loss", t["anchored"], t["exploratory"], backend=backend)


def _build(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
    dtype, (b, d) = dtype_of(case), (sizes["B"], sizes["d"])

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        normal = Normal(generator, setting.device, dtype)
        anchored = normal(b, d)
        return {"anchored": anchored, "exploratory": (anchored.float() * 0.5 + normal(b, d).float()).to(dtype)}

    passes = {"forward": 2.0, "backward": 4.0, "full": 6.0}[case.direction]
    return tensor_workload(
        case,
        setting,
        make=make,
        candidates=[
            *own_candidates(_ours, _explain, setting.device),
            *reference_candidates(_reference, compiled=setting.device == "cuda"),
        ],
        references=[_reference],
        wrt=("anchored", "exploratory"),
        work=Work(5.0 * passes * b * d, passes * b * d * dtype.itemsize),
    )


CASES: list[Case] = []
for _device, _shape, _dtype, _name, _priority in (
    ("cuda", {"B": 65536, "d": 768}, "bfloat16", "b65536", 5),
    ("cpu", {"B": 4096, "d": 768}, "float32", "b4096", 6),
):
    CASES += each(
        "redundancy",
        _name,
        _shape,
        {"B": 9, "d": 16},
        _build,
        device=_device,
        dtypes=(_dtype,),
        directions=("forward", "full"),
        priority=_priority,
    )
