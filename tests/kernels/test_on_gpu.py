"""What the interpreter's small shapes do not reach: the shipped tiles, groups and parts of keys, offsets beyond 2³¹."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_checks import DTYPES, check_cross, check_modulation, check_redundancy, check_streams

from tgq_fast.kernels import (
    cross_attention,
    cross_attention_backward,
    cross_attention_fused,
    modulation,
    stream_attention,
    stream_attention_backward,
)

ON_GPU = torch.cuda.is_available()


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not ON_GPU, reason="no CUDA device")(test))


WIDE_HEADS = (2, 5, 4, 70, 96, 512, 2)  # width 256: no kernels in fp32
SIZES = [
    (3, 8, 8, 197, 768, 768, 12),
    (2, 9, 24, 300, 80, 160, 2),  # heads of 80, keys in two fused parts
    (1, 40, 40, 700, 64, 256, 2),  # more than 64 queries
    (2, 3, 2, 1100, 72, 64, 1),  # more keys than are resident
    WIDE_HEADS,
]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", ["absorbed", "fused", "projected"])
def test_cross_attention(form: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    if sizes == WIDE_HEADS and dtype == torch.float32 and form != "absorbed":
        pytest.skip("heads of 256 in fp32")
    check_cross(form, dtype, sizes=sizes, mask="some", frozen=sizes[3] == 197)  # type: ignore[arg-type]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(8, 8, 32), (32, 33, 100), (70, 5, 0)], ids=str)
@pytest.mark.parametrize("head", [64, 128])
def test_self_attention(lengths: tuple[int, int, int], head: int, dtype: torch.dtype) -> None:
    check_streams(dtype, lengths=lengths, head=head, sees_text=head == 64)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [64, 100])
def test_modulation_and_redundancy(rank: int, dtype: torch.dtype) -> None:
    check_modulation(dtype, sizes=(37, 8, 9, 192, 96, rank))
    check_redundancy(dtype, batch=300, width=200)


# A tensor of more than 2³¹ elements; its last items must give the bits that they give alone. Without a GPU a few items
# more than those go through the interpreter: the calls below then still fit the launchers.
LAST, WIDTH, HEADS = (16, 768, 12) if ON_GPU else (1, 32, 1)


def large(items: int, *shape: int) -> Tensor:
    if not ON_GPU:
        return torch.randn(LAST + 1, *shape)
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("too little device memory")
    found = torch.randn(items, *shape, dtype=torch.bfloat16, device="cuda")
    assert found.numel() > 2**31
    return found


@pytest.fixture
def memory() -> Iterator[None]:
    """Gives what a test took back to the other processes of the GPU."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


def large_test(test: Callable[..., None]) -> Callable[..., None]:
    test = pytest.mark.usefixtures("memory")(test)
    return pytest.mark.gpu(test) if ON_GPU else test


def assert_same_ends(run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> None:
    whole = [t[-LAST:].clone() for t in run(*tensors)]
    alone = run(*(t[-LAST:].clone() for t in tensors))
    for got, expected in zip(whole, alone):
        assert torch.isfinite(expected).all() and expected.any()
        assert torch.equal(got, expected)


@large_test
def test_large_absorbed() -> None:
    x = large(43_712, 64, WIDTH)
    q = torch.randn(len(x), 1, 1, WIDTH, dtype=x.dtype, device=x.device)

    def run(q: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        out, lse, d_q = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), torch.empty_like(q)
        cross_attention.forward(q, x, *(None,) * 4, 0.03, out, lse)
        delta = torch.ones_like(lse)
        cross_attention_backward.backward_rows(q, x, *(None,) * 3, q, lse, delta, 0.03, d_q)
        return out, lse, d_q, cross_attention_backward.backward_tokens(q, x, *(None,) * 3, q, lse, delta, 0.03)

    assert_same_ends(run, q, x)


@large_test
def test_large_fused() -> None:
    x = large(43_712, 64, WIDTH)
    q = torch.randn(len(x), 1, 1, 64, dtype=x.dtype, device=x.device)
    weights = [torch.randn(64, WIDTH, dtype=x.dtype, device=x.device) / 28 for _ in range(2)]
    assert_same_ends(lambda q, x: cross_attention_fused.forward(q, x, *weights, *(None,) * 5, 0.125, False)[:2], q, x)


@large_test
def test_large_streams() -> None:
    q = large(43_712, 64, HEADS, 64)
    lengths = (8, 24, 32)

    def run(q: Tensor) -> tuple[Tensor, ...]:
        out, lse, *_ = stream_attention.forward(q, q, q, lengths, "block", True, None, 32, *(None,) * 3, 0.125, False)
        given = (q, q, q, q, out, lse, lengths, "block", True, None, 32, None, None, 0.125)
        return out, lse, *stream_attention_backward.backward(*given)[:3]  # without a guide its scale has no gradient

    assert_same_ends(run, q)


@large_test
def test_large_modulation() -> None:
    tokens = large(349_536, 8, WIDTH)
    image = torch.randn(len(tokens), WIDTH, dtype=tokens.dtype, device=tokens.device)
    scalar = torch.ones(len(tokens), dtype=tokens.dtype, device=tokens.device)
    gates = [
        modulation.Gate(*(torch.randn(*s, dtype=tokens.dtype, device=tokens.device) / 8 for s in shapes))
        for shapes in (((64, n), (64,), (WIDTH, 64), (WIDTH,)) for n in (2 + 3 * WIDTH, 2 * WIDTH))
    ]

    def run(tokens: Tensor, image: Tensor, scalar: Tensor) -> tuple[Tensor, ...]:
        saved = modulation.forward(tokens, tokens, scalar, scalar, image, *gates, 1.0)
        pair = saved.out_a, saved.out_e, None, None
        grads = modulation.backward(*pair, tokens, tokens, scalar, scalar, image, *gates, saved, 1.0)
        return saved.out_a, saved.gate_e, grads.a, grads.e, grads.image

    assert_same_ends(run, tokens, image, scalar)
