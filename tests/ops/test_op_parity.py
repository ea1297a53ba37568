"""Every operator through its kernels against the reference: shapes, masks, strides, dtypes, forward and gradients."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from op_checks import DEVICE, DTYPES, check_cross, check_info_nce, check_modulation, check_redundancy, check_streams

from tgq_fast import ops, reference
from tgq_fast.ops.triton_attention import absorbed_attention

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
def test_self_attention(mixing: str, dtype: torch.dtype) -> None:
    check_streams(dtype, mixing=mixing, sees_text=mixing == "one_way")


@pytest.mark.parametrize("lengths", [(0, 3, 5), (17, 2, 0), (1, 1, 1), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("sees_text", [False, True])
def test_self_attention_edges(lengths: tuple[int, int, int], sees_text: bool) -> None:
    check_streams(torch.float32, lengths=lengths, sees_text=sees_text, strided=sees_text, heads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scalar", [False, True], ids=["vector", "scalar"])
def test_modulation(dtype: torch.dtype, scalar: bool) -> None:
    check_modulation(dtype, scalar=scalar)


@pytest.mark.parametrize("sizes", [(0, 2, 2, 8, 4, 4), (1, 1, 1, 17, 3, 5)], ids=["B=0", "odd"])
def test_modulation_edges(sizes: tuple[int, int, int, int, int, int]) -> None:
    check_modulation(torch.float32, sizes=sizes)


def test_modulation_strided() -> None:
    check_modulation(torch.float32, sizes=(3, 2, 2, 16, 4, 4), strided=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_redundancy(dtype: torch.dtype, backend: str) -> None:
    check_redundancy(dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_redundancy_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgq_fast.ops import triton_losses

    monkeypatch.setattr(triton_losses, "CENTRED_ELEMENTS", 100)  # 20 channels: five items per chunk
    check_redundancy(dtype, backend="torch")


def test_redundancy_of_known_moments_reads_no_means() -> None:
    a, e = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = ((a - a.mean(0)) * (e - e.mean(0))).mean(0)
    moments = torch.stack((a.mean(0), e.mean(0), a.var(0, correction=0), e.var(0, correction=0), covariance))
    unread = torch.full_like(a, float("nan"))
    found = ops.redundancy_loss(unread, unread, moments=moments, backend="torch")
    torch.testing.assert_close(found, reference.redundancy_loss(a, e))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_redundancy_small_batches(batch: int, backend: str) -> None:
    check_redundancy(torch.float32, batch=batch, width=3, offset=0, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_info_nce(dtype: torch.dtype, backend: str) -> None:
    check_info_nce(dtype, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_info_nce_repeated_anchors_without_groups(backend: str) -> None:
    check_info_nce(torch.float32, items=19, width=16, rows=[3, 3, 0, 18, 7], groups=False, backend=backend)


@pytest.mark.parametrize("rows", [None, [3, 3, 0, 36, 7]])
def test_info_nce_chunks(rows: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from tgq_fast.ops import triton_losses

    monkeypatch.setattr(triton_losses, "CHUNK_ELEMENTS", 100)  # 37 items: two anchors per chunk
    check_info_nce(torch.float32, rows=rows, backend="torch")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_info_nce_of_unlike_negative_labels_and_an_anchor_that_is_its_own_positive(backend: str) -> None:
    e = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    groups = torch.tensor([-1, -2, -1, 3, 3, -2])
    positives, scale = torch.tensor([0, 2, 5, 4, 3, 1]), torch.tensor(1.5)
    exact = reference.info_nce(e.double(), positives, scale.double(), groups=groups)
    found = ops.info_nce(
        e.to(DEVICE), positives.to(DEVICE), scale.to(DEVICE), groups=groups.to(DEVICE), backend=backend
    )
    torch.testing.assert_close(found.cpu(), exact.float())


def test_info_nce_holds_no_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from tgq_fast.ops import triton_losses

    monkeypatch.setattr(triton_losses, "CHUNK_ELEMENTS", 500)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    e, t, rows = torch.randn(128, 4), torch.tensor(0.5), torch.arange(128)
    fixed = rows ^ 1, t, rows // 2, rows
    with Watch():  # the implementations: a mode sees an operator of ours as one call
        loss, lse = triton_losses.info_nce_operator._init_fn(e, *fixed, False)
        triton_losses.info_nce_backward._init_fn(loss, e, *fixed, lse, False)
    assert 0 < largest <= 128 * 4


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


@pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
@pytest.mark.parametrize("sees_text", [False, True])
@pytest.mark.parametrize("lengths", [(3, 4, 19), (0, 3, 5), (17, 2, 0)], ids=str)
def test_torch_self_attention(mixing: str, sees_text: bool, lengths: tuple[int, int, int]) -> None:
    check_streams(torch.float32, lengths=lengths, mixing=mixing, sees_text=sees_text, backend="torch")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_exploratory_bits_ignore_metadata(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 14, 2, 16, generator=generator) for _ in range(3))
    longer = [torch.cat([x, torch.randn(2, 25, 2, 16)], dim=1) for x in (q, k, v)]
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 9:] = float("nan")
    base = ops.stream_self_attention(q, k, v, (4, 5, 5), backend=backend)[:, 4:9]
    for other, text in ((longer, 30), (changed, 5)):
        out = ops.stream_self_attention(*other, (4, 5, text), backend=backend)[:, 4:9]
        assert torch.equal(out, base)


def test_keys_and_values_that_were_projected_already() -> None:
    x, a, e = torch.randn(2, 7, 12), torch.randn(2, 3, 8), torch.randn(2, 2, 8)
    layers = [[torch.randn(8, n) for n in (8, 12, 12)] for _ in range(3)]
    for wq, wk, wv in layers:
        pair = torch.nn.functional.linear(x, wk), torch.nn.functional.linear(x, wv)
        own = ops.hybrid_cross_attention(a, e, x, wq, None, wk, None, wv, None, num_heads=2, form="projected")
        got = ops.hybrid_cross_attention(a, e, x, wq, None, wk, None, wv, None, num_heads=2, keys_values=pair)
        torch.testing.assert_close(got.anchored, own.anchored)
        torch.testing.assert_close(got.exploratory, own.exploratory)


# The interpreter takes a second per example: few of them, and no shrinking.
QUICK = settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


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


@QUICK
@given(
    lengths=st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(0, 20)),
    mixing=st.sampled_from(["block", "one_way", "full"]),
    sees_text=st.booleans(),
    mask=st.sampled_from([None, "some", "none"]),
)
def test_self_attention_any_shape(
    lengths: tuple[int, int, int], mixing: str, sees_text: bool, mask: str | None
) -> None:
    check_streams(torch.float32, lengths=lengths, mixing=mixing, sees_text=sees_text, mask=mask, heads=1, head=8)
