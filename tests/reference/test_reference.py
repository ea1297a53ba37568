"""The reference operators against independent definitions, their edge cases, and gradcheck in fp64."""

from __future__ import annotations

import itertools

import pytest
import reference_checks as checks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import F64, attention_inputs, close, gate_inputs, key_masks
from torch import Tensor
from torch.autograd import gradcheck

from tgq_fast import reference
from tgq_fast.errors import ArgumentError

FORMS = ("projected", "absorbed")


def differentiable(inputs: dict) -> dict[str, Tensor]:
    return {k: v.requires_grad_(True) for k, v in inputs.items() if isinstance(v, Tensor)}


class TestCrossAttention:
    @pytest.mark.parametrize("form", FORMS)
    def test_is_multihead_attention(self, form: str) -> None:
        checks.check_cross_attention(reference, form)

    def test_statistics(self) -> None:
        checks.check_statistics(reference)

    def test_guide(self) -> None:
        checks.check_guide(reference)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("masked", [False, True])
    def test_gradcheck_of_a_guided_call(self, form: str, masked: bool) -> None:
        inputs = attention_inputs(batch=2, na=2, ne=1, length=3, dv=3, heads=2, head=2)
        inputs["guide_scale"] = torch.randn(2, 2, dtype=F64)
        leaves = differentiable(inputs)
        guide, mask = torch.randn(2, 3, dtype=F64, requires_grad=True), key_masks(2, 3)[3] if masked else None

        def run(*values: Tensor) -> tuple[Tensor, Tensor]:
            given = {**inputs, **dict(zip(leaves, values))}
            return reference.hybrid_cross_attention(**given, guide=guide, key_mask=mask, form=form)[:2]

        assert gradcheck(run, tuple(leaves.values()))
        sum(out.sum() for out in run(*leaves.values())).backward()
        assert guide.grad is None

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"guide": None}, "guide"),
            ({"guide_scale": None}, "guide_scale"),
            ({"guide": torch.zeros(3, 6)}, "guide"),
            ({"guide": torch.zeros(3, 7, dtype=torch.bool)}, "guide"),
            ({"guide_scale": torch.zeros(2, 3)}, "guide_scale"),
        ],
    )
    def test_bad_guides(self, change: dict, name: str) -> None:
        given = {"guide": torch.zeros(3, 7), "guide_scale": torch.zeros(2, 2), **change}
        with pytest.raises(ArgumentError, match=rf"^{name}\b"):
            reference.hybrid_cross_attention(**attention_inputs(), **given)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        batch=st.integers(0, 3),
        na=st.integers(0, 4),
        ne=st.integers(0, 4),
        length=st.integers(0, 9),
        dv=st.integers(1, 9),
        heads=st.integers(1, 3),
        head=st.integers(1, 5),
        masked=st.integers(0, 3),
    )
    def test_absorbed_is_projected(
        self, batch: int, na: int, ne: int, length: int, dv: int, heads: int, head: int, masked: int
    ) -> None:
        inputs = attention_inputs(batch, na, ne, length, dv, heads, head)
        mask = key_masks(batch, length)[masked]
        one, other = (reference.hybrid_cross_attention(**inputs, key_mask=mask, form=form) for form in FORMS)
        close(one.anchored, other.anchored)
        close(one.exploratory, other.exploratory)
        assert one.anchored.shape == (batch, na, heads * head)

    @pytest.mark.parametrize("form", FORMS)
    def test_key_bias_has_no_effect(self, form: str) -> None:
        inputs = attention_inputs()
        with_bias = reference.hybrid_cross_attention(**inputs, form=form)
        without = reference.hybrid_cross_attention(**{**inputs, "k_bias": None}, form=form)
        assert torch.equal(with_bias.anchored, without.anchored)

    @pytest.mark.parametrize("form", FORMS)
    def test_item_that_sees_nothing_is_exactly_zero_with_finite_gradients(self, form: str) -> None:
        inputs = attention_inputs()
        leaves = differentiable(inputs)
        mask = torch.ones(3, 7, dtype=torch.bool)
        mask[1] = False
        output = reference.hybrid_cross_attention(**inputs, key_mask=mask, form=form, return_stats=True)
        both = torch.cat((output.anchored, output.exploratory), dim=1)
        assert not both[1].any() and both[0].all()
        assert torch.isneginf(output.stats.lse[1]).all() and not output.stats.entropy[1].any()
        both.square().sum().backward()
        for name, leaf in leaves.items():
            assert name == "k_bias" or leaf.grad.isfinite().all(), name
        assert not leaves["visual"].grad[1].any()

    @pytest.mark.parametrize("form", FORMS)
    def test_masked_tokens_cannot_matter(self, form: str) -> None:
        inputs = attention_inputs()
        mask = key_masks(3, 7)[2]
        before = reference.hybrid_cross_attention(**inputs, key_mask=mask, form=form)
        inputs["visual"] = torch.where(mask[..., None], inputs["visual"], 1e9)
        after = reference.hybrid_cross_attention(**inputs, key_mask=mask, form=form)
        assert torch.equal(before.anchored, after.anchored) and torch.equal(before.exploratory, after.exploratory)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("masked", range(4))
    def test_gradcheck(self, form: str, masked: int) -> None:
        inputs = attention_inputs(batch=2, na=1, ne=2, length=3, dv=3, heads=2, head=2)
        del inputs["k_bias"]
        leaves = differentiable(inputs)
        mask = key_masks(2, 3)[masked]

        def run(*values: Tensor) -> tuple[Tensor, Tensor]:
            named = dict(zip(leaves, values, strict=True))
            return reference.hybrid_cross_attention(**named, k_bias=None, num_heads=2, key_mask=mask, form=form)[:2]

        assert gradcheck(run, tuple(leaves.values()))

    def test_statistics_carry_no_gradient(self) -> None:
        inputs = attention_inputs()
        differentiable(inputs)
        stats = reference.hybrid_cross_attention(**inputs, return_stats=True).stats
        assert not stats.lse.requires_grad and not stats.entropy.requires_grad and stats.group_mass is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_the_dtype(self, dtype: torch.dtype) -> None:
        inputs = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in attention_inputs().items()}
        for form in FORMS:
            output = reference.hybrid_cross_attention(**inputs, form=form)
            assert output.anchored.dtype == dtype and output.anchored.isfinite().all()

    def test_bad_arguments(self) -> None:
        with pytest.raises(ArgumentError, match="num_heads"):
            reference.hybrid_cross_attention(**{**attention_inputs(), "num_heads": 3})
        with pytest.raises(ArgumentError, match="form"):
            reference.hybrid_cross_attention(**attention_inputs(), form="flash")


class TestSelfAttention:
    def test_visibility(self) -> None:
        checks.check_self_attention(reference)

    @pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
    @pytest.mark.parametrize("explore_sees_text", [False, True])
    def test_gradients_follow_the_visibility(self, mixing: str, explore_sees_text: bool) -> None:
        """∂ row / ∂ column value is non-zero exactly where the table of the method lets the row see the column."""
        q, k, v = (torch.randn(1, 6, 1, 3, dtype=F64, requires_grad=True) for _ in range(3))
        output = reference.stream_self_attention(q, k, v, (2, 2, 2), mixing=mixing, explore_sees_text=explore_sees_text)
        for i, j in itertools.product(range(6), range(6)):
            gradient = torch.autograd.grad(output[0, i].sum(), v, retain_graph=True)[0][0, j]
            assert bool(gradient.any()) == checks.sees("AAEETT"[i], "AAEETT"[j], mixing, explore_sees_text)

    def test_mask_shapes(self) -> None:
        assert reference.stream_mask((2, 1, 3)).shape == (1, 1, 6, 6)
        assert reference.stream_mask((2, 1, 3), text_mask=torch.ones(4, 3, dtype=torch.bool)).shape == (4, 1, 6, 6)

    @pytest.mark.parametrize("mixing", ["block", "one_way", "full"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_gradcheck(self, mixing: str, masked: bool) -> None:
        q, k, v = (torch.randn(2, 5, 1, 2, dtype=F64, requires_grad=True) for _ in range(3))
        mask = torch.tensor([[False, False], [True, False]]) if masked else None

        def run(*values: Tensor) -> Tensor:
            return reference.stream_self_attention(*values, (1, 2, 2), mixing=mixing, text_mask=mask)

        assert gradcheck(run, (q, k, v))

    def test_empty_batch(self) -> None:
        x = torch.randn(0, 5, 2, 4)
        assert reference.stream_self_attention(x, x, x, (1, 2, 2)).shape == (0, 5, 2, 4)

    def test_bad_arguments(self) -> None:
        x = torch.randn(1, 5, 1, 2)
        with pytest.raises(ArgumentError, match="lengths"):
            reference.stream_self_attention(x, x, x, (1, 2, 3))
        with pytest.raises(ArgumentError, match="mixing"):
            reference.stream_self_attention(x, x, x, (1, 2, 2), mixing="none")


class TestModulation:
    def test_is_its_definition(self) -> None:
        checks.check_modulation(reference)

    def test_zero_output_layer_is_the_exact_identity(self) -> None:
        (*inputs, of_a, of_e), alpha = gate_inputs(reference)
        zeroed = [p._replace(w2=torch.zeros_like(p.w2), b2=torch.zeros_like(p.b2)) for p in (of_a, of_e)]
        output = reference.dual_gated_modulation(*inputs, *zeroed, alpha=alpha)
        assert torch.equal(output.anchored, inputs[0]) and torch.equal(output.exploratory, inputs[1])
        assert not output.anchored_gate.any() and not output.exploratory_gate.any()

    def test_minus_one_silences_a_channel(self) -> None:
        (*inputs, of_a, of_e), _ = gate_inputs(reference)
        bias = torch.zeros(6, dtype=F64)
        bias[2] = -1e4
        off = of_a._replace(w2=torch.zeros_like(of_a.w2), b2=bias)
        output = reference.dual_gated_modulation(*inputs, off, of_e)
        assert not output.anchored[..., 2].any()
        assert torch.equal(output.anchored[..., [0, 1, 3, 4, 5]], inputs[0][..., [0, 1, 3, 4, 5]])

    def test_centred_sigmoid(self) -> None:
        z = torch.tensor([-800.0, -1.0, 0.0, 1.0, 800.0], dtype=F64)
        close(reference.centred_sigmoid(z), 2 * torch.sigmoid(z) - 1, 1e-15)
        assert reference.centred_sigmoid(z)[2] == 0

    @pytest.mark.parametrize(("na", "ne", "gate"), [(3, 2, 6), (1, 1, 1), (0, 2, 6), (2, 0, 6)])
    def test_gradcheck(self, na: int, ne: int, gate: int) -> None:
        (a, e, s, has, v_g, of_a, of_e), alpha = gate_inputs(reference, na, ne, gate)
        leaves = [x.requires_grad_(True) for x in (a, e, s, v_g, *of_a, *of_e)]

        def run(a: Tensor, e: Tensor, s: Tensor, v_g: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
            parameters = (reference.GateParameters(*p[:4]), reference.GateParameters(*p[4:]))
            output = reference.dual_gated_modulation(a, e, s, has, v_g, *parameters, alpha=alpha)
            return tuple(x for x in output if x.numel())

        assert gradcheck(run, leaves)

    @pytest.mark.parametrize(("na", "ne"), [(0, 2), (2, 0)])
    def test_empty_stream_is_finite(self, na: int, ne: int) -> None:
        inputs, alpha = gate_inputs(reference, na, ne)
        output = reference.dual_gated_modulation(*inputs, alpha=alpha)
        assert all(x.isfinite().all() for x in output)


class TestLosses:
    def test_info_nce_by_brute_force(self) -> None:
        checks.check_info_nce(reference)

    def test_info_nce_of_one_pair_with_no_negative_is_zero(self) -> None:
        e = torch.eye(2, dtype=F64)
        assert reference.info_nce(e, torch.tensor([1, 0]), torch.tensor(3.0)).item() == 0.0

    def test_info_nce_gradcheck(self) -> None:
        e = torch.randn(6, 3, dtype=F64, requires_grad=True)
        t = torch.tensor(0.5, dtype=F64, requires_grad=True)
        positives, groups = torch.tensor([1, 0, 3, 2, 5, 4]), torch.tensor([0, 0, 0, 0, -1, -1])
        for kwargs in ({}, {"groups": groups}, {"groups": groups, "rows": torch.tensor([4, 1])}):
            chosen = positives[kwargs["rows"]] if "rows" in kwargs else positives
            assert gradcheck(lambda e, t, c=chosen, k=kwargs: reference.info_nce(e, c, t, **k), (e, t))

    def test_losses_of_half_precision_are_fp32(self) -> None:
        e = torch.randn(6, 3, dtype=torch.bfloat16)
        positives = torch.tensor([1, 0, 3, 2, 5, 4])
        assert reference.info_nce(e, positives, torch.tensor(1.0)).dtype == torch.float32
        assert reference.redundancy_loss(e, e).dtype == torch.float32

    def test_redundancy_against_corrcoef(self) -> None:
        checks.check_redundancy(reference)

    def test_redundancy_range(self) -> None:
        a = torch.randn(50, 4, dtype=F64)
        close(reference.redundancy_loss(a, -2 * a + 1, eps=0.0), torch.tensor(1.0, dtype=F64))
        assert reference.redundancy_loss(a, torch.randn(50, 4, dtype=F64)) < 0.2

    @pytest.mark.parametrize("batch", [0, 1])
    def test_redundancy_of_too_few_items_is_zero_with_gradient(self, batch: int) -> None:
        a, e = (torch.randn(batch, 3, requires_grad=True) for _ in range(2))
        loss = reference.redundancy_loss(a, e)
        loss.backward()
        assert loss.item() == 0.0 and not a.grad.any()

    def test_redundancy_gradcheck(self) -> None:
        a, e = (torch.randn(5, 3, dtype=F64, requires_grad=True) for _ in range(2))
        assert gradcheck(reference.redundancy_loss, (a, e))


class TestTopK:
    def test_against_lexsort(self) -> None:
        checks.check_topk(reference)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.data())
    def test_any_scores(self, data: st.DataObject) -> None:
        value = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, float("inf"), float("-inf"), float("nan")])
        rows, size, k = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 7)), data.draw(st.integers(0, 9))
        pool = torch.tensor([data.draw(value) for _ in range(size)]).reshape(size, 1)
        queries = torch.ones(rows, 1)
        exclude = torch.tensor([data.draw(st.integers(-2, size - 1)) for _ in range(rows)], dtype=torch.int64)
        found = reference.exact_topk(queries, pool, k, exclude=exclude)
        banned = [{int(x)} if x >= 0 else set() for x in exclude]
        values, indices = checks.lexsort_topk((queries @ pool.T).numpy(), k, banned)
        assert found.indices.tolist() == indices.tolist()
        assert found.scores.tolist() == values.tolist()

    def test_a_real_minus_infinity_is_no_padding(self) -> None:
        found = reference.exact_topk(torch.ones(1, 1), torch.tensor([[float("-inf")], [float("nan")]]), 2)
        assert found.indices.tolist() == [[0, -1]]
