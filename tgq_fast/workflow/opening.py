"""What the steps open first: towers, frozen features, the model of a run."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tgq_fast import console
from tgq_fast.errors import CheckpointError

if TYPE_CHECKING:
    from tgq_fast.data import Catalog
    from tgq_fast.models import TGQFormerConfig, TGQFormerModel
    from tgq_fast.models.features import FeatureStore
    from tgq_fast.models.towers import TextTower, VisionTower

Policy = Literal["raise", "skip"]
REFUSED_ROWS = "refused_rows.jsonl"
"""Beside a pool or in a run: rows of the catalogue that were left out."""


def load_towers(config: TGQFormerConfig) -> tuple[VisionTower, TextTower]:
    """The frozen towers that a configuration names; loaded once per process."""
    return _towers(config.vision_tower, config.text_tower, config.llm, config.max_field_tokens, config.tower_attention)


@functools.lru_cache(maxsize=2)
def _towers(
    vision: str, text: str, llm: str | None, max_field_tokens: int, attention: str | None
) -> tuple[VisionTower, TextTower]:
    from tgq_fast.models import load_text_tower, load_vision_tower

    console.note(f"frozen towers: {vision}, {text}")
    tower = load_vision_tower(vision, attention=attention)
    return tower, load_text_tower(text, vision=tower, llm=llm, max_field_tokens=max_field_tokens)


def open_store(
    catalog: Catalog,
    config: TGQFormerConfig,
    *,
    cache: Path | None,
    on_error: Policy,
    advance: console.Advance | None = None,
) -> FeatureStore:
    """Frozen features of a catalogue: read from the cache, computed where they are missing.

    Args:
        advance: a progress bar to go on with; None draws one.
    """
    from tgq_fast.models import FeatureStore

    vision, text = load_towers(config)
    with console.progress("frozen features") if advance is None else nullcontext(advance) as step:

        def progress(done: int, total: int) -> None:
            step(done, total, "frozen features")

        return FeatureStore.open_or_build(catalog, vision, text, config, cache, progress=progress, on_error=on_error)


def open_run(run: Path) -> TGQFormerModel:
    """The model of a run folder, on the GPU when there is one, with its frozen towers."""
    import torch

    from tgq_fast.models import TGQFormerModel

    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder; `tgq-fast train` makes one")
    model = TGQFormerModel.from_pretrained(run)
    model.set_towers(*load_towers(model.config))
    if torch.cuda.is_available():
        torch.nn.Module.to(model, "cuda")
    return model


def zero_shot_model(catalog: Catalog, config: TGQFormerConfig, *, whitened: bool, cache: Path | None) -> TGQFormerModel:
    """The model that needs no training: its embedding is the frozen image feature, raw or whitened."""
    from tgq_fast.models import TGQFormerModel, fit_whitening
    from tgq_fast.models.whitening import whitening_rows

    whitening = None
    if whitened:
        store = open_store(catalog, config, cache=cache, on_error="skip")
        rows = whitening_rows(catalog, store.valid, config.whitening)
        whitening, config = fit_whitening(store.pictures, rows, config)
    model = TGQFormerModel.zero_shot(config, whitening)
    model.set_towers(*load_towers(config))
    return model
