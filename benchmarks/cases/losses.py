"""Training losses: redundancy of the streams, and InfoNCE that never holds the B × B logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.cases.common import Normal, own_candidates, reference_candidates, register_all
from benchmarks.cases.tensors import Candidate, dtype_of, tensor_workload
from benchmarks.ceilings import Work
from benchmarks.registry import Case, Setting, Workload
from tgq_fast import ops, reference


def _redundancy_reference(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": reference.redundancy_loss(t["anchored"], t["exploratory"])}


def _redundancy_ours(t: dict[str, Tensor], *, backend: str | None) -> dict[str, Tensor]:
    return {"loss": ops.redundancy_loss(t["anchored"], t["exploratory"], backend=backend)}


def _redundancy_explain(t: dict[str, Tensor], *, backend: str | None) -> Any:
    return ops.explain("redundancy_loss", t["anchored"], t["exploratory"], backend=backend)


def _build_redundancy(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
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
            *own_candidates(_redundancy_ours, _redundancy_explain, setting.device),
            *reference_candidates(_redundancy_reference, compiled=setting.device == "cuda"),
        ],
        references=[_redundancy_reference],
        wrt=("anchored", "exploratory"),
        work=Work(5.0 * passes * b * d, passes * b * d * dtype.itemsize),
    )


def _nce_operands(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return t["embeddings"], t["positives"], t["log_scale"]


def _nce_reference(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": reference.info_nce(*_nce_operands(t), groups=t["groups"])}


def _nce_ours(t: dict[str, Tensor], *, backend: str | None) -> dict[str, Tensor]:
    return {"loss": ops.info_nce(*_nce_operands(t), groups=t["groups"], backend=backend)}


def _nce_explain(t: dict[str, Tensor], *, backend: str | None) -> Any:
    return ops.explain("info_nce", *_nce_operands(t), groups=t["groups"], backend=backend)


def _nce_cross_entropy(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a training script writes: whole logits, a mask made in advance, cross-entropy."""
    e = t["embeddings"].to(torch.promote_types(t["embeddings"].dtype, torch.float32))
    logits = (e @ e.T) * t["log_scale"].to(e.dtype).exp()
    return {"loss": cross_entropy(logits.masked_fill(t["masked"], float("-inf")), t["positives"])}


def _build_nce(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
    dtype, (items, width) = dtype_of(case), (sizes["items"], sizes["D"])

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        normal = Normal(generator, setting.device, torch.float32)
        positives = torch.arange(items, device=setting.device) ^ 1  # pairs lie side by side
        centres = normal(items // 2, width).repeat_interleave(2, dim=0)
        embeddings = normalize(centres + normal(items, width, std=0.7), dim=-1).to(dtype)
        groups = torch.randint(0, items // 4, (items // 2,), generator=generator, device=setting.device)
        groups = groups.repeat_interleave(2)
        masked = groups[:, None] == groups
        masked[torch.arange(items, device=setting.device), positives] = False
        return {
            "embeddings": embeddings,
            "positives": positives,
            "groups": groups,
            "masked": masked,
            "log_scale": torch.full((), math.log(20.0), device=setting.device),
        }

    forward, back = 2.0 * items * items * width, 6.0 * items * items * width
    flops = {"forward": forward, "backward": back, "full": forward + back}[case.direction]
    passes = {"forward": 1, "backward": 2, "full": 3}[case.direction]
    return tensor_workload(
        case,
        setting,
        make=make,
        candidates=[
            *own_candidates(_nce_ours, _nce_explain, setting.device),
            *reference_candidates(_nce_reference, compiled=setting.device == "cuda"),
            Candidate("logits + cross_entropy", "peer", _nce_cross_entropy),
        ],
        references=[_nce_reference],
        wrt=("embeddings", "log_scale"),
        work=Work(flops, float(passes * items * width * dtype.itemsize)),
    )


for _device, _shape, _dtype, _name, _priority in (
    ("cuda", {"B": 65536, "d": 768}, "bfloat16", "b65536", 5),
    ("cpu", {"B": 4096, "d": 768}, "float32", "b4096", 6),
):
    register_all(
        "redundancy",
        _name,
        _shape,
        {"B": 9, "d": 16},
        _build_redundancy,
        device=_device,
        dtypes=(_dtype,),
        directions=("forward", "full"),
        priority=_priority,
    )
for _device, _shape, _dtype, _name, _priority in (
    ("cuda", {"items": 16384, "D": 256}, "bfloat16", "items16384", 4),
    ("cpu", {"items": 4096, "D": 256}, "float32", "items4096", 6),
):
    register_all(
        "info_nce",
        _name,
        _shape,
        {"items": 24, "D": 16},
        _build_nce,
        device=_device,
        dtypes=(_dtype,),
        directions=("forward", "full"),
        priority=_priority,
    )
