"""The reference of the modulation against its definition, its edges, gradcheck in fp64."""

from __future__ import annotations

import pytest
import reference_checks as checks
import torch
from reference_checks import F64, close, gate_inputs
from torch import Tensor
from torch.autograd import gradcheck

from tgq_fast import reference


def test_is_its_definition() -> None:
    checks.check_modulation(reference)


def test_zero_output_layer_is_the_exact_identity() -> None:
    (*inputs, of_a, of_e), alpha = gate_inputs(reference)
    zeroed = [p._replace(w2=torch.zeros_like(p.w2), b2=torch.zeros_like(p.b2)) for p in (of_a, of_e)]
    output = reference.dual_gated_modulation(*inputs, *zeroed, alpha=alpha)
    assert torch.equal(output.anchored, inputs[0]) and torch.equal(output.exploratory, inputs[1])
    assert not output.anchored_gate.any() and not output.exploratory_gate.any()


def test_minus_one_silences_a_channel() -> None:
    (*inputs, of_a, of_e), _ = gate_inputs(reference)
    bias = torch.zeros(6, dtype=F64)
    bias[2] = -1e4
    off = of_a._replace(w2=torch.zeros_like(of_a.w2), b2=bias)
    output = reference.dual_gated_modulation(*inputs, off, of_e)
    assert not output.anchored[..., 2].any()
    assert torch.equal(output.anchored[..., [0, 1, 3, 4, 5]], inputs[0][..., [0, 1, 3, 4, 5]])


def test_centred_sigmoid() -> None:
    z = torch.tensor([-800.0, -1.0, 0.0, 1.0, 800.0], dtype=F64)
    close(reference.centred_sigmoid(z), 2 * torch.sigmoid(z) - 1, 1e-15)
    assert reference.centred_sigmoid(z)[2] == 0


@pytest.mark.parametrize(("na", "ne", "gate"), [(3, 2, 6), (1, 1, 1), (0, 2, 6), (2, 0, 6)])
def test_gradcheck(na: int, ne: int, gate: int) -> None:
    (a, e, s, has, v_g, of_a, of_e), alpha = gate_inputs(reference, na, ne, gate)
    leaves = [x.requires_grad_(True) for x in (a, e, s, v_g, *of_a, *of_e)]

    def run(a: Tensor, e: Tensor, s: Tensor, v_g: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
        parameters = (reference.GateParameters(*p[:4]), reference.GateParameters(*p[4:]))
        output = reference.dual_gated_modulation(a, e, s, has, v_g, *parameters, alpha=alpha)
        return tuple(x for x in output if x.numel())

    assert gradcheck(run, leaves)


@pytest.mark.parametrize(("na", "ne"), [(0, 2), (2, 0)])
def test_empty_stream_is_finite(na: int, ne: int) -> None:
    inputs, alpha = gate_inputs(reference, na, ne)
    output = reference.dual_gated_modulation(*inputs, alpha=alpha)
    assert all(x.isfinite().all() for x in output)
