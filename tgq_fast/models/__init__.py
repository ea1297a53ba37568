"""Configuration, frozen towers, processor, connectors, readers, feature cache and the assembled model."""

from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.connector import TGQFormerConnector
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.modeling import TGQFormerModel
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures, TGQFormerOutput
from tgq_fast.models.presets import PRESETS
from tgq_fast.models.processing import ProcessedItems, PromptInputs, TGQFormerProcessor
from tgq_fast.models.qformer_weights import load_qformer_weights
from tgq_fast.models.towers import TextTower, VisionTower, load_text_tower, load_vision_tower
from tgq_fast.models.whitening import Whitening, fit_whitening, whitening_rows
from tgq_fast.models.zoo import CONNECTORS, ConnectorSpec, connector_spec
from tgq_fast.models.zoo.budget import build_connector, match_budget

__all__ = [
    "CONNECTORS",
    "PRESETS",
    "ConnectorOutput",
    "ConnectorSpec",
    "FeatureStore",
    "FrozenFeatures",
    "ProcessedItems",
    "PromptInputs",
    "TGQFormerConfig",
    "TGQFormerConnector",
    "TGQFormerModel",
    "TGQFormerOutput",
    "TGQFormerProcessor",
    "TextTower",
    "VisionTower",
    "Whitening",
    "build_connector",
    "connector_spec",
    "fit_whitening",
    "load_qformer_weights",
    "load_text_tower",
    "load_vision_tower",
    "match_budget",
    "whitening_rows",
]
