"""What must hold for the hybrid-query connector: disentangled streams, identity gates, items without metadata."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from connector_inputs import DT, random_features, randomise, small_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tgq_fast import reference
from tgq_fast.errors import ArgumentError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.connector import TGQFormerConnector
from tgq_fast.models.outputs import DistinctTokens, FrozenFeatures
from tgq_fast.models.zoo import CONNECTORS
from tgq_fast.models.zoo.budget import build_connector

NA = 3
WITH_TOKENS = [name for name in CONNECTORS if name != "text-only"]


def explore(connector: TGQFormerConnector, features: FrozenFeatures) -> Tensor:
    """The exploratory stream before the gates."""
    assert connector.modulation is None
    with torch.no_grad():
        return connector.eval()(features).tokens[:, connector.layout.num_anchored :]


def metadata_variants(features: FrozenFeatures) -> list[FrozenFeatures]:
    """The same images with other, fewer, more, longer and no metadata."""
    batch = features.visual_tokens.shape[0]
    variants = []
    for length in (0, 1, 5, 6, 33, 64):
        tokens = torch.randn(batch, length, DT) * 10
        for mask in (torch.ones(batch, length, dtype=torch.bool), torch.rand(batch, length) < 0.5):
            ids = torch.ones(batch, length, dtype=torch.long) * mask
            variants.append(dataclasses.replace(features, metadata_tokens=tokens, metadata_mask=mask, field_ids=ids))
    return variants


@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        ({}, 5),
        ({"hidden_size": 36, "num_attention_heads": 3, "num_exploratory_queries": 7}, 3),
        ({"hidden_size": 192, "num_attention_heads": 12, "intermediate_size": 400, "num_exploratory_queries": 8}, 17),
        ({"per_stream_ffn": True}, 5),
        ({"num_anchored_queries": 0}, 4),
        ({"norm": "pre"}, 5),
        ({"norm": "pre", "text_in_layers": False, "num_hidden_layers": 1}, 6),
    ],
)
def test_block_mode_exploratory_stream_is_bit_identical_whatever_the_metadata(sizes: dict, batch: int) -> None:
    connector = randomise(TGQFormerConnector(small_config(gate="none", **sizes)))
    features = random_features(batch)
    expected = explore(connector, features)
    for variant in metadata_variants(features):
        assert torch.equal(explore(connector, variant), expected)


@pytest.mark.parametrize("switches", [{"stream_mixing": "full"}, {"explore_sees_text": True}])
def test_other_modes_let_metadata_reach_the_exploratory_stream(switches: dict) -> None:
    connector = randomise(TGQFormerConnector(small_config(gate="none", **switches)))
    features = random_features()
    expected = explore(connector, features)
    changed = explore(connector, metadata_variants(features)[4])
    assert (changed - expected).abs().max() > 1e-3


def test_one_way_mode_keeps_metadata_out_of_the_exploratory_stream() -> None:
    connector = randomise(TGQFormerConnector(small_config(gate="none", stream_mixing="one_way")))
    features = random_features()
    for variant in metadata_variants(features):
        torch.testing.assert_close(explore(connector, variant), explore(connector, features))


def test_anchored_stream_sees_exploratory_queries_only_when_mixed() -> None:
    features = random_features()
    for mixing, seen in (("block", False), ("one_way", True), ("full", True)):
        connector = randomise(TGQFormerConnector(small_config(gate="none", stream_mixing=mixing))).eval()
        with torch.no_grad():
            before = connector(features).tokens[:, :NA]
            connector.query_tokens.add_(torch.randn_like(connector.query_tokens))
            after = connector(features).tokens[:, :NA]
        assert torch.equal(before, after) != seen


def test_modulation_is_the_exact_identity_at_initialisation() -> None:
    for gate in ("vector", "scalar"):
        torch.manual_seed(5)
        gated = TGQFormerConnector(small_config(gate=gate)).eval()
        bare = TGQFormerConnector(small_config(gate="none")).eval()
        bare.load_state_dict(gated.state_dict(), strict=False)
        features = random_features()
        with torch.no_grad():
            output = gated(features)
            assert torch.equal(output.tokens, bare(features).tokens)
        assert not output.anchored_gate.any() and not output.exploratory_gate.any()
        assert output.anchored_gate.shape == ((5, 32) if gate == "vector" else (5, 1))


def test_what_each_gate_sees() -> None:
    connector = randomise(TGQFormerConnector(small_config(agreement="dual_encoder"))).eval()
    features = random_features()
    with torch.no_grad():
        base = connector(features)
        other = connector(dataclasses.replace(features, agreement=features.agreement + 1))
        text = connector(metadata_variants(features)[8])
        image = connector(dataclasses.replace(features, global_image=features.global_image + 1))
    has = features.has_metadata
    assert (base.anchored_gate - other.anchored_gate)[has].abs().max() > 1e-4
    assert torch.equal(base.anchored_gate[~has], other.anchored_gate[~has])  # no metadata, nothing to agree with
    for untouched in (other, text):
        assert torch.equal(base.exploratory_gate, untouched.exploratory_gate)
        assert torch.equal(base.tokens[:, NA:], untouched.tokens[:, NA:])
    assert not torch.equal(base.exploratory_gate, image.exploratory_gate)
    assert base.anchored_gate.abs().max() < 1 and base.exploratory_gate.abs().max() < 1


def test_means_are_before_the_gates() -> None:
    connector = randomise(TGQFormerConnector(small_config())).eval()
    features = random_features()
    with torch.no_grad():
        output = connector(features)
        restored = output.tokens[:, :NA] / (1 + output.anchored_gate[:, None])
    torch.testing.assert_close(output.anchored_mean, restored.mean(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_TOKENS)
@pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
@pytest.mark.parametrize("text", [0, 4])
def test_no_metadata_is_finite_forward_and_backward(name: str, mixing: str, text: int) -> None:
    connector = randomise(build_connector(small_config(name, stream_mixing=mixing))).train()
    features = random_features(text=text)
    features.metadata_mask[:] = False
    # Padding may hold anything.
    features.metadata_tokens[:] = float("nan")
    features.field_ids[:] = 10_000
    features.visual_tokens.requires_grad_(True)
    output = connector(features)
    loss = output.tokens.square().sum()
    if output.alignment_logits is not None:
        aligned = cross_entropy(output.alignment_logits, torch.arange(5))
        assert aligned.item() == 0.0
        loss = loss + aligned
    loss.backward()
    assert output.tokens.isfinite().all()
    assert features.visual_tokens.grad.isfinite().all()
    for parameter_name, p in connector.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", WITH_TOKENS)
@pytest.mark.parametrize("overrides", [{}, {"per_stream_ffn": True}, {"gate": "scalar", "stream_mixing": "full"}])
def test_every_parameter_learns(name: str, overrides: dict) -> None:
    """No unused parameter: each one gets a gradient, so distributed training needs no search for unused ones."""
    connector = randomise(build_connector(small_config(name, **overrides))).train()
    output = connector(random_features())
    loss = (output.tokens * torch.randn_like(output.tokens)).sum()
    if output.alignment_logits is not None:
        loss = loss + cross_entropy(output.alignment_logits, torch.arange(5))
    loss.backward()
    for parameter_name, p in connector.named_parameters():
        assert p.grad is not None and p.grad.any(), parameter_name


def test_item_without_metadata_gets_null_anchors_and_only_it() -> None:
    connector = randomise(TGQFormerConnector(small_config())).eval()
    features = random_features()
    with torch.no_grad():
        before = connector(features).tokens
        connector.compression.null_tokens.add_(torch.randn_like(connector.compression.null_tokens))
        after = connector(features).tokens
    assert not torch.equal(before[0, :NA], after[0, :NA])
    assert torch.equal(before[1:], after[1:])


def test_permuting_metadata_tokens_changes_nothing_but_rounding() -> None:
    connector = randomise(TGQFormerConnector(small_config())).eval()
    features = random_features()
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    permuted = dataclasses.replace(
        features,
        metadata_tokens=features.metadata_tokens[:, order],
        metadata_mask=features.metadata_mask[:, order],
        field_ids=features.field_ids[:, order],
    )
    moved = dataclasses.replace(permuted, field_ids=3 - permuted.field_ids.clamp_min(1))
    with torch.no_grad():
        base, same, other = (connector(f).tokens for f in (features, permuted, moved))
    torch.testing.assert_close(base, same, rtol=1e-4, atol=1e-4)
    assert (base - other)[1:, :NA].abs().max() > 1e-2  # the field a token belongs to does count


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_an_item_does_not_depend_on_its_batch_or_padding(name: str) -> None:
    connector = randomise(build_connector(small_config(name))).eval()
    features = random_features()
    wider = {
        "metadata_tokens": torch.cat((features.metadata_tokens, torch.randn(5, 7, DT)), dim=1),
        "metadata_mask": torch.cat((features.metadata_mask, torch.zeros(5, 7, dtype=torch.bool)), dim=1),
        "field_ids": torch.cat((features.field_ids, torch.zeros(5, 7, dtype=torch.long)), dim=1),
        "visual_tokens": torch.cat((features.visual_tokens, torch.randn(5, 4, 24)), dim=1),
        "visual_mask": torch.arange(13).expand(5, -1) < 9,
    }
    with torch.no_grad():
        whole = connector(features).tokens
        if not CONNECTORS[name].sees_place:  # cells are places, so they do move with L
            padded = connector(dataclasses.replace(features, **wider)).tokens
            torch.testing.assert_close(whole, padded, rtol=1e-4, atol=1e-5)
        for i in range(5):
            one = FrozenFeatures(
                **{
                    f.name: v[i : i + 1] if isinstance(v, Tensor) else v
                    for f in dataclasses.fields(features)
                    for v in [getattr(features, f.name)]
                }
            )
            torch.testing.assert_close(connector(one).tokens, whole[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*CONNECTORS])
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(name: str, batch: int) -> None:
    connector = build_connector(small_config(name)).train()
    output = connector(random_features(batch))
    assert output.tokens.shape == (batch, 0 if name == "text-only" else 5, 32)
    assert output.tokens.isfinite().all()


@pytest.mark.parametrize("name", ["tgq", "qformer", "instructblip"])
def test_attention_map(name: str) -> None:
    connector = randomise(build_connector(small_config(name))).eval()
    features = random_features()
    features.visual_mask = torch.rand(5, 9) < 0.7
    features.visual_mask[2] = False
    with torch.no_grad():
        output = connector(features, return_attention=True)
        plain = connector(features)
    assert plain.attention is None and torch.equal(plain.tokens, output.tokens)
    attention = output.attention
    assert attention.shape == (5, 5, 9)
    assert not attention.masked_select(~features.visual_mask[:, None].expand_as(attention)).any()
    seen = features.visual_mask.any(dim=1)
    torch.testing.assert_close(attention[seen].sum(dim=-1), torch.ones(4, 5))
    assert not attention[~seen].any()


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_distinct_tokens_give_what_all_tokens_give(norm: str) -> None:
    for text_in_layers in (True, False):
        config = small_config(norm=norm, text_in_layers=text_in_layers, agreement="alignment")
        connector = randomise(TGQFormerConnector(config)).double().eval()
        features = random_features().to("cpu", torch.float64)
        features.metadata_tokens[3], features.metadata_mask[3] = features.metadata_tokens[1], features.metadata_mask[1]
        features.field_ids[3] = features.field_ids[1]
        rows = torch.cat((torch.zeros(1, DT).double(), features.metadata_tokens.flatten(0, 1)))
        index = (torch.arange(30).view(5, 6) + 1) * features.metadata_mask
        index[3] = index[1]
        fields = torch.cat((torch.zeros(1).long(), features.field_ids.flatten()))
        features.metadata_tokens = features.metadata_tokens * features.metadata_mask[..., None]
        features.field_ids = features.field_ids * features.metadata_mask
        with torch.no_grad():
            expected = connector(features)
            given = connector(dataclasses.replace(features, distinct=DistinctTokens(rows, fields, index)))
        torch.testing.assert_close(given.tokens, expected.tokens, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(given.agreement, expected.agreement)


@pytest.mark.parametrize("name", ["tgq", "qformer", "instructblip"])
@pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_operators_give_what_their_definitions_give(
    name: str, mixing: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = randomise(build_connector(small_config(name, stream_mixing=mixing, norm=norm))).double().eval()
    features = random_features().to("cpu", torch.float64)
    features.visual_mask = torch.rand(5, 9) < 0.7

    def run() -> list[Tensor]:
        connector.zero_grad()
        output = connector(features)
        output.tokens.square().sum().backward()
        return [output.tokens.detach(), *(p.grad for p in connector.parameters() if p.grad is not None)]

    given = run()
    for module in ("attention", "connector"):
        monkeypatch.setattr(f"tgq_fast.models.{module}.ops", reference)
    for mine, expected in zip(given, run(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_half_precision_features_are_cast() -> None:
    connector = randomise(TGQFormerConnector(small_config())).eval()
    features = random_features().to("cpu", torch.float16)
    with torch.no_grad():
        expected = connector(random_features()).tokens
        assert connector(features).tokens.dtype == torch.float32
        torch.testing.assert_close(connector(features).tokens, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("ablation", [{"num_anchored_queries": 0}, {"num_exploratory_queries": 0}])
@pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
@pytest.mark.parametrize("gate", ["vector", "scalar", "none"])
def test_single_stream_ablations(ablation: dict, mixing: str, gate: str) -> None:
    connector = randomise(TGQFormerConnector(small_config(**ablation, stream_mixing=mixing, gate=gate))).train()
    output = connector(random_features())
    assert output.anchored_mean is None and output.exploratory_mean is None  # no pair of streams to decorrelate
    assert (output.anchored_gate is None) == (gate == "none" or "num_anchored_queries" in ablation)
    loss = (output.tokens * torch.randn_like(output.tokens)).sum()
    if output.alignment_logits is not None:
        loss = loss + cross_entropy(output.alignment_logits, torch.arange(5))
    loss.backward()
    for name, p in connector.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("name", ["tgq", "instructblip"])
def test_compiles_as_one_graph(name: str) -> None:
    connector = randomise(build_connector(small_config(name))).eval()
    features = random_features()
    with torch.no_grad():
        compiled = torch.compile(lambda f: connector(f).tokens, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(features), connector(features).tokens)


def test_wrong_input_says_what_is_wrong() -> None:
    connector = TGQFormerConnector(small_config())
    features = random_features()
    with pytest.raises(ArgumentError, match="visual_tokens"):
        connector(dataclasses.replace(features, visual_tokens=torch.randn(5, 9, 25)))
    with pytest.raises(ArgumentError, match="metadata_tokens"):
        connector(dataclasses.replace(features, metadata_tokens=torch.randn(5, 6, 3)))
    with pytest.raises(ArgumentError, match="field_ids"):
        connector(dataclasses.replace(features, field_ids=features.field_ids[:, :2]))
    with pytest.raises(ArgumentError, match="global_image"):
        connector(dataclasses.replace(features, global_image=features.global_image[:2]))
    with pytest.raises(ArgumentError, match="dual encoder"):
        TGQFormerConnector(small_config(agreement="dual_encoder"))(dataclasses.replace(features, agreement=None))
    with pytest.raises(ArgumentError, match="attention_probs_dropout_prob"):
        TGQFormerConnector(small_config(attention_probs_dropout_prob=0.1))


def test_seed_decides_the_weights_and_sizes_do_not_need_towers() -> None:
    def build() -> dict[str, Tensor]:
        torch.manual_seed(11)
        return build_connector(TGQFormerConfig.preset("tiny")).state_dict()

    first, second = build(), build()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ["tgq", "qformer", "attention-pool"])
def test_frozen_tokens_leave_the_affine_part_of_their_norm_to_the_projections(name: str) -> None:
    """Value and every gradient are those of the LayerNorm itself, and no gradient passes through the tokens."""
    connector = randomise(build_connector(small_config(name, norm="pre"))).double().eval()
    features = random_features().to("cpu", torch.float64)

    def gradients(frozen: bool) -> tuple[Tensor, dict[str, Tensor]]:
        connector.zero_grad()
        tokens = features.visual_tokens.clone().requires_grad_(not frozen)
        out = connector(dataclasses.replace(features, visual_tokens=tokens)).tokens
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        assert frozen == (tokens.grad is None)
        return out.detach(), {n: p.grad.clone() for n, p in connector.named_parameters() if p.grad is not None}

    expected, by_norm = gradients(frozen=False)
    given, by_projection = gradients(frozen=True)
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)
    assert by_norm.keys() == by_projection.keys()
    assert any("norm_source" in parameter for parameter in by_norm)
    for parameter, gradient in by_norm.items():
        torch.testing.assert_close(by_projection[parameter], gradient, rtol=1e-7, atol=1e-7, msg=parameter)


def test_a_hooked_norm_runs_as_it_is() -> None:
    connector = randomise(build_connector(small_config("qformer", norm="pre")))
    seen = []
    norm = next(m for n, m in connector.named_modules() if n.endswith("norm_source") and isinstance(m, nn.LayerNorm))
    norm.register_forward_hook(lambda *a: seen.append(1))
    connector(random_features()).tokens.sum().backward()
    assert seen and norm.weight.grad is not None
