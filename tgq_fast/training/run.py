"""One training run in one folder, resumable; see :mod:`tgq_fast.training.folder` for what lies in it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments, set_seed

from tgq_fast.arguments import checked
from tgq_fast.data import Catalog, RejectLog
from tgq_fast.defaults import own_randomness, plain_tensors
from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.io.files import locked, make_folder, storage_errors
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.modeling import TGQFormerModel
from tgq_fast.models.pictures import PictureFeatures
from tgq_fast.models.processing import TGQFormerProcessor
from tgq_fast.models.towers import TextTower, VisionTower, load_text_tower, load_vision_tower
from tgq_fast.models.views import ViewStore
from tgq_fast.models.whitening import Whitening, fit_whitening, whitened_pictures, whitening_rows
from tgq_fast.training.finish import finish_run
from tgq_fast.training.folder import (
    CHECKPOINTS,
    LOCK,
    LOG,
    REJECTS,
    RunLog,
    TrainResult,
    claim,
    load_result,
    write_manifest,
)
from tgq_fast.training.pairs import DistinctBatchSampler, PairCollator, PairDataset
from tgq_fast.training.ranks import Team, refuse_fsdp
from tgq_fast.training.reporting import check_reporters, reporters
from tgq_fast.training.trainer import BEST_METRIC, Event, TGQTrainer, last_complete_checkpoint
from tgq_fast.training.verdict import measure_floors
from tgq_fast.training.warm import WarmStart, warm_start

__all__ = ["TrainResult", "train"]

logger = logging.getLogger(__name__)


@plain_tensors()
@checked
def train(
    catalog: Catalog,
    config: TGQFormerConfig,
    *,
    out: str | Path,
    epochs: int = 3,
    seed: int = 0,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    bf16: bool | None = None,
    max_steps: int | None = None,
    keep: Literal["best", "trained"] = "best",
    checkpoint_steps: int | None = None,
    log_steps: int = 10,
    validations: int = 6,
    resume: bool = False,
    init_from: str | Path | None = None,
    report_to: str | Sequence[str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    cache_dir: str | Path | None = None,
    towers: tuple[VisionTower, TextTower] | None = None,
    store: FeatureStore | None = None,
    views: ViewStore | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> TrainResult:
    """Train a connector and reader over frozen towers on the training pairs of a catalogue.

    The checkpoint with the best validation HR@10 (over the full pool, after every epoch of a short run and about
    `validations` times in a long one; of equal ones the one with the best MRR) becomes the run's model, unless the
    frozen feature without training is better on the same queries: `run.json` holds that verdict in words and numbers. A
    run that was killed resumes from its last complete checkpoint to the same weights, bit for bit on the CPU.

    Several processes (`torchrun`, `accelerate launch`) train one run together: they see the batches of one process,
    each computes its share, and every term of the loss is that of the whole batch. Rank 0 alone writes.

    Args:
        catalog: items, images and pairs.
        config: the model; tower widths are filled in here.
        out: the run's folder.
        epochs: passes over the items of the training pairs, one pair drawn for each.
        seed: of initialisation, batch order, dropout and field dropout.
        batch_size: pairs B per step, over all processes; 2B items. Lowered when the pairs cannot fill it with distinct
            items, or the processes cannot share it evenly.
        lr: peak learning rate of AdamW; cosine to zero after a linear warm-up.
        weight_decay: of matrices.
        warmup: share of the steps.
        bf16: mixed precision; None: where the processor multiplies bf16 matrices (AMX, or a GPU that does).
        max_steps: stop after so many steps instead of after `epochs`.
        keep: "best" keeps the frozen feature where training did not help (the trained model then lies in `trained/`);
            "trained" keeps the trained model whatever the verdict.
        checkpoint_steps: also write a checkpoint every so many steps, besides the one after each epoch.
        log_steps: steps per log entry.
        validations: of a run of more epochs than that; each embeds the whole catalogue.
        resume: go on with an unfinished run of the same arguments; a finished one is returned as it is.
        init_from: run whose trained weights and whitening this one starts from, instead of random ones; `config` must
            be its configuration but for what only training reads.
        report_to: "tensorboard" (into `out`/tensorboard) and "wandb", besides training_log.jsonl.
        on_error: unusable images: "raise", or "skip" them (listed in the run's rejects.jsonl).
        cache_dir: of the frozen features.
        towers: towers that are already loaded.
        store: raw features that are already computed; the towers are then not needed.
        views: corrupted pictures that training draws from (`config.view_share`), of the same towers.
        on_event: progress; gets mappings with "event": features, start, step, log, evaluation, checkpoint, end.

    Raises:
        ArgumentError: a bad value, or no usable training pair.
        CheckpointError: `out` holds another or an unfinished run, a run with other arguments, or damaged files.
        ImageError: an unusable image, policy "raise".
        DependencyError: a package that `report_to` needs is not installed.
        StorageError: `out` cannot be written to, or its disk is full.
        DistributedError: another process of the same training stopped or did not answer.
    """
    counts = {"epochs": epochs, "batch_size": batch_size, "log_steps": log_steps, "validations": validations}
    for name, value in counts.items():
        if value < 1:
            raise ArgumentError(name, value, "at least 1")
    if not lr > 0:
        raise ArgumentError("lr", lr, "a learning rate above 0")
    if not 0 <= warmup < 1:
        raise ArgumentError("warmup", warmup, "a share in [0, 1)")
    if keep not in ("best", "trained"):
        raise ArgumentError("keep", repr(keep), "'best' or 'trained'")
    report_to = check_reporters(report_to)
    warm = None if init_from is None else warm_start(init_from)
    bf16 = multiplies_bf16() if bf16 is None else bf16
    folder = Path(out).resolve()
    refuse_fsdp()
    team = Team()
    send = on_event if on_event is not None and team.leads else lambda event: None
    held = ExitStack()

    def take() -> None:
        if not held.enter_context(locked(make_folder(folder) / LOCK, wait=False)):
            raise CheckpointError(f"{folder}: another process is training in this folder")

    with own_randomness(), torch.inference_mode(False), torch.enable_grad(), storage_errors(folder), held:
        team.lead(take)
        arguments = {
            "epochs": epochs,
            "validations": validations,
            "seed": seed,
            "batch_size": batch_size,
            "lr": lr,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "bf16": bf16,
            "max_steps": max_steps,
            "log_steps": log_steps,
            "keep": keep,
            "views": None if views is None else views.key,
            "init_from": None if warm is None else warm.digest,
        }
        if store is None:
            towers = towers or _load_towers(config)
            config = config.with_towers(*towers)
        if views is None and config.view_share:  # what only views teach is then not built
            config = TGQFormerConfig.from_dict(config.to_dict() | {"view_share": 0.0})
        if warm is not None:
            warm.check(config)
        wanted = config
        manifest = team.lead(lambda: claim(folder, wanted, arguments, catalog, resume))
        if manifest["status"] == "finished":
            team.lead(lambda: shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True))  # a kill may have left them
            return load_result(folder, manifest, resumed_from=manifest["result"]["steps"])
        if store is None:
            assert towers is not None
            pair = towers

            def features(rejects: RejectLog | None = None) -> FeatureStore:
                return FeatureStore.open_or_build(
                    catalog,
                    *pair,
                    wanted,
                    cache_dir,
                    on_error=on_error,
                    rejects=rejects,
                    progress=lambda done, total: send({"event": "features", "done": done, "total": total}),
                )

            if team.leads:
                made = []
                team.lead(lambda: made.append(features(RejectLog(folder / REJECTS))))
                store = made[0]
            else:
                team.lead(lambda: None)  # rank 0 computes them
                store = features()
        raw, whitening = store, None
        pictures: PictureFeatures | None = views
        if config.whitening:
            if warm is not None:
                whitening = warm.whitening(config)
            else:
                rows = whitening_rows(catalog, store.valid, config.whitening)
                whitening, config = fit_whitening(store.pictures, rows, config)
            store = store.whitened(whitening, cache_dir)
            if views is not None:
                pictures = whitened_pictures(views, whitening, cache_dir)
        store = store.for_connector(config.connector)
        # Only now: a run whose features cannot be made leaves the folder free.
        team.lead(lambda: write_manifest(folder, manifest))
        return _run(
            folder,
            catalog,
            config,
            store,
            manifest,
            arguments,
            raw=raw,
            views=views,
            pictures=pictures,
            towers=towers,
            whitening=whitening,
            warm=warm,
            report_to=report_to,
            checkpoint_steps=checkpoint_steps,
            send=send,
            team=team,
        )


def multiplies_bf16() -> bool:
    """Whether mixed precision saves time here: a GPU with bf16, or a processor with AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_amx_tile_supported())


def _load_towers(config: TGQFormerConfig) -> tuple[VisionTower, TextTower]:
    vision = load_vision_tower(config.vision_tower, attention=config.tower_attention)
    text = load_text_tower(config.text_tower, vision=vision, llm=config.llm, max_field_tokens=config.max_field_tokens)
    return vision, text


def _run(
    folder: Path,
    catalog: Catalog,
    config: TGQFormerConfig,
    store: FeatureStore,
    manifest: dict[str, Any],
    arguments: dict[str, Any],
    *,
    raw: FeatureStore,
    views: ViewStore | None,
    pictures: PictureFeatures | None,
    towers: tuple[VisionTower, TextTower] | None,
    whitening: Whitening | None,
    warm: WarmStart | None,
    report_to: Sequence[str],
    checkpoint_steps: int | None,
    send: Callable[[Event], None],
    team: Team,
) -> TrainResult:
    seed = arguments["seed"]
    pairs = PairDataset(catalog, "train", valid=store.valid)
    sampler = DistinctBatchSampler(pairs, arguments["batch_size"], seed)
    if sampler.batch_size < arguments["batch_size"]:
        logger.warning(
            "batches of %d pairs instead of %d: the training pairs cannot fill more with distinct items",
            sampler.batch_size,
            arguments["batch_size"],
        )
    share = team.share(sampler.batch_size)
    if not share:
        raise ArgumentError("batch_size", sampler.batch_size, f"at least {team.size} pairs, one for each process")
    if share * team.size < sampler.batch_size:
        sampler = DistinctBatchSampler(pairs, share * team.size, seed)
        logger.warning("batches of %d pairs, which %d processes share evenly", sampler.batch_size, team.size)
    has_validation = len(catalog.split_pairs("validation").query) > 0
    steps = arguments["max_steps"] or len(sampler) * arguments["epochs"]
    # Embedding the pool takes as long as some epochs do, so a long run is not validated after each.
    rhythm = len(sampler) * max(1, round(steps / len(sampler) / arguments["validations"]))
    args = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=share,
        per_device_eval_batch_size=max(64, sampler.batch_size),
        num_train_epochs=arguments["epochs"],
        max_steps=arguments["max_steps"] or -1,
        learning_rate=arguments["lr"],
        weight_decay=arguments["weight_decay"],
        lr_scheduler_type="cosine",
        warmup_steps=round(arguments["warmup"] * steps),
        bf16=arguments["bf16"],
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
        logging_steps=arguments["log_steps"],
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=rhythm,
        save_strategy="steps",
        save_steps=rhythm,
        save_total_limit=2,
        load_best_model_at_end=has_validation,
        metric_for_best_model=f"eval_{BEST_METRIC}" if has_validation else None,
        greater_is_better=True if has_validation else None,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    checkpoint = team.lead(lambda: last_complete_checkpoint(folder / CHECKPOINTS))
    start = 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
    log = RunLog(folder / LOG, start) if team.leads else None

    def on_event(event: Event) -> None:
        if event["event"] == "log" and "train_loss" not in event:  # Trainer's summary of one call, not of the run
            assert log is not None  # only rank 0 is told of entries
            log.add({name: value for name, value in event.items() if name != "event"})
        send(event)

    set_seed(seed)
    if towers is None:
        model = TGQFormerModel(config)
    else:
        model = TGQFormerModel.from_config_with_towers(config, vision=towers[0], text=towers[1])
    if whitening is not None and model.whitening is not None:
        model.whitening.load_state_dict(whitening.state_dict())
    if warm is not None:
        warm.fill(model)
    trainer = TGQTrainer(
        model,
        args,
        catalog=catalog,
        store=store,
        pairs=pairs,
        sampler=sampler,
        collator=PairCollator(
            store,
            pairs.components,
            seed=seed,
            processor=TGQFormerProcessor(config) if config.llm is not None else None,
            views=views,
            pictures=pictures,
            part=(team.rank, team.size),
        ),
        validation="validation" if has_validation else None,
        on_event=on_event,
        checkpoint_steps=checkpoint_steps,
        team=team,
    )
    for callback in reporters(report_to, folder) if team.leads else ():
        trainer.add_callback(callback)
    floors = {}
    if has_validation:
        floors = team.lead(lambda: measure_floors(catalog, raw, None if whitening is None else store, "validation"))
        for name, floor in floors.items():
            send({"event": "floor", "name": name, **{metric: m.value for metric, m in floor.metrics.items()}})
    send({"event": "start", "step": start, "steps": steps, "batch_size": sampler.batch_size, "pairs": len(pairs)})
    with team.watched():
        if checkpoint is not None and start >= steps:
            trainer.restore_end(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    team.meet()  # everybody has read the best checkpoint
    trainer.finish()
    finished = team.lead(
        lambda: finish_run(folder, config, manifest, arguments, trainer, model, floors, whitening, sampler.batch_size)
    )
    send({"event": "end", **finished["result"]})
    return load_result(folder, finished, resumed_from=start)
