"""The one list of connectors: what configuration, command line, documentation and studies know of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tgq_fast.errors import ArgumentError

if TYPE_CHECKING:
    from torch import nn

    from tgq_fast.models.configuration import TGQFormerConfig

__all__ = ["CONNECTORS", "ZERO_SHOT", "ConnectorSpec", "connector_spec"]

_ZOO = "tgq_fast.models.zoo"


@dataclass(frozen=True)
class ConnectorSpec:
    """One connector.

    Attributes:
        name: as in `TGQFormerConfig.connector`.
        target: "module:class"; the class takes a configuration.
        summary: what it does, in a line of Markdown.
        source: where it comes from.
        reads_metadata: whether the connector itself reads metadata tokens.
        reader_sees_metadata: whether the reader does.
        sees_picture: False: it emits no visual token.
        foreign_metadata: every item gets another item's metadata, in training and evaluation.
        control: a control rather than a rival.
        settings: fields of the configuration that the name fixes.
        sees_place: whether its tokens depend on where a visual token stands in the sequence.
        has_attention: whether it can return attention over the visual tokens.
    """

    name: str
    target: str
    summary: str
    source: str
    reads_metadata: bool = False
    reader_sees_metadata: bool = True
    sees_picture: bool = True
    foreign_metadata: bool = False
    control: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    sees_place: bool = False
    has_attention: bool = False

    def tokens(self, config: TGQFormerConfig) -> int:
        """Number of visual tokens that the reader gets."""
        return config.num_queries if self.sees_picture else 0

    def build(self, config: TGQFormerConfig) -> nn.Module:
        """A new connector."""
        module, name = self.target.split(":")
        cls: Callable[[TGQFormerConfig], nn.Module] = getattr(importlib.import_module(module), name)
        return cls(config)

    @property
    def is_hybrid(self) -> bool:
        """Whether it is the hybrid-query connector (with anchored and exploratory streams), in any variant."""
        return self.target == _HYBRID


_HYBRID = "tgq_fast.models.connector:TGQFormerConnector"
_QFORMER = f"{_ZOO}.qformer:QFormerConnector"

_SPECS = (
    ConnectorSpec(
        "tgq",
        _HYBRID,
        "the hybrid-query connector",
        "TGQ-Former",
        reads_metadata=True,
        has_attention=True,
    ),
    ConnectorSpec(
        "mlp",
        f"{_ZOO}.pooling:MLPProjector",
        "means over N runs of neighbouring visual tokens, LayerNorm, two-layer GELU MLP",
        "DeCo, InternVL",
        sees_place=True,
    ),
    ConnectorSpec(
        "avgpool",
        f"{_ZOO}.pooling:AveragePoolProjector",
        "the same with one mean over the whole image; its N tokens differ by a learned offset",
        "LLaVA-1.5's projector",
    ),
    ConnectorSpec(
        "attention-pool",
        f"{_ZOO}.attention_pool:AttentionPool",
        "N probes attend to the visual tokens once, then one MLP",
        "SigLIP's pooling head",
        has_attention=True,
    ),
    ConnectorSpec(
        "qformer",
        _QFORMER,
        "N learned queries, no text",
        "BLIP-2",
        has_attention=True,
    ),
    ConnectorSpec(
        "instructblip",
        _QFORMER,
        "N learned queries, metadata tokens in the self-attention",
        "InstructBLIP",
        reads_metadata=True,
        has_attention=True,
    ),
    ConnectorSpec(
        "perceiver",
        f"{_ZOO}.perceiver:PerceiverResampler",
        "N latents attend to the visual tokens and themselves",
        "Flamingo, IDEFICS",
    ),
    ConnectorSpec(
        "c-abstractor",
        f"{_ZOO}.abstractor:CAbstractor",
        "convolutions over the grid of patches, adaptive average pooling to N cells, convolutions, MLP",
        "Honeybee",
        sees_place=True,
    ),
    ConnectorSpec(
        "notellm-2",
        _QFORMER,
        "`qformer`, image compressed in context, and the frozen image feature gated into both embeddings",
        "NoteLLM-2",
        settings={"late_fusion": "image"},
        has_attention=True,
    ),
    ConnectorSpec(
        "ungated",
        _HYBRID,
        "`tgq` without gates, its feed-forwards widened to the same number of parameters",
        "ours, a control",
        reads_metadata=True,
        control=True,
        settings={"gate": "none"},
        has_attention=True,
    ),
    ConnectorSpec(
        "shuffled-metadata",
        _HYBRID,
        "`tgq` where every item has another item's metadata, in training and evaluation",
        "ours, a control",
        reads_metadata=True,
        foreign_metadata=True,
        control=True,
        has_attention=True,
    ),
    ConnectorSpec(
        "image-only",
        _QFORMER,
        "`qformer`, so that comparing the two shows what metadata in the prompt alone is worth",
        "ours, a control",
        reader_sees_metadata=False,
        control=True,
        has_attention=True,
    ),
    ConnectorSpec(
        "text-only",
        f"{_ZOO}.controls:TextOnlyConnector",
        "no visual token at all, no connector parameters",
        "ours, a control",
        sees_picture=False,
        control=True,
    ),
)

CONNECTORS: Mapping[str, ConnectorSpec] = {spec.name: spec for spec in _SPECS}
"""Connectors that train, by name."""

ZERO_SHOT = "zero-shot"
"""Connector of a model without training: its embedding is the (whitened) global image."""

_ALL = {
    **CONNECTORS,
    ZERO_SHOT: ConnectorSpec(
        ZERO_SHOT,
        f"{_ZOO}.controls:TextOnlyConnector",
        "nothing: the frozen image feature is the embedding",
        "ours, the floor",
        reader_sees_metadata=False,
        control=True,
    ),
}


def connector_spec(name: str) -> ConnectorSpec:
    """What the list says of a connector, or of :data:`ZERO_SHOT`.

    Raises:
        ArgumentError: unknown name.
    """
    try:
        return _ALL[name]
    except (KeyError, TypeError):
        raise ArgumentError("connector", repr(name), "one of " + ", ".join(CONNECTORS)) from None
