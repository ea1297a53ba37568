"""The zoo against code that nobody here wrote: their weights in our modules give their result."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from connector_inputs import DV, random_features, randomise, small_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import RegNetConfig, SiglipVisionConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.regnet.modeling_regnet import RegNetYLayer
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from tgq_fast.models.zoo import abstractor, attention_pool, perceiver
from tgq_fast.models.zoo.budget import build_connector

D = 32


def gap(ours: Tensor, theirs: Tensor) -> float:
    assert theirs.abs().max() > 0.5  # not comparing zeros
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ---------------------------------------------------------------- Perceiver-Resampler


def idefics() -> tuple[nn.Module, nn.Module]:
    vision = SimpleNamespace(embed_dim=D)
    config = SimpleNamespace(perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=False), vision_config=vision)
    theirs = randomise(IdeficsPerceiverResampler(config, D, 3, 4, D // 4, 5)).eval()
    ours = build_connector(small_config("perceiver", visual_width=D, intermediate_size=4 * D)).eval()
    ours.load_state_dict(theirs.state_dict())  # the same names
    return ours, theirs


def perceiver_gap() -> float:
    ours, theirs = idefics()
    features = random_features()
    features.visual_tokens = torch.randn(5, 9, D)
    features.visual_mask = torch.arange(9) < torch.tensor([9, 4, 1, 8, 9])[:, None]
    with torch.no_grad():
        given = ours(features).tokens
        # They have no mask: what is masked here is not there at all.
        expected = torch.cat([theirs(x[None, mask]) for x, mask in zip(features.visual_tokens, features.visual_mask)])
    return gap(given, expected)


def test_perceiver_is_idefics_resampler() -> None:
    assert perceiver_gap() < 1e-5


# ---------------------------------------------------------------- cross-attention pooling


def pooling_gap() -> float:
    """SigLIP's head has one probe; N of ours are N of theirs."""
    width = 64
    theirs = SiglipMultiheadAttentionPoolingHead(
        SiglipVisionConfig(hidden_size=D, num_attention_heads=4, intermediate_size=width, hidden_act="gelu")
    )
    randomise(theirs).eval()
    ours = build_connector(
        small_config("attention-pool", visual_width=D, intermediate_size=width, layer_norm_eps=1e-6)
    ).eval()
    nn.init.normal_(ours.probe)
    p = ours.attention.attention
    with torch.no_grad():
        weight, bias = theirs.attention.in_proj_weight.chunk(3), theirs.attention.in_proj_bias.chunk(3)
        for layer, w, b in zip((p.query, p.key, p.value), weight, bias):
            layer.weight.copy_(w)
            if layer.bias is not None:  # the keys' cancels
                layer.bias.copy_(b)
        for layer, source in (
            (ours.attention.output.dense, theirs.attention.out_proj),
            (ours.layernorm, theirs.layernorm),
            (ours.intermediate.dense, theirs.mlp.fc1),
            (ours.dense, theirs.mlp.fc2),
        ):
            layer.load_state_dict(source.state_dict())
        features = random_features()
        features.visual_tokens = torch.randn(5, 9, D)
        features.visual_mask = torch.arange(9) < torch.tensor([9, 4, 1, 8, 9])[:, None]
        rows = []
        for probe in ours.probe[0]:
            theirs.probe.copy_(probe)
            rows.append(
                torch.cat([theirs(x[None, mask]) for x, mask in zip(features.visual_tokens, features.visual_mask)])
            )
        return gap(ours(features).tokens, torch.stack(rows, dim=1))


def test_attention_pool_is_siglip_head() -> None:
    assert pooling_gap() < 1e-5


# ---------------------------------------------------------------- C-Abstractor


class LayerNorm2d(nn.Module):
    """What timm makes of the LayerNorm2d that Honeybee puts in place of BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), (len(self.weight),), self.weight, self.bias, 1e-5)
        return x.permute(0, 3, 1, 2)


def regnet_stage(depth: int, into: int, width: int) -> nn.Module:
    config = RegNetConfig(groups_width=1, hidden_act="silu")
    stage = nn.Sequential(*(RegNetYLayer(config, into if i == 0 else width, width, 1) for i in range(depth)))
    for module in list(stage.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, LayerNorm2d(child.num_features))
            elif isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    return stage


def from_regnet(name: str, number: int) -> str:
    """Our name of one of transformers' parameters."""
    name = name.replace("convolution", "conv").replace("normalization", "bn").replace("shortcut", "downsample")
    for theirs, ours in (("layer.0", "conv1"), ("layer.1", "conv2"), ("layer.3", "conv3")):
        name = name.replace(theirs, ours)
    name = name.replace("layer.2.attention.0", "se.fc1").replace("layer.2.attention.2", "se.fc2")
    return f"{('before', 'after')[number]}.{name}"


def from_timm(name: str, number: int) -> str:
    block, rest = name.split(".", 1)
    return f"{('before', 'after')[number]}.{int(block[1:]) - 1}.{rest}"


def abstractor_gap(make_stage=regnet_stage, rename=from_regnet, length: int = 17, queries: int = 4) -> float:  # type: ignore[no-untyped-def]
    width = 40
    ours = build_connector(
        small_config(
            "c-abstractor",
            intermediate_size=width,
            num_visual_tokens=length,
            num_anchored_queries=1,
            num_exploratory_queries=queries - 1,
        )
    ).eval()
    randomise(ours)
    stages = [randomise(make_stage(3, into, width)).eval() for into in (DV, width)]
    weights = {rename(n, i): p for i, stage in enumerate(stages) for n, p in stage.named_parameters()}
    report = ours.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys
    assert {n.split(".")[0] for n in report.missing_keys} == {"pos_emb", "readout"}
    side, cells = int(length**0.5), int(queries**0.5)
    features = random_features(length=length)
    with torch.no_grad():
        x = features.visual_tokens[:, length - side**2 :] + ours.pos_emb
        x = stages[0](x.transpose(1, 2).reshape(5, DV, side, side).clone())
        x = stages[1](F.adaptive_avg_pool2d(x, (cells, cells))).flatten(2).transpose(1, 2)
        expected = ours.readout[3](F.silu(ours.readout[0](x)))
        return gap(ours(features).tokens, expected)


@pytest.mark.parametrize(("length", "queries"), [(9, 4), (17, 4), (49, 16), (197, 9)])
def test_c_abstractor_is_honeybee_s_on_transformers_regnet(length: int, queries: int) -> None:
    assert abstractor_gap(length=length, queries=queries) < 1e-5


def test_c_abstractor_is_honeybee_s_on_timm() -> None:
    regnet = pytest.importorskip("timm.models.regnet", reason="timm is not installed")
    layers = pytest.importorskip("timm.layers")
    stage = partial(regnet.RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=layers.LayerNorm2d)
    assert abstractor_gap(stage, from_timm) < 1e-5


# ---------------------------------------------------------------- planted faults


def test_planted_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def attends_to_context_only(self: nn.Module, context: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        return attend(self, context, 0 * latents, mask)

    attend = perceiver._LatentAttention.forward

    def keeps_probe(self: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        return self.dense(x) + residual

    faults = [
        (perceiver._LatentAttention, "forward", attends_to_context_only, perceiver_gap),
        (perceiver._FeedForward, "forward", lambda self, x: self.c_proj(F.gelu(self.fc(self.ln(x)))), perceiver_gap),
        (attention_pool._Projection, "forward", keeps_probe, pooling_gap),
        (abstractor._SqueezeExcitation, "forward", lambda self, x, real: x, abstractor_gap),
        (abstractor._Block, "forward", lambda self, x, real: F.silu(self.conv3(self.conv1(x))), abstractor_gap),
        (abstractor.CAbstractor, "pool", lambda self, x, real: F.adaptive_max_pool2d(x, self.cells), abstractor_gap),
    ]
    for owner, name, fault, measure in faults:
        with monkeypatch.context() as planted:
            planted.setattr(owner, name, fault)
            assert measure() > 1e-3, name
