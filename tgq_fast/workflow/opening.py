"""What the steps open first: towers, frozen features, the model of a run."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tgq_fast.arguments import checked
from tgq_fast.errors import CheckpointError
from tgq_fast.watch import SILENT, Advance, Watch

if TYPE_CHECKING:
    from tgq_fast.data import Catalog
    from tgq_fast.models import TGQFormerConfig, TGQFormerModel
    from tgq_fast.models.features import FeatureStore
    from tgq_fast.models.towers import TextTower, VisionTower

Policy = Literal["raise", "skip"]
REFUSED_ROWS = "refused_rows.jsonl"
"""Beside a pool or in a run: rows of the catalogue that were left out."""


_loaded: dict[tuple[str, str, str | None, int, str | None], tuple[VisionTower, TextTower]] = {}


def load_towers(config: TGQFormerConfig, watch: Watch = SILENT) -> tuple[VisionTower, TextTower]:
    """The frozen towers that a configuration names; the last two pairs are kept."""
    names = config.vision_tower, config.text_tower, config.llm, config.max_field_tokens, config.tower_attention
    found = _loaded.get(names)
    if found is None:
        watch.note(f"frozen towers: {config.vision_tower}, {config.text_tower}")
        found = _towers(*names)
        while len(_loaded) >= 2:
            del _loaded[next(iter(_loaded))]
        _loaded[names] = found
    return found


def _towers(
    vision: str, text: str, llm: str | None, max_field_tokens: int, attention: str | None
) -> tuple[VisionTower, TextTower]:
    from tgq_fast.models import load_text_tower, load_vision_tower

    tower = load_vision_tower(vision, attention=attention)
    return tower, load_text_tower(text, vision=tower, llm=llm, max_field_tokens=max_field_tokens)


def open_store(
    catalog: Catalog,
    config: TGQFormerConfig,
    *,
    cache: Path | None,
    on_error: Policy,
    advance: Advance | None = None,
    watch: Watch = SILENT,
) -> FeatureStore:
    """Frozen features of a catalogue: read from the cache, computed where they are missing.

    Args:
        advance: goes on being called; None: a step of its own is begun.
    """
    from tgq_fast.models import FeatureStore

    vision, text = load_towers(config, watch)
    with watch.progress("frozen features") if advance is None else nullcontext(advance) as step:

        def progress(done: int, total: int) -> None:
            step(done, total, "frozen features")

        return FeatureStore.open_or_build(catalog, vision, text, config, cache, progress=progress, on_error=on_error)


@checked
def open_run(run: Path, watch: Watch = SILENT) -> TGQFormerModel:
    """The model of a run folder, on the GPU when there is one, with its frozen towers."""
    import torch

    from tgq_fast.models import TGQFormerModel

    if not (run := Path(run)).is_dir():
        raise CheckpointError(f"{run}: no such run folder; `tgq-fast train` makes one")
    model = TGQFormerModel.from_pretrained(run)
    model.set_towers(*load_towers(model.config, watch))
    if torch.cuda.is_available():
        torch.nn.Module.to(model, "cuda")
    return model


def zero_shot_model(
    catalog: Catalog, config: TGQFormerConfig, *, whitened: bool, cache: Path | None, watch: Watch = SILENT
) -> TGQFormerModel:
    """The model that needs no training: its embedding is the frozen image feature, raw or whitened."""
    from tgq_fast.models import TGQFormerModel, fit_whitening
    from tgq_fast.models.whitening import shrinkage_of_few, whitening_rows

    whitening = None
    if whitened:
        store = open_store(catalog, config, cache=cache, on_error="skip", watch=watch)
        rows = whitening_rows(catalog, store.valid, config.whitening)
        config = copy.deepcopy(config)
        config.whitening_shrinkage = shrinkage_of_few(len(rows), config.whitening, config.whitening_shrinkage)
        whitening, config = fit_whitening(store.pictures, rows, config)
    model = TGQFormerModel.zero_shot(config, whitening)
    model.set_towers(*load_towers(config, watch))
    return model
