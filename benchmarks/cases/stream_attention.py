"""Self-attention over [A; E; T] with the block structure of the two streams and padded metadata."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import Case, Setting, Workload
from benchmarks.cases.common import Normal, each, own_candidates, reference_candidates
from benchmarks.cases.tensors import Candidate, dtype_of, tensor_workload
from benchmarks.ceilings import Work
from tgq_fast import ops, reference
from tgq_fast.reference.stream_attention import stream_mask


def _lengths(sizes: dict[str, Any]) -> tuple[int, int, int]:
    return sizes["N"] // 2, sizes["N"] - sizes["N"] // 2, sizes["M"]


def _reference(t: dict[str, Tensor], *, lengths: tuple[int, int, int]) -> dict[str, Tensor]:
    return {"out": reference.stream_self_attention(t["q"], t["k"], t["v"], lengths, text_mask=t["text_mask"])}


def _ours(t: dict[str, Tensor], *, lengths: tuple[int, int, int], backend: str | None) -> dict[str, Tensor]:
    out = ops.stream_self_attention(t["q"], t["k"], t["v"], lengths, text_mask=t["text_mask"], backend=backend)
    return {"out": out}


def _explain(t: dict[str, Tensor], *, lengths: tuple[int, int, int], backend: str | None) -> str:
    operands = t["q"], t["k"], t["v"], lengths
    return str(ops.explain("stream_self_attention", *operands, text_mask=t["text_mask"], backend=backend))


def _dense_sdpa(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """The library route: a dense boolean mask, made outside the timed region; rows that see nothing become zero."""
    q, k, v = (t[name].transpose(1, 2) for name in "qkv")
    out = scaled_dot_product_attention(q, k, v, attn_mask=t["dense_mask"]).transpose(1, 2)
    return {"out": torch.where(t["sees_some"], out, 0.0)}


def _work(sizes: dict[str, Any], direction: str, item: int) -> Work:
    na, ne, m = _lengths(sizes)
    b, width = sizes["B"], sizes["H"] * sizes["dh"]
    pairs = na * (na + m) + ne * ne + m * m
    rows = b * (na + ne + m) * width
    forward = Work(4.0 * b * pairs * width, 4.0 * rows * item)
    backward = Work(10.0 * b * pairs * width, 7.0 * rows * item)
    if direction == "full":
        return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return forward if direction == "forward" else backward


def _build(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
    dtype, lengths = dtype_of(case), _lengths(sizes)
    shape = sizes["B"], sum(lengths), sizes["H"], sizes["dh"]

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        normal = Normal(generator, setting.device, dtype)
        real = torch.randint(1, sizes["M"] + 1, (sizes["B"], 1), generator=generator, device=setting.device)
        text_mask = torch.arange(sizes["M"], device=setting.device) < real
        dense = stream_mask(lengths, text_mask=text_mask, device=setting.device)
        return {
            **{name: normal(*shape) for name in "qkv"},
            "text_mask": text_mask,
            "dense_mask": dense,
            "sees_some": dense.any(dim=-1).transpose(1, 2)[..., None],
        }

    definition = partial(_reference, lengths=lengths)
    compiled = setting.device == "cuda"
    peers = [Candidate("SDPA, dense mask", "peer", _dense_sdpa)]
    if compiled:
        peers.append(Candidate("torch.compile of SDPA, dense mask", "peer", _dense_sdpa, compiled=True))
    return tensor_workload(
        case,
        setting,
        make=make,
        candidates=[
            *own_candidates(partial(_ours, lengths=lengths), partial(_explain, lengths=lengths), setting.device),
            *reference_candidates(definition, compiled=compiled),
            *peers,
        ],
        references=[definition],
        wrt=("q", "k", "v"),
        work=_work(sizes, case.direction, dtype.itemsize),
    )


_TINY = {"B": 2, "N": 6, "M": 5, "H": 2, "dh": 16}
_SHAPE = {"N": 16, "M": 32, "H": 12, "dh": 64}
CASES: list[Case] = []
for _device, _batch, _dtypes, _name in (
    ("cuda", 1024, ("bfloat16",), "paper-b1024"),
    ("cpu", 32, ("float32",), "paper-b32"),
):
    CASES += each(
        "streams",
        _name,
        {"B": _batch, **_SHAPE},
        _TINY,
        _build,
        device=_device,
        dtypes=_dtypes,
        directions=("forward", "full"),
        priority=4,
    )
