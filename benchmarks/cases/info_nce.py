"""InfoNCE that never holds the B × B logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.case import Case, Setting, Workload
from benchmarks.cases.common import Normal, each, own_candidates, reference_candidates
from benchmarks.cases.tensors import Candidate, dtype_of, tensor_workload
from benchmarks.ceilings import Work
from tgq_fast import ops, reference


def _operands(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return t["embeddings"], t["positives"], t["log_scale"]


def _reference(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": reference.info_nce(*_operands(t), groups=t["groups"])}


def _ours(t: dict[str, Tensor], *, backend: str | None) -> dict[str, Tensor]:
    return {"loss": ops.info_nce(*_operands(t), groups=t["groups"], backend=backend)}


def _explain(t: dict[str, Tensor], *, backend: str | None) -> Any:
    return ops.explain("info_nce", *_operands(t), groups=t["groups"], backend=backend)


def _cross_entropy(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a training script writes: whole logits, a mask made in advance, cross-entropy."""
    e = t["embeddings"].to(torch.promote_types(t["embeddings"].dtype, torch.float32))
    logits = (e @ e.T) * t["log_scale"].to(e.dtype).exp()
    return {"loss": cross_entropy(logits.masked_fill(t["masked"], float("-inf")), t["positives"])}


def _build(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
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
            *own_candidates(_ours, _explain, setting.device),
            *reference_candidates(_reference, compiled=setting.device == "cuda"),
            Candidate("logits + cross_entropy", "peer", _cross_entropy),
        ],
        references=[_reference],
        wrt=("embeddings", "log_scale"),
        work=Work(flops, float(passes * items * width * dtype.itemsize)),
    )


CASES: list[Case] = []
for _device, _shape, _dtype, _name, _priority in (
    ("cuda", {"items": 16384, "D": 256}, "bfloat16", "items16384", 4),
    ("cpu", {"items": 4096, "D": 256}, "float32", "items4096", 6),
):
    CASES += each(
        "info_nce",
        _name,
        _shape,
        {"items": 24, "D": 16},
        _build,
        device=_device,
        dtypes=(_dtype,),
        directions=("forward", "full"),
        priority=_priority,
    )
