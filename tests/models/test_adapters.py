"""Adapters and hooks on any layer are kept: nothing reads weights past a layer that is more than they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from connector_inputs import random_features, randomise, small_config
from torch import Tensor, nn

from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.inference import packed
from tgq_fast.models.readers import LightReader, LLMReader, merged_adapters
from tgq_fast.models.zoo.budget import build_connector
from tgq_fast.ops import explain

peft = pytest.importorskip("peft")


def adapt(module: nn.Module, name: str, **options: object) -> nn.Module:
    """LoRA with values of its own on one layer, in place; the layer."""
    config = peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, module)
    layer = module.get_submodule(name)
    with torch.no_grad():
        for part, parameter in layer.named_parameters():
            if "lora_" in part and "magnitude" not in part:
                parameter.normal_(std=0.5)
    return layer


def set_weights(layer: nn.Module) -> Tensor:
    """W + ΔW of an adapted layer."""
    base, (delta,) = layer.get_base_layer(), [layer.get_delta_weight(name) for name in layer.active_adapters]
    return (base.weight + delta).detach()


def check(module: nn.Module, name: str, call: Callable[[nn.Module], Tensor]) -> None:
    """The adapted module gives what the module gives with W + ΔW, and the adapters have gradients."""
    plain = call(module).detach()
    layer = adapt(module, name)
    out = call(module)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    for part, parameter in layer.named_parameters():
        if "lora_" in part:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, part
    base, parent = layer.get_base_layer(), module.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        base.weight.copy_(set_weights(layer))
    setattr(parent, name.rpartition(".")[2], base)
    torch.testing.assert_close(out, call(module), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [f"{gate}.{half}" for gate in ("anchored", "exploratory") for half in ("down", "up")])
def test_adapters_in_the_gates(name: str) -> None:
    model, features = randomise(build_connector(small_config())).eval(), random_features()
    check(model, f"modulation.{name}", lambda m: m(features).tokens)


def test_explain_says_how_the_gates_run() -> None:
    gates = build_connector(small_config()).modulation
    inputs = (torch.randn(2, 3, 32), torch.randn(2, 2, 32), torch.rand(2), torch.ones(2), torch.randn(2, 20))
    assert "run as they are" not in str(explain(gates, *inputs))
    seen: list[nn.Module] = []
    handle = gates.anchored.down.register_forward_hook(lambda m, x, y: seen.append(m))
    assert "anchored.down has hooks" in str(explain(gates, *inputs)) and not seen
    gates(*inputs)
    assert len(seen) == 1
    handle.remove()
    assert "run as they are" not in str(explain(gates, *inputs))


@pytest.mark.parametrize("name", ["layers.0.qkv", "layers.1.qkv", "layers.1.out", "metadata", "field_embeddings"])
def test_adapters_in_the_light_reader(name: str) -> None:
    torch.manual_seed(0)
    config = tiny.tiny_config(Path("v"), "t", text_width=16, hidden_dropout_prob=0.0, reader_layers=2)
    reader, features = randomise(LightReader(config)).eval(), random_features()
    tokens = torch.randn(5, 4, config.hidden_size)
    if name == "field_embeddings":  # no LoRA of this shape: a hook must reach the mean of the tokens too
        before = reader(tokens, features).embedding
        reader.layers = nn.ModuleList()
        alone = reader(tokens, features).embedding
        reader.field_embeddings.register_forward_hook(lambda m, x, y: y * 3)
        assert not torch.allclose(reader(tokens, features).embedding, alone, atol=1e-3)
        assert before.shape == alone.shape
        return
    check(reader, name, lambda m: m(tokens, features).embedding)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"switched_off": True}], ids=str)
def test_what_is_no_sum_of_weights_is_not_merged(options: dict[str, bool], llama: Path) -> None:
    torch.manual_seed(0)
    config = tiny.tiny_config(Path("v"), str(llama), llm=str(llama), lora_rank=0)
    reader = LLMReader(TGQFormerConfig(**config.to_dict())).eval()
    off = options.pop("switched_off", False)
    layer = adapt(reader, "llm.layers.0.mlp.up_proj", **options)
    with torch.no_grad():
        for part, parameter in layer.named_parameters():
            if "magnitude" in part:
                parameter.mul_(1.5)
    if off:
        layer.enable_adapters(False)
    ids = torch.randint(4, 90, (2, 7))
    with torch.no_grad():
        expected = reader.llm(input_ids=ids).last_hidden_state
        with merged_adapters(reader):
            assert torch.equal(reader.llm(input_ids=ids).last_hidden_state, expected)
        assert torch.equal(reader.llm(input_ids=ids).last_hidden_state, expected)


@pytest.mark.parametrize("isa", ["best", "avx2"])
def test_hooks_on_parts_that_a_packed_layer_covers(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa != "best":
        monkeypatch.setenv("TGQ_ISA", isa)
    for norm in ("pre", "post"):
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "visual_width": 32, "num_visual_tokens": 40}
        model = randomise(build_connector(small_config(norm=norm, **sizes))).eval()
        features = random_features()
        features.visual_tokens = torch.randn(5, 40, 32)
        with torch.no_grad():
            plain = model(features).tokens
            for name, part in model.named_modules():
                if not name.startswith("encoder.layer.0.") or not isinstance(part, (nn.Module,)):
                    continue
                handle = part.register_forward_hook(lambda m, x, y: 2 * y if isinstance(y, Tensor) else None)
                expected = model(features).tokens
                torch.testing.assert_close(packed(model)(features).tokens, expected, rtol=2e-2, atol=2e-2, msg=name)
                handle.remove()
            model.encoder.layer[0].output_query.LayerNorm = nn.RMSNorm(64)
            expected = model(features).tokens
            assert not torch.allclose(expected, plain, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(packed(model)(features).tokens, expected, rtol=2e-2, atol=2e-2)
