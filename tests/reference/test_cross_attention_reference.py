"""The reference of hybrid-query cross-attention against independent definitions, its edges, gradcheck in fp64."""

from __future__ import annotations

import pytest
import reference_checks as checks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_checks import F64, attention_inputs, close, differentiable, key_masks
from torch import Tensor
from torch.autograd import gradcheck

from tgq_fast import reference
from tgq_fast.errors import ArgumentError

FORMS = ("projected", "absorbed")


@pytest.mark.parametrize("form", FORMS)
def test_is_multihead_attention(form: str) -> None:
    checks.check_cross_attention(reference, form)


def test_statistics() -> None:
    checks.check_statistics(reference)


def test_guide() -> None:
    checks.check_guide(reference)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_a_guided_call(form: str, masked: bool) -> None:
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
def test_bad_guides(change: dict, name: str) -> None:
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
    batch: int, na: int, ne: int, length: int, dv: int, heads: int, head: int, masked: int
) -> None:
    inputs = attention_inputs(batch, na, ne, length, dv, heads, head)
    mask = key_masks(batch, length)[masked]
    one, other = (reference.hybrid_cross_attention(**inputs, key_mask=mask, form=form) for form in FORMS)
    close(one.anchored, other.anchored)
    close(one.exploratory, other.exploratory)
    assert one.anchored.shape == (batch, na, heads * head)


@pytest.mark.parametrize("form", FORMS)
def test_key_bias_has_no_effect(form: str) -> None:
    inputs = attention_inputs()
    with_bias = reference.hybrid_cross_attention(**inputs, form=form)
    without = reference.hybrid_cross_attention(**{**inputs, "k_bias": None}, form=form)
    assert torch.equal(with_bias.anchored, without.anchored)


@pytest.mark.parametrize("form", FORMS)
def test_item_that_sees_nothing_is_exactly_zero_with_finite_gradients(form: str) -> None:
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
def test_masked_tokens_cannot_matter(form: str) -> None:
    inputs = attention_inputs()
    mask = key_masks(3, 7)[2]
    before = reference.hybrid_cross_attention(**inputs, key_mask=mask, form=form)
    inputs["visual"] = torch.where(mask[..., None], inputs["visual"], 1e9)
    after = reference.hybrid_cross_attention(**inputs, key_mask=mask, form=form)
    assert torch.equal(before.anchored, after.anchored) and torch.equal(before.exploratory, after.exploratory)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", range(4))
def test_gradcheck(form: str, masked: int) -> None:
    inputs = attention_inputs(batch=2, na=1, ne=2, length=3, dv=3, heads=2, head=2)
    del inputs["k_bias"]
    leaves = differentiable(inputs)
    mask = key_masks(2, 3)[masked]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(leaves, values, strict=True))
        return reference.hybrid_cross_attention(**named, k_bias=None, num_heads=2, key_mask=mask, form=form)[:2]

    assert gradcheck(run, tuple(leaves.values()))


def test_statistics_carry_no_gradient() -> None:
    inputs = attention_inputs()
    differentiable(inputs)
    stats = reference.hybrid_cross_attention(**inputs, return_stats=True).stats
    assert not stats.lse.requires_grad and not stats.entropy.requires_grad and stats.group_mass is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in attention_inputs().items()}
    for form in FORMS:
        output = reference.hybrid_cross_attention(**inputs, form=form)
        assert output.anchored.dtype == dtype and output.anchored.isfinite().all()


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="num_heads"):
        reference.hybrid_cross_attention(**{**attention_inputs(), "num_heads": 3})
    with pytest.raises(ArgumentError, match="form"):
        reference.hybrid_cross_attention(**attention_inputs(), form="flash")
