"""opcheck, fullgraph compilation, autocast, bitwise repeat and NaN-poisoned outputs of the kernels."""

from collections.abc import Callable

import pytest
import torch
from op_checks import DEVICE, check_cross, check_info_nce, check_modulation, check_redundancy, check_streams

from tgq_fast import ops, reference
from tgq_fast.ops.cross_attention_triton import absorbed_attention
from tgq_fast.ops.info_nce import info_nce_forward
from tgq_fast.ops.modulation import modulate
from tgq_fast.ops.redundancy import redundancy_forward
from tgq_fast.ops.stream_attention_triton import stream_attention


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def gate_parameters(image: int, width: int) -> list[reference.GateParameters]:
    inputs = (2 + image + 2 * width, image + width)
    return [reference.GateParameters(leaf(4, n), leaf(4), leaf(width, 4), leaf(width)) for n in inputs]


def guide(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, length, device=DEVICE), leaf(1, 2)


def absorbed(fused: bool) -> tuple:
    mask = torch.tensor([[True] * 5, [True, False, True, False, True]], device=DEVICE)
    return (
        absorbed_attention,
        leaf(2, 3, 16),
        leaf(2, 5, 12),
        leaf(16, 12),
        leaf(16, 12),
        leaf(16),
        mask,
        None,
        *guide(2, 5),
        2,
        True,
        fused,
    )


def stream() -> tuple:
    mask = torch.tensor([[True, True], [True, False]], device=DEVICE)
    heads = [leaf(2, 5, 2, 16) for _ in range(3)]
    structure = ((1, 2, 2), "block", False, 3, False)
    return stream_attention, *heads, mask, None, *guide(2, 5), *structure


def modulation() -> tuple:
    has = torch.tensor([1.0, 0.0], device=DEVICE)
    anchored, exploratory = gate_parameters(6, 8)
    inputs = (leaf(2, 2, 8), leaf(2, 3, 8), leaf(2), has, leaf(2, 6))
    return modulate, *inputs, *anchored, *exploratory, 1.0


def info_nce(triton: bool) -> tuple:
    index = torch.arange(4, device=DEVICE)
    return info_nce_forward, leaf(4, 8), index.flip(0), leaf(), None, index, triton


def redundancy(triton: bool) -> tuple:
    return redundancy_forward, leaf(4, 8), leaf(4, 8), 1e-6, triton


OPERATORS: dict[str, Callable[[], tuple]] = {
    "absorbed": lambda: absorbed(False),
    "fused": lambda: absorbed(True),
    "stream": stream,
    "modulation": modulation,
    "info_nce torch": lambda: info_nce(False),
    "info_nce triton": lambda: info_nce(True),
    "redundancy torch": lambda: redundancy(False),
    "redundancy triton": lambda: redundancy(True),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    operator, *arguments = OPERATORS[name]()
    torch.library.opcheck(operator, tuple(arguments))


def model(a, e, x, weights, gates, beta, form):  # type: ignore[no-untyped-def]
    """Every operator in one graph."""
    wq, wk, wv = weights
    options = {"num_heads": 2, "form": form, "guide": x[..., 0], "guide_scale": beta}
    out = ops.hybrid_cross_attention(a, e, x, wq, None, wk, None, wv, None, **options)
    both = torch.cat((out.anchored, out.exploratory), dim=1).unflatten(-1, (2, 8))
    both = ops.stream_self_attention(both, both, both, (2, 3, 0)).flatten(2)
    has = torch.ones(x.shape[0], device=x.device)
    mod = ops.dual_gated_modulation(both[:, :2], both[:, 2:], x[:, 0, 0], has, x[:, 0], *gates)
    mean_a, mean_e = mod.anchored.mean(1), mod.exploratory.mean(1)
    index = torch.arange(x.shape[0], device=x.device)
    loss = ops.info_nce(mean_a, index.flip(0), torch.zeros((), device=x.device))
    return loss + ops.redundancy_loss(mean_a, mean_e)


def inputs(length: int = 5) -> tuple[tuple, list[torch.Tensor]]:
    a, e, x = leaf(3, 2, 16), leaf(3, 3, 16), leaf(3, length, 12)
    weights, gates, beta = [leaf(16, n) for n in (16, 12, 12)], gate_parameters(12, 16), leaf(2, 2)
    return (a, e, x, weights, gates, beta), [a, e, x, *weights, *gates[0], *gates[1], beta]


@pytest.mark.parametrize(
    ("backend", "form"), [("torch", "auto"), ("triton", "absorbed"), ("triton", "fused"), ("triton", "projected")]
)
def test_fullgraph_compile(backend: str, form: str) -> None:
    torch._dynamo.reset()
    arguments, leaves = inputs()
    with ops.use_backend(backend):
        expected = model(*arguments, form)
        # aot_eager traces forward and backward through the fake functions without a C++ compiler in the loop.
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments, form)
        torch.testing.assert_close(got, expected)
        for mine, plain in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)):
            torch.testing.assert_close(mine, plain)


def test_autocast_computes_in_the_lower_dtype() -> None:
    low = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    (a, e, x, weights, gates, beta), _ = inputs()
    wq, wk, wv = weights
    options = {"num_heads": 2, "guide": x[..., 0], "guide_scale": beta}
    with torch.autocast(DEVICE, low), ops.use_backend("triton"):
        for form in ("absorbed", "fused", "projected"):
            out = ops.hybrid_cross_attention(a, e, x, wq, None, wk, None, wv, None, form=form, **options)
            assert out.anchored.dtype == low
        mod = ops.dual_gated_modulation(out.anchored, out.exploratory, x[:, 0, 0], x[:, 0, 1], x[:, 0], *gates)
        assert mod.anchored.dtype == low
    mod.anchored.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in (wk, beta))


CHECKS: dict[str, Callable[[], None]] = {
    "absorbed": lambda: check_cross("absorbed", torch.float32, sizes=(2, 2, 3, 9, 16, 16, 2), mask="some"),
    "absorbed groups": lambda: check_cross("absorbed", torch.float32, sizes=(2, 2, 3, 37, 16, 16, 2), mask="some"),
    "absorbed guide": lambda: check_cross("absorbed", torch.float32, sizes=(2, 2, 3, 37, 16, 16, 2), guided=True),
    "projected guide": lambda: check_cross("projected", torch.float32, sizes=(2, 2, 3, 9, 16, 16, 2), guided=True),
    "fused": lambda: check_cross("fused", torch.float32, sizes=(2, 2, 3, 9, 16, 16, 2), mask="some"),
    "fused parts": lambda: check_cross("fused", torch.float32, sizes=(2, 2, 3, 37, 16, 16, 2), mask="some"),
    "projected": lambda: check_cross("projected", torch.float32, sizes=(2, 2, 3, 9, 16, 16, 2), mask="some"),
    "streams": lambda: check_streams(torch.float32, lengths=(2, 3, 5), heads=1),
    "modulation": lambda: check_modulation(torch.float32, sizes=(3, 2, 3, 17, 5, 4)),
    "redundancy": lambda: check_redundancy(torch.float32, batch=19, width=5),
    "info_nce": lambda: check_info_nce(torch.float32, items=19, width=8),
}


@pytest.mark.parametrize("name", CHECKS)
def test_poisoned_outputs_are_fully_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN; what a kernel leaves unwritten then shows in the parity check."""
    poisoned = []

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            if out.is_floating_point():
                poisoned.append(out.shape)
                out.fill_(float("nan"))
            return out

        return call

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    CHECKS[name]()
    assert poisoned


@pytest.mark.parametrize("form", ["absorbed", "fused", "projected"])
def test_two_runs_are_bitwise_equal(form: str) -> None:
    arguments, leaves = inputs(length=37)
    runs = []
    with ops.use_backend("triton"):
        for _ in range(2):
            loss = model(*arguments, form)
            runs.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*runs))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("form", ["absorbed", "fused", "projected"])
def test_cuda_graph_replays_on_new_data(form: str) -> None:
    from tgq_fast.kernels import tiling

    mask = torch.ones(5, 37, dtype=torch.bool, device=DEVICE)  # of odd width: chunks after the first are not aligned
    fixed = [torch.randn(shape, device=DEVICE) for shape in ((5, 6, 32), (5, 37, 16), (32, 32), (32, 16), (32, 16))]
    options = {"num_heads": 2, "form": form, "backend": "triton", "key_mask": mask, "return_stats": True}

    def call(q, x, wq, wk, wv):  # type: ignore[no-untyped-def]
        steer = {"guide": x[..., 0], "guide_scale": wq[:6, :2]}
        out = ops.hybrid_cross_attention(q, q[:, :0], x, wq, None, wk, None, wv, wv[:, 0], **options, **steer)
        return out.anchored, out.stats.entropy

    size = 2 * 2 * 6 * 16 * 4  # two items to a chunk
    with torch.no_grad(), tiling.forced("limits", {"chunk_bytes": size, "graph_chunk_bytes": size}):
        call(*fixed)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = call(*fixed)
        for tensor in fixed:
            tensor.copy_(torch.randn_like(tensor))
        mask.copy_(torch.rand(mask.shape, device=DEVICE) > 0.4)
        graph.replay()
        for got, expected in zip(replayed, call(*fixed)):
            assert torch.equal(got, expected)
