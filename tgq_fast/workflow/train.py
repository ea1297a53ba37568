"""Train a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tgq_fast.arguments import checked
from tgq_fast.defaults import plain_tensors
from tgq_fast.watch import SILENT, Watch, follows
from tgq_fast.workflow.opening import REFUSED_ROWS, Policy, load_towers

if TYPE_CHECKING:
    from tgq_fast.data import Catalog
    from tgq_fast.models import TGQFormerConfig

DEFAULT_VIEWS = 4
"""Corrupted views of each training picture."""


def steps_per_epoch(catalog: Catalog, batch_size: int) -> int:
    """Optimiser steps in one pass over the items that have a training pair."""
    return max(1, len(catalog.split_pairs("train").items) // batch_size)


def default_epochs(catalog: Catalog, batch_size: int) -> int:
    """As many epochs as make about 300 steps, but at least 4 and at most 40."""
    return min(40, max(4, round(300 / steps_per_epoch(catalog, batch_size))))


@plain_tensors()
@checked
def train_run(
    catalog: Catalog,
    config: TGQFormerConfig,
    out: Path,
    *,
    epochs: int | None = None,
    seed: int,
    batch_size: int,
    lr: float,
    bf16: bool | None = None,
    validations: int = 6,
    resume: bool = False,
    init_from: Path | None = None,
    report_to: Sequence[str] = (),
    views: int = DEFAULT_VIEWS,
    keep: Literal["best", "trained"] = "best",
    cache: Path | None = None,
    on_error: Policy = "raise",
    watch: Watch = SILENT,
) -> dict[str, Any]:
    """Train a run folder; returns its summary. Without `epochs`, see :func:`default_epochs`.

    Args:
        validations, init_from, report_to: of :func:`tgq_fast.train`.
        keep: "trained" keeps the trained model where the frozen feature is better on validation, too.
        views: corrupted views of each training picture, which training draws from; 0: none.
    """
    from tgq_fast.data import RejectLog
    from tgq_fast.training import train
    from tgq_fast.training.folder import check_place

    if not follows():  # the process that will write there
        check_place(out.resolve(), resume)
    epochs = epochs or default_epochs(catalog, batch_size)
    with watch.progress("training") as advance:
        steps = 0

        def on_event(event: Mapping[str, Any]) -> None:
            nonlocal steps
            kind = event["event"]
            if kind == "start":
                steps = int(event["steps"])
            elif kind == "features":
                advance(event["done"], event["total"], "frozen features")
            if kind in ("start", "step", "checkpoint"):
                advance(event["step"], steps, "training")
            if kind == "floor":
                watch.note(f"{event['name']} (no training): validation HR@10 {event['HR@10']:.3f}")
            if kind == "evaluation":
                found = {n: v for n, v in event.items() if isinstance(v, float) and n.endswith("/HR@10")}
                for name, value in found.items():
                    watch.note(f"step {event['step']}: {name} {value:.3f}")

        corrupted = None
        if views and config.view_share:
            from tgq_fast.models.views import ViewRecipe, training_views

            corrupted = training_views(
                catalog,
                load_towers(config, watch)[0],
                ViewRecipe(per_item=views),
                cache_dir=cache,
                progress=lambda done, total: advance(done, total, "training views"),
            )
        result = train(
            catalog,
            config,
            out=out,
            epochs=epochs,
            seed=seed,
            batch_size=batch_size,
            lr=lr,
            bf16=bf16,
            keep=keep,
            validations=validations,
            resume=resume,
            init_from=init_from,
            report_to=report_to,
            log_steps=2 if steps_per_epoch(catalog, batch_size) < 20 else 10,
            on_error=on_error,
            cache_dir=cache,
            towers=load_towers(config, watch),
            views=corrupted,
            on_event=on_event,
        )
    if catalog.report.rejected:
        RejectLog(out / REFUSED_ROWS).add_report(catalog.report)
    summary = {
        "run": str(result.path),
        "connector": config.connector,
        "fields": list(config.fields),
        "epochs": epochs,
        "steps": result.steps,
        "best_step": result.best_step,
        "validation_HR@10": result.best_metric,
        "verdict": (result.manifest["result"].get("verdict") or {}).get("words"),
        "resumed_from": result.resumed_from,
        "trainable_parameters": result.manifest["result"]["trainable_parameters"],
        "seed": seed,
    }
    return summary
