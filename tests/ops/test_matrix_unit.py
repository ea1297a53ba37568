"""The CPU's matrix unit against fp64: as accurate as the plain PyTorch layers in the same dtype."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from op_checks import assert_close
from torch import Tensor, nn
from torch.nn import functional

from tgq_fast import reference
from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.ops import matrix_unit
from tgq_fast.ops.matrix_unit import PackedLinear, shared_attention, stream_attention

pytestmark = pytest.mark.skipif(bool(matrix_unit.why_not(torch.float32)), reason=matrix_unit.why_not(torch.float32))
DTYPES = [torch.float32, torch.bfloat16]
# Rows, inputs, outputs: small and odd ones, whole and broken tiles and steps, more than 512 rows and 768 inputs.
SHAPES = [(1, 1, 2), (5, 33, 31), (32, 64, 32), (33, 100, 70), (130, 768, 96), (31, 1600, 33), (513, 40, 65)]


def close(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    assert got.dtype == plain.dtype
    assert_close("result", got, exact, plain, exact.abs().max().item())


def layer(inputs: int, outputs: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype), torch.randn(outputs).to(dtype)


def norm_layer(width: int, dtype: torch.dtype) -> nn.LayerNorm:
    norm = nn.LayerNorm(width).to(dtype).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestLinear:
    @pytest.mark.parametrize("gelu", [False, True])
    def test_product_and_activation(self, shape: tuple[int, int, int], dtype: torch.dtype, gelu: bool) -> None:
        rows, inputs, outputs = shape
        w, b = layer(inputs, outputs, dtype)
        x = torch.randn(rows, inputs).to(dtype)
        act = functional.gelu if gelu else lambda y: y
        got = PackedLinear(w, b)(x, gelu=gelu)
        close(
            got,
            act(functional.linear(x.double(), w.double(), b.double())),  # type: ignore[operator]
            act(functional.linear(x, w, b)),  # type: ignore[operator]
        )

    def test_residual_and_norm(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        rows, inputs, outputs = shape
        w, b = layer(inputs, outputs, dtype)
        x, residual, norm = (
            torch.randn(rows, inputs).to(dtype),
            torch.randn(rows, outputs).to(dtype),
            norm_layer(outputs, dtype),
        )
        got = PackedLinear(w, b, norm).add_to(x, residual)
        exact = functional.linear(x.double(), w.double(), b.double()) + residual.double()
        exact = functional.layer_norm(exact, (outputs,), norm.weight.double(), norm.bias.double(), norm.eps)
        close(got, exact, norm(functional.linear(x, w, b) + residual))

    def test_residual_alone(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """As before a LayerNorm that comes later; the feed-forward's residual is another than its input."""
        rows, inputs, outputs = shape
        (w, b), (back, back_bias) = layer(inputs, outputs, dtype), layer(outputs, inputs, dtype, 1)
        x, residual, other = (torch.randn(rows, n).to(dtype) for n in (inputs, outputs, inputs))

        def definition(*t: Tensor) -> tuple[Tensor, Tensor]:
            x, residual, other, w, b, back, back_bias = t
            hidden = functional.gelu(functional.linear(x, w, b))
            return functional.linear(x, w, b) + residual, functional.linear(hidden, back, back_bias) + other

        up, down = PackedLinear(w, b), PackedLinear(back, back_bias)
        found = up.add_to(x, residual), up.feed_forward(down, x, other)
        tensors = (x, residual, other, w, b, back, back_bias)
        for got, exact, plain in zip(
            found, definition(*(t.double() for t in tensors)), definition(*tensors), strict=True
        ):
            close(got, exact, plain)

    def test_feed_forward(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        rows, hidden, width = shape
        (up, up_bias), (down, down_bias) = layer(width, hidden, dtype), layer(hidden, width, dtype, 1)
        x, norm = torch.randn(rows, width).to(dtype), norm_layer(width, dtype)
        got = PackedLinear(up, up_bias).feed_forward(PackedLinear(down, down_bias, norm), x)

        def definition(x: Tensor, weight: Tensor, shift: Tensor, *layers: Tensor) -> Tensor:
            inner = functional.gelu(functional.linear(x, layers[0], layers[1]))
            return functional.layer_norm(functional.linear(inner, layers[2], layers[3]) + x, (width,), weight, shift)

        tensors = (x, norm.weight, norm.bias, up, up_bias, down, down_bias)
        close(got, definition(*(t.double() for t in tensors)), definition(*tensors))


@pytest.mark.parametrize("dtype", DTYPES)
class TestLinearDetails:
    @pytest.mark.parametrize(("groups", "outputs", "inputs"), [(3, 64, 16), (2, 32, 100)])
    @pytest.mark.parametrize("turned", [False, True])
    def test_groups(self, dtype: torch.dtype, groups: int, outputs: int, inputs: int, turned: bool) -> None:
        torch.manual_seed(0)
        w = (
            torch.randn(groups, inputs, outputs).to(dtype).transpose(1, 2)
            if turned
            else torch.randn(groups, outputs, inputs).to(dtype)
        )
        x, b = torch.randn(40, groups * inputs).to(dtype), torch.randn(groups * outputs).to(dtype)

        def definition(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return torch.einsum("mgi,goi->mgo", x.unflatten(1, (groups, inputs)), w).flatten(1) + b

        close(PackedLinear(w, b)(x), definition(x.double(), w.double(), b.double()), definition(x, w, b))

    def test_columns_and_no_bias(self, dtype: torch.dtype) -> None:
        w, _ = layer(48, 96, dtype)
        x = torch.randn(2, 7, 48).to(dtype)
        packed = PackedLinear(w)
        assert torch.equal(packed(x, columns=slice(32, 96)), packed(x)[..., 32:])
        assert packed(x).shape == (2, 7, 96)

    def test_strided_rows(self, dtype: torch.dtype) -> None:
        w, b = layer(64, 40, dtype)
        wide = torch.randn(30, 200).to(dtype)
        packed = PackedLinear(w, b)
        for x in (wide[::3, 10:74], wide[:, ::2][:, :64], wide.t()[:64].t()):
            assert torch.equal(packed(x), packed(x.contiguous()))

    def test_bits_depend_on_the_row_alone(self, dtype: torch.dtype) -> None:
        """Not on other rows, the number of threads, or the run."""
        w, b = layer(1000, 80, dtype)
        norm = norm_layer(80, dtype)
        x, residual = torch.randn(600, 1000).to(dtype), torch.randn(600, 80).to(dtype)
        packed, threads = PackedLinear(w, b, norm), torch.get_num_threads()
        try:
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append((packed(x, gelu=True), packed.add_to(x, residual)))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))
        part = slice(517, 530)
        assert torch.equal(packed(x[part], gelu=True), found[0][0][part])
        assert torch.equal(packed.add_to(x[part], residual[part]), found[0][1][part])

    def test_later_changes_of_the_weights_are_not_seen(self, dtype: torch.dtype) -> None:
        w, b = layer(32, 32, dtype)
        x, norm = torch.randn(4, 32).to(dtype), norm_layer(32, dtype)
        packed = PackedLinear(w, b, norm)
        before = packed.add_to(x, x)
        for changed in (w, b, norm.weight, norm.bias):
            changed.zero_()
        assert torch.equal(packed.add_to(x, x), before)

    def test_nan_stays_in_its_row(self, dtype: torch.dtype) -> None:
        w, b = layer(64, 48, dtype)
        norm = norm_layer(48, dtype)
        x, residual = torch.randn(40, 64).to(dtype), torch.randn(40, 48).to(dtype)
        packed = PackedLinear(w, b, norm)
        clean = packed(x, gelu=True), packed.add_to(x, residual)
        x[7, 3] = float("nan")
        for got, before in zip((packed(x, gelu=True), packed.add_to(x, residual)), clean, strict=True):
            assert got[7].isnan().all()
            assert torch.equal(got[torch.arange(40) != 7], before[torch.arange(40) != 7])

    def test_concurrent_callers(self, dtype: torch.dtype) -> None:
        w, b = layer(256, 256, dtype)
        packed = PackedLinear(w, b)
        inputs = [torch.randn(rows, 256).to(dtype) for rows in (300, 40, 520, 7)]
        expected = [packed(x) for x in inputs]
        wrong: list[int] = []

        def work(i: int) -> None:
            for _ in range(10):
                if not torch.equal(packed(inputs[i]), expected[i]):
                    wrong.append(i)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong


def test_gelu_over_its_range() -> None:
    """The identity as weights hands every value to the activation as it is."""
    x = torch.cat(
        (torch.linspace(-14, 14, 4096 - 32), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 9.0, -9.0] * 4))
    )
    got = PackedLinear(torch.eye(32))(x.view(-1, 32), gelu=True).flatten().double()
    exact = functional.gelu(x.double())
    assert ((got - exact).abs() <= 6e-8 * x.abs().double().clamp_min(1.0)).all()


@pytest.mark.parametrize("kind", ["large", "small", "mixed", "cancelling", "halfway", "denormal"])
def test_fp32_values_that_are_hard_to_split(kind: str) -> None:
    """Parts of an fp32 number must add up to it over the whole range of exponents that a product can have."""
    torch.manual_seed(1)
    x, w = torch.randn(40, 200), torch.randn(48, 200)
    if kind == "large":
        x, w = x * 1e18, w * 1e17
    elif kind == "small":
        x, w = x * 1e-15, w * 1e-14
    elif kind == "mixed":
        x = x * torch.exp2(torch.randint(-30, 30, (200,)).float())
    elif kind == "cancelling":
        x[:, 100:], w[:, 100:] = x[:, :100] * (1 + 1e-6), -w[:, :100]
    elif kind == "halfway":
        x, w = x.sign() * 1.00390625, w.sign() * (1 + 2**-16 + 2**-23)
    elif kind == "denormal":
        x = x * 1e-40
    got = PackedLinear(w)(x)
    exact, plain = x.double() @ w.double().T, x @ w.T
    floor = 1e-36 if kind == "denormal" else 0.0  # the unit reads denormals as zero
    assert (got.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor


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


def test_bad_input_and_machines_without_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedLinear(torch.randn(32, 16))
    with pytest.raises(
        ArgumentError, match=r"x: got torch.float32 \(4, 15\) on cpu, expected torch.float32 \[..., 16\]"
    ):
        packed(torch.randn(4, 15))
    with pytest.raises(ArgumentError, match="bfloat16"):
        packed(torch.randn(4, 16).bfloat16())
    with pytest.raises(ArgumentError, match="out a multiple of 32"):
        PackedLinear(torch.randn(2, 33, 16))
    with pytest.raises(BackendError, match=r"does not compute in torch\.float16"):
        PackedLinear(torch.randn(32, 16).half())
    assert packed(torch.empty(0, 16)).shape == (0, 32)
    with pytest.raises(ArgumentError, match="residual"):
        packed.add_to(torch.randn(4, 16), torch.randn(3, 32))
    q, x = torch.randn(2, 4, 32), torch.randn(2, 7, 32)
    for guide, strength in ((torch.zeros(2, 6), torch.zeros(4)), (torch.zeros(2, 7), torch.zeros(5))):
        with pytest.raises(ArgumentError, match="guide, strength"):
            shared_attention(q, x, None, 1.0, guide, strength)
    monkeypatch.setenv("TGQ_ISA", "avx2")
    assert "no AMX" in matrix_unit.why_not(torch.float32)
    with pytest.raises(BackendError, match="TGQ_ISA"):
        packed(torch.randn(4, 16))
