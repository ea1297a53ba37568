"""What this machine can do, measured in the run: copy bandwidth and matrix rates. Floors are computed from these."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import Call, measure

_TINY, _COPY_BYTES = 1 << 20, {"cpu": 256 << 20, "cuda": 2 << 30}
_MATRIX = {"cpu": 2048, "cuda": 8192}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Work(NamedTuple):
    """The least a case must do: floating-point operations, and bytes with every input read and output written once."""

    flops: float
    bytes: float


class Floor(NamedTuple):
    """Seconds that no version can beat by much, and which ceiling sets them ("bytes" or "flops")."""

    seconds: float
    bound: str


def measure_ceilings(device: str, *, tiny: bool = False, budget_s: float = 3.0) -> dict[str, float]:
    """{"copy_bytes_s", "float32_flop_s", "bfloat16_flop_s", ...}: medians on random data, TF32 off."""
    size = _TINY if tiny else _COPY_BYTES[device]
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy_bytes_s": lambda _: target.copy_(source)}
    work = {"copy_bytes_s": 2.0 * size}
    n = 64 if tiny else _MATRIX[device]
    for name, dtype in _DTYPES.items():
        if device == "cpu" and dtype is torch.float16:
            continue
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype, device=device)
        calls[f"{name}_flop_s"] = partial(_product, a, b, out)
        work[f"{name}_flop_s"] = 2.0 * n**3
    for call in calls.values():
        for _ in range(2):
            call(0)
    found = measure(calls, sets=1, device=device, budget_s=budget_s, min_samples=5, max_samples=40)
    return {name: work[name] / (timing.median_ms * 1e-3) for name, timing in found.items()}


def _product(a: Tensor, b: Tensor, out: Tensor, _: int) -> Tensor:
    return torch.mm(a, b, out=out)


def floor(work: Work, dtype: str, ceilings: dict[str, float]) -> Floor:
    """The larger of operations over the matrix rate and bytes over the copy bandwidth."""
    compute = work.flops / ceilings.get(f"{dtype}_flop_s", ceilings["float32_flop_s"])
    memory = work.bytes / ceilings["copy_bytes_s"]
    return Floor(compute, "flops") if compute > memory else Floor(memory, "bytes")
