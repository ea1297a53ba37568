"""Agreement, pooling baselines, budget and cost of the connectors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from connector_inputs import DG, DT, DV, random_features, randomise, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import adaptive_avg_pool1d, cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from tgq_fast.errors import ArgumentError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.connector import TGQFormerConnector
from tgq_fast.models.embeddings import AlignmentHead, RunningStandardiser
from tgq_fast.models.flops import connector_cost
from tgq_fast.models.layers import initialise_connector
from tgq_fast.models.zoo import CONNECTORS
from tgq_fast.models.zoo.budget import build_connector, count_parameters, match_budget


class TestStandardiser:
    def test_follows_training_statistics_and_freezes(self) -> None:
        scores = torch.randn(40, 16) * 0.07 + 0.31
        valid = torch.rand(40, 16) < 0.8
        standardise = RunningStandardiser().train()
        for values, mask in zip(scores, valid, strict=True):
            standardise(values, mask)
        standardise.eval()
        result = standardise(scores.flatten(), valid.flatten())
        seen = result[valid.flatten()]
        assert abs(seen.mean()) < 0.05 and abs(seen.std() - 1) < 0.05
        assert not result[~valid.flatten()].any()
        before = {k: v.clone() for k, v in standardise.state_dict().items()}
        standardise(torch.randn(9) + 5, torch.ones(9, dtype=torch.bool))
        assert all(torch.equal(v, before[k]) for k, v in standardise.state_dict().items())

    def test_one_item_of_another_batch_changes_nothing_at_evaluation(self) -> None:
        standardise = RunningStandardiser().eval()
        values, valid = torch.randn(4), torch.ones(4, dtype=torch.bool)
        assert torch.equal(standardise(values, valid)[:1], standardise(values[:1], valid[:1]))

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_items_leave_the_statistics_alone(self, count: int) -> None:
        standardise = RunningStandardiser().train()
        valid = torch.arange(3) < count
        assert standardise(torch.full((3,), float("nan")).masked_fill(valid, 2.0), valid).isfinite().all()
        assert standardise.batches == 0 and standardise.mean == 0 and standardise.var == 1

    def test_state_travels_with_the_checkpoint(self) -> None:
        source = TGQFormerConnector(small_config()).train()
        source(random_features())
        target = TGQFormerConnector(small_config()).eval()
        target.load_state_dict(source.state_dict())
        assert target.standardiser.batches == 1
        with torch.no_grad():
            assert torch.equal(source.eval()(random_features()).agreement, target(random_features()).agreement)

    def test_no_gradient_from_the_gates(self) -> None:
        values = torch.randn(4, requires_grad=True)
        assert not RunningStandardiser()(values, torch.ones(4, dtype=torch.bool)).requires_grad


class TestAlignment:
    def head(self) -> AlignmentHead:
        config = small_config(initializer_range=0.3)
        head = AlignmentHead(config)
        initialise_connector(head, config)
        return head

    def test_logits_are_scaled_cosines_with_negatives_only(self) -> None:
        head, features = self.head().train(), random_features()
        features.metadata_tokens[3], features.metadata_mask[3] = features.metadata_tokens[2], features.metadata_mask[2]
        cosine, logits = head(features)
        torch.testing.assert_close(logits.diagonal(), cosine / 0.07)
        hidden = torch.isinf(logits)
        expected = torch.zeros(5, 5, dtype=torch.bool)
        expected[0], expected[:, 0] = True, True  # item 0 has no metadata
        expected[2, 3] = expected[3, 2] = True  # the same metadata is no negative
        expected.fill_diagonal_(False)
        assert torch.equal(hidden, expected)

    def test_training_raises_the_agreement(self) -> None:
        head, features = self.head().train(), random_features(12)
        optimiser = torch.optim.Adam(head.parameters(), lr=0.02)
        for _ in range(60):
            logits = head(features)[1]
            loss = cross_entropy(logits, torch.arange(12)) + cross_entropy(logits.T, torch.arange(12))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        head.eval()
        right = head(features)[0][1:]
        wrong = head(dataclasses.replace(features, global_image=features.global_image.roll(1, 0)))[0][1:]
        assert right.mean() > wrong.mean() + 0.5
        assert head(features)[1] is None


class TestPooling:
    @pytest.mark.parametrize("length", [1, 4, 5, 9, 49, 197])
    def test_cells_are_those_of_adaptive_average_pooling(self, length: int) -> None:
        projector = build_connector(small_config("mlp"))
        visual = torch.randn(2, length, DV)
        expected = adaptive_avg_pool1d(visual.transpose(1, 2), 5).transpose(1, 2)
        torch.testing.assert_close(projector.pool(visual, None), expected)

    def test_masked_tokens_do_not_count(self) -> None:
        projector = build_connector(small_config("avgpool"))
        visual, mask = torch.randn(3, 9, DV), torch.arange(9) < torch.tensor([9, 4, 0])[:, None]
        pooled = projector.pool(visual, mask)
        torch.testing.assert_close(pooled[1, 0], visual[1, :4].mean(dim=0))
        assert not pooled[2].any()

    def test_avgpool_knows_no_place_and_mlp_does(self) -> None:
        features = random_features()
        moved = dataclasses.replace(features, visual_tokens=features.visual_tokens.flip(1))
        for name, same in (("avgpool", True), ("mlp", False)):
            connector = randomise(build_connector(small_config(name))).eval()
            with torch.no_grad():
                assert torch.allclose(connector(features).tokens, connector(moved).tokens, atol=1e-5) == same


class TestBudget:
    @pytest.mark.parametrize("preset", ["tiny", "paper", "large"])
    @pytest.mark.parametrize("name", [n for n in CONNECTORS if n != "text-only"])
    def test_every_connector_fits_within_one_percent(self, preset: str, name: str) -> None:
        config = TGQFormerConfig.preset(preset)
        matched = match_budget(config, name)
        assert abs(count_parameters(matched) / count_parameters(config) - 1) <= 0.01
        assert matched.connector == name and matched.num_queries == config.num_queries
        assert (
            config.connector == "tgq" and config.intermediate_size == TGQFormerConfig.preset(preset).intermediate_size
        )

    @pytest.mark.parametrize(
        "ablation",
        [{"gate": "none"}, {"gate": "scalar"}, {"num_anchored_queries": 0, "num_exploratory_queries": 8}],
    )
    def test_ablations_too(self, ablation: dict) -> None:
        config = TGQFormerConfig.preset("tiny")
        matched = match_budget(config, "tgq", **ablation)
        assert matched.intermediate_size > config.intermediate_size
        assert abs(count_parameters(matched) / count_parameters(config) - 1) <= 0.01

    def test_count_is_the_module_s(self) -> None:
        config = small_config()
        assert count_parameters(config) == sum(p.numel() for p in build_connector(config).parameters())

    def test_text_only_has_nothing_to_adjust(self) -> None:
        matched = match_budget(small_config(), "text-only")
        assert matched.connector == "text-only" and count_parameters(matched) == 0

    def test_impossible_budget_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match="fits the budget"):
            match_budget(small_config("avgpool", intermediate_size=8), "tgq")
        with pytest.raises(ArgumentError, match="configuration fields"):
            match_budget(small_config(), "tgq", gates="none")


class TestCost:
    @pytest.mark.parametrize("name", CONNECTORS)
    @pytest.mark.parametrize(
        "overrides",
        [
            {},
            {"stream_mixing": "full", "gate": "scalar"},
            {"stream_mixing": "one_way", "explore_sees_text": True, "agreement": "none"},
            {"num_anchored_queries": 0, "gate": "none", "cross_attention_frequency": 1},
            {"num_exploratory_queries": 0, "gate": "none"},
        ],
    )
    def test_counts_what_runs(self, name: str, overrides: dict, monkeypatch: pytest.MonkeyPatch) -> None:
        """Against the operators that PyTorch's own counter sees in a forward pass."""
        # The counter's hooks on all modules only watch; with hooks that may act, layers run as they are, not absorbed.
        monkeypatch.setattr(torch.nn.modules.module, "_has_any_global_hook", lambda: False)
        batch = 3
        config = small_config(name, **overrides)
        connector = build_connector(config).eval().requires_grad_(False)
        features = random_features(batch)
        features.metadata_mask.fill_(True)  # the cost is that of M tokens; padding is skipped
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:
            connector(features)
        assert counter.get_total_flops() == 2 * batch * connector_cost(config).macs

    def test_forms(self) -> None:
        config = TGQFormerConfig.preset(
            "paper", visual_width=768, text_width=512, global_width=512, num_visual_tokens=197, whitening=0
        )
        projected, absorbed = (connector_cost(config, form=form).macs for form in ("projected", "absorbed"))
        # Three cross-attention layers over 197 tokens, each 232 M + 4.8 M against 58 M + 19 M, and the compression.
        assert 3 * 155e6 < projected - absorbed < 3 * 165e6 + 60e6
        assert connector_cost(config).macs <= projected
        assert connector_cost(config).gflops == pytest.approx(2e-9 * connector_cost(config).macs)

    def test_widths_are_those_of_the_inputs(self) -> None:
        config = small_config()
        more = connector_cost(small_config(global_width=DG + 1)).macs - connector_cost(config).macs
        assert more == 2 * config.gate_bottleneck + config.alignment_size
        assert (config.text_width, config.visual_width) == (DT, DV)
