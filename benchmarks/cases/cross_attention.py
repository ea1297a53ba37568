"""Hybrid-query cross-attention: both streams over shared visual tokens, query projection and value bias included."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.case import Case, Direction, Setting, Workload
from benchmarks.cases.common import each
from benchmarks.cases.tensors import Candidate, Function, dtype_of, tensor_workload
from benchmarks.ceilings import Work
from tgq_fast import ops, reference

_NAMES = (
    "anchored",
    "exploratory",
    "visual",
    "q_weight",
    "q_bias",
    "k_weight",
    "k_bias",
    "v_weight",
    "v_bias",
)
_WEIGHTS = ("q_weight", "q_bias", "k_weight", "v_weight", "v_bias")


def _inputs(sizes: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    b, n, length, d, dv = (sizes[s] for s in ("B", "N", "L", "d", "dv"))

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    return {
        "anchored": normal(b, n // 2, d),
        "exploratory": normal(b, n - n // 2, d),
        "visual": normal(b, length, dv),
        # Scores of unit variance times three: a softmax that is neither flat nor one-hot.
        "q_weight": normal(d, d, std=3 * d**-0.5),
        "q_bias": normal(d, std=0.1),
        "k_weight": normal(d, dv, std=dv**-0.5),
        "k_bias": normal(d, std=0.1),
        "v_weight": normal(d, dv, std=dv**-0.5),
        "v_bias": normal(d, std=0.1),
    }


def _reference(t: dict[str, Tensor], *, heads: int, form: str) -> dict[str, Tensor]:
    out = reference.hybrid_cross_attention(*(t[name] for name in _NAMES), num_heads=heads, form=form)  # type: ignore[arg-type]
    return {"anchored": out.anchored, "exploratory": out.exploratory}


def _ours(t: dict[str, Tensor], *, heads: int, form: str, backend: str | None) -> dict[str, Tensor]:
    out = ops.hybrid_cross_attention(*(t[name] for name in _NAMES), num_heads=heads, form=form, backend=backend)  # type: ignore[arg-type]
    return {"anchored": out.anchored, "exploratory": out.exploratory}


def _explain(t: dict[str, Tensor], *, heads: int, form: str, backend: str | None) -> str:
    return str(
        ops.explain("hybrid_cross_attention", *(t[n] for n in _NAMES), num_heads=heads, form=form, backend=backend)
    )


def _library(
    t: dict[str, Tensor], *, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """What a Q-Former does: project the tokens, then a library attention over [B, L, H, dh]."""
    queries = torch.cat((t["anchored"], t["exploratory"]), dim=1)
    q, k, v = (
        linear(x, t[f"{name}_weight"], t[f"{name}_bias"]).unflatten(-1, (heads, -1))
        for name, x in (("q", queries), ("k", t["visual"]), ("v", t["visual"]))
    )
    context = attend(q, k, v).flatten(2)
    num_anchored = t["anchored"].shape[1]
    return {"anchored": context[:, :num_anchored], "exploratory": context[:, num_anchored:]}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend is None:
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v)
    return out


def _no_flash() -> str:
    return "" if importlib.util.find_spec("flash_attn") else "flash-attn is not installed"


def _ours_named(name: str, heads: int, form: str, backend: str | None) -> Candidate:
    return Candidate(
        name,
        "ours",
        partial(_ours, heads=heads, form=form, backend=backend),
        describe=partial(_explain, heads=heads, form=form, backend=backend),
    )


class _Graphed:
    """A function of named tensors as the replay of a CUDA graph, one per input set; the first call records it."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}

    def __call__(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        place = t["visual"].data_ptr()
        if place not in self.graphs:
            self.function(t)  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.function(t)
            self.graphs[place] = graph, out
        graph, out = self.graphs[place]
        graph.replay()
        return out


def _with_chunks(t: dict[str, Tensor], *, heads: int, size: int) -> dict[str, Tensor]:
    from tgq_fast.kernels import tiling

    with tiling.forced("limits", {"chunk_bytes": size, "graph_chunk_bytes": size}):
        return _ours(t, heads=heads, form="absorbed", backend="triton")


def chunk_candidates(heads: int, device: str) -> list[Candidate]:
    """The absorbed form with its own chunk size and with others, launched one by one and from a CUDA graph."""
    own: Function = partial(_ours, heads=heads, form="absorbed", backend=None)
    found = [
        Candidate("reference", "reference", partial(_reference, heads=heads, form="absorbed")),
        Candidate("tgq_fast", "ours", own),
    ]
    on_gpu: dict[str, Function] = {"tgq_fast, graph": _Graphed(own)}
    for mib in (8, 12, 16, 24, 32, 48, 64, 128):
        sized: Function = partial(_with_chunks, heads=heads, size=mib * 2**20)
        on_gpu |= {f"tgq_fast, {mib} MiB": sized, f"tgq_fast, {mib} MiB, graph": _Graphed(sized)}
    reason = "" if device == "cuda" else "chunks are a matter of the kernels on a GPU"
    return found + [Candidate(name, "ours", f, why_not=lambda: reason) for name, f in on_gpu.items()]


def candidates(heads: int, device: str, *, compiled: bool) -> list[Candidate]:
    """Our forms and backends, the reference, and every library route over projected tokens."""
    eager: Function = partial(_reference, heads=heads, form="projected")
    library: Function = partial(_library, heads=heads, attend=_sdpa)
    found = [_ours_named("tgq_fast", heads, "auto", None)]
    if device == "cuda":
        found += [
            _ours_named(f"tgq_fast {form} {backend}", heads, form, backend)
            for form in ("absorbed", "projected")
            for backend in ("triton", "torch")
        ]
        found.append(_ours_named("tgq_fast fused triton", heads, "fused", "triton"))
    else:
        found += [_ours_named(f"tgq_fast {form}", heads, form, "torch") for form in ("absorbed", "projected")]
    found += [Candidate("reference", "reference", eager), Candidate("projected + SDPA", "peer", library)]
    if device == "cuda":
        for label, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("math", SDPBackend.MATH),
        ):
            attend = partial(_sdpa, backend=backend)
            found.append(Candidate(f"projected + SDPA {label}", "peer", partial(_library, heads=heads, attend=attend)))
        attend_flash: Function = partial(_library, heads=heads, attend=_flash)
        found.append(Candidate("projected + flash-attn", "peer", attend_flash, why_not=_no_flash))
    if compiled:
        found += [
            Candidate("torch.compile of reference", "peer", eager, compiled=True),
            Candidate("torch.compile of projected + SDPA", "peer", library, compiled=True),
        ]
    return found


def least_work(sizes: dict[str, Any], direction: str, item: int) -> Work:
    """Of the cheaper algebraic form. The backward pass counts two products for each of the forward pass that depends
    on something trained: the frozen visual tokens get no gradient."""
    b, n, length, d, dv, heads = (sizes[s] for s in ("B", "N", "L", "d", "dv", "H"))
    query = 2 * n * d * d
    projected = 4 * length * d * dv + 4 * n * length * d
    absorbed = 4 * n * heads * length * dv + 4 * n * d * dv
    # Backward. Projected: dWk and dWv; four attention products. Absorbed: scores again, dP, dq'; four end products.
    projected_back = 4 * length * d * dv + 10 * n * length * d
    absorbed_back = 6 * n * heads * length * dv + 8 * n * d * dv
    forward_flops = query + min(projected, absorbed)
    backward_flops = 2 * query + min(projected_back, absorbed_back)
    weights = (d * d + 2 * d * dv) * item
    forward_bytes = b * (2 * n * d + length * dv) * item + weights
    backward_bytes = b * (3 * n * d + length * dv) * item + 2 * weights
    return {
        "forward": Work(b * forward_flops, forward_bytes),
        "backward": Work(b * backward_flops, backward_bytes),
        "full": Work(b * (forward_flops + backward_flops), forward_bytes + backward_bytes),
    }[direction]


def _build(case: Case, sizes: dict[str, Any], setting: Setting, *, compiled: bool, chunks: bool = False) -> Workload:
    dtype = dtype_of(case)
    heads = sizes["H"]
    return tensor_workload(
        case,
        setting,
        make=lambda generator: _inputs(sizes, dtype, setting.device, generator),
        candidates=chunk_candidates(heads, setting.device)
        if chunks
        else candidates(heads, setting.device, compiled=compiled),
        references=[partial(_reference, heads=heads, form=form) for form in ("projected", "absorbed")],
        wrt=("anchored", "exploratory", *_WEIGHTS),
        weights=_WEIGHTS,
        work=least_work(sizes, case.direction, dtype.itemsize),
    )


_TINY = {"B": 2, "N": 6, "L": 19, "d": 64, "dv": 48, "H": 4}
_PAPER = {"N": 16, "L": 197, "d": 768, "dv": 768, "H": 12}
_SIGLIP = {"N": 16, "L": 729, "d": 1152, "dv": 1152, "H": 16}
_WIDE = {"N": 64, "L": 257, "d": 1024, "dv": 1024, "H": 16}


CASES: list[Case] = []


def _add(
    shape_class: str,
    shape: dict[str, int],
    dtypes: tuple[str, ...],
    directions: tuple[Direction, ...],
    device: str,
    *,
    priority: int,
    compiled: bool = False,
    chunks: bool = False,
) -> None:
    build = partial(_build, compiled=compiled, chunks=chunks)
    CASES.extend(
        each(
            "attention",
            shape_class,
            shape,
            _TINY,
            build,
            device=device,
            dtypes=dtypes,
            directions=directions,
            priority=priority,
        )
    )


# First what no peer decides: which of our own forms and sizes is right.
_add("paper-b1", {"B": 1, **_PAPER}, ("bfloat16",), ("forward",), "cuda", priority=0)
_add("paper-b8", {"B": 8, **_PAPER}, ("bfloat16",), ("forward",), "cuda", priority=0)
_add("chunks-b1024", {"B": 1024, **_PAPER}, ("bfloat16",), ("forward",), "cuda", priority=0, chunks=True)
_add("paper-b1024", {"B": 1024, **_PAPER}, ("bfloat16",), ("forward", "full"), "cuda", priority=1, compiled=True)
_add("siglip-b256", {"B": 256, **_SIGLIP}, ("bfloat16",), ("forward", "full"), "cuda", priority=2, compiled=True)
_add("wide-b256", {"B": 256, **_WIDE}, ("bfloat16",), ("forward", "full"), "cuda", priority=3)
_add("siglip-b1", {"B": 1, **_SIGLIP}, ("bfloat16",), ("forward",), "cuda", priority=2)
_add("paper-b32", {"B": 32, **_PAPER}, ("bfloat16",), ("forward",), "cuda", priority=3)
_add("paper-b1024-more", {"B": 1024, **_PAPER}, ("float16",), ("forward",), "cuda", priority=6)
_add("paper-b1024-more", {"B": 1024, **_PAPER}, ("bfloat16",), ("backward",), "cuda", priority=6)
_add("paper-b256-fp32", {"B": 256, **_PAPER}, ("float32",), ("forward",), "cuda", priority=6)
_add("paper-b16", {"B": 16, **_PAPER}, ("float32", "bfloat16"), ("forward", "full"), "cpu", priority=3)
_add("siglip-b4", {"B": 4, **_SIGLIP}, ("float32", "bfloat16"), ("forward",), "cpu", priority=4)
_add("wide-b4", {"B": 4, **_WIDE}, ("float32", "bfloat16"), ("forward",), "cpu", priority=5)
