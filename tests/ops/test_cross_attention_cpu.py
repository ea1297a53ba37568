"""The absorbed form as the CPU runs it without gradients, against the reference."""

from __future__ import annotations

import pytest
import torch

from tgq_fast import ops, reference
from tgq_fast.ops import cross_attention_torch


def arguments(dtype: torch.dtype, sizes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    batch, anchored, exploratory, length, visual_width, width = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = [normal(width, n) * n**-0.5 for n in (width, visual_width, visual_width)]
    biases = [normal(width) for _ in weights]
    streams = (normal(batch, anchored, width), normal(batch, exploratory, width), normal(batch, length, visual_width))
    return (*streams, *(t for pair in zip(weights, biases, strict=True) for t in pair))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, "some", "one item sees nothing"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 24], ids=["one item at a time", "all items"])
@pytest.mark.parametrize("sizes", [(3, 2, 3, 7, 20, 16), (2, 0, 1, 1, 8, 16), (1, 3, 0, 5, 16, 32)], ids=str)
def test_parity(
    dtype: torch.dtype,
    mask: str | None,
    guided: bool,
    chunk: int,
    sizes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_attention_torch, "_CPU_BYTES", chunk)
    inputs = arguments(dtype, sizes)
    key_mask = None
    if mask is not None:
        key_mask = torch.arange(sizes[3]) < torch.tensor([[sizes[3]], [1], [2]])[: sizes[0]]
        if mask != "some":
            key_mask[-1] = False
    ran = []
    original = cross_attention_torch._absorbed_on_cpu
    monkeypatch.setattr(cross_attention_torch, "_absorbed_on_cpu", lambda *a: ran.append(1) or original(*a))
    options = {"num_heads": 2, "key_mask": key_mask, "form": "absorbed"}
    if guided:
        generator = torch.Generator().manual_seed(1)
        guide = torch.randn(sizes[0], sizes[3], generator=generator)
        guide = guide if key_mask is None else guide.masked_fill(~key_mask, float("nan"))
        options |= {"guide": guide, "guide_scale": torch.randn(sizes[1], 2, generator=generator)}
    with torch.no_grad():
        exact = reference.hybrid_cross_attention(*(t.double() for t in inputs), **options)
        plain = reference.hybrid_cross_attention(*inputs, **options)
        found = ops.hybrid_cross_attention(*inputs, **options, backend="torch")
    assert ran, "another path was taken"
    for name in ("anchored", "exploratory"):
        out, low, high = (getattr(result, name).double() for result in (found, plain, exact))
        if not high.numel():
            continue
        noise = 4 * torch.finfo(dtype).eps * high.abs().max()
        assert (out - high).abs().max() <= 2 * (low - high).abs().max() + noise


def test_no_items_and_no_keys() -> None:
    for sizes in ((0, 2, 1, 5, 8, 16), (2, 2, 1, 0, 8, 16)):
        inputs = arguments(torch.float32, sizes)
        with torch.no_grad():
            found = ops.hybrid_cross_attention(*inputs, num_heads=2, form="absorbed", backend="torch")
        assert found.anchored.shape == (sizes[0], 2, 16)
        assert not found.anchored.any()


def test_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_attention_torch, "_CPU_BYTES", 1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func is torch.ops.aten.new_empty.default:
                largest = max(largest, out.numel())
            return out

    inputs = arguments(torch.float32, (8, 2, 2, 9, 24, 16))
    with torch.no_grad(), Watch():
        ops.hybrid_cross_attention(*inputs, num_heads=2, form="absorbed", backend="torch")
    assert 0 < largest <= 4 * 2 * 24  # N * H * dv of one item


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype, mask: bool) -> None:
    key_mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool() if mask else None
    results = []
    for attend, precision in ((reference, torch.float64), (reference, dtype), (ops, dtype)):
        inputs = [t.to(precision).requires_grad_(True) for t in arguments(dtype, (2, 2, 1, 5, 8, 16))]
        found = attend.hybrid_cross_attention(*inputs, num_heads=2, form="absorbed", key_mask=key_mask)
        loss = found.anchored.square().sum() + found.exploratory.square().sum()
        results.append(torch.autograd.grad(loss, [inputs[i] for i in (0, 1, 2, 3, 5, 7, 8)]))
    for exact, plain, out in zip(*results, strict=True):
        noise = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (out - exact).abs().max() <= 3 * (plain - exact).abs().max() + noise
