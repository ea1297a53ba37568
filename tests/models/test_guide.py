"""Where the product is: the guide's heads, the mask loss that teaches them, and the direct part that follows them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from connector_inputs import random_features, randomise, small_config
from torch import Tensor
from torch.nn.functional import normalize

from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.connector import TGQFormerConnector
from tgq_fast.models.direct import DirectReadout
from tgq_fast.models.embeddings import AlignmentHead, GuideHead
from tgq_fast.models.outputs import FrozenFeatures

TAUGHT: dict[str, Any] = {"guide": True, "guide_head": "mask", "mask_weight": 0.1, "view_share": 0.5, "norm": "pre"}


def features(dtype: torch.dtype = torch.float64) -> FrozenFeatures:
    found = random_features().to("cpu", dtype)
    found.visual_mask = torch.ones(found.visual_tokens.shape[:2], dtype=torch.bool)
    found.visual_mask[1, 5:] = False
    found.product_share = torch.rand(found.visual_tokens.shape[:2], dtype=dtype)
    return found


class TestGuideHead:
    def head(self) -> GuideHead:
        return randomise(GuideHead(small_config(**TAUGHT))).double()

    def test_score_is_its_definition(self) -> None:
        head, given = self.head(), features()
        gain, width = GuideHead.GAIN, head.image.out_features
        score = head.score(given)
        for b in range(len(score)):
            real = given.metadata_mask[b]
            mean = given.metadata_tokens[b][real].sum(0) / max(int(real.sum()), 1)
            t = gain * (head.text.weight @ mean + head.text.bias)
            for patch in range(score.shape[1]):
                x = given.visual_tokens[b, patch]
                x = x / (x.square().mean() + 1e-6).sqrt()
                expected = gain * (head.image.weight @ x) @ t / math.sqrt(width) + gain * (head.alone.weight[0] @ x)
                assert score[b, patch].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)

    def test_stored_weights_are_divided_by_the_gain(self) -> None:
        torch.manual_seed(0)
        own = TGQFormerConnector(small_config(**TAUGHT)).alignment
        assert isinstance(own, GuideHead)
        bound = math.sqrt(6 / (own.image.in_features + own.image.out_features)) / GuideHead.GAIN
        assert 0.5 * bound < own.image.weight.abs().max() <= bound

    def test_the_mask_loss_alone_trains_it(self) -> None:
        connector = randomise(TGQFormerConnector(small_config(**TAUGHT))).double().train()
        output = connector(features())
        assert output.alignment_logits is None and output.mask_loss is not None
        output.tokens.sum().backward(retain_graph=True)
        assert all(p.grad is None for p in connector.alignment.parameters())
        output.mask_loss.backward()
        assert all(
            p.grad is not None and p.grad.any() for n, p in connector.alignment.named_parameters() if "weight" in n
        )
        others = [n for n, p in connector.named_parameters() if p.grad is not None and p.grad.isnan().any()]
        assert not others

    def test_descent_on_the_mask_loss_finds_the_product(self) -> None:
        torch.manual_seed(0)
        config = small_config(**TAUGHT)
        head, given = GuideHead(config), features(torch.float32)
        direction = normalize(torch.randn(config.token_width), dim=0)
        given.visual_mask, shown = None, torch.zeros(given.visual_tokens.shape[:2])
        shown[:, :3] = 1.0
        given.visual_tokens = given.visual_tokens + 4 * shown[..., None] * direction
        given.product_share = shown
        optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
        for _ in range(60):
            loss = head.train().patch_agreement(given).mask_loss()
            assert loss is not None
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        told = given.has_metadata
        mass = head.eval().patch_agreement(given).guide.softmax(dim=1)[told, :3].sum(dim=1)
        assert (mass > 0.9).all()

    @pytest.mark.parametrize("lacking", [{"mask_weight": 0.0}, {"view_share": 0.0}, {"guide_head": "alignment"}])
    def test_without_views_to_teach_it_the_alignment_head_guides(self, lacking: dict[str, Any]) -> None:
        config = small_config(**{**TAUGHT, **lacking})
        assert isinstance(TGQFormerConnector(config).alignment, AlignmentHead)

    def test_the_gates_see_the_mean_score(self) -> None:
        connector = randomise(TGQFormerConnector(small_config(**TAUGHT))).double().eval()
        given = features()
        assert isinstance(connector.alignment, GuideHead) and connector.standardiser is not None
        connector.standardiser.mean.fill_(0.25)
        score = connector.alignment.score(given) * given.visual_mask
        mean = score.sum(dim=1) / given.visual_mask.sum(dim=1)
        expected = ((mean - 0.25) / math.sqrt(1 + 1e-6)).float().masked_fill(~given.has_metadata, 0.0)
        torch.testing.assert_close(connector(given).agreement, expected, rtol=1e-5, atol=1e-5)


class TestDirect:
    def readout(self, **overrides: Any) -> DirectReadout:
        config = small_config(**{**TAUGHT, "direct_size": 4, "embedding_size": 12, "direct_switch": True, **overrides})
        return randomise(DirectReadout(config)).double()

    def given(self) -> tuple[Tensor, Tensor, FrozenFeatures, Tensor]:
        found = features()
        agreement = torch.randn(found.visual_tokens.shape[:2], dtype=torch.float64) * found.visual_mask
        e, v = (normalize(torch.randn(len(agreement), 8, dtype=torch.float64), dim=1) for _ in range(2))
        return e, v, found, agreement

    def pool(self, readout: DirectReadout, found: FrozenFeatures, agreement: Tensor | None, b: int) -> Tensor:
        x = found.visual_tokens[b][found.visual_mask[b]]
        logits = (x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()) @ readout.saliency
        if agreement is not None:
            logits = logits + readout.sharpness * agreement[b][found.visual_mask[b]]
        return logits.softmax(0) @ x

    def test_switch_is_its_definition(self) -> None:
        readout, (e, v, found, agreement) = self.readout(), self.given()
        mixed, alone = readout(e, v, found, agreement)
        assert readout.plain is not None and readout.switch is not None
        a = torch.sigmoid(readout.share_logit)
        for b in range(len(e)):
            plain = normalize(readout.plain(self.pool(readout, found, None, b)), dim=0)
            guided = normalize(readout.projection(self.pool(readout, found, agreement, b)), dim=0)
            x = found.visual_tokens[b][found.visual_mask[b]]
            spread = agreement[b].square().mean().sqrt()
            seen = torch.cat((x.mean(0), agreement[b].max()[None], 4 * spread[None]))
            w = torch.sigmoid(3 * readout.switch(seen))
            part = normalize((1 - w) * plain + w * guided, dim=0)
            expected = torch.cat(((1 - a).sqrt() * e[b], a.sqrt() * part))
            torch.testing.assert_close(mixed[b].double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                alone[b].double(), torch.cat(((1 - a).sqrt() * v[b], a.sqrt() * plain)), rtol=1e-5, atol=1e-5
            )

    def test_both_are_unit_vectors_and_v_emb_sees_no_metadata(self) -> None:
        readout, (e, v, found, agreement) = self.readout(), self.given()
        mixed, alone = readout(e, v, found, agreement)
        other, same = readout(e, v, found, -3 * agreement)
        torch.testing.assert_close(mixed.norm(dim=1), torch.ones(len(e), dtype=mixed.dtype))
        torch.testing.assert_close(alone.norm(dim=1), torch.ones(len(e), dtype=alone.dtype))
        assert torch.equal(alone, same) and not torch.allclose(mixed, other)

    def test_starts_half_way_between_two_equal_maps(self) -> None:
        fresh = DirectReadout(small_config(**TAUGHT, direct_size=4, embedding_size=12, direct_switch=True)).double()
        e, v, found, agreement = self.given()
        assert fresh.guided_share(found, agreement).unique().tolist() == [0.5]
        assert torch.equal(fresh.plain.weight, fresh.projection.weight)
        mixed, alone = fresh(e, v, found, torch.zeros_like(agreement))  # nothing to follow: both maps say the same
        torch.testing.assert_close(mixed[:, 8:], alone[:, 8:])

    def test_the_switch_trains_and_the_agreement_does_not_through_it(self) -> None:
        readout, (_, _, found, agreement) = self.readout(), self.given()
        agreement.requires_grad_()
        share = readout.guided_share(found, agreement)
        share.sum().backward()
        assert agreement.grad is None and readout.switch.weight.grad.any()

    @pytest.mark.parametrize("without", [{"guide": False}, {"connector": "mlp"}, {"direct_switch": False}])
    def test_no_switch_where_nothing_guides(self, without: dict[str, Any]) -> None:
        assert self.readout(**without).switch is None


def test_older_configurations_have_neither() -> None:
    old = TGQFormerConfig.preset("tiny").to_dict()
    for name in ("guide_head", "direct_switch"):
        del old[name]
    config = TGQFormerConfig.from_dict(old)
    assert config.guide_head == "alignment" and not config.direct_switch
