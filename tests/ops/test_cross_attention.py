"""Hybrid-query cross-attention through its kernels and on torch against the reference, forward and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import DEVICE, DTYPES, QUICK, check_cross

from tgq_fast import ops
from tgq_fast.ops.cross_attention_triton import absorbed_attention

FORMS = ("absorbed", "fused", "projected")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [None, "some"])
def test_cross_attention(form: str, dtype: torch.dtype, mask: str | None) -> None:
    # 37 keys: more than the interpreter's 2 x 16 resident ones, and no multiple of a tile.
    check_cross(form, dtype, mask=mask, frozen=mask is None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 2, 3, 5, 16, 16, 2),
        (1, 1, 0, 1, 16, 16, 1),
        (1, 0, 1, 17, 8, 32, 2),
        (2, 2, 1, 0, 16, 16, 1),
        (1, 9, 9, 5, 20, 12, 3),
    ],
    ids=["B=0", "one query, L=1", "no anchored query", "L=0", "more rows than keys"],
)
def test_cross_attention_edges(form: str, sizes: tuple[int, int, int, int, int, int, int]) -> None:
    check_cross(form, torch.float32, sizes=sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [None, "some"])
def test_guide(form: str, dtype: torch.dtype, mask: str | None) -> None:
    check_cross(form, dtype, mask=mask, frozen=mask is None, guided=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sizes",
    [
        (0, 2, 3, 5, 16, 16, 2),
        (1, 1, 0, 1, 16, 16, 1),
        (1, 0, 1, 17, 8, 32, 2),
        (2, 2, 1, 0, 16, 16, 1),
        (2, 18, 2, 5, 20, 12, 3),
    ],
    ids=["B=0", "anchored alone, L=1", "no anchored query", "L=0", "two tiles of queries"],
)
def test_guide_edges(form: str, sizes: tuple[int, int, int, int, int, int, int]) -> None:
    check_cross(form, torch.float32, sizes=sizes, mask="some", guided=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_exploratory_bits_ignore_the_guide(form: str, backend: str) -> None:
    """Whatever it is: NaN too, and with statistics."""
    if form == "fused" and backend == "torch":
        pytest.skip("no such form")
    a, e, x = (torch.randn(2, n, c, device=DEVICE) for n, c in ((2, 16), (3, 16), (7, 12)))
    weights = [torch.randn(16, n, device=DEVICE) for n in (16, 12, 12)]
    results = []
    for guide in (torch.zeros(2, 7), torch.full((2, 7), float("nan")), torch.full((2, 7), 1e30)):
        out = ops.hybrid_cross_attention(
            a, e, x, weights[0], None, weights[1], None, weights[2], None, num_heads=2, form=form, backend=backend,
            return_stats=True, guide=guide.to(DEVICE), guide_scale=torch.ones(2, 2, device=DEVICE),
        )  # fmt: skip
        results.append([out.exploratory, *(s[:, :, 2:] for s in out.stats if s is not None)])
        assert torch.isnan(out.anchored).all() == torch.isnan(guide).any()
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_guide_gets_no_gradient_and_its_scale_may_be_frozen() -> None:
    guide, scale = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 7), (2, 2)))
    a, e, x = (torch.randn(2, n, c, device=DEVICE, requires_grad=True) for n, c in ((2, 16), (3, 16), (7, 12)))
    weights = [torch.randn(16, n, device=DEVICE) * n**-0.5 for n in (16, 12, 12)]
    given = (a, e, x, weights[0], None, weights[1], None, weights[2], None)
    for backend, form in (("torch", "absorbed"), ("torch", "projected"), *(("triton", form) for form in FORMS)):
        options = {"num_heads": 2, "form": form, "backend": backend, "guide": guide}
        learned = ops.hybrid_cross_attention(*given, **options, guide_scale=scale).anchored.sum()
        assert torch.autograd.grad(learned, (guide, scale), allow_unused=True, retain_graph=True)[0] is None
        frozen = ops.hybrid_cross_attention(*given, **options, guide_scale=scale.detach()).anchored.sum()
        for one, two in zip(torch.autograd.grad(learned, (a, e, x)), torch.autograd.grad(frozen, (a, e, x))):
            torch.testing.assert_close(one, two)  # PyTorch's attention has a kernel of its own for a frozen bias


@pytest.mark.parametrize("form", FORMS)
def test_cross_attention_nothing_visible(form: str) -> None:
    check_cross(form, torch.float32, sizes=(2, 2, 2, 5, 16, 16, 2), mask="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [5, 37], ids=["one part", "parts"])
def test_value_bias_within_the_fused_kernel(length: int, dtype: torch.dtype) -> None:
    """Without gradients the kernel adds it, to rows that see a key only."""
    with torch.no_grad():
        check_cross("fused", dtype, sizes=(3, 2, 3, length, 24, 32, 2), mask="some", frozen=True, gradients=False)


@pytest.mark.parametrize("fused", [False, True])
def test_value_bias_within_the_operator_has_gradients(fused: bool) -> None:
    shapes = (2, 3, 16), (2, 5, 12), (16, 12), (16, 12), (16,)
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    *tensors, bias = leaves
    mask = torch.tensor([[False] * 5, [True, False, True, False, True]], device=DEVICE)
    upstream = torch.randn(2, 3, 16, device=DEVICE)
    inside = absorbed_attention(*tensors, bias, mask, None, None, None, 2, False, fused)[0]
    outside = absorbed_attention(*tensors, None, mask, None, None, None, 2, False, fused)[0]
    outside = outside + bias * mask.any(1)[:, None, None]
    torch.testing.assert_close(inside, outside)
    for got, expected in zip(*(torch.autograd.grad(found, leaves, upstream) for found in (inside, outside))):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_cross_attention_strided_without_bias(form: str) -> None:
    check_cross(form, torch.float32, sizes=(2, 2, 3, 9, 16, 16, 2), mask="some", strided=True, bias=False)


@pytest.mark.parametrize("items", [1, 2])
def test_absorbed_chunks(items: int) -> None:
    from tgq_fast.kernels import tiling

    with tiling.forced("limits", {"chunk_bytes": items * 2 * 3 * 16 * 4}):  # 2 heads, 3 queries, 16 channels
        check_cross("absorbed", torch.float32, sizes=(3, 1, 2, 5, 16, 16, 2), mask="some", guided=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_tiles_and_parts(dtype: torch.dtype) -> None:
    """Two tiles of queries, three parts of keys, the last of one key; heads wider than the width's chunk."""
    check_cross("fused", dtype, sizes=(2, 10, 9, 33, 20, 36, 2), mask="some", frozen=True)


@pytest.mark.parametrize("form", ["absorbed", "projected", "auto"])
@pytest.mark.parametrize("mask", [None, "some", "none"])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 37, 24, 32, 2), (0, 2, 3, 5, 16, 16, 2), (1, 1, 0, 1, 16, 16, 1)], ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_torch_cross_attention(
    form: str, mask: str | None, sizes: tuple[int, int, int, int, int, int, int], guided: bool
) -> None:
    check_cross(form, torch.float32, sizes=sizes, mask=mask, guided=guided, backend="torch")


def test_keys_and_values_that_were_projected_already() -> None:
    x, a, e = torch.randn(2, 7, 12), torch.randn(2, 3, 8), torch.randn(2, 2, 8)
    layers = [[torch.randn(8, n) for n in (8, 12, 12)] for _ in range(3)]
    for wq, wk, wv in layers:
        pair = torch.nn.functional.linear(x, wk), torch.nn.functional.linear(x, wv)
        own = ops.hybrid_cross_attention(a, e, x, wq, None, wk, None, wv, None, num_heads=2, form="projected")
        got = ops.hybrid_cross_attention(a, e, x, wq, None, wk, None, wv, None, num_heads=2, keys_values=pair)
        torch.testing.assert_close(got.anchored, own.anchored)
        torch.testing.assert_close(got.exploratory, own.exploratory)


@QUICK
@given(
    form=st.sampled_from(FORMS),
    sizes=st.tuples(*(st.integers(low, high) for low, high in ((1, 2), (0, 3), (1, 3), (1, 35), (1, 20)))),
    heads=st.integers(1, 3),
    head=st.integers(1, 9),
    mask=st.sampled_from([None, "some", "none"]),
    guided=st.booleans(),
)
def test_cross_attention_any_shape(
    form: str, sizes: tuple[int, int, int, int, int], heads: int, head: int, mask: str | None, guided: bool
) -> None:
    check_cross(form, torch.float32, sizes=(*sizes, heads * head, heads), mask=mask, guided=guided)
