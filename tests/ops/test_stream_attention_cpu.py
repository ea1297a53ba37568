"""Stream self-attention of short sequences as the CPU runs it: both ways to compute it, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tgq_fast import ops, reference
from tgq_fast.ops import stream_attention_cpu
from tgq_fast.reference.stream_attention import stream_mask

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BF16 = torch.bfloat16
LAYOUTS = {
    "block": ("block", False),
    "block, exploratory rows see text": ("block", True),
    "one way": ("one_way", False),
    "full": ("full", False),
}


def operands(dtype: torch.dtype, length: int, batch: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(batch, length, 2, 16, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [x.to(dtype) for x in normal]


def masks(kind: str | None, batch: int, text: int) -> torch.Tensor | None:
    """None, each item with its own length, or the same with an item that has no text."""
    if kind is None:
        return None
    mask = torch.arange(text) < torch.tensor([text, 1, 2])[:batch, None]
    if kind == "one item has none":
        mask[-1] = False
    return mask


def run(function, q, k, v, d, training: bool, *args, **options):  # type: ignore[no-untyped-def]
    """Result, and gradients of q, k and v when training."""
    leaves = [x.detach().clone().requires_grad_(training) for x in (q, k, v)]
    out = function(*leaves, *args, **options)
    return [out, *(torch.autograd.grad(out, leaves, d) if training else ())]


WITH_TEXT = [(3, 4, 5), (2, 3, 28), (3, 0, 4), (0, 3, 4)]
CALLS = [(lengths, mask) for lengths in WITH_TEXT for mask in (None, "some", "one item has none")]
CALLS += [(lengths, None) for lengths in ((3, 3, 0), (2, 3, 0), (0, 3, 0))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("lengths", "mask"), CALLS, ids=str)
def test_parity(
    dtype: torch.dtype,
    layout: str,
    training: bool,
    lengths: tuple[int, int, int],
    mask: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """33 tokens are more than two heads are wide: products then make their weights again in the backward."""
    mixing, sees_text = LAYOUTS[layout]
    inputs = operands(dtype, sum(lengths))
    two_items = 2 * 3 * inputs[0][0].numel() * dtype.itemsize
    monkeypatch.setattr(stream_attention_cpu, "_CHUNK_BYTES", two_items)
    options = {"mixing": mixing, "explore_sees_text": sees_text, "text_mask": masks(mask, 3, lengths[2])}
    exact = run(reference.stream_self_attention, *(x.double() for x in inputs), training, lengths, **options)
    plain = run(reference.stream_self_attention, *inputs, training, lengths, **options)
    found = run(ops.stream_self_attention, *inputs, training, lengths, backend="torch", **options)
    for out, low, high in zip(found, plain, exact, strict=True):
        assert out.dtype == dtype and out.shape == high.shape
        noise = 4 * torch.finfo(dtype).eps * max(x.abs().max() for x in (exact[1:] or exact))
        assert (out.double() - high).abs().max() <= 2 * (low.double() - high).abs().max() + noise


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("chunk", [1, 1 << 23], ids=["one item at a time", "all items"])
def test_exploratory_bits_ignore_metadata(
    dtype: torch.dtype, training: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_attention_cpu, "_CHUNK_BYTES", chunk)
    base = operands(dtype, 8)

    def exploratory(text: int, value: float | None = None) -> torch.Tensor:
        more = [x if value is None else torch.full_like(x, value) for x in operands(dtype, max(1, text), seed=text)]
        inputs = [torch.cat((x, y[:, :text]), dim=1) for x, y in zip(base, more, strict=True)]
        return run(ops.stream_self_attention, *inputs, training, (4, 4, text), backend="torch")[0][:, 4:8]

    expected = exploratory(0)
    alone = run(ops.stream_self_attention, *(x[:, 4:] for x in base), training, (0, 4, 0), backend="torch")[0]
    assert torch.equal(alone, expected)
    for text, value in ((1, None), (5, None), (40, None), (5, float("nan")), (5, float("inf"))):
        assert torch.equal(exploratory(text, value), expected)


def test_strides_and_expanded_gradients() -> None:
    lengths = (2, 3, 4)
    wide = [torch.randn(2, 9, 16, 2, generator=torch.Generator().manual_seed(i)).transpose(2, 3) for i in range(3)]
    for dtype, tolerance in ((torch.float32, 1e-5), (BF16, 0.1)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in wide]
        assert leaves[0].stride(-1) != 1
        pairs = []
        for function in (ops.stream_self_attention, reference.stream_self_attention):
            out = function(*leaves, lengths)
            pairs.append(torch.autograd.grad(out.sum(), leaves))  # an expanded scalar: strides of zero
        for got, expected in zip(*pairs, strict=True):
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_long_sequences_have_no_mask_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (2, 2, 5)
    inputs = operands(torch.float32, 9)[:3]
    expected = ops.stream_self_attention(*inputs, lengths)
    monkeypatch.setattr("tgq_fast.ops.stream_attention.LONGEST", 8)
    monkeypatch.setattr("tgq_fast.ops.stream_attention.streams_on_cpu", lambda *_: pytest.fail("short path"))
    torch.testing.assert_close(ops.stream_self_attention(*inputs, lengths), expected)


def test_autocast() -> None:
    inputs = operands(torch.float32, 9)[:3]
    with torch.autocast("cpu", BF16):
        out = ops.stream_self_attention(*(x.requires_grad_() for x in inputs), (2, 2, 5))
    assert out.dtype == BF16
    out.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


def test_kept_weights_are_no_larger_than_queries_and_keys() -> None:
    for length in (9, 32, 33):
        q, k, v, _ = operands(BF16, length)
        _, kept = stream_attention_cpu.stream_attention_cpu(q, k, v, None, [length, 0, 0], "block", False, True)
        assert kept.numel() == (6 * length * length if length <= 32 else 0) <= 2 * q.numel()


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("length", [5, 40])
def test_opcheck(dtype: torch.dtype, length: int) -> None:
    q, k, v = (x.requires_grad_() for x in operands(dtype, length, batch=2)[:3])
    mask = torch.ones(2, length - 4, dtype=torch.bool)
    mask[0, 0] = False
    for options in (
        (None, [length, 0, 0], "block"),
        (mask, [2, 2, length - 4], "block"),
        (mask, [4, 0, length - 4], "full"),
    ):
        torch.library.opcheck(stream_attention_cpu.stream_attention_cpu, (q, k, v, *options, False, True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [(2, 3, 4), (3, 3, 0)], ids=str)
def test_counted_operations_are_those_of_visible_pairs(layout: str, lengths: tuple[int, int, int]) -> None:
    mixing, sees_text = LAYOUTS[layout]
    leaves = [x.requires_grad_() for x in operands(torch.float32, sum(lengths))[:3]]
    pairs = int(stream_mask(lengths, mixing=mixing, explore_sees_text=sees_text).sum())
    with FlopCounterMode(display=False) as counter:
        out = ops.stream_self_attention(*leaves, lengths, mixing=mixing, explore_sees_text=sees_text, backend="torch")
        assert counter.get_total_flops() == 4 * 3 * 2 * 16 * pairs
        out.sum().backward()
    assert counter.get_total_flops() == 14 * 3 * 2 * 16 * pairs


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_layout_first_seen_in_inference_mode_can_be_trained(dtype: torch.dtype) -> None:
    stream_attention_cpu._layout_bias.cache_clear()
    inputs, lengths = operands(dtype, 9)[:3], (2, 3, 4)
    with torch.inference_mode():
        ops.stream_self_attention(*inputs, lengths)
    out = ops.stream_self_attention(*(x.requires_grad_() for x in inputs), lengths)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))
