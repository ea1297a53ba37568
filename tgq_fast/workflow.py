"""What the verbs of the command line, `make demo` and the report do: whole steps over catalogue, run and pool folders.

Progress goes to stderr; results are returned as typed objects or plain dicts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tgq_fast import console
from tgq_fast.errors import ArgumentError, CheckpointError, TGQError

if TYPE_CHECKING:
    from tgq_fast.data import Catalog, ValidationReport
    from tgq_fast.models import TGQFormerConfig, TGQFormerModel
    from tgq_fast.models.features import FeatureStore
    from tgq_fast.models.towers import TextTower, VisionTower
    from tgq_fast.retrieval import EmbedReport, Evaluation
    from tgq_fast.retrieval.embed_plan import Plan

Policy = Literal["raise", "skip"]
FLOOR = "zero-shot image"
"""Name of the floor without training: the frozen image feature alone."""
_CATALOG_NOTE = "catalog.json"  # beside a pool: where its catalogue lay, for titles in search results
_REFUSED_ROWS = "refused_rows.jsonl"  # beside a pool or in a run: rows of the catalogue that were left out
_SHOWN = ("HR@", "H@", "Recall@", "MRR", "NDCG@", "1-NN")


@dataclass(frozen=True)
class Validation:
    """Findings about a catalogue and the fields that guide by default."""

    report: ValidationReport
    fields: list[str]


def load_catalog(path: Path, on_error: Policy) -> Catalog:
    """Read a catalogue and say what was left out."""
    from tgq_fast.data import Catalog

    catalog = Catalog.load(path, policy=on_error)
    for line in [*catalog.report.problems, *catalog.report.warnings][:5]:
        console.note(f"{path}: {line}")
    return catalog


def validate_catalog(path: Path, *, images: bool, rejects: Path | None) -> Validation:
    """Check every row, pair and, on request, picture; problems are collected, not raised."""
    from tgq_fast.data import Catalog, RejectLog, validate_images
    from tgq_fast.data.guides import suggest_fields

    catalog = Catalog.load(path, policy="skip")
    report = catalog.report
    log = RejectLog(rejects) if rejects is not None else None
    if log is not None:
        log.add_report(report)
    if images:
        with console.progress("pictures") as advance:
            report = report.with_images(validate_images(catalog, reject_log=log, on_progress=advance, workers=2))
    return Validation(report, suggest_fields(catalog))


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
    from tgq_fast.models import TGQFormerConfig, match_budget
    from tgq_fast.models.configuration import CONNECTORS

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
    return TGQFormerConfig.from_dict(config.to_dict() | {"connector": connector})


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
    cache: Path | None = None,
    on_error: Policy = "raise",
) -> dict[str, Any]:
    """Train a run folder; returns its summary. Without `epochs`, see :func:`default_epochs`."""
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

        result = train(
            catalog,
            config,
            out=out,
            epochs=epochs,
            seed=seed,
            batch_size=batch_size,
            lr=lr,
            bf16=bf16,
            resume=resume,
            log_steps=2 if steps_per_epoch(catalog, batch_size) < 20 else 10,
            on_error=on_error,
            cache_dir=cache,
            towers=load_towers(config),
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


def embed_run(
    catalog: Catalog,
    run: Path,
    out: Path,
    *,
    batch_size: int = 64,
    shard_size: int = 4096,
    resume: bool = True,
    cache: Path | None = None,
    on_error: Policy = "raise",
    codes: bool = True,
) -> EmbedReport:
    """Embed a catalogue into a pool folder, or bring the pool up to date; goes on where an interrupted call ended."""
    from tgq_fast.data import RejectLog
    from tgq_fast.data.files import write_atomic
    from tgq_fast.retrieval import embed_catalog, model_digest

    model = open_run(run)
    with console.progress("embedding") as advance:

        def features(work: Plan) -> FeatureStore | None:
            """A whole catalogue goes through the cache; the few items of an update do not."""
            if len(work.todo) < len(catalog):
                return None
            return open_store(catalog, model.config, cache=cache, on_error=on_error, advance=advance)

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
        )
    if catalog.report.rejected:
        RejectLog(out / _REFUSED_ROWS).add_report(catalog.report)
    note = json.dumps({"catalog": str(Path(catalog.report.path).resolve()), "digest": catalog.digest()}, indent=1)
    write_atomic(out / _CATALOG_NOTE, note.encode())
    return report


def search_pool(
    path: Path,
    *,
    item: str | None = None,
    image: Path | None = None,
    fields: Mapping[str, str] | None = None,
    model: Path | None = None,
    catalog: Path | None = None,
    k: int = 10,
) -> dict[str, Any]:
    """Neighbours of an item of the pool, or of a new picture with metadata.

    Raises:
        ArgumentError: neither or both of `item` and `image`, metadata without a picture, an unknown id or field.
        PoolError, CheckpointError: the pool was made by another model, or one of them cannot be read.
    """
    import torch

    from tgq_fast.errors import PoolError
    from tgq_fast.retrieval import ItemPool, model_digest

    if (item is None) == (image is None):
        raise ArgumentError("query", "both" if item is not None else "nothing", "either --item ID or --image FILE")
    if item is not None and fields:
        raise ArgumentError("--field", ", ".join(fields), "a query by --image", "An item brings its own metadata.")
    pool = ItemPool.open(path)
    exclude: list[str | None] = [item]
    if item is not None:
        query = pool.get([item]).float()
    else:
        assert image is not None
        if model is None:
            raise ArgumentError("--model", None, "the run that made the pool, to embed the picture")
        network = open_run(model)
        unknown = [name for name in fields or {} if name not in network.config.fields]
        if unknown:
            known = ", ".join(network.config.fields) or "none"
            raise ArgumentError("--field", ", ".join(unknown), f"fields that guide this model: {known}")
        if pool.manifest.model != model_digest(network):
            raise PoolError(f"{path}: was made by another model than {model}; embed the catalogue with this one")
        vector = network.encode([image], fields=[dict(fields or {})])
        query = torch.as_tensor(vector).float()
    found = pool.search(query, k, exclude_ids=exclude)
    known_items = catalog_of(path, pool.manifest.source, catalog)
    hits = []
    for rank, (item_id, score) in enumerate(zip(found.ids[0], found.scores[0].tolist()), start=1):
        if item_id is None:
            break
        hit: dict[str, Any] = {"rank": rank, "id": item_id, "score": score}
        if known_items is not None and item_id in known_items:
            row = known_items.items[known_items.index(item_id)]
            file = None if row.file_name is None else str(known_items.image_path(row))
            hit |= {"title": row.title, "brand": row.brand, "category": row.category, "file": file}
        hits.append(hit)
    return {"query": item if item is not None else str(image), "k": k, "pool_size": len(pool), "hits": hits}


def catalog_of(pool: Path, digest: str, given: Path | None) -> Catalog | None:
    """The catalogue to show titles from: the given one, else the one the pool was made from if it is still there."""
    from tgq_fast.data import Catalog

    if given is not None:
        return Catalog.load(given, policy="skip")
    try:
        note = json.loads((pool / _CATALOG_NOTE).read_text())
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
    samples: int = 1000,
    cache: Path | None = None,
    on_error: Policy = "raise",
) -> dict[str, Evaluation]:
    """Evaluation of a run by name, and with `floor` of the zero-shot image feature beside it."""
    from tgq_fast.retrieval import evaluate, model_digest, open_embedded, zero_shot_embeddings

    model = open_run(run)
    embedded: Any = None if pool is None else open_embedded(pool, catalog, model_digest(model))
    store = open_store(catalog, model.config, cache=cache, on_error=on_error) if floor or pool is None else None
    if embedded is None:
        assert store is not None
        embedded = embed_in_memory(catalog, model, store)
    results = {run.name: evaluate(catalog, embedded, ks=ks, split=split, samples=samples)}
    if floor and store is not None:
        results[FLOOR] = evaluate(catalog, zero_shot_embeddings(catalog, store), ks=ks, split=split, samples=samples)
    return results


def embed_in_memory(catalog: Catalog, model: TGQFormerModel, store: FeatureStore) -> Any:
    """[n, D] embeddings of a catalogue; items without a usable picture get a zero row, which scores 0 against all."""
    import torch

    # A copy: what encode returns belongs to inference mode and cannot be changed outside it.
    vectors = torch.as_tensor(model.encode(catalog, features=store, on_error="skip", batch_size=128)).clone()
    vectors[list(store.invalid)] = 0.0
    return vectors


def metric_table(results: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Columns (one per run) and rows (one per metric, value and interval) of a result table."""
    rows = []
    for name in next(iter(results.values())).metrics:
        if name.startswith(_SHOWN):
            cells = (result.metrics.get(name) for result in results.values())
            rows.append([name, *("" if m is None else f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]" for m in cells)])
    return ["", *results], rows


def import_source(source: str, path: Path, out: Path, *, limit: int | None, link: bool) -> dict[str, Any]:
    """Convert a downloaded public data set into a catalogue folder."""
    from tgq_fast.data import import_catalog

    copy: Literal["link", "copy"] = "link" if link else "copy"
    return import_catalog(source, path, out, limit=limit, copy=copy).to_dict()
