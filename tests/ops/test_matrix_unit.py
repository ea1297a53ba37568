"""The CPU's matrix unit against fp64: as accurate as the plain PyTorch layers in the same dtype."""

from __future__ import annotations

import threading

import pytest
import torch
from matrix_checks import DTYPES, close
from torch import Tensor, nn
from torch.nn import functional

from tgq_fast.errors import ArgumentError, BackendError
from tgq_fast.ops import matrix_unit
from tgq_fast.ops.matrix_unit import PackedLinear, shared_attention

pytestmark = pytest.mark.skipif(bool(matrix_unit.why_not(torch.float32)), reason=matrix_unit.why_not(torch.float32))


# Rows, inputs, outputs: small and odd ones, whole and broken tiles and steps, more than 512 rows and 768 inputs.
SHAPES = [(1, 1, 2), (5, 33, 31), (32, 64, 32), (33, 100, 70), (130, 768, 96), (31, 1600, 33), (513, 40, 65)]


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


@pytest.mark.parametrize("device", ["meta"])  # stands for any default device: what is made there has no address
def test_the_callers_default_device_gets_no_memory_into_the_native_calls(device: str) -> None:
    weight, x = torch.randn(40, 48), torch.randn(3, 48)
    expected = PackedLinear(weight)(x)
    with torch.device(device):
        layer = PackedLinear(weight, torch.zeros(40, device="cpu"))
        assert torch.equal(layer(x), expected) and torch.equal(PackedLinear(weight)(x), expected)
        assert layer.add_to(x, expected).device.type == "cpu"
    for wrong in (
        lambda: PackedLinear(weight.to(device)),
        lambda: PackedLinear(weight, torch.zeros(40, device=device)),
    ):
        with pytest.raises(ArgumentError, match="on the CPU"):
            wrong()
