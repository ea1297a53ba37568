"""Dual-gated vector modulation of both streams."""

from __future__ import annotations

from torch import Tensor

from tgq_fast import reference
from tgq_fast.ops.dispatch import Decision, choose, explainer
from tgq_fast.reference.modulation import GateParameters, ModulationOutput

__all__ = ["dual_gated_modulation"]

_OP = "dual_gated_modulation"


def dual_gated_modulation(
    anchored: Tensor,
    exploratory: Tensor,
    agreement: Tensor,
    has_metadata: Tensor,
    global_image: Tensor,
    anchored_parameters: GateParameters,
    exploratory_parameters: GateParameters,
    *,
    alpha: float = 1.0,
    backend: str | None = None,
) -> ModulationOutput:
    """Scale every channel of each stream by 1 + α·gate.

    Arguments and result are those of :func:`tgq_fast.reference.dual_gated_modulation`; `backend` as in
    :mod:`tgq_fast.ops.dispatch`.

    Raises:
        BackendError: a backend that was asked for by name cannot run this call.
    """
    arguments = (
        anchored,
        exploratory,
        agreement,
        has_metadata,
        global_image,
        anchored_parameters,
        exploratory_parameters,
    )
    _decide(*arguments, alpha=alpha, backend=backend)
    return reference.dual_gated_modulation(*arguments, alpha=alpha)


@explainer(_OP)
def _decide(
    anchored: Tensor,
    exploratory: Tensor,
    agreement: Tensor,
    has_metadata: Tensor,
    global_image: Tensor,
    anchored_parameters: GateParameters,
    exploratory_parameters: GateParameters,
    *,
    alpha: float = 1.0,
    backend: str | None = None,
) -> Decision:
    requested, chosen, rejected = choose(_OP, backend, {"torch": ()})
    return Decision(_OP, requested, chosen, None, rejected)
