"""Parity checks of the operators against the reference, shared by the tests and the mutation suite.

Rule: with `exact` the reference in fp64 and `plain` the reference in the dtype under test,
max|got - exact| ≤ factor · max|plain - exact| + floor, and the same in the L2 norm. The factor is 2, and 3 for weight
gradients. The floor is four rounding steps of the dtype at the largest magnitude among the call's outputs (gradients):
where terms of that size cancel, as in the gradient of a softmax over one key, the order of rounding alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from tgq_fast import ops, reference

pytest.importorskip("triton", reason="kernel tests need triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
QUICK = settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
"""The interpreter takes a second per example: few of them, and no shrinking."""


def largest(values: Sequence[Tensor | None]) -> float:
    """Largest finite magnitude of several tensors."""
    finite = [v.detach()[torch.isfinite(v.detach())].abs() for v in values if v is not None]
    return max((f.max().item() for f in finite if f.numel()), default=0.0)


def assert_close(name: str, got: Tensor, exact: Tensor, plain: Tensor, magnitude: float, factor: float = 2.0) -> None:
    """The rule above; infinities must sit at the same places."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(exact.shape)}"
    if not got.numel():
        return
    assert not torch.isnan(got).any(), f"{name}: NaN"
    got64, plain64, exact = got.double(), plain.double(), exact.double()
    finite = torch.isfinite(exact)
    assert torch.equal(got64[~finite], exact[~finite]), f"{name}: infinities differ"
    got64, plain64, exact = got64[finite], plain64[finite], exact[finite]
    if not exact.numel():
        return
    step = 4 * torch.finfo(got.dtype).eps * magnitude
    for norm, floor in ((float("inf"), step), (2, step * exact.numel() ** 0.5)):
        error = torch.linalg.vector_norm(got64 - exact, norm).item()
        base = torch.linalg.vector_norm(plain64 - exact, norm).item()
        limit = factor * base + floor
        assert error <= limit, f"{name}: norm {norm}: error {error:.3e} above {limit:.3e} (plain {base:.3e})"


def tensor(*shape: int, dtype: torch.dtype, scale: float = 1.0, strided: bool = False) -> Tensor:
    """Random leaf; `strided` makes every dimension but the last step over unused memory."""
    if strided:
        value = torch.randn(*(2 * n for n in shape[:-1]), shape[-1])
        value = value[tuple(slice(None, None, 2) for _ in shape[:-1])]
    else:
        value = torch.randn(shape)
    return (value * scale).to(DEVICE, dtype).requires_grad_()


def masks(batch: int, length: int, kind: str | None) -> Tensor | None:
    """None; "some": random with item 0 fully hidden; "none": nothing visible."""
    if kind is None:
        return None
    mask = torch.rand(batch, length) > 0.4
    mask[: 1 if kind == "some" else batch] = False
    return mask.to(DEVICE)


def lifted(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values as fp64 leaves."""
    return [None if v is None else v.detach().double().requires_grad_(v.requires_grad) for v in values]


def compare(
    names: Sequence[str],
    leaves: Sequence[Tensor | None],
    run: Callable[..., Sequence[Tensor | None]],
    define: Callable[..., Sequence[Tensor | None]],
    outputs: int,
    strided: bool = False,
    gradients: bool = True,
) -> None:
    """Forward of every output, gradients of the first `outputs` of them with respect to every leaf."""

    def differentiate(found: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> list[Tensor | None]:
        wanted = [leaf for leaf in given if leaf is not None and leaf.requires_grad]
        differentiable = [o for o in found[:outputs] if o is not None]
        ups = [u.to(o.dtype) for u, o in zip(upstream, differentiable)]
        return list(torch.autograd.grad(differentiable, wanted, ups, allow_unused=True))

    got = run(*leaves)
    upstream = []
    for output in got[:outputs]:
        if output is not None:
            up = torch.randn(*output.shape, 2 if strided else 1, dtype=torch.float32)[..., 0]
            upstream.append(up.to(DEVICE, output.dtype))
    high, low = lifted(leaves), list(leaves)
    exact, plain = define(*high), define(*low)
    for index, (g, x, p) in enumerate(zip(got, exact, plain)):
        if x is not None:
            assert_close(f"output {index}", g, x, p, largest(exact))
    if not gradients:
        return
    named = [n for n, leaf in zip(names, leaves) if leaf is not None and leaf.requires_grad]
    exact_gradients = differentiate(exact, high)
    magnitude = largest(exact_gradients)
    for name, g, x, p in zip(named, differentiate(got, leaves), exact_gradients, differentiate(plain, low)):
        if x is None or p is None:  # the reference does not depend on it (the key bias)
            assert g is None or not g.any(), name
            continue
        if g is None:  # as good as zero
            assert not x.any(), f"no gradient of {name}"
            continue
        assert_close(f"gradient of {name}", g, x, p, magnitude, 3.0 if "weight" in name else 2.0)


def check_cross(
    form: str,
    dtype: torch.dtype,
    *,
    sizes: tuple[int, int, int, int, int, int, int] = (2, 3, 4, 37, 24, 32, 2),
    mask: str | None = None,
    bias: bool = True,
    strided: bool = False,
    frozen: bool = False,
    stats: bool = True,
    gradients: bool = True,
    guided: bool = False,
    backend: str = "triton",
) -> None:
    """hybrid_cross_attention; sizes are B, Na, Ne, L, dv, d, H. `frozen`: the visual tokens need no gradient.

    A guide is NaN where the mask hides a key: nothing may read it there.
    """
    batch, na, ne, length, dv, d, heads = sizes
    a = tensor(batch, na, d, dtype=dtype, strided=strided)
    e = tensor(batch, ne, d, dtype=dtype, strided=strided)
    x = tensor(batch, length, dv, dtype=dtype, strided=strided)
    x = x.detach() if frozen else x
    weights = [tensor(d, n, dtype=dtype, scale=n**-0.5) for n in (d, dv, dv)]
    biases = [tensor(d, dtype=dtype) if bias else None for _ in range(3)]
    key_mask = masks(batch, length, mask)
    group = (torch.rand(batch, length) > 0.5).to(DEVICE)
    guide, guide_scale = None, None
    if guided:
        guide = 2 * torch.randn(batch, length).to(DEVICE)
        guide = guide if key_mask is None else guide.masked_fill(~key_mask, float("nan"))
        guide_scale = tensor(na, heads, dtype=dtype)
    options = {"num_heads": heads, "key_mask": key_mask, "key_group": group, "return_stats": stats, "guide": guide}

    def flat(function: Callable[..., reference.HybridAttentionOutput], **more: str) -> Callable[..., list]:
        def call(a, e, x, wq, wk, wv, bq, bk, bv, beta):  # type: ignore[no-untyped-def]
            out = function(a, e, x, wq, bq, wk, bk, wv, bv, guide_scale=beta, **options, **more)
            return [out.anchored, out.exploratory, *(out.stats or ())]

        return call

    names = ["anchored", "exploratory", "visual", "q_weight", "k_weight", "v_weight", "q_bias", "k_bias", "v_bias"]
    names.append("guide_scale")
    run = flat(ops.hybrid_cross_attention, form=form, backend=backend)
    define = flat(reference.hybrid_cross_attention, form="absorbed" if form == "fused" else form)
    compare(names, [a, e, x, *weights, *biases, guide_scale], run, define, 2, strided, gradients)


def check_streams(
    dtype: torch.dtype,
    *,
    lengths: tuple[int, int, int] = (3, 4, 19),
    mixing: str = "block",
    sees_text: bool = False,
    mask: str | None = "some",
    strided: bool = False,
    heads: int = 2,
    head: int = 24,
    backend: str = "triton",
) -> None:
    """stream_self_attention."""
    leaves = [tensor(2, sum(lengths), heads, head, dtype=dtype, strided=strided) for _ in range(3)]
    options = {"mixing": mixing, "explore_sees_text": sees_text, "text_mask": masks(2, lengths[2], mask)}

    def run(q, k, v):  # type: ignore[no-untyped-def]
        return [ops.stream_self_attention(q, k, v, lengths, backend=backend, **options)]

    def define(q, k, v):  # type: ignore[no-untyped-def]
        return [reference.stream_self_attention(q, k, v, lengths, **options)]

    compare("qkv", leaves, run, define, 1, strided)


def check_modulation(
    dtype: torch.dtype,
    *,
    sizes: tuple[int, int, int, int, int, int] = (5, 3, 6, 40, 20, 8),
    scalar: bool = False,
    strided: bool = False,
    backend: str = "triton",
) -> None:
    """dual_gated_modulation; sizes are B, Na, Ne, d, dg, r."""
    batch, na, ne, d, dg, rank = sizes
    width = 1 if scalar else d
    has = (torch.arange(batch) % 2 == 0).to(DEVICE)

    def gate(inputs: int) -> list[Tensor]:
        shapes = ((rank, inputs), (rank,), (width, rank), (width,))
        return [tensor(*shape, dtype=dtype, scale=shape[-1] ** -0.5) for shape in shapes]

    leaves = [
        tensor(batch, na, d, dtype=dtype, strided=strided),
        tensor(batch, ne, d, dtype=dtype, strided=strided),
        tensor(batch, dtype=dtype),
        tensor(batch, dg, dtype=dtype),
        *gate(2 + dg + 2 * d),
        *gate(dg + d),
    ]

    def flat(function: Callable[..., reference.ModulationOutput], **more: str) -> Callable[..., list]:
        def call(a, e, s, v, *w):  # type: ignore[no-untyped-def]
            gates = reference.GateParameters(*w[:4]), reference.GateParameters(*w[4:])
            return list(function(a, e, s, has, v, *gates, alpha=0.7, **more))

        return call

    gates = [f"{stream} {name} weight" for stream in "ae" for name in ("w1", "b1", "w2", "b2")]
    names = ["anchored", "exploratory", "agreement", "global_image", *gates]
    run = flat(ops.dual_gated_modulation, backend=backend)
    compare(names, leaves, run, flat(reference.dual_gated_modulation), 4, strided)


def check_redundancy(
    dtype: torch.dtype, *, batch: int = 37, width: int = 20, offset: float = 8, backend: str = "triton"
) -> None:
    """redundancy_loss; with an offset the means lie far from zero, where plain sums of squares lose their digits."""
    a, e = (tensor(batch, width, dtype=dtype).detach() + offset for _ in range(2))
    e = (0.5 * a + e).requires_grad_()

    def run(a, e):  # type: ignore[no-untyped-def]
        return [ops.redundancy_loss(a, e, backend=backend)]

    def define(a, e):  # type: ignore[no-untyped-def]
        return [reference.redundancy_loss(a, e)]

    compare("ae", [a.requires_grad_(), e], run, define, 1)


def check_info_nce(
    dtype: torch.dtype,
    *,
    items: int = 37,
    width: int = 40,
    rows: Sequence[int] | None = None,
    groups: bool = True,
    backend: str = "triton",
) -> None:
    """info_nce, with co-positives and anchors without a group."""
    e = torch.nn.functional.normalize(torch.randn(items, width), dim=1).to(DEVICE, dtype).requires_grad_()
    t = torch.tensor(1.7, device=DEVICE, dtype=dtype, requires_grad=True)
    anchors = torch.arange(items) if rows is None else torch.tensor(rows)
    positives = ((anchors + 1 + torch.randint(items - 1, anchors.shape)) % items).to(DEVICE)
    labels = torch.randint(-1, 5, (items,)).to(DEVICE) if groups else None
    options = {"groups": labels, "rows": None if rows is None else anchors.to(DEVICE)}

    def run(e, t):  # type: ignore[no-untyped-def]
        return [ops.info_nce(e, positives, t, backend=backend, **options)]

    def define(e, t):  # type: ignore[no-untyped-def]
        return [reference.info_nce(e, positives, t, **options)]

    compare(["embeddings", "log_scale"], [e, t], run, define, 1)
