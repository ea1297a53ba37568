"""Multiply-accumulates and trainable parameters of a connector, from its configuration alone.

Only matrix products are counted (projections, attention, feed-forwards, gates, pooling), once per item and forward
pass, at the full length M of the metadata; softmax, LayerNorm and activations are not, nor is whitening, which is
the same for every connector. One MAC is two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tgq_fast.models.attention import StreamLayout
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.layers import stream_layout
from tgq_fast.models.zoo.abstractor import BLOCKS, patch_grid
from tgq_fast.models.zoo.budget import count_parameters
from tgq_fast.models.zoo.registry import connector_spec
from tgq_fast.ops.cross_attention_cost import form_cost

__all__ = ["ConnectorCost", "connector_cost"]

Form = Literal["auto", "projected", "absorbed"]


@dataclass(frozen=True)
class ConnectorCost:
    """Cost of one connector.

    Attributes:
        connector: its name.
        parameters: trainable parameters, without the projection to the reader's width.
        macs: multiply-accumulates per item, forward.
        tokens: visual tokens N that the reader then has to read.
    """

    connector: str
    parameters: int
    macs: int
    tokens: int

    @property
    def gflops(self) -> float:
        """10⁹ floating point operations per item."""
        return 2e-9 * self.macs


def connector_cost(
    config: TGQFormerConfig,
    *,
    num_visual_tokens: int | None = None,
    num_metadata_tokens: int | None = None,
    form: Form = "auto",
    device: str = "cpu",
) -> ConnectorCost:
    """Cost of `build_connector(config)`.

    Args:
        num_visual_tokens: L; None: `config.num_visual_tokens`.
        num_metadata_tokens: M, at least 1; None: `config.max_metadata_tokens`.
        form: how cross-attention is computed; "auto" is what inference on `device` chooses.
        device: "cpu" or "cuda", for "auto".
    """
    length = config.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
    text = max(1, config.max_metadata_tokens if num_metadata_tokens is None else num_metadata_tokens)
    name, n, d = config.connector, config.num_queries, config.hidden_size
    spec = connector_spec(name)
    if not spec.sees_picture:
        return ConnectorCost(name, 0, 0, 0)
    if name in ("mlp", "avgpool"):
        cells = n if name == "mlp" else 1
        hidden = config.intermediate_size
        macs = cells * (length * config.token_width + config.token_width * hidden + hidden * d)
        return ConnectorCost(name, count_parameters(config), macs, n)
    if name == "perceiver":
        return ConnectorCost(name, count_parameters(config), _perceiver_macs(config, length), n)
    if name == "c-abstractor":
        return ConnectorCost(name, count_parameters(config), _abstractor_macs(config, length), n)

    def cross(queries: int, keys: int, width: int) -> int:
        """Query and output projections, and attention in the form asked for."""
        chosen: str = form
        if form == "auto":
            chosen = form_cost(
                queries=queries,
                length=keys,
                visual_width=width,
                width=d,
                num_heads=config.num_attention_heads,
                device=device,
            ).best
        if chosen == "absorbed":
            attention = 2 * queries * config.num_attention_heads * keys * width + 2 * queries * d * width
        else:
            attention = 2 * keys * width * d + 2 * queries * keys * d
        return 2 * queries * d * d + attention

    if name == "attention-pool":
        macs = cross(n, length, config.token_width) + 2 * n * d * config.intermediate_size
        return ConnectorCost(name, count_parameters(config), macs, n)
    layout = stream_layout(config)
    m = text if layout.reads_text else 0
    macs = text * config.text_width * d if m or layout.num_anchored else 0
    if layout.num_anchored:
        macs += cross(layout.num_anchored, text, d)
    for index in range(config.num_hidden_layers):
        wanted = index < config.num_hidden_layers - 1  # the last layer's text rows are keys and values only
        macs += 4 * n * d * d + (4 if wanted else 2) * m * d * d
        macs += 2 * d * visible_pairs(layout, m)
        if index % config.cross_attention_frequency == 0:
            macs += cross(n, length, config.token_width)
        macs += 2 * d * config.intermediate_size * (n + (m if wanted else 0))
    if spec.is_hybrid:
        macs += _modulation_macs(config)
        if config.guide and layout.num_anchored:
            macs += config.alignment_size * (length * config.token_width + length + config.text_width)
            macs += length * config.token_width if config.guides_by_mask else 0
    return ConnectorCost(name, count_parameters(config), macs, n)


def visible_pairs(layout: StreamLayout, num_text: int) -> int:
    """Query–key pairs that self-attention over [A; E; T] computes."""
    na, ne, m = layout.num_anchored, layout.num_exploratory, num_text
    if layout.mixing == "full":
        return (na + ne + m) ** 2
    anchored = na * (na + m + (ne if layout.mixing == "one_way" else 0))
    return anchored + ne * (ne + (m if layout.explore_sees_text else 0)) + m * m


def _perceiver_macs(config: TGQFormerConfig, length: int) -> int:
    n, d, source = config.num_queries, config.hidden_size, length + config.num_queries
    macs = length * config.token_width * d if config.token_width != d else 0
    layer = 2 * n * d * d + 2 * source * d * d + 2 * n * source * d + 2 * n * d * config.intermediate_size
    return macs + config.num_hidden_layers * layer


def _abstractor_macs(config: TGQFormerConfig, length: int) -> int:
    n, d, w = config.num_queries, config.hidden_size, config.intermediate_size
    macs = n * (w * d + d * d)
    for places, widths in (
        (patch_grid(length)[0] ** 2, [config.token_width] + [w] * (BLOCKS - 1)),
        (n, [w] * BLOCKS),
    ):
        for width in widths:
            convolutions = width * w + 9 * w + w * w + (width * w if width != w else 0)
            macs += places * convolutions + 2 * w * round(width / 4)
    return macs


def _modulation_macs(config: TGQFormerConfig) -> int:
    if config.gate == "none":
        return 0
    d, dg, r = config.hidden_size, config.image_width, config.gate_bottleneck
    out = d if config.gate == "vector" else 1
    macs = r * (dg + d + out) if config.num_exploratory_queries else 0
    if config.num_anchored_queries:
        macs += r * (2 + dg + 2 * d + out + (3 if config.gate_sees_patches else 0))
        if config.agreement == "alignment" and not config.guides_by_mask:
            macs += config.alignment_size * (dg + config.text_width)
    return macs
