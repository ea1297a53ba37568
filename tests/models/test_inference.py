"""Packed weights and packed text rows: the same numbers, less work."""

from __future__ import annotations

import pytest
import torch
from connector_inputs import random_features, randomise, small_config
from torch import nn

from tgq_fast.models import layers
from tgq_fast.models.connector import build_connector
from tgq_fast.models.inference import packed_weights
from tgq_fast.ops.matrix_unit import why_not


def connector(name: str = "tgq", dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    model = randomise(build_connector(small_config(name, **overrides)))
    with torch.no_grad():  # attention of wide heads stays away from the near ties at which bf16 decides nothing
        for p in model.parameters():
            p.mul_(min(1.0, (32 / model.config.hidden_size) ** 0.5) if p.ndim == 2 else 1.0)
    return model.eval().to(dtype)


@pytest.fixture(params=["best", "avx2"], autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the machine's matrix unit, where it has one, and with the matrix library alone."""
    if request.param != "best":
        monkeypatch.setenv("TGQ_ISA", request.param)
    return request.param


REPLACED = ("forward", "context", "feed_forward")


def replaced(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if any(name in vars(m) for name in REPLACED)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 256, 300])
def test_packed_product_is_the_product(dtype: torch.dtype, rows: int) -> None:
    layer = nn.Linear(72, 40).to(dtype)
    x = torch.randn(2, rows, 72).to(dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        plain = layer(x)
        with packed_weights(layer):
            packed = layer(x)
    noise = (plain.double() - exact).abs().max()
    assert packed.shape == plain.shape and packed.dtype == dtype
    assert (packed.double() - exact).abs().max() <= 2 * noise + torch.finfo(dtype).eps * exact.abs().max()


# Sizes at which every layer runs on the matrix unit, and in the absorbed form.
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "visual_width": 32, "num_visual_tokens": 40}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tgq", "instructblip", "qformer"])
@pytest.mark.parametrize("overrides", [{}, WIDE, {**WIDE, "stream_mixing": "full"}, {**WIDE, "per_stream_ffn": True}])
def test_connector_gives_the_same_tokens(
    name: str, dtype: torch.dtype, overrides: dict[str, object], instruction_set: str
) -> None:
    model, features = connector(name, dtype, **overrides), random_features()
    if overrides:
        generator = torch.Generator().manual_seed(7)
        features.visual_tokens = torch.randn(5, 40, 32, generator=generator)
        features.visual_mask = torch.rand(5, 40, generator=generator) > 0.3
        features.visual_mask[2] = False
    with torch.no_grad():
        exact = connector(name, torch.float64, **overrides)(features).tokens
        plain = model(features).tokens
        with packed_weights(model):
            used = {type(m) for m in replaced(model)}
            packed = model(features).tokens
    if instruction_set == "best" and not why_not(dtype):
        expected = {layers.QueryLayer, layers.ResidualOutput}
        assert used >= (expected | {layers.StreamSelfAttention, layers.HybridCrossAttention} if overrides else expected)
    else:
        assert layers.Intermediate in used, "the activation is not fused"
    assert (packed.double() - exact).norm() <= 2 * (plain.double() - exact).norm()
    if dtype == torch.float32 or not overrides:  # the largest error of bf16 is one element's luck in wide layers
        assert (packed.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


def test_layers_are_as_before_when_it_closes() -> None:
    model, features = connector(), random_features()
    with torch.no_grad():
        before = model(features).tokens
        with pytest.raises(ZeroDivisionError), packed_weights(model):
            1 / 0  # noqa: B018
        assert not replaced(model)
        model.encoder.layer[0].intermediate_query.dense.weight.mul_(2)
        assert not torch.equal(model(features).tokens, before)


def test_gradients_take_the_weights_as_they_are() -> None:
    model, features = connector(), random_features()
    expected = torch.autograd.grad(model(features).tokens.sum(), list(model.encoder.parameters()))
    with packed_weights(model):
        found = torch.autograd.grad(model(features).tokens.sum(), list(model.encoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(bool(why_not(torch.float32)), reason=why_not(torch.float32))
def test_exploratory_rows_do_not_see_metadata_on_the_matrix_unit(instruction_set: str) -> None:
    model, features = connector(gate="none", **WIDE), random_features()
    features.visual_tokens = torch.randn(5, 40, 32)
    with torch.no_grad(), packed_weights(model):
        before = model(features).tokens
        features.metadata_tokens = features.metadata_tokens * 5
        features.metadata_mask = features.metadata_mask.roll(1, 0)
        after = model(features).tokens
    assert torch.equal(after[:, 3:], before[:, 3:])
    assert not torch.equal(after[:, :3], before[:, :3])


class TestTextPacking:
    def test_pack_and_pad_are_inverse_on_real_rows(self) -> None:
        mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
        packing = layers.TextPacking.where_useful(mask)
        assert packing is not None
        x = torch.randn(3, 3, 4)
        packed = packing.pack(x)
        assert torch.equal(packed, x[mask])
        assert torch.equal(packing.pad(packed), x * mask[..., None])

    def test_nothing_to_skip(self) -> None:
        assert layers.TextPacking.where_useful(None) is None
        assert layers.TextPacking.where_useful(torch.ones(2, 3, dtype=torch.bool)) is None

    @pytest.mark.parametrize("name", ["tgq", "instructblip"])
    @pytest.mark.parametrize("overrides", [{}, {"stream_mixing": "full"}, {"explore_sees_text": True}])
    def test_same_tokens_and_gradients_as_with_padding(
        self, name: str, overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, features = connector(name, torch.float64, **overrides), random_features()
        results = []
        for padded in (False, True):
            if padded:
                monkeypatch.setattr(layers.TextPacking, "where_useful", lambda mask: None)
            tokens = model(features).tokens
            weights = [p for p in model.encoder.parameters() if p.requires_grad]
            results.append([tokens, *torch.autograd.grad(tokens.square().sum(), weights, allow_unused=True)])
        for packed, plain in zip(*results, strict=True):
            torch.testing.assert_close(packed, plain, rtol=1e-10, atol=1e-12)

    def test_padding_is_not_multiplied(self) -> None:
        model, features = connector(), random_features()
        seen: list[int] = []
        feed_forward = model.encoder.layer[0].intermediate
        hook = feed_forward.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
        with torch.no_grad():
            model(features)
        hook.remove()
        assert seen == [int(features.metadata_mask.sum())]
