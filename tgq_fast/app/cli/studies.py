"""The verb `tgq-fast study`: parse, call, print. Heavy imports happen inside, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tgq_fast.app import console
from tgq_fast.app.cli.options import setting
from tgq_fast.errors import ArgumentError

__all__ = ["study"]


def study(
    catalog: Annotated[Path, typer.Argument(help="Catalogue folder, or its metadata file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="STUDY", help="Folder of the study.", show_default=False)],
    connectors: Annotated[
        str, typer.Option(metavar="a,b|zoo", help="Connectors, the main one first; zoo: all there are.")
    ] = "zoo",
    ablations: Annotated[str, typer.Option(metavar="a,b|all", help="Parts of tgq to leave out, one at a time.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each connector and ablation.")] = 3,
    corruptions: Annotated[
        str | None,
        typer.Option(metavar="clean,overlay:0.3:both,…", help="Conditions. Default: overlays and scenes on each side."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:key=value,…", help="A recipe that every connector tries on the folds; repeatable."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds of the groups of train and validation.")] = 5,
    select: Annotated[str, typer.Option(help="Metric that chooses among recipes.")] = "H@100",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that train at a time.")] = 1,
    fields: Annotated[
        str | None, typer.Option(metavar="a,b,c", help="Metadata that may guide; default: by rule.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Sizes and towers: tiny, paper, large.")] = "tiny",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="key=value", help="Any configuration field; repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every run; default: as in tgq-fast train.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    validations: Annotated[int, typer.Option(min=1, help="Of each run; the best one's model counts.")] = 6,
    views: Annotated[int, typer.Option(min=0, help="Corrupted views of each training picture; 0 for none.")] = 4,
    view_kinds: Annotated[
        str | None, typer.Option(metavar="kind=weight,…", help="Kinds of views; default: overlays, scenes, crops.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of folds, corruptions and views.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder of frozen features.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="study.json on stdout too.")] = False,
) -> None:
    """Train, embed and evaluate connectors and ablations under one budget; go on after an interruption.

    Choices are made on folds of train and validation. Writes study.json and report.html.

    Example: tgq-fast study shop --out study --connectors tgq,qformer,mlp --ablations guide,gates --seeds 3 --jobs 2

    Example: tgq-fast study shop --out study --recipe plain: --recipe wide:hidden_size=512 --folds 5
    """
    from tgq_fast.app.intake import load_catalog
    from tgq_fast.data.guides import suggest_fields
    from tgq_fast.models.zoo.registry import CONNECTORS
    from tgq_fast.study.engine import run_study
    from tgq_fast.study.page import text_table, verdict
    from tgq_fast.study.plan import ABLATIONS, CONDITIONS, Plan

    loaded = load_catalog(catalog, "skip", watch=console.TERMINAL)
    changed: dict[str, Any] = {"per_item": views}
    if view_kinds is not None:
        changed["kinds"] = {name: _number(name, value) for name, value in _pairs(view_kinds, "--view-kinds").items()}
    plan = Plan(
        catalog=str(catalog.resolve()),
        digest=loaded.digest(),
        fields=suggest_fields(loaded) if fields is None else _list(fields),
        preset=preset,
        overrides=_settings(",".join(set_ or ()), "--set"),
        connectors=list(CONNECTORS) if connectors == "zoo" else _list(connectors),
        ablations=list(ABLATIONS) if ablations == "all" else _list(ablations),
        recipes=dict(_recipe(text) for text in recipe or ["default:"]),
        seeds=seeds,
        folds=folds,
        conditions=["clean", *CONDITIONS] if corruptions is None else _list(corruptions),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        bf16=bf16,
        validations=validations,
        views=changed if views else None,
        select=select,
        seed=seed,
    )
    found = run_study(plan, out, jobs=jobs, cache=cache, say=console.note)
    if as_json:
        console.print_json(found)
    else:
        columns, rows = text_table(found)
        console.table(f"{found['main']} on {found['catalogue']}", columns, rows)
    for line in verdict(found):
        console.note(line)
    console.note(f"wrote {out / 'study.json'} and {out / 'report.html'}")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _pairs(text: str, option: str) -> dict[str, str]:
    found = {}
    for part in _list(text):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ArgumentError(option, repr(part), "name=value")
        found[name.strip()] = value.strip()
    return found


def _settings(text: str, option: str) -> dict[str, Any]:
    """Values that are JSON are read as JSON, as in `tgq-fast train --set`."""
    return {name: setting(value) for name, value in _pairs(text, option).items()}


def _recipe(text: str) -> tuple[str, dict[str, Any]]:
    name, colon, settings = text.partition(":")
    if not colon or not name.strip():
        raise ArgumentError("--recipe", repr(text), "NAME:key=value,… (nothing after the colon: the defaults)")
    return name.strip(), _settings(settings, "--recipe")


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ArgumentError("--view-kinds", f"{name}={value}", "a number as weight") from None
