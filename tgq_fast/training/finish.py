"""The end of a run: what is kept of it, and run.json that says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tgq_fast.evaluation import Evaluation
from tgq_fast.io.identity import sha256_file
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.inference import evaluating
from tgq_fast.models.modeling import TGQFormerModel
from tgq_fast.models.second_look import calibrate
from tgq_fast.models.whitening import Whitening, paired_rows, whitening_rows
from tgq_fast.pool.embed import WHITENED_FLOOR
from tgq_fast.training.folder import CHECKPOINTS, LOG, MODEL_FILES, TRAINED, write_manifest
from tgq_fast.training.trainer import BEST_METRIC, TGQTrainer
from tgq_fast.training.verdict import judge

__all__ = ["finish_run"]


def finish_run(
    folder: Path,
    config: TGQFormerConfig,
    manifest: dict[str, Any],
    arguments: dict[str, Any],
    trainer: TGQTrainer,
    model: TGQFormerModel,
    floors: dict[str, Evaluation],
    whitening: Whitening | None,
    batch_size: int,
) -> dict[str, Any]:
    """Judge the trained model, write what is kept and say so in run.json, whose content is returned."""
    state = trainer.state
    has_validation = bool(floors)
    verdict = judge(trainer.validate(), floors) if floors else None
    own = whitening_rows(trainer.catalog, trainer.store.valid, config.whitening or 1)
    # Pictures of products that training has not seen may be of another kind, such as those of another shop.
    unseen = paired_rows(trainer.catalog, "validation", trainer.store.valid)
    with evaluating(model):
        for rows in (own, unseen):
            threshold = calibrate(model, trainer.store, rows)
    if verdict is not None and verdict.keep != "trained" and arguments["keep"] == "best":
        model.save_pretrained(folder / TRAINED)
        floor_model = TGQFormerModel.zero_shot(config, whitening if verdict.keep == WHITENED_FLOOR else None)
        floor_model.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    finished = {
        **manifest,
        "status": "finished",
        "result": {
            "steps": state.global_step,
            "best_step": state.best_global_step or state.global_step,
            "best_metric": state.best_metric,
            "metric": f"validation {BEST_METRIC}" if has_validation else None,
            "batch_size": batch_size,
            "second_look": threshold,
            "trainable_parameters": sum(p.numel() for _, p in model.trainable_parameters()),
            "verdict": None if verdict is None else verdict.to_dict(),
        },
        "files": {name: sha256_file(folder / name) for name in (*MODEL_FILES, LOG)},
    }
    write_manifest(folder, finished)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return finished
