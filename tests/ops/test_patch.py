"""patch / unpatch of transformers' Q-Formers: the same numbers, the same state dict, a way back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from tgq_fast import ops
from tgq_fast.errors import ArgumentError, BackendError

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_hidden_size": 24,
    "vocab_size": 50,
}


def make(kind: str, attention: str = "sdpa", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    options = {**SIZES, "attn_implementation": attention, "attention_probs_dropout_prob": dropout}
    options["hidden_dropout_prob"] = 0.0
    model = (
        Blip2QFormerModel(Blip2QFormerConfig(**options))
        if kind == "blip2"
        else InstructBlipQFormerModel(InstructBlipQFormerConfig(**options))
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double()


def run(model: nn.Module, masked: bool) -> torch.Tensor:
    torch.manual_seed(4)
    queries, visual = torch.randn(3, 5, 32).double(), torch.randn(3, 11, 24).double()
    visual_mask = torch.ones(3, 11, dtype=torch.long)
    inputs = {"query_embeds": queries, "encoder_hidden_states": visual}
    if isinstance(model, InstructBlipQFormerModel):
        inputs["input_ids"] = torch.randint(50, (3, 6))
        text = torch.ones(3, 11, dtype=torch.long)
        if masked:
            text[1, 8:] = 0
        inputs["attention_mask"] = text
    if masked:
        visual_mask[0, 7:] = 0
        inputs["encoder_attention_mask"] = visual_mask
    return model(**inputs).last_hidden_state


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_same_output_and_gradients(kind: str, masked: bool, attention: str, form: str) -> None:
    model = make(kind, attention).eval()
    before = run(model, masked)
    before.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    keys = set(model.state_dict())

    calls = []
    original = ops.patch.__globals__["_attend"]
    ops.patch.__globals__["_attend"] = lambda *a: calls.append(a) or original(*a)
    try:
        assert ops.patch(model, form=form, backend="torch") is model
        after = run(model, masked)
    finally:
        ops.patch.__globals__["_attend"] = original
    assert len(calls) == 3, "two self-attentions and one cross-attention"
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    after.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            got = torch.zeros_like(expected[name]) if parameter.grad is None else parameter.grad
            atol = 1e-7 * expected[name].abs().max().item() + 1e-9
            torch.testing.assert_close(got, expected[name], rtol=1e-7, atol=atol)
    assert set(model.state_dict()) == keys

    ops.unpatch(model)
    assert all(not hasattr(m, "_tgq_fast_options") for m in model.modules())
    assert type(model).__name__ in ("Blip2QFormerModel", "InstructBlipQFormerModel")
    assert torch.equal(run(model, masked), before)


def test_dropout_in_training_runs_the_original() -> None:
    model = ops.patch(make("blip2", dropout=0.5), backend="triton").train()
    run(model, False)  # the Triton backend takes no fp64: the original code ran
    with pytest.raises(BackendError):
        run(model.eval(), False)


def test_copies_stay_patched_and_repatching_changes_options() -> None:
    model = ops.patch(make("blip2").eval(), backend="triton")
    twin = ops.patch(copy.deepcopy(model), backend="torch")
    assert torch.isfinite(run(twin, True)).all()
    with pytest.raises(BackendError):
        run(model, True)
    ops.unpatch(twin)
    assert type(next(ops.patch.__globals__["_attentions"](twin))).__module__.startswith("transformers")


class Adapted(nn.Module):
    """A low-rank adapter around a layer, as peft wraps it: with the attributes of the layer inside."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.a = nn.Parameter(torch.randn(3, layer.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(layer.out_features, 3, dtype=torch.float64))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.a.T @ self.b.T


def cross_attention(model: nn.Module) -> nn.Module:
    return model.encoder.layer[0].crossattention.attention


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_adapters_on_projections_are_kept(name: str) -> None:
    model = make("blip2").eval()
    attention = cross_attention(model)
    setattr(attention, name, Adapted(getattr(attention, name)))
    expected = run(model, True)
    patched = ops.patch(copy.deepcopy(model), backend="torch")
    found = run(patched, True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    expected.square().sum().backward()
    found.square().sum().backward()
    for one, two in zip(attention.parameters(), cross_attention(patched).parameters(), strict=True):
        assert two.grad is not None
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-7, atol=1e-7 * float(one.grad.abs().max()) + 1e-9)
    decision = ops.explain(cross_attention(patched), torch.randn(1, 5, 32).double(), torch.randn(1, 7, 24).double())
    assert f"{name} is a Adapted" in str(decision) and decision.form == "projected"


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "global hook", "forward of its own", "tensor subclass"])
def test_projections_with_more_to_them_run_as_they_are(kind: str) -> None:
    model = ops.patch(make("blip2").eval(), backend="torch")
    layer, handle, seen = cross_attention(model).key, None, []
    plain = run(model, False)
    if kind == "hook":
        handle = layer.register_forward_hook(lambda m, x, y: seen.append(m) or 2 * y)
    elif kind == "pre-hook":
        handle = layer.register_forward_pre_hook(lambda m, x: seen.append(m) or (2 * x[0],))
    elif kind == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, x, y: (seen.append(m) or 2 * y) if m is layer else None
        )
    elif kind == "forward of its own":
        layer.forward = lambda x: seen.append(layer) or 2 * nn.Linear.forward(layer, x)
    else:

        class Scaled(nn.Parameter):
            """As a quantised tensor: what multiplies is another than what it holds."""

            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                with torch._C.DisableTorchFunctionSubclass():
                    out = function(*args, **(kwargs or {}))
                    if function is nn.functional.linear:
                        seen.append(cls)
                        return 2 * out
                    return out

        layer.weight = Scaled(layer.weight.detach())
    try:
        changed = run(model, False)
    finally:
        if handle is not None:
            handle.remove()
    assert seen and not torch.allclose(changed, plain)


def test_an_unused_key_bias_has_a_gradient() -> None:
    """Of zero: DistributedDataParallel waits for the gradient of every parameter."""
    model = ops.patch(make("blip2"), backend="torch")
    run(model, False).square().sum().backward()
    gradient = cross_attention(model).key.bias.grad
    assert gradient is not None and not gradient.any()


def test_patched_models_pickle() -> None:
    model = ops.patch(make("blip2").eval(), form="absorbed", backend="torch")
    expected = run(model, True)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin, True), expected)
    assert cross_attention(twin)._tgq_fast_options == ("absorbed", "torch")
    assert type(cross_attention(ops.unpatch(twin))).__module__.startswith("transformers")


def test_unconditional_queries_are_broadcast() -> None:
    model = make("blip2").eval()
    torch.manual_seed(5)
    queries, visual = torch.randn(1, 5, 32).double(), torch.randn(3, 11, 24).double()
    arguments = {"query_embeds": queries.expand(3, -1, -1), "encoder_hidden_states": visual}
    expected = model(**arguments).last_hidden_state
    got = ops.patch(model)(**arguments).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_model_without_a_qformer_is_refused() -> None:
    with pytest.raises(ArgumentError, match="Blip2QFormer"):
        ops.patch(nn.Linear(2, 2))
