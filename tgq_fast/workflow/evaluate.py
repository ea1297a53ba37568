"""Evaluate a run beside the floors that need no training, under conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgq_fast.arguments import checked
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError
from tgq_fast.watch import SILENT, Watch
from tgq_fast.workflow.opening import Policy, load_towers, open_run, open_store

if TYPE_CHECKING:
    import torch.distributed as dist

    from tgq_fast.data import Catalog
    from tgq_fast.evaluation import Evaluation
    from tgq_fast.scale.crew import Crew

_SHOWN = ("HR@", "H@", "Recall@", "MRR", "NDCG@", "1-NN")


@plain_defaults()
@checked
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
    crew: Crew | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Evaluation]:
    """Evaluation of a run by name, and with `floor` of the zero-shot image features, raw and whitened, beside it.

    Args:
        pool: of this run; None embeds now. Where nothing else is evaluated it may be larger than memory.
        floor: None: yes, but beside a pool only where the frozen features of this catalogue are cached already, so that
            a pool is evaluated without reading a picture.
        corrupt: conditions as in `overlay:0.3:both`; each adds an evaluation "name · condition".
        seed: of the corruptions.
        crew: workers that hold the pool's shards.
        group: a `torch.distributed` group whose ranks share the work on the pool; each gets the whole result.

    Raises:
        ArgumentError: a condition that cannot be read.
        PoolError: the pool was made by another model, or does not hold this catalogue.
    """
    from tgq_fast.data.conditions import CLEAN, parse_conditions
    from tgq_fast.evaluation import evaluate
    from tgq_fast.models import FeatureStore
    from tgq_fast.pool import model_digest, open_embedded
    from tgq_fast.workflow.embeddings import Conditions, evaluate_under, floors, pool_embeddings

    asked = [CLEAN, *(condition for condition in parse_conditions(corrupt) if condition != CLEAN)]
    if crew is not None or group is not None:
        if pool is None or floor or len(asked) > 1:
            given = "no pool" if pool is None else "floors" if floor else "conditions"
            raise ArgumentError("engine", f"several processes with {given}", "a pool alone, which they share")
        floor = False
    model = open_run(run, watch)
    store = None
    if pool is not None and not floor and len(asked) == 1:
        if floor is None:
            store = FeatureStore.find(
                catalog, *load_towers(model.config, watch), model.config, cache, on_error=on_error
            )
        if store is None:
            with open_embedded(pool, catalog, model_digest(model)) as held, ExitStack() as shared:
                embedded: Any = held
                if crew is not None:
                    from tgq_fast.scale import ShardedPool

                    embedded = shared.enter_context(ShardedPool(pool, crew))
                with watch.progress("queries") as advance:
                    options: dict[str, Any] = {"ks": ks, "split": split, "samples": samples, "progress": advance}
                    return {run.name: evaluate(catalog, embedded, group=group, **options)}
    clean = None if pool is None else pool_embeddings(pool, catalog, model)
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
