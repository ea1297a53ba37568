"""`transformers.Trainer` for pairs of items: distinct items, named loss terms, validation by full-pool retrieval.

Source: AdamW with a cosine schedule and the choice of the checkpoint by validation HR@10, then MRR, are ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from tgq_fast.data import Catalog
from tgq_fast.errors import CheckpointError
from tgq_fast.evaluation import Evaluation, evaluate
from tgq_fast.io.files import write_atomic
from tgq_fast.io.identity import sha256_file
from tgq_fast.io.json_text import read_json
from tgq_fast.models.checkpoint import load_into, load_state
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.gather import total, world_size
from tgq_fast.models.modeling import TGQFormerModel
from tgq_fast.training.averaging import WeightAverage
from tgq_fast.training.pairs import DistinctBatchSampler, PairCollator, PairDataset
from tgq_fast.training.ranks import Team

__all__ = ["BEST_METRIC", "TGQTrainer", "last_complete_checkpoint"]

BEST_METRIC, TIE_BREAK = "HR@10", "MRR"
_COMPLETE = "complete.json"
_RAW = "training_weights.safetensors"  # of a checkpoint whose model is an average
Event = Mapping[str, Any]


class TGQTrainer(Trainer):
    """Trains a :class:`TGQFormerModel` on cached features.

    Differences from `Trainer`: what is validated, saved and chosen is the average of the weights (`config.ema`);
    batches come from :class:`DistinctBatchSampler`; every loss term is logged as "loss/<term>"; evaluation embeds the
    whole catalogue and measures retrieval on one split; a checkpoint counts only once a file with the checksums of all
    its files is in place; nothing pickled is written or read but tensors (`weights_only`).

    Args:
        model: the model.
        args: training arguments.
        catalog, store: the catalogue and its feature cache.
        pairs: training pairs.
        sampler: batches of them.
        collator: pairs → inputs.
        validation: split to evaluate, or None.
        ks: cut-offs of the evaluation.
        on_event: gets "step", "log", "evaluation" and "checkpoint" events as mappings with an "event" key.
        team: the ranks that train together; None: those of the process group, if there is one.
    """

    def __init__(
        self,
        model: TGQFormerModel,
        args: TrainingArguments,
        *,
        catalog: Catalog,
        store: FeatureStore,
        pairs: PairDataset,
        sampler: DistinctBatchSampler,
        collator: PairCollator,
        validation: str | None = "validation",
        ks: tuple[int, ...] = (1, 10, 100),
        on_event: Callable[[Event], None] | None = None,
        checkpoint_steps: int | None = None,
        team: Team | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=pairs,
            eval_dataset=None if validation is None else pairs,  # evaluate() takes its pairs from the catalogue
            data_collator=collator,
            callbacks=[_Events(sampler, on_event, checkpoint_steps, self._stepped)],
        )
        for callback in (PrinterCallback, ProgressCallback):  # progress is the caller's, through events
            self.remove_callback(callback)
        self.catalog, self.store, self.sampler = catalog, store, sampler
        self.validation, self.ks = validation, ks
        self.on_event = on_event or (lambda event: None)
        self.team = team or Team()
        self.evaluations: list[tuple[int, Evaluation]] = []
        decay = model.config.ema
        self.average = WeightAverage(model, decay) if decay else None
        self._terms: dict[str, Tensor] = {}
        self._term_steps = 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of distinct items: the same on all ranks, each of which collates its share."""
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        if self.args.world_size > 1:  # accelerate would deal out whole batches
            return loader
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _stepped(self, step: int) -> None:
        if self.average is not None:
            self.average.update(step)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The model's own loss; its terms are collected for the next log entry."""
        output = model(**inputs)
        for name, term in output.losses.items():
            self._terms[name] = self._terms.get(name, torch.zeros((), device=term.device)) + term.float()
        self._term_steps += 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every loss term since the last entry, and the learned scale."""
        if "loss" in logs and self._term_steps:
            for name, term in self._terms.items():
                logs[f"loss/{name}"] = float(total(term)) / self._term_steps / world_size()
            logs["logit_scale"] = float(self.accelerator.unwrap_model(self.model).logit_scale.detach())
            self._terms, self._term_steps = {}, 0
        super().log(logs, start_time)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:  # type: ignore[override]
        """Embed the catalogue and evaluate the validation pairs over the full pool."""
        with self._averaged():
            result = self.validate()
        self.evaluations.append((self.state.global_step, result))
        # The ranks' embeddings may differ by rounding, and all must choose the same checkpoint.
        own = {f"{metric_key_prefix}_{name}": m.value for name, m in result.metrics.items()}
        metrics = self.team.lead(lambda: own)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Of equal validations the one that ranks mates higher: with few items the first may find all of them."""
        best = bool(super()._determine_best_metric(metrics, trial))
        if not best and metrics[f"eval_{BEST_METRIC}"] == self.state.best_metric:
            name, step = f"eval_{TIE_BREAK}", self.state.best_global_step
            before = [entry[name] for entry in self.state.log_history if entry["step"] == step and name in entry]
            best = bool(before) and metrics[name] > before[-1]
            if best:
                self.state.best_global_step = self.state.global_step
        return best

    def validate(self) -> Evaluation:
        """Evaluation of the model as it is on the validation pairs, over the full pool."""
        assert self.validation is not None
        model: TGQFormerModel = self.accelerator.unwrap_model(self.model)
        size = max(64, 2 * self.args.per_device_eval_batch_size)
        # An item without a usable picture is NaN, which is no candidate.
        embeddings = torch.as_tensor(model.encode(self.catalog, features=self.store, batch_size=size, on_error="skip"))
        return evaluate(self.catalog, embeddings, ks=self.ks, split=self.validation, samples=0)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated from token counts, which say little about this model; see `tgq_fast.models.flops`."""
        return 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay for the weights of linear layers and convolutions alone: no biases, norms, embeddings, learned
        queries, guide weights or scales, whatever their shape."""
        return decayed_parameters(model)

    # ------------------------------------------------------------ checkpoints

    @property
    def _root(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self._root)
        model: TGQFormerModel = self.accelerator.unwrap_model(self.model)
        with self._averaged():
            model.save_pretrained(folder)
        if self.average is not None:  # what training goes on with, beside what is used
            weights = {name: p.detach().cpu().contiguous() for name, p in model.trainable_parameters()}
            write_atomic(folder / _RAW, save(weights))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each rank has left its state there
        if self.args.should_save:
            folder = self._root / f"checkpoint-{self.state.global_step}"
            seal_checkpoint(folder)
            self.on_event({"event": "checkpoint", "step": self.state.global_step, "path": str(folder)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._restore(folder)
        if self.average is not None:
            own: TGQFormerModel = self.accelerator.unwrap_model(self.model)
            trained = dict(own.trainable_parameters())
            self.average.load({name: p.detach() for name, p in trained.items()})
            raw = load_file(folder / _RAW)  # its checksum is the checkpoint's
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(raw[name])

    def restore_end(self, checkpoint: Path) -> None:
        """Instead of training on from the checkpoint of the last step: `Trainer` does one step too many where that is
        within an epoch.
        """
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # the precision of what is measured
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._load_from_checkpoint(str(checkpoint), self.model)
        if self.args.load_best_model_at_end:
            self._load_best_model()

    def finish(self) -> None:
        """After training: the model has the weights to keep. With validation they are those of the best checkpoint
        already, else the average."""
        if self.average is not None and not self.args.load_best_model_at_end:
            self.average.apply()

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self._restore(self._root / Path(best).name)  # the run may have been moved

    def _restore(self, folder: Path) -> None:
        model: TGQFormerModel = self.accelerator.unwrap_model(self.model)
        load_into(model, load_state(folder), wanted=set(model.saved_state()), folder=folder)


class _Events(TrainerCallback):
    """Tells the sampler the epoch, asks for extra checkpoints and passes progress on."""

    def __init__(
        self,
        sampler: DistinctBatchSampler,
        on_event: Callable[[Event], None] | None,
        checkpoint_steps: int | None,
        stepped: Callable[[int], None],
    ) -> None:
        self.sampler, self.on_event, self.checkpoint_steps = sampler, on_event, checkpoint_steps
        self.stepped = stepped

    def _send(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepped(state.global_step)
        if self.checkpoint_steps and state.global_step % self.checkpoint_steps == 0:
            control.should_save = True
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True  # the last step, too
            control.should_save = True
        self._send({"event": "step", "step": state.global_step, "steps": state.max_steps, "epoch": state.epoch})

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self._send({"event": "log", "step": state.global_step, **log_entry(logs)})

    def on_evaluate(
        self, args: TrainingArguments, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._send({"event": "evaluation", "step": state.global_step, **log_entry(metrics or {})})


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: weights of linear layers and convolutions."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return [f"{name}.weight".lstrip(".") for name, module in model.named_modules() if isinstance(module, layers)]


def log_entry(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer's names → ours: "eval_H@10" becomes "eval/H@10"; what only tells the time is left out."""
    timing = ("runtime", "per_second", "total_flos")
    return {
        (f"eval/{name[5:]}" if name.startswith("eval_") else name): value
        for name, value in logs.items()
        if not any(word in name for word in timing)
    }


def seal_checkpoint(folder: Path) -> None:
    """Write the checksums of a checkpoint's files; only then does it count as complete."""
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != _COMPLETE}
    write_atomic(folder / _COMPLETE, (json.dumps(files, indent=1) + "\n").encode())


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files all fit their checksums; half-written ones are removed.

    Raises:
        CheckpointError: a checkpoint that was complete is damaged now.
    """
    named = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    found = sorted(named, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    best: Path | None = None
    for path in found:
        if path.is_symlink() or not path.is_dir():
            raise CheckpointError(f"{path}: no folder, which a checkpoint is; move it away to resume")
        if not (path / _COMPLETE).is_file():
            shutil.rmtree(path)  # the writer was killed inside it
        elif best is None:
            best = path
    if best is not None:
        try:
            files = dict(read_json((best / _COMPLETE).read_bytes()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{best / _COMPLETE}: not readable ({error}); remove this checkpoint") from None
        for name, digest in files.items():
            if not (best / name).is_file() or sha256_file(best / name) != digest:
                raise CheckpointError(
                    f"{best / name}: missing or damaged (SHA-256 differs); remove {best} to resume from an earlier one"
                )
    return best
