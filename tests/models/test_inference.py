"""Packed weights and packed text rows: the same numbers, less work."""

from __future__ import annotations

import pytest
import torch
from connector_inputs import random_features, randomise, small_config
from torch import nn

from tgq_fast.models import layers
from tgq_fast.models.connector import build_connector
from tgq_fast.models.inference import packed_weights


def connector(name: str = "tgq", dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    return randomise(build_connector(small_config(name, **overrides))).eval().to(dtype)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tgq", "instructblip", "qformer"])
def test_connector_gives_the_same_tokens(name: str, dtype: torch.dtype) -> None:
    model, features = connector(name, dtype), random_features()
    with torch.no_grad():
        exact = connector(name, torch.float64)(features).tokens
        plain = model(features).tokens
        with packed_weights(model):
            used = [m for m in model.modules() if "forward" in vars(m)]
            packed = model(features).tokens
    assert any(isinstance(m, layers.Intermediate) for m in used), "the activation is not fused"
    noise = (plain.double() - exact).abs().max()
    assert (packed.double() - exact).abs().max() <= 2 * noise


def test_layers_are_as_before_when_it_closes() -> None:
    model, features = connector(), random_features()
    with torch.no_grad():
        before = model(features).tokens
        with pytest.raises(ZeroDivisionError), packed_weights(model):
            1 / 0  # noqa: B018
        assert not any("forward" in vars(m) for m in model.modules())
        model.encoder.layer[0].intermediate_query.dense.weight.mul_(2)
        assert not torch.equal(model(features).tokens, before)


def test_gradients_take_the_weights_as_they_are() -> None:
    model, features = connector(), random_features()
    expected = torch.autograd.grad(model(features).tokens.sum(), list(model.encoder.parameters()))
    with packed_weights(model):
        found = torch.autograd.grad(model(features).tokens.sum(), list(model.encoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
