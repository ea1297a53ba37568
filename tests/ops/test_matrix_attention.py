"""Attention on the matrix unit against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix_checks import DTYPES, close
from torch import Tensor
from torch.nn import functional

from tgq_fast import reference
from tgq_fast.errors import ArgumentError
from tgq_fast.ops import matrix_unit
from tgq_fast.ops.matrix_unit import PackedLinear, shared_attention, stream_attention

pytestmark = pytest.mark.skipif(bool(matrix_unit.why_not(torch.float32)), reason=matrix_unit.why_not(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "length", "width"), [(1, 1, 32), (40, 31, 96), (192, 197, 64), (33, 900, 800), (7, 64, 48)]
)
class TestSharedAttention:
    def test_parity(self, rows: int, length: int, width: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        q, x = torch.randn(3, rows, width).to(dtype), torch.randn(3, length, width).to(dtype)
        visible = torch.rand(3, length) > 0.4
        visible[1] = False
        visible[2] = True

        def definition(q: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
            scores = q @ x.transpose(1, 2) * 0.2
            if mask is None:
                return scores.softmax(dim=-1) @ x
            hidden = ~mask[:, None]
            return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).masked_fill(hidden, 0.0) @ x

        for mask in (None, visible):
            got = shared_attention(q.clone(), x, mask, 0.2)
            close(got, definition(q.double(), x.double(), mask), definition(q, x, mask))
        assert not got[1].any(), "an item without a visible token"

    def test_guide(self, rows: int, length: int, width: int, dtype: torch.dtype) -> None:
        """For the first rows; hidden tokens' guide is not read, and other rows never see it."""
        torch.manual_seed(0)
        q, x = torch.randn(2, rows, width).to(dtype), torch.randn(2, length, width).to(dtype)
        visible = torch.rand(2, length) > 0.3
        visible[:, 0] = True
        guide, strength = torch.randn(2, length).masked_fill(~visible, float("nan")), torch.randn(rows // 2)

        def definition(q: Tensor, x: Tensor) -> Tensor:
            bias = strength[:, None] * guide.masked_fill(~visible, 0.0)[:, None]
            scores = q @ x.transpose(1, 2) * 0.2 + functional.pad(bias, (0, 0, 0, rows - len(strength))).to(q.dtype)
            return scores.masked_fill(~visible[:, None], float("-inf")).softmax(dim=-1) @ x

        got = shared_attention(q.clone(), x, visible, 0.2, guide, strength)
        close(got, definition(q.double(), x.double()), definition(q, x))
        wild = torch.full_like(guide, float("nan"))
        other = shared_attention(q.clone(), x, visible, 0.2, wild, strength)
        assert torch.equal(other[:, rows // 2 :], got[:, rows // 2 :])
        assert other[:, : rows // 2].isnan().all()

    def test_bits_over_threads_and_strides(self, rows: int, length: int, width: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        q, wide = torch.randn(2, rows, width).to(dtype), torch.randn(4, length, width + 3).to(dtype)
        threads = torch.get_num_threads()
        try:
            found = []
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                found.append(shared_attention(q.clone(), wide[::2, :, 3:], None, 0.2))
        finally:
            torch.set_num_threads(threads)
        expected = shared_attention(q.clone(), wide[::2, :, 3:].contiguous(), None, 0.2)
        assert all(torch.equal(f, expected) for f in found)


def test_lazily_negated_tensors_are_read_as_they_are() -> None:
    """Torch keeps a negation as a mark beside the memory, which an address does not show."""
    torch.manual_seed(0)

    def lazy(x: Tensor) -> Tensor:
        marked = torch._neg_view(x)
        assert marked.is_neg()
        return marked

    w, b, x, residual = torch.randn(64, 32), torch.randn(64), torch.randn(20, 32), torch.randn(20, 64)
    plain, packed = PackedLinear(-w, -b), PackedLinear(lazy(w), lazy(b))
    assert torch.equal(packed(lazy(x)), plain(-x))
    assert torch.equal(packed.add_to(lazy(x), lazy(residual)), plain.add_to(-x, -residual))
    q, tokens, guide, strength = torch.randn(1, 8, 32), torch.randn(1, 9, 32), torch.randn(1, 9), torch.randn(8)
    got = shared_attention(-q, lazy(tokens), None, 1.0, lazy(guide), lazy(strength))
    assert torch.equal(got, shared_attention(-q, -tokens, None, 1.0, -guide, -strength))
    with pytest.raises(ArgumentError, match="q, x"):
        shared_attention(lazy(q), tokens, None, 1.0)
    heads = torch.randn(2, 5, 3 * 32)
    assert torch.equal(
        stream_attention(lazy(heads), None, None, (2, 3), 2)[0], stream_attention(-heads, None, None, (2, 3), 2)[0]
    )


def test_a_negated_view_is_read_by_the_strides_of_its_values() -> None:
    torch.manual_seed(0)
    q, wide = torch.randn(2, 3, 32), torch.randn(2, 5, 96)
    x = torch._neg_view(wide[:, :, :32])  # carried out, its rows lie closer together
    got = shared_attention(q.clone(), x, None, 0.2)
    assert torch.equal(got, shared_attention(q.clone(), (-wide[:, :, :32]).contiguous(), None, 0.2))


def test_a_hidden_token_may_hold_anything() -> None:
    torch.manual_seed(0)
    q, x = torch.randn(1, 20, 64), torch.randn(1, 50, 64)
    visible = torch.ones(1, 50, dtype=torch.bool)
    visible[0, [3, 49]] = False
    expected = shared_attention(q.clone(), x, visible, 1.0)
    x[0, [3, 49]] = 1e20
    assert torch.equal(shared_attention(q.clone(), x, visible, 1.0), expected)


STREAMS: list[dict[str, Any]] = [
    {"mixing": "block"},
    {"mixing": "block", "explore_sees_text": True},
    {"mixing": "one_way"},
    {"mixing": "one_way", "explore_sees_text": True},
    {"mixing": "full"},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", STREAMS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("lengths", [(3, 2), (8, 8), (0, 16), (17, 20)])
@pytest.mark.parametrize("text_wanted", [True, False])
def test_stream_attention(
    lengths: tuple[int, int], options: dict[str, Any], dtype: torch.dtype, text_wanted: bool
) -> None:
    torch.manual_seed(0)
    batch, heads, width, most = 4, 3, 16 * 3 * 2, 40
    mask = torch.arange(most) < torch.tensor([[0], [1], [most], [19]])
    sequence = torch.randn(batch, sum(lengths) + most, 3, heads, width // heads).to(dtype)
    queries, text = sequence[:, : sum(lengths)].flatten(2), sequence[:, sum(lengths) :].flatten(2)[mask]
    starts = functional.pad(mask.sum(1).cumsum(0), (1, 0))
    rows = text if text_wanted else text[:, width:].contiguous()
    got, got_text = stream_attention(queries, rows, starts, lengths, heads, text_wanted=text_wanted, **options)

    def definition(dtype: torch.dtype) -> Tensor:
        q, k, v = sequence.to(dtype).unbind(2)
        return reference.stream_self_attention(q, k, v, (*lengths, most), text_mask=mask, **options).flatten(2)

    exact, plain = definition(torch.float64), definition(dtype)
    close(got, exact[:, : sum(lengths)], plain[:, : sum(lengths)])
    if not text_wanted:
        assert got_text is None
    else:
        assert got_text is not None
        close(got_text, exact[:, sum(lengths) :][mask], plain[:, sum(lengths) :][mask])


def test_stream_attention_without_text_and_whatever_the_text() -> None:
    """Exploratory rows: the same bits without metadata and with any, NaN included."""
    torch.manual_seed(0)
    lengths, heads = (5, 6), 2
    queries, text = torch.randn(3, 11, 3 * 64), torch.randn(12, 3 * 64)
    alone, none = stream_attention(queries, None, None, lengths, heads)
    assert none is None
    text[4] = float("nan")
    starts = torch.tensor([0, 3, 3, 12])
    beside, _ = stream_attention(queries, text, starts, lengths, heads)
    assert torch.equal(beside[:, 5:], alone[:, 5:])
    assert torch.equal(beside[1], alone[1]), "an item without text"
    assert not torch.equal(beside[0, :5], alone[0, :5])
