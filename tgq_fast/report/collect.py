"""Gather what a report shows: evaluate runs, sample neighbours, ask the main run where it looks and how it gates."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from tgq_fast import __version__, workflow
from tgq_fast.data import Catalog, Item, load_image
from tgq_fast.data.conditions import CLEAN, parse_conditions
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError, ImageError
from tgq_fast.evaluation import Evaluation, compare
from tgq_fast.io.files import check_target, write_atomic
from tgq_fast.report import figures
from tgq_fast.report.content import Example, Metric, Neighbour, ReportContent, RunResult
from tgq_fast.report.page import render
from tgq_fast.report.probes import attention_maps, gate_study
from tgq_fast.search import topk
from tgq_fast.training.folder import RUN, read_log, read_manifest
from tgq_fast.watch import SILENT, Watch
from tgq_fast.workflow.embeddings import Conditions, evaluate_under, floors, pool_embeddings

if TYPE_CHECKING:
    from tgq_fast.models import TGQFormerModel

__all__ = ["write_report"]

_NEIGHBOURS = 8
_HIT_DEPTH = 10


@dataclass
class Gathered:
    """A run or a floor with its [n, D] embeddings in catalogue order (NaN: no candidate) and evaluations."""

    name: str
    vectors: torch.Tensor
    evaluation: Evaluation
    corrupted: dict[str, Evaluation]
    path: Path | None = None
    model: TGQFormerModel | None = None


@plain_defaults()
def write_report(
    catalog: Catalog,
    runs: Sequence[Path],
    out: Path,
    *,
    pools: Sequence[Path] | None = None,
    ks: Sequence[int] = (1, 10, 100),
    split: str = "test",
    corrupt: Sequence[str] = (),
    examples: int = 8,
    seed: int = 0,
    cache: Path | None = None,
    on_error: workflow.Policy = "raise",
    watch: Watch = SILENT,
) -> dict[str, Any]:
    """Write the page atomically; returns a summary of what it says.

    Args:
        runs: run folders, the main one first.
        pools: their pools in the same order; None embeds now.
        corrupt: conditions under which runs and floors are evaluated too.
        examples: sampled test queries, half of them found in the first ten by the main run and half not.

    Raises:
        ArgumentError: numbers of runs and pools differ.
        PoolError: a pool that another model made, or of another catalogue.
    """
    if pools and len(pools) != len(runs):
        raise ArgumentError("pools", f"{len(pools)} pools", f"{len(runs)}, one per run, in the same order")
    check_target(out)
    models = [workflow.open_run(path, watch) for path in runs]
    known = [pool_embeddings(path, catalog, model) for path, model in zip(pools or (), models)]
    asked = [condition for condition in parse_conditions(corrupt) if condition != CLEAN]

    def gather(name: str, embedder: Any, clean: torch.Tensor | None, conditions: Conditions) -> Gathered:
        evaluation, _, vectors = evaluate_under(conditions, embedder, clean=clean, ks=ks, split=split)
        found = {str(c): evaluate_under(conditions, embedder, c, clean=vectors, ks=ks, split=split)[0] for c in asked}
        return Gathered(name, vectors, evaluation, found)

    gathered, floored = [], []
    for number, (path, model) in enumerate(zip(runs, models)):
        store = workflow.open_store(catalog, model.config, cache=cache, on_error=on_error, watch=watch)
        conditions = Conditions(catalog, workflow.load_towers(model.config, watch), store, cache_dir=cache, seed=seed)
        one = gather(_name(path, runs), model, known[number] if known else None, conditions)
        gathered.append(replace(one, path=path, model=model))
        if number == 0:
            main_store = store
            floored = [gather(f.name, f, None, conditions) for f in floors(store, model.config, model.whitening)]
    main, model = gathered[0], models[0]
    shown = [*gathered, *floored]
    results = [_result(one, shown) for one in shown]
    pictures = Pictures(catalog)
    queries = sample_queries(main.evaluation, examples, seed)
    rng = np.random.default_rng(seed)
    valid = main_store.valid & main_store.has_image
    pool = np.unique(main.evaluation.query)
    pool = pool[valid[pool]]
    maps, reason = attention_maps(model, main_store, [int(q) for q in queries if valid[q]][:6], pictures)
    study = gate_study(main.name, model, main_store, rng.permutation(pool), pictures, seed=seed)
    shown_examples = _examples(catalog, shown, queries, pictures)
    notes = ([reason] if reason else []) + pictures.notes()
    if main_store.invalid:
        notes.append(f"{len(main_store.invalid)} item(s) have no usable picture and are no candidates.")
    given: list[tuple[str, object]] = [("--model", path) for path in runs]
    given += [*(("--pool", path) for path in pools or ()), ("--out", out)]
    given += [("--k", ",".join(map(str, ks))), ("--split", split), *(("--corrupt", str(c)) for c in asked)]
    given += [("--examples", examples), ("--seed", seed)]
    command = shlex.join(
        ["tgq-fast", "report", str(catalog.report.path), *(str(part) for pair in given for part in pair)]
    )
    content = ReportContent(
        title=f"{main.name} on {Path(catalog.root).resolve().name}, {split} split",
        facts={
            "catalogue": Path(catalog.root).resolve().name,
            "items in the pool": f"{main.evaluation.pool_size:,}",
            "queries": f"{main.evaluation.queries:,}",
            "pairs": f"{main.evaluation.pairs:,}",
            "intervals": f"{main.evaluation.confidence:.0%} bootstrap over groups, {main.evaluation.samples} draws",
        },
        verdict=verdict(main, floored),
        runs=results,
        conditions={
            str(c): [RunResult(one.name, _metrics(one.corrupted[str(c)]), baseline=one.model is None) for one in shown]
            for c in asked
        },
        examples=shown_examples,
        example_note=_example_note(main, len(queries), seed),
        attention=maps,
        gates=study,
        catalogue=_catalogue_facts(catalog),
        notes=notes,
        made_by=f"Written by tgq_fast {__version__} on {date.today().isoformat()}: {command}",
    )
    page = render(content).encode("utf-8", "replace")  # a path may hold bytes that are no text
    write_atomic(out, page)
    return {
        "file": str(out),
        "bytes": len(page),
        "verdict": list(content.verdict),
        "runs": {g.name: g.evaluation.to_dict() for g in gathered},
        **{g.name: g.evaluation.to_dict() for g in floored},
        "conditions": {str(c): {g.name: g.corrupted[str(c)].to_dict() for g in shown} for c in asked},
        "examples": len(shown_examples),
        "attention_maps": len(maps),
        "gates": study is not None,
        "notes": notes,
    }


def verdict(main: Gathered, floored: Sequence[Gathered]) -> list[str]:
    """Whether the main run beats the better floor: by how much, and how sure, over groups of test queries."""
    names = [name for name in main.evaluation.metrics if name.startswith("HR@")] + ["MRR"]
    if not floored:
        return []

    def score(one: Gathered) -> float:
        return sum(one.evaluation[name] for name in names)

    best = max(floored, key=score)
    told = []
    for name in names:
        found = compare(main.evaluation, best.evaluation, name).difference
        word = "better" if found.low > 0 else "worse" if found.high < 0 else "not told apart"
        told.append(
            (
                word,
                f"{name} {main.evaluation[name]:.3f} against {best.evaluation[name]:.3f}, {found.value:+.3f} "
                f"[{found.low:+.3f}, {found.high:+.3f}]: {word}",
            )
        )
    words = {word for word, _ in told}
    if "worse" in words and "better" in words:
        head = f"Training helped in some measures and hurt in others, against {best.name}, which needs none."
    elif "worse" in words:
        head = f"Training did not help: {best.name}, which needs none, is better."
    elif "better" in words:
        head = f"Training helped: {main.name} beats {best.name}, the better of what needs no training."
    else:
        head = f"Training cannot be told from {best.name}, which needs none: no difference leaves its interval."
    return [head, *(text for _, text in told)]


def _result(one: Gathered, shown: Sequence[Gathered]) -> RunResult:
    beaten: dict[str, list[str]] = {}
    for other in shown:
        for name in one.evaluation.metrics:
            comparable = other is not one and name != "1-NN" and name in other.evaluation.metrics
            if comparable and compare(one.evaluation, other.evaluation, name).difference.low > 0:
                beaten.setdefault(name, []).append(other.name)
    if one.path is None or one.model is None:
        return RunResult(one.name, _metrics(one.evaluation), baseline=True, beaten=beaten)
    manifest = read_manifest(one.path) if (one.path / RUN).is_file() else {}
    curves = training_curves(read_log(one.path, manifest))
    return RunResult(one.name, _metrics(one.evaluation), run_facts(manifest, one.model), curves, beaten=beaten)


class Pictures:
    """Product pictures of a catalogue; remembers what could not be read."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.failed: dict[str, str] = {}

    def load(self, item: Item) -> Image.Image | None:
        """RGB picture, or None when it cannot be read."""
        if item.file_name is None:
            return None
        try:
            return load_image(self.catalog.picture(item), item.id)
        except ImageError as error:
            self.failed[item.id] = error.reason
            return None

    def uri(self, row: int, *, side: int) -> str | None:
        """Data URI of an item's picture, or None."""
        image = self.load(self.catalog.items[row])
        return None if image is None else figures.data_uri(image, side=side)

    def notes(self) -> list[str]:
        """What the reader should know about unreadable pictures."""
        return [f"picture of item {item_id} is not shown: {reason}" for item_id, reason in sorted(self.failed.items())]


def sample_queries(evaluation: Evaluation, count: int, seed: int) -> list[int]:
    """Catalogue rows of sampled queries: half found within ten, half not, as far as there are enough of both."""
    rows, label = np.unique(evaluation.query, return_inverse=True)
    best = np.full(len(rows), np.iinfo(np.int64).max)
    np.minimum.at(best, label, evaluation.rank)
    rng = np.random.default_rng(seed)
    hits, misses = (rng.permutation(rows[mask]).tolist() for mask in (best <= _HIT_DEPTH, best > _HIT_DEPTH))
    from_misses = min(len(misses), count // 2)
    from_hits = min(len(hits), count - from_misses)
    from_misses = min(len(misses), count - from_hits)
    return [int(row) for row in hits[:from_hits] + misses[:from_misses]]


def training_curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Every number that the entries of a training log have against "step"."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for entry in entries:
        for name, value in _numbers(entry):
            if name not in ("step", "epoch"):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(entry["step"]))
                values.append(value)
    return curves


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            found.append((prefix + name, float(value)))
    return found


def _name(path: Path, runs: Sequence[Path]) -> str:
    """Folder name, with its parent where two runs share it."""
    path = path.resolve()
    twins = [other for other in runs if other.resolve().name == path.name]
    return path.name if len(twins) == 1 else f"{path.parent.name}/{path.name}"


def _metrics(evaluation: Evaluation) -> dict[str, Metric]:
    shown = ("HR@", "H@", "Recall@", "MRR", "NDCG@", "1-NN")
    return {
        name: Metric(interval.value, interval.low, interval.high)
        for name, interval in evaluation.metrics.items()
        if name.startswith(shown)
    }


def run_facts(manifest: Mapping[str, Any], model: TGQFormerModel) -> dict[str, str]:
    config = model.config
    trainable = sum(parameter.numel() for _, parameter in model.trainable_parameters())
    connector = sum(parameter.numel() for parameter in model.connector.parameters())
    facts = {
        "connector": config.connector,
        "guiding fields": ", ".join(config.fields) or "none",
        "vision tower": config.vision_tower,
        "text tower": config.text_tower,
        "reader": config.llm or "light reader",
        "queries (anchored + exploratory)": f"{config.num_anchored_queries} + {config.num_exploratory_queries}",
        "width / heads / layers": f"{config.hidden_size} / {config.num_attention_heads} / {config.num_hidden_layers}",
        "trainable parameters": f"{trainable:,}",
        "of these in the connector": f"{connector:,}",
    }
    versions = {name.rpartition(" ")[2]: value for name, value in manifest.get("versions", {}).items()}
    for values in (versions, manifest.get("arguments", {}), manifest.get("result", {})):
        for name in ("version", "commit", "epochs", "steps", "best_step", "batch_size", "lr", "seed"):
            if isinstance(values.get(name), int | float | str):
                facts[name.replace("_", " ")] = str(values[name])[:12]
    return facts


def _examples(
    catalog: Catalog, gathered: Sequence[Gathered], queries: Sequence[int], pictures: Pictures
) -> list[Example]:
    if not queries:
        return []
    rows = torch.tensor(queries, dtype=torch.int64)
    found = []
    for g in gathered:
        held = ~torch.isnan(g.vectors).any(dim=1)  # an item without an embedding is no candidate
        vectors = torch.nan_to_num(g.vectors, nan=0.0)
        found.append(topk(vectors[rows], vectors, _NEIGHBOURS, exclude=rows, allowed=held))
    main = gathered[0].evaluation
    shown = []
    for position, query in enumerate(queries):
        positives = set(main.target[main.query == query].tolist()) - {query}
        neighbours = []
        for g, hits in zip(gathered, found):
            ranks = g.evaluation.rank[g.evaluation.query == query]
            best = int(ranks.min()) if len(ranks) and ranks.min() <= len(catalog) else None
            cells = [
                _neighbour(catalog, row, score, row in positives, pictures)
                for row, score in zip(hits.indices[position].tolist(), hits.scores[position].tolist())
                if row >= 0
            ]
            neighbours.append((g.name, best, cells))
        item = catalog.items[query]
        shown.append(
            Example(item.id, pictures.uri(query, side=240), _title(item), _detail(item), len(positives), neighbours)
        )
    return shown


def _neighbour(catalog: Catalog, row: int, score: float, hit: bool, pictures: Pictures) -> Neighbour:
    item = catalog.items[row]
    return Neighbour(item.id, pictures.uri(row, side=200), _title(item), item.category or "", score, hit)


def _title(item: Item) -> str:
    return item.title or item.category or item.id


def _detail(item: Item) -> str:
    values = [item.brand, item.category, *item.attributes.values()]
    return " · ".join(value for value in values if value)


def _example_note(main: Gathered, count: int, seed: int) -> str:
    share = main.evaluation.metrics.get(f"HR@{_HIT_DEPTH}")
    overall = f" Over all queries that share is {share.value:.1%}." if share is not None else ""
    return (
        f"{count} queries sampled with seed {seed}: half of those for which {main.name} finds a positive within the "
        f"first {_HIT_DEPTH}, half of those for which it does not, so misses are over-represented here.{overall} A hit "
        "is a positive of the query in this split; a miss may still be a sensible neighbour."
    )


def _catalogue_facts(catalog: Catalog) -> dict[str, str]:
    report = catalog.report
    facts = {"items": f"{len(catalog):,}", "pairs": f"{report.pairs:,}", "rows refused": str(report.problem_count)}
    for name, split in report.splits.items():
        facts[f"{name} pairs / queries"] = f"{split['pairs']:,} / {split['queries']:,}"
    for name, missing in report.missing.items():
        if missing:
            facts[f"without {name}"] = f"{missing:,}"
    return facts
