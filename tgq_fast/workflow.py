"""What the verbs of the command line, `make demo` and the report do: whole steps over catalogue, run and pool folders.

Progress goes to stderr; results are returned as typed objects or plain dicts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tgq_fast import console
from tgq_fast.errors import ArgumentError, CheckpointError, TGQError

if TYPE_CHECKING:
    from tgq_fast.data import Catalog
    from tgq_fast.models import TGQFormerConfig, TGQFormerModel
    from tgq_fast.models.features import FeatureStore
    from tgq_fast.models.towers import TextTower, VisionTower
    from tgq_fast.retrieval import EmbedReport, Evaluation
    from tgq_fast.retrieval.embed_parts import Engine
    from tgq_fast.retrieval.embed_plan import Plan
    from tgq_fast.scale.crew import Crew

Policy = Literal["raise", "skip"]
FLOOR = "zero-shot image"
"""Name of the floor without training: the frozen image feature alone."""
DEFAULT_VIEWS = 4
"""Corrupted views of each training picture."""
CATALOG_NOTE = "catalog.json"  # beside a pool: where its catalogue lay, for titles in search results
_REFUSED_ROWS = "refused_rows.jsonl"  # beside a pool or in a run: rows of the catalogue that were left out
_SHOWN = ("HR@", "H@", "Recall@", "MRR", "NDCG@", "1-NN")


def make_config(
    catalog: Catalog,
    *,
    preset: str,
    connector: str = "tgq",
    fields: Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    match: bool = True,
) -> TGQFormerConfig:
    """Configuration of a run with the widths of its towers filled in.

    Args:
        catalog: fields are checked against it, and chosen from it when `fields` is None.
        preset: "tiny", "paper" or "large".
        connector: which connector; with `match` it gets as many trainable parameters as tgq would have.
        overrides: further configuration fields.

    Raises:
        ArgumentError: unknown field, preset, connector or configuration field.
    """
    from tgq_fast.data.guides import suggest_fields
    from tgq_fast.models import CONNECTORS, TGQFormerConfig, match_budget

    known = catalog.field_names()
    chosen = suggest_fields(catalog) if fields is None else list(fields)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ArgumentError("--fields", ", ".join(unknown), "fields of this catalogue: " + ", ".join(known))
    if connector not in CONNECTORS:
        raise ArgumentError("--connector", repr(connector), "one of " + ", ".join(CONNECTORS))
    defaults = TGQFormerConfig.preset(preset)
    extra = dict(overrides or {})
    wrong = [name for name in extra if name not in defaults.to_dict() or name in ("connector", "fields", "model_type")]
    if wrong:
        raise ArgumentError("--set", ", ".join(wrong), "fields of TGQFormerConfig; fields and connector have options")
    config = TGQFormerConfig.preset(preset, **(extra | {"fields": chosen}))
    config = config.with_towers(*load_towers(config))
    if connector == "tgq":
        return config
    if match and "intermediate_size" not in extra:
        return match_budget(config, connector)
    return config.with_connector(connector)


def connector_table(preset: str, overrides: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Per connector, at the budget of the preset's tgq: what it does, its source, tokens, trainable parameters and
    multiply-accumulates per item. No tower is loaded: widths and L are the configuration's.

    Raises:
        ArgumentError: an unknown configuration field, or a connector that cannot have these sizes.
    """
    from tgq_fast.models import CONNECTORS, TGQFormerConfig, match_budget
    from tgq_fast.models.flops import connector_cost

    config = TGQFormerConfig.preset(preset)
    extra = dict(overrides or {})
    if wrong := [name for name in extra if name not in config.to_dict() or name in ("connector", "model_type")]:
        raise ArgumentError("--set", ", ".join(wrong), "fields of TGQFormerConfig")
    config = TGQFormerConfig.preset(preset, **extra)
    rows = []
    for name, spec in CONNECTORS.items():
        cost = connector_cost(match_budget(config, name))
        rows.append(
            {
                "connector": name,
                "what it does": spec.summary,
                "source": spec.source,
                "reader sees metadata": spec.reader_sees_metadata,
                "tokens": spec.tokens(config),
                "parameters": cost.parameters,
                "macs": cost.macs,
            }
        )
    return rows


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


def steps_per_epoch(catalog: Catalog, batch_size: int) -> int:
    """Optimiser steps in one pass over the items that have a training pair."""
    import numpy as np

    pairs = catalog.split_pairs("train")
    return max(1, len(np.union1d(pairs.query, pairs.target)) // batch_size)


def default_epochs(catalog: Catalog, batch_size: int) -> int:
    """As many epochs as make about 300 steps, but at least 4 and at most 40."""
    return min(40, max(4, round(300 / steps_per_epoch(catalog, batch_size))))


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
    resume: bool = False,
    views: int = DEFAULT_VIEWS,
    keep: Literal["best", "trained"] = "best",
    cache: Path | None = None,
    on_error: Policy = "raise",
) -> dict[str, Any]:
    """Train a run folder; returns its summary. Without `epochs`, see :func:`default_epochs`.

    Args:
        keep: "trained" keeps the trained model where the frozen feature is better on validation, too.
        views: corrupted views of each training picture, which training draws from; 0: none.
    """
    from tgq_fast.data import RejectLog
    from tgq_fast.training import train

    epochs = epochs or default_epochs(catalog, batch_size)
    with console.progress("training") as advance:
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
                console.note(f"{event['name']} (no training): validation HR@10 {event['HR@10']:.3f}")
            if kind == "evaluation":
                found = {n: v for n, v in event.items() if isinstance(v, float) and n.endswith("/HR@10")}
                for name, value in found.items():
                    console.note(f"step {event['step']}: {name} {value:.3f}")

        corrupted = None
        if views and config.view_share:
            from tgq_fast.models.views import ViewRecipe, training_views

            corrupted = training_views(
                catalog,
                load_towers(config)[0],
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
            resume=resume,
            log_steps=2 if steps_per_epoch(catalog, batch_size) < 20 else 10,
            on_error=on_error,
            cache_dir=cache,
            towers=load_towers(config),
            views=corrupted,
            on_event=on_event,
        )
    if catalog.report.rejected:
        RejectLog(out / _REFUSED_ROWS).add_report(catalog.report)
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


def embed_run(
    catalog: Catalog,
    run: Path | TGQFormerModel,
    out: Path,
    *,
    batch_size: int = 64,
    shard_size: int = 4096,
    resume: bool = True,
    cache: Path | None = None,
    on_error: Policy = "raise",
    codes: bool = True,
    threads: int | None = None,
    crew: Crew | None = None,
) -> EmbedReport:
    """Embed a catalogue into a pool folder, or bring the pool up to date; goes on where an interrupted call ended.

    Pictures go through the model in one pass. Only a cache of them that is there already, as training leaves one, is
    read instead.

    Args:
        run: its folder, or a model.
        cache: also write the frozen features of a whole catalogue there, for later runs.
        threads: of :func:`tgq_fast.embed_catalog`.
        crew: workers that embed instead of this process, see :mod:`tgq_fast.scale`.
    """
    from tgq_fast.data import RejectLog
    from tgq_fast.data.files import write_atomic
    from tgq_fast.models import FeatureStore
    from tgq_fast.models.zoo import connector_spec
    from tgq_fast.retrieval import embed_catalog, model_digest
    from tgq_fast.retrieval.item_table import write_items

    model = open_run(run) if isinstance(run, Path) else run
    engine = None if crew is None else parts_engine(out, crew)
    with console.progress("embedding") as advance:

        def features(work: Plan) -> FeatureStore | None:
            """Cached features of a whole catalogue, where they are there or asked for."""
            if connector_spec(model.config.connector).foreign_metadata:  # needs to see all items
                return open_store(catalog, model.config, cache=cache, on_error=on_error, advance=advance)
            if len(work.todo) < len(catalog) or engine is not None:
                return None
            if cache is not None:
                return open_store(catalog, model.config, cache=cache, on_error=on_error, advance=advance)
            return FeatureStore.find(catalog, *load_towers(model.config), model.config, on_error=on_error)

        report = embed_catalog(
            catalog,
            model,
            out,
            digest=model_digest(model),
            batch_size=batch_size,
            shard_size=shard_size,
            resume=resume,
            on_error=on_error,
            features=features,
            codes=codes,
            progress=lambda done, total: advance(done, total, "embedding"),
            threads=threads,
            engine=engine,
        )
    if catalog.report.rejected:
        RejectLog(out / _REFUSED_ROWS).add_report(catalog.report)
    note = json.dumps({"catalog": str(Path(catalog.report.path).resolve()), "digest": catalog.digest()}, indent=1)
    write_atomic(out / CATALOG_NOTE, note.encode())
    write_items(catalog, out)
    return report


def parts_engine(out: Path, crew: Crew) -> Engine:
    """Embeds with several workers; finished parts lie beside the pool until they are committed."""
    from tgq_fast.scale import PartsEngine

    return PartsEngine(crew, out.with_name(out.name + ".parts"))


def catalog_of(pool: Path, digest: str, given: Path | None) -> Catalog | None:
    """The catalogue to show titles from: the given one, else the one the pool was made from if it is still there."""
    from tgq_fast.data import Catalog

    if given is not None:
        return Catalog.load(given, policy="skip")
    try:
        note = json.loads((pool / CATALOG_NOTE).read_text())
        catalog = Catalog.load(note["catalog"], policy="skip")
    except (OSError, ValueError, KeyError, TypeError, TGQError):
        return None
    return catalog if catalog.digest() == digest else None


def evaluate_run(
    catalog: Catalog,
    run: Path,
    *,
    pool: Path | None = None,
    ks: Sequence[int] = (1, 10, 100),
    split: str = "test",
    floor: bool = True,
    corrupt: Sequence[str] = (),
    samples: int = 1000,
    seed: int = 0,
    cache: Path | None = None,
    on_error: Policy = "raise",
) -> dict[str, Evaluation]:
    """Evaluation of a run by name, and with `floor` of the zero-shot image features, raw and whitened, beside it.

    Args:
        pool: of this run; None embeds now.
        corrupt: conditions as in `overlay:0.3:both`; each adds an evaluation "name · condition".
        seed: of the corruptions.

    Raises:
        ArgumentError: a condition that cannot be read.
        PoolError: the pool was made by another model, or does not hold this catalogue.
    """
    from tgq_fast.data.conditions import CLEAN, parse_conditions
    from tgq_fast.retrieval import evaluate
    from tgq_fast.study.embeddings import Conditions, evaluate_under, floors, pool_embeddings

    asked = [CLEAN, *(condition for condition in parse_conditions(corrupt) if condition != CLEAN)]
    model = open_run(run)
    clean = None if pool is None else pool_embeddings(pool, catalog, model)
    if clean is not None and not floor and len(asked) == 1:
        return {run.name: evaluate(catalog, clean, ks=ks, split=split, samples=samples)}
    store = open_store(catalog, model.config, cache=cache, on_error=on_error)
    results: dict[str, Evaluation] = {}
    with console.progress("corrupted pictures") as advance:
        conditions = Conditions(catalog, load_towers(model.config), store, cache_dir=cache, seed=seed, progress=advance)
        embedders: dict[str, Any] = {run.name: model}
        if floor:
            embedders |= {found.name: found for found in floors(store, model.config, model.whitening)}
        for name, embedder in embedders.items():
            known = clean if name == run.name else None
            for condition in asked:
                evaluation, _, vectors = evaluate_under(
                    conditions, embedder, condition, clean=known, ks=ks, split=split, samples=samples
                )
                known = vectors if condition == CLEAN else known
                results[name if condition == CLEAN else f"{name} · {condition}"] = evaluation
    return results


def metric_table(results: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Columns (one per run) and rows (one per metric, value and interval) of a result table."""
    rows = []
    for name in next(iter(results.values())).metrics:
        if name.startswith(_SHOWN):
            cells = (result.metrics.get(name) for result in results.values())
            rows.append([name, *("" if m is None else f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]" for m in cells)])
    return ["", *results], rows
