"""Verbs over runs: train one, evaluate it, report about several."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tgq_fast.app import console
from tgq_fast.app.cli.options import (
    Cache,
    CatalogPath,
    Cpus,
    Json,
    OnError,
    Policy,
    Preset,
    RayAddress,
    Workers,
    assignments,
    crew,
    cutoffs,
    names,
    short,
    tower_options,
)
from tgq_fast.errors import ArgumentError
from tgq_fast.watch import follows

RunPath = Annotated[Path, typer.Option("--model", metavar="RUN", help="Folder that train wrote.", show_default=False)]
Corrupt = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND:AMOUNT:SIDE",
        help="Also under this condition, such as overlay:0.3:both, scene:4:query, metadata:wrong:0.5:pool; repeatable.",
    ),
]


class Keep(str, Enum):
    """What a run keeps where the frozen feature is better on validation than the trained model."""

    best = "best"
    trained = "trained"


class EvaluationEngine(str, Enum):
    """Which processes share a pool that is evaluated."""

    local = "local"
    ray = "ray"
    torchrun = "torchrun"


def train(
    catalog: CatalogPath,
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run.", show_default=False)],
    preset: Annotated[Preset, typer.Option(help="Sizes and towers.")] = Preset.tiny,
    connector: Annotated[
        str | None, typer.Option(metavar="NAME", help="A name that tgq-fast connectors lists; default: tgq.")
    ] = None,
    fields: Annotated[
        str | None,
        typer.Option(metavar="a,b,c", help="Metadata that may guide. Default: chosen by rule and printed."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Default: about 300 steps, at least 4 and at most 40 epochs.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--fp32", help="Mixed precision. Default: where it saves time.")
    ] = None,
    vision: Annotated[str | None, typer.Option(help="Vision tower: name, hub name or local path.")] = None,
    text: Annotated[str | None, typer.Option(help="Text tower: name, hub name or local path.")] = None,
    llm: Annotated[str | None, typer.Option(help="LLM by name or path; 'none' for the light reader.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="key=value", help="Any configuration field; repeatable.")
    ] = None,
    match_budget: Annotated[
        bool, typer.Option("--match-budget/--no-match-budget", help="Give other connectors as many parameters as tgq.")
    ] = True,
    views: Annotated[
        int, typer.Option(min=0, help="Corrupted views of each training picture: overlays, scenes, crops; 0 for none.")
    ] = 4,
    keep: Annotated[
        Keep, typer.Option(help="best: the frozen feature where it wins on validation; trained: the model anyway.")
    ] = Keep.best,
    validations: Annotated[
        int, typer.Option(min=1, help="How often a long run is validated; each time embeds the whole catalogue.")
    ] = 6,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in RUN.")] = False,
    init_from: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Start from this run's trained weights; sizes, fields, towers are its own."),
    ] = None,
    report_to: Annotated[
        str | None, typer.Option(metavar="a,b", help="tensorboard, wandb: also log there; needs their extras.")
    ] = None,
    cache: Cache = None,
    on_error: OnError = Policy.stop,
    as_json: Json = False,
) -> None:
    """Train a connector over frozen towers on the training pairs of a catalogue.

    Example: tgq-fast train shop --out runs/tgq --fields category,gender --epochs 5

    Example: tgq-fast train shop --out runs/qf --connector qformer --set num_hidden_layers=4

    Example: tgq-fast train shop --out runs/longer --init-from runs/tgq --epochs 10 --lr 3e-4
    """
    from tgq_fast.app.intake import load_catalog, require_pairs
    from tgq_fast.workflow import continued_config, make_config, train_run

    loaded = load_catalog(catalog, on_error.value, watch=console.TERMINAL)
    require_pairs(loaded)
    overrides = assignments(set_, "--set", parse=True) | tower_options(vision, text, llm)
    if init_from is not None:
        config = continued_config(init_from, connector=connector, fields=names(fields), overrides=overrides)
    else:
        config = make_config(
            loaded,
            preset=preset.value,
            connector=connector or "tgq",
            fields=names(fields),
            overrides=overrides,
            match=match_budget,
            watch=console.TERMINAL,
        )
    console.note("guiding fields: " + (", ".join(config.fields) or "none"))
    summary = train_run(
        loaded,
        config,
        out,
        epochs=epochs,
        seed=seed,
        batch_size=batch_size,
        lr=lr,
        bf16=bf16,
        validations=validations,
        resume=resume,
        init_from=init_from,
        report_to=names(report_to) or (),
        views=views,
        keep=keep.value,
        cache=cache,
        on_error=on_error.value,
        watch=console.TERMINAL,
    )
    if as_json:
        console.print_json(summary)
    else:
        console.table("trained", ("", "value"), [(name, short(value)) for name, value in summary.items()])


def evaluate(
    catalog: CatalogPath,
    model: RunPath,
    pool: Annotated[Path | None, typer.Option(metavar="POOL", help="Pool of this run; default: embed now.")] = None,
    k: Annotated[str, typer.Option("--k", metavar="1,10,100", help="Cut-offs.")] = "1,10,100",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    floor: Annotated[
        bool | None,
        typer.Option(
            "--floor/--no-floor", help="Also the zero-shot image-only floors; default: yes, with --pool if cached."
        ),
    ] = None,
    corrupt: Corrupt = None,
    seed: Annotated[int, typer.Option(help="Of the corruptions.")] = 0,
    samples: Annotated[int, typer.Option(min=0, help="Bootstrap draws over groups.")] = 1000,
    cache: Cache = None,
    workers: Workers = 1,
    engine: Annotated[
        EvaluationEngine,
        typer.Option(help="With --pool: ray: actors that hold its shards; torchrun: the processes that run this."),
    ] = EvaluationEngine.local,
    ray_address: RayAddress = "local",
    cpus: Cpus = 1,
    on_error: OnError = Policy.stop,
    as_json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="[FILE]",
            help="The result as one JSON document on stdout, or written to FILE beside the table.",
        ),
    ] = None,
) -> None:
    """Hit rate, recall, MRR and NDCG over the full pool, with bootstrap intervals.

    Example: tgq-fast evaluate shop --model runs/tgq --pool pools/tgq --k 1,10,100 --json result.json

    Example: tgq-fast evaluate shop --model runs/tgq --corrupt overlay:0.3:both --corrupt scene:4:query

    Example: tgq-fast evaluate shop --model runs/tgq --pool pools/tgq --workers 4
    """
    from tgq_fast.app.intake import load_catalog
    from tgq_fast.io.files import check_target, write_atomic
    from tgq_fast.pool.embed import RAW_FLOOR
    from tgq_fast.workflow import evaluate_run

    if as_json is not None and str(as_json) != "-":
        check_target(as_json)
    shared: dict[str, Any] = {}
    watched: AbstractContextManager[None] = nullcontext()
    if engine is EvaluationEngine.torchrun:
        from tgq_fast.training.ranks import Team

        if "WORLD_SIZE" not in os.environ:
            raise ArgumentError("--engine", "torchrun in a single process", "torchrun -m tgq_fast evaluate …")
        team = Team()
        shared["group"], watched = team.group, team.watched()
    else:
        shared["crew"] = crew(engine is EvaluationEngine.ray, workers, ray_address, cpus)
    loaded = load_catalog(catalog, on_error.value, watch=console.TERMINAL)
    with watched:
        results = evaluate_run(
            loaded,
            model,
            pool=pool,
            ks=cutoffs(k),
            split=split,
            floor=floor,
            corrupt=corrupt or (),
            samples=samples,
            seed=seed,
            cache=cache,
            on_error=on_error.value,
            watch=console.TERMINAL,
            **shared,
        )
    if floor is None and RAW_FLOOR not in results:
        console.note("without the zero-shot floors: frozen features are not cached; --floor computes them")
    document = {"catalogue": str(catalog), "model": str(model)} | {name: e.to_dict() for name, e in results.items()}
    if as_json is not None and str(as_json) == "-":
        console.print_json(document)
        return
    if as_json is not None and not follows():
        write_atomic(as_json, (json.dumps(console.plain(document), indent=2) + "\n").encode())
        console.note(f"wrote {as_json}")
    from tgq_fast.workflow import metric_table

    columns, rows = metric_table(results)
    first = next(iter(results.values()))
    console.table(f"{split}: {first.queries} queries, pool of {first.pool_size}", columns, rows)


def report(
    catalog: CatalogPath,
    model: Annotated[
        list[Path],
        typer.Option("--model", metavar="RUN", help="Repeat to compare, main run first.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", show_default=False)],
    pool: Annotated[
        list[Path] | None, typer.Option(metavar="POOL", help="Pools of the runs, same order; default: embed now.")
    ] = None,
    k: Annotated[str, typer.Option("--k", metavar="1,10,100", help="Cut-offs.")] = "1,10,100",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    corrupt: Corrupt = None,
    examples: Annotated[int, typer.Option(min=0, help="Queries shown with their neighbours.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the sampled examples and corruptions.")] = 0,
    cache: Cache = None,
    on_error: OnError = Policy.stop,
    as_json: Json = False,
) -> None:
    """One self-contained HTML page: metrics, curves, neighbours, attention over pictures, gates.

    Example: tgq-fast report shop --model runs/tgq --model runs/qformer --out report.html
    """
    from tgq_fast.app.intake import load_catalog
    from tgq_fast.report.collect import write_report

    loaded = load_catalog(catalog, on_error.value, watch=console.TERMINAL)
    summary = write_report(
        loaded,
        model,
        out,
        pools=pool,
        ks=cutoffs(k),
        split=split,
        corrupt=corrupt or (),
        examples=examples,
        seed=seed,
        cache=cache,
        on_error=on_error.value,
        watch=console.TERMINAL,
    )
    if as_json:
        console.print_json(summary)
    else:
        for line in summary["verdict"]:
            console.note(line)
        console.note(f"wrote {out} ({summary['bytes'] / 1e6:.1f} MB)")
