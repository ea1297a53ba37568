"""A model that works with frozen towers without owning them."""

from __future__ import annotations

import logging
from typing import Any

from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.models.configuration import TGQFormerConfig, tower_digests
from tgq_fast.models.encoding import FeatureExtractor
from tgq_fast.models.processing import TGQFormerProcessor
from tgq_fast.models.towers import TextTower, VisionTower, load_text_tower, load_vision_tower

logger = logging.getLogger(__name__)


class TowerHolder:
    """Frozen towers that are no submodules: loaded on first use, known by digests, never trained or saved.

    A mixin of a model with a `config`.
    """

    config: TGQFormerConfig
    _towers: tuple[VisionTower | None, TextTower | None] = (None, None)
    _extractor: FeatureExtractor | None = None

    def set_towers(self, vision: VisionTower, text: TextTower) -> None:
        """Use these loaded towers.

        Raises:
            ArgumentError: their widths are not the configuration's.
            CheckpointError: the model was made with towers of other weights.
        """
        given = {
            "visual_width": vision.width,
            "global_width": vision.global_width,
            "text_width": text.width,
        }
        for name, value in given.items():
            if getattr(self.config, name) != value:
                raise ArgumentError(name, value, f"{getattr(self.config, name)}, as in the model's configuration")
        known = self.config.tower_digests or {}
        for name, digest in tower_digests(vision, text).items():
            held, dtype = known.get(name, digest), digest.split(":")[0]
            if held == digest:
                continue
            if held.split(":")[0] != dtype:  # the same weights in another dtype have another digest, too
                logger.warning("%s tower: %s weights cannot be told from the model's %s ones", name, dtype, held)
                continue
            tower = "text" if name == "tokenizer" else name
            what = "tokenizer is not that" if name == "tokenizer" else "weights or preprocessing are not those"
            raise CheckpointError(
                f"{tower} tower {getattr(self.config, f'{tower}_tower')!r}: its {what} "
                f"that this model was made with (digest {digest[:20]}…, expected {held[:20]}…); embeddings would "
                "differ. Use the same files, or load the model with tower_digests=None to take these all the same"
            )
        self._towers, self._extractor = (vision, text), None

    def __getstate__(self) -> dict[str, Any]:
        # Loaded towers hold functions and belong to this process; the copy loads them again on first use.
        return {**self.__dict__, "_towers": (None, None), "_extractor": None}

    @property
    def vision_tower(self) -> VisionTower:
        """The frozen vision tower, loaded on first use."""
        return self._loaded_towers()[0]

    @property
    def text_tower(self) -> TextTower:
        """The frozen text tower, loaded on first use."""
        return self._loaded_towers()[1]

    def _loaded_towers(self) -> tuple[VisionTower, TextTower]:
        vision, text = self._towers
        if vision is None or text is None:
            config = self.config
            vision = vision or load_vision_tower(config.vision_tower, attention=config.tower_attention)
            text = text or load_text_tower(
                config.text_tower, vision=vision, llm=config.llm, max_field_tokens=config.max_field_tokens
            )
            self.set_towers(vision, text)
        return vision, text

    @property
    def processor(self) -> TGQFormerProcessor:
        """A processor of this configuration."""
        return self.extractor.processor

    @property
    def extractor(self) -> FeatureExtractor:
        """Items → frozen features."""
        if self._extractor is None:
            self._extractor = FeatureExtractor(self.config, self._loaded_towers)
        return self._extractor
