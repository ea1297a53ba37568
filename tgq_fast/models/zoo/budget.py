"""Building connectors, counting their parameters, and giving them all the same number of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tgq_fast.errors import ArgumentError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.direct import DirectReadout
from tgq_fast.models.readers import LateFusion
from tgq_fast.models.zoo.registry import connector_spec

__all__ = ["TOLERANCE", "build_connector", "count_parameters", "match_budget"]

TOLERANCE = 0.01


def build_connector(config: TGQFormerConfig) -> nn.Module:
    """The connector that `config.connector` names.

    All have ``forward(features: FrozenFeatures, *, return_attention=False) -> ConnectorOutput``.

    Raises:
        ArgumentError: unknown name, or sizes that the connector cannot have.
    """
    return connector_spec(config.connector).build(config)


def count_parameters(config: TGQFormerConfig) -> int:
    """Trainable parameters of the connector that `config` describes, without allocating it.

    The direct part belongs to the method and counts. So does the late gate of `late_fusion` where its width is known,
    with the light reader.
    (With an LLM of width w it adds w (2w + 1), and w dg for late_fusion="image".)
    """
    with torch.device("meta"):
        parts = [build_connector(config)]
        if config.late_fusion != "none" and config.llm is None:
            parts.append(LateFusion(config.hidden_size, config))
        if config.direct_width:
            parts.append(DirectReadout(config))
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)


def match_budget(config: TGQFormerConfig, connector: str, **overrides: Any) -> TGQFormerConfig:
    """A copy of `config` with another connector and as many trainable connector parameters, within 1 %.

    `intermediate_size` is what is adjusted: the width of feed-forwards, of a projector's hidden layer, or of
    convolutions; depth, width d and number of tokens stay. Where that is near enough it becomes a multiple of 8, which
    is friendlier to matrix units. ``text-only`` has nothing to adjust.

    Args:
        config: the budget is the parameter count of its own connector.
        connector: name of the other connector.
        overrides: further fields of the copy, e.g. ``gate="none"`` for an ungated connector of equal size.

    Raises:
        ArgumentError: unknown connector or field, or no width gets within 1 % of the budget.
    """
    spec, budget = connector_spec(connector), count_parameters(config)
    if unknown := [name for name in overrides if not hasattr(config, name)]:
        raise ArgumentError("overrides", ", ".join(unknown), "names of configuration fields")
    matched = config.with_connector(connector, **overrides)
    if not spec.sees_picture:
        return matched

    def size(width: int) -> int:
        matched.intermediate_size = width
        return count_parameters(matched)

    nearest = matched.intermediate_size
    for _ in range(20):  # Newton's method: the count grows with the width linearly, or (convolutions) with its square
        found = size(nearest)
        step = round(4 * (budget - found) / (size(nearest + 4) - found))
        if not step or nearest + step < 1:
            break
        nearest += step
    for width in (max(8, 8 * round(nearest / 8)), nearest):
        if abs(size(width) - budget) <= TOLERANCE * budget:
            return matched
    raise ArgumentError(
        "connector",
        f"{connector!r} with {size(nearest):,} parameters",
        f"one that fits the budget of {budget:,} within {TOLERANCE:.0%}",
        "Enlarge intermediate_size of the configuration that sets the budget.",
    )
