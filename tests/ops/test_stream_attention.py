"""Stream self-attention through its kernels and on torch against the reference, forward and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import DTYPES, QUICK, check_streams

from tgq_fast import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
def test_self_attention(mixing: str, dtype: torch.dtype) -> None:
    check_streams(dtype, mixing=mixing, sees_text=mixing == "one_way")


@pytest.mark.parametrize("lengths", [(0, 3, 5), (17, 2, 0), (1, 1, 1), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("sees_text", [False, True])
def test_self_attention_edges(lengths: tuple[int, int, int], sees_text: bool) -> None:
    check_streams(torch.float32, lengths=lengths, sees_text=sees_text, strided=sees_text, heads=1)


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
