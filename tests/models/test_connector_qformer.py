"""Our Q-Former against `transformers`' BLIP-2 and InstructBLIP code, randomly initialised there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.connector import TGQFormerConnector
from tgq_fast.models.outputs import FrozenFeatures
from tgq_fast.models.qformer_weights import load_qformer_weights
from tgq_fast.models.zoo.budget import build_connector
from tgq_fast.models.zoo.qformer import QFormerConnector

B, N, L, M = 5, 7, 23, 11
SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 5, "intermediate_size": 224}
DV = 80


def config(connector: str, **overrides: object) -> TGQFormerConfig:
    sizes = {
        **SIZES,
        "num_anchored_queries": 3,
        "num_exploratory_queries": N - 3,
        "visual_width": DV,
        "text_width": SIZES["hidden_size"],
        "global_width": 12,
        "fields": ["a"],
    }
    return TGQFormerConfig(connector=connector, **{**sizes, **overrides})


def randomise(module: nn.Module, seed: int = 1) -> None:
    """Non-trivial values everywhere: HF starts biases at zero and LayerNorms at the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name.lower() and name.endswith("weight") else 0.15 * noise)


def features(text: Tensor | None = None, visual_mask: Tensor | None = None) -> FrozenFeatures:
    width = SIZES["hidden_size"]
    mask = torch.ones(B, 0 if text is None else M, dtype=torch.bool)
    if text is not None:
        mask = torch.arange(M) < torch.tensor([M, 1, 4, 0, 7])[:, None]
    return FrozenFeatures(
        visual_tokens=torch.randn(B, L, DV),
        global_image=torch.randn(B, 12),
        metadata_tokens=torch.zeros(B, 0, width) if text is None else text,
        metadata_mask=mask,
        field_ids=mask.long(),
        visual_mask=visual_mask,
    )


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max()
    assert scale > 1.0  # not comparing zeros
    assert (ours - theirs).abs().max() / scale <= 1e-5


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_blip2_without_text(frequency: int, masked: bool) -> None:
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(**SIZES, encoder_hidden_size=DV, cross_attention_frequency=frequency)
    ).eval()
    randomise(theirs)
    ours = build_connector(config("qformer", cross_attention_frequency=frequency)).eval()
    report = load_qformer_weights(ours, theirs)
    assert report.kept == ("query_tokens",)
    assert all(name.endswith("key.bias") for name in report.without_effect)
    nn.init.normal_(ours.query_tokens)
    mask = torch.rand(B, L) < 0.6 if masked else None
    batch = features(visual_mask=mask)
    with torch.no_grad():
        expected = theirs(
            query_embeds=ours.query_tokens.expand(B, -1, -1),
            encoder_hidden_states=batch.visual_tokens,
            encoder_attention_mask=None if mask is None else mask.long(),
        ).last_hidden_state
        assert_same(ours(batch).tokens, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_blip2_with_text(masked: bool) -> None:
    theirs = Blip2QFormerModel(Blip2QFormerConfig(**SIZES, encoder_hidden_size=DV, use_qformer_text_input=True)).eval()
    randomise(theirs)
    ours = build_connector(config("instructblip")).eval()
    report = load_qformer_weights(ours, theirs)
    last = SIZES["num_hidden_layers"] - 1
    text_ffn = [name for name in report.without_effect if not name.endswith("key.bias")]
    assert text_ffn and all(name.startswith(f"encoder.layer.{last}.") for name in text_ffn)
    pass_text_through(ours)
    text, mask = torch.randn(B, M, SIZES["hidden_size"]), torch.rand(B, L) < 0.6 if masked else None
    batch = features(text, mask)
    with torch.no_grad():
        embeds = torch.cat((ours.query_tokens.expand(B, -1, -1), text), dim=1)
        attended = torch.cat((torch.ones(B, N, dtype=torch.long), batch.metadata_mask.long()), dim=1)
        expected = theirs(
            query_embeds=embeds,
            query_length=N,
            attention_mask=attended,
            encoder_hidden_states=batch.visual_tokens,
            # Their 2-D form breaks with text (it expands to N + M rows); 4-D passes through.
            encoder_attention_mask=None if mask is None else mask[:, None, None].expand(-1, 1, N, -1),
        ).last_hidden_state[:, :N]
        assert_same(ours(batch).tokens, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_instructblip(masked: bool) -> None:
    theirs = InstructBlipQFormerModel(
        InstructBlipQFormerConfig(**SIZES, encoder_hidden_size=DV, vocab_size=50, max_position_embeddings=20)
    ).eval()
    randomise(theirs)
    ours = build_connector(config("instructblip")).eval()
    report = load_qformer_weights(ours, theirs)
    assert len(report.left_out) == 2
    pass_text_through(ours)
    ids = torch.randint(1, 50, (B, M))
    embeddings = theirs.embeddings
    with torch.no_grad():
        text = embeddings.word_embeddings(ids) + embeddings.position_embeddings(torch.arange(M))
        mask = torch.rand(B, L) < 0.6 if masked else None
        batch = features(text, mask)
        attended = torch.cat((torch.ones(B, N, dtype=torch.long), batch.metadata_mask.long()), dim=1)
        expected = theirs(
            input_ids=ids,
            attention_mask=attended,
            query_embeds=ours.query_tokens.expand(B, -1, -1),
            encoder_hidden_states=batch.visual_tokens,
            encoder_attention_mask=None if mask is None else mask.long(),
        ).last_hidden_state[:, :N]
        assert_same(ours(batch).tokens, expected)


def pass_text_through(connector: QFormerConnector) -> None:
    """Metadata tokens enter as they are, and queries are not trivially small."""
    assert connector.metadata is not None
    with torch.no_grad():
        connector.metadata.projection.weight.copy_(torch.eye(SIZES["hidden_size"]))
        connector.metadata.projection.bias.zero_()
        connector.metadata.field_embeddings.weight.zero_()
        connector.query_tokens.normal_()


def test_text_matters_to_the_parity() -> None:
    """Hiding one text token moves the queries far more than the tolerance: the parity above can fail."""
    ours = build_connector(config("instructblip")).eval()
    randomise(ours)
    batch = features(torch.randn(B, M, SIZES["hidden_size"]))
    with torch.no_grad():
        full = ours(batch).tokens
        batch.metadata_mask = batch.metadata_mask.clone()
        batch.metadata_mask[0, 3] = False
        fewer = ours(batch).tokens
    assert (full[0] - fewer[0]).abs().max() > 1e-3
    assert torch.equal(full[1], fewer[1])


def test_whole_model_state_dict_brings_the_queries() -> None:
    theirs = Blip2QFormerModel(Blip2QFormerConfig(**SIZES, encoder_hidden_size=DV))
    queries = torch.randn(1, N, SIZES["hidden_size"])
    state = {f"qformer.{k}": v for k, v in theirs.state_dict().items()}
    state |= {"query_tokens": queries, "vision_model.x": torch.zeros(1), "language_projection.weight": torch.zeros(1)}
    ours = build_connector(config("qformer"))
    assert load_qformer_weights(ours, state).kept == ()
    assert torch.equal(ours.query_tokens, queries)


def test_loads_into_tgq() -> None:
    theirs = Blip2QFormerModel(Blip2QFormerConfig(**SIZES, encoder_hidden_size=DV, use_qformer_text_input=True))
    randomise(theirs)
    ours = TGQFormerConnector(config("tgq", per_stream_ffn=True))
    state = {**theirs.state_dict(), "query_tokens": torch.randn(1, 32, SIZES["hidden_size"])}
    report = load_qformer_weights(ours, state)
    assert not any(name.startswith("encoder.") for name in report.kept)
    assert torch.equal(ours.query_tokens, state["query_tokens"][:, : N - 3])
    layer, source = ours.encoder.layer[1], theirs.encoder.layer[1]
    for mine in (layer.output_query, layer.output_explore):
        assert torch.equal(mine.dense.weight, source.output_query.dense.weight)
    assert torch.equal(layer.output.dense.weight, source.output.dense.weight)
    assert not ours.modulation.exploratory.up.weight.any()  # still the identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 6}, "keys without a place"),
        ({"num_hidden_layers": 4}, "missing"),
        ({"intermediate_size": 200}, "other shapes"),
        ({"cross_attention_frequency": 1}, "keys without a place"),
    ],
)
def test_other_sizes_are_refused(change: dict[str, int], message: str) -> None:
    theirs = Blip2QFormerModel(Blip2QFormerConfig(**{**SIZES, **change}, encoder_hidden_size=DV))
    ours = build_connector(config("qformer"))
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_qformer_weights(ours, theirs)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_missing_text_layers_need_consent() -> None:
    theirs = Blip2QFormerModel(Blip2QFormerConfig(**SIZES, encoder_hidden_size=DV))
    ours = build_connector(config("instructblip"))
    with pytest.raises(CheckpointError, match="missing"):
        load_qformer_weights(ours, theirs)
    assert "encoder.layer.0.intermediate.dense.weight" in load_qformer_weights(ours, theirs, strict=False).kept


def test_foreign_input_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no Q-Former"):
        load_qformer_weights(build_connector(config("qformer")), {"a": torch.zeros(1)})
    with pytest.raises(ArgumentError, match="Q-Former layers"):
        load_qformer_weights(build_connector(config("mlp")), {})
