"""Evaluate a run beside the floors that need no training, under conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgq_fast.watch import SILENT, Watch
from tgq_fast.workflow.opening import Policy, load_towers, open_run, open_store

if TYPE_CHECKING:
    from tgq_fast.data import Catalog
    from tgq_fast.evaluation import Evaluation

_SHOWN = ("HR@", "H@", "Recall@", "MRR", "NDCG@", "1-NN")


def evaluate_run(
    catalog: Catalog,
    run: Path,
    *,
    pool: Path | None = None,
    ks: Sequence[int] = (1, 10, 100),
    split: str = "test",
    floor: bool | None = None,
    corrupt: Sequence[str] = (),
    samples: int = 1000,
    seed: int = 0,
    cache: Path | None = None,
    on_error: Policy = "raise",
    watch: Watch = SILENT,
) -> dict[str, Evaluation]:
    """Evaluation of a run by name, and with `floor` of the zero-shot image features, raw and whitened, beside it.

    Args:
        pool: of this run; None embeds now.
        floor: None: yes, but beside a pool only where the frozen features of this catalogue are cached already, so that
            a pool is evaluated without reading a picture.
        corrupt: conditions as in `overlay:0.3:both`; each adds an evaluation "name · condition".
        seed: of the corruptions.

    Raises:
        ArgumentError: a condition that cannot be read.
        PoolError: the pool was made by another model, or does not hold this catalogue.
    """
    from tgq_fast.data.conditions import CLEAN, parse_conditions
    from tgq_fast.evaluation import evaluate
    from tgq_fast.models import FeatureStore
    from tgq_fast.workflow.embeddings import Conditions, evaluate_under, floors, pool_embeddings

    asked = [CLEAN, *(condition for condition in parse_conditions(corrupt) if condition != CLEAN)]
    model = open_run(run, watch)
    clean = None if pool is None else pool_embeddings(pool, catalog, model)
    store = None
    if clean is not None and not floor and len(asked) == 1:
        if floor is None:
            store = FeatureStore.find(
                catalog, *load_towers(model.config, watch), model.config, cache, on_error=on_error
            )
        if store is None:
            return {run.name: evaluate(catalog, clean, ks=ks, split=split, samples=samples)}
    if store is None:
        store = open_store(catalog, model.config, cache=cache, on_error=on_error, watch=watch)
    results: dict[str, Evaluation] = {}
    with watch.progress("corrupted pictures") as advance:
        conditions = Conditions(
            catalog, load_towers(model.config, watch), store, cache_dir=cache, seed=seed, progress=advance
        )
        embedders: dict[str, Any] = {run.name: model}
        if floor is not False:
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
