"""Verbs over pools: embed a catalogue, search, tables of neighbours, serve."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tgq_fast.app import console
from tgq_fast.app.cli.options import (
    CatalogPath,
    Cpus,
    Gpus,
    Json,
    OnError,
    Policy,
    PoolPath,
    Preset,
    RayAddress,
    Workers,
    assignments,
    crew,
    tower_options,
)
from tgq_fast.errors import ArgumentError

Where = Annotated[
    str | None,
    typer.Option(help="Conditions, such as 'category = same, in_stock = true, price within 30%'.", show_default=False),
]
PerGroup = Annotated[int | None, typer.Option("--per-group", min=1, help="At most so many neighbours of one group_id.")]
Columns = Annotated[
    Path | None,
    typer.Option("--table", metavar="FILE", help="Parquet or CSV file with an id column, for conditions."),
]
CatalogOption = Annotated[
    Path | None, typer.Option("--catalog", help="Catalogue of the pool, where it is newer than what embed kept of it.")
]
K = Annotated[int, typer.Option("-k", min=1, help="Neighbours.")]


class ZeroShot(str, Enum):
    """The two features that need no training."""

    raw = "raw"
    whitened = "whitened"


class EngineName(str, Enum):
    """Where embedding runs."""

    local = "local"
    ray = "ray"


def embed(
    catalog: CatalogPath,
    out: Annotated[Path, typer.Option("--out", metavar="POOL", help="Folder of the pool.", show_default=False)],
    model: Annotated[Path | None, typer.Option("--model", metavar="RUN", help="Folder that train wrote.")] = None,
    zero_shot: Annotated[
        ZeroShot | None, typer.Option("--zero-shot", help="Instead of a run: the frozen image feature, no training.")
    ] = None,
    preset: Annotated[Preset, typer.Option(help="With --zero-shot: sizes and towers.")] = Preset.tiny,
    vision: Annotated[str | None, typer.Option(help="With --zero-shot: the vision tower.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="Items per file: what an interruption can cost.")] = 4096,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished pool.")] = True,
    codes: Annotated[bool, typer.Option("--codes/--no-codes", help="Also write what makes searching faster.")] = True,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", help="Also keep frozen features here. Default: none are written; a cache of train is read."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that decode pictures, of all workers. Default: one per processor, 2 to 16."),
    ] = None,
    workers: Workers = 1,
    engine: Annotated[
        EngineName, typer.Option(help="ray: actors of a Ray cluster; needs pip install ray==2.60.0 (extra ray).")
    ] = EngineName.local,
    ray_address: RayAddress = "local",
    cpus: Cpus = 1,
    gpus: Gpus = 0,
    on_error: OnError = Policy.stop,
    as_json: Json = False,
) -> None:
    """Embed every item into a pool on disk; run it again after an interruption and it goes on.

    Example: tgq-fast embed shop --model runs/tgq --out pools/tgq --on-error skip

    Example: tgq-fast embed shop --zero-shot whitened --out pools/floor

    Example: tgq-fast embed shop --model runs/tgq --out pools/tgq --workers 4
    """
    from tgq_fast.app.intake import load_catalog
    from tgq_fast.workflow import embed_run, make_config, zero_shot_model

    if (model is None) == (zero_shot is None):
        given = "neither" if model is None else "both"
        raise ArgumentError("--model", given, "a run by --model RUN, or --zero-shot raw|whitened")
    loaded = load_catalog(catalog, on_error.value, pairs=False, watch=console.TERMINAL)
    source: Any = model
    if zero_shot is not None:
        config = make_config(
            loaded, preset=preset.value, fields=[], overrides=tower_options(vision, None, None), watch=console.TERMINAL
        )
        source = zero_shot_model(
            loaded, config, whitened=zero_shot is ZeroShot.whitened, cache=cache, watch=console.TERMINAL
        )
    report = embed_run(
        loaded,
        source,
        out,
        batch_size=batch_size,
        shard_size=shard_size,
        resume=resume,
        cache=cache,
        on_error=on_error.value,
        codes=codes,
        watch=console.TERMINAL,
        threads=threads,
        crew=crew(engine is EngineName.ray, workers, ray_address, cpus, gpus),
    ).to_dict()
    if as_json:
        console.print_json(report)
    else:
        console.table("embedded", ("", "value"), list(report.items()))
        made_by = "" if model is None else f" --model {shlex.quote(str(model))}"
        console.note(f"look at it: tgq-fast serve {shlex.quote(str(out))}{made_by}")


def search(
    pool: PoolPath,
    item: Annotated[
        list[str] | None, typer.Option(help="Id of an item of the pool; not a result of itself. Repeatable.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to search with; needs --model.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(metavar="name=value", help="Metadata of the query; repeatable.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", metavar="RUN", help="Run that made the pool.")] = None,
    where: Where = None,
    per_group: PerGroup = None,
    catalog: CatalogOption = None,
    table: Columns = None,
    k: K = 10,
    as_json: Json = False,
) -> None:
    """Nearest items of a pool, exactly.

    Example: tgq-fast search pools/tgq --item 12345 -k 5 --where 'category = same, price < 50'

    Example: tgq-fast search pools/tgq --image shoe.jpg --field category=Shoes --model runs/tgq
    """
    from tgq_fast.app.pool_steps import search_pool

    if bool(item) == (image is not None):
        raise ArgumentError("query", "both" if item else "nothing", "either --item ID or --image FILE")

    result = search_pool(
        pool,
        items=item or (),
        image=image,
        fields=assignments(field, "--field"),
        model=model,
        catalog=catalog,
        table=table,
        where=where,
        per_group=per_group,
        k=k,
    )
    if as_json:
        console.print_json(result)
        return
    for query in result["queries"]:
        hits = query["hits"]
        if not hits:
            console.note(f"{query['query']}: no item meets the conditions")
            continue
        columns = [n for n in ("rank", "score", "id", "title", "brand", "file") if any(n in hit for hit in hits)]
        rows = [[f"{hit[n]:.4f}" if n == "score" else hit.get(n) for n in columns] for hit in hits]
        console.table(f"neighbours of {query['query']}", columns, rows, left=len(columns))


def neighbours(
    pool: PoolPath,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help=".parquet, .csv or .jsonl.", show_default=False)],
    where: Where = None,
    per_group: PerGroup = None,
    catalog: CatalogOption = None,
    table: Columns = None,
    k: K = 20,
    as_json: Json = False,
) -> None:
    """The neighbours of every item as a table: item, rank, neighbour, score. Run it again after an interruption.

    Example: tgq-fast neighbours pools/tgq --out related.parquet --where 'category = same, in_stock = true'
    """
    from tgq_fast.app.pool_steps import related_items

    with console.progress("neighbours") as advance:
        found = related_items(
            pool, out, k=k, where=where, per_group=per_group, catalog=catalog, table=table, progress=advance
        )
    _show("neighbours", found, as_json)


def duplicates(
    pool: PoolPath,
    threshold: Annotated[float, typer.Option(help="Least score of a pair.")] = 0.98,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.csv", help="Also write the groups there.")] = None,
    as_json: Json = False,
) -> None:
    """Near-identical items, as groups.

    Example: tgq-fast duplicates pools/tgq --threshold 0.98 --out duplicates.csv
    """
    from tgq_fast.app.pool_steps import near_identical

    with console.progress("duplicates") as advance:
        found = near_identical(pool, threshold, out, progress=advance)
    if as_json:
        console.print_json(found)
        return
    rows = [
        [number, len(group), ", ".join(one["id"] for one in group[:6]) + (", …" if len(group) > 6 else "")]
        for number, group in enumerate(found["groups"][:30], start=1)
    ]
    title = f"{found['duplicates']} of {found['items']} items in {len(found['groups'])} groups"
    console.table(title, ("group", "size", "items"), rows, left=3)


def mine_negatives(
    pool: PoolPath,
    catalog: Annotated[Path, typer.Option(help="Catalogue of the pool, with groups or pairs.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help=".parquet, .csv or .jsonl.", show_default=False)],
    skip: Annotated[int, typer.Option(min=0, help="Leave so many of the nearest out.")] = 0,
    k: K = 20,
    as_json: Json = False,
) -> None:
    """The nearest items that are no positives (another group, in no pair), for training with hard negatives.

    Example: tgq-fast mine-negatives pools/tgq --catalog shop --out negatives.parquet --skip 2
    """
    from tgq_fast.app.pool_steps import hard_negatives

    with console.progress("negatives") as advance:
        found = hard_negatives(pool, catalog, out, k=k, skip=skip, progress=advance)
    _show("negatives", found, as_json)


def _show(title: str, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(found)
    else:
        console.table(title, ("", "value"), list(found.items()))


def serve(
    pool: Annotated[
        list[Path], typer.Argument(help="Folders that embed wrote; several can be compared.", show_default=False)
    ],
    model: Annotated[
        list[Path] | None, typer.Option("--model", metavar="RUN", help="Runs that made them, for queries by picture.")
    ] = None,
    catalog: Annotated[
        Path | None, typer.Option(help="Catalogue of the pools; default: the one the first was made from.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default reaches this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Further name that clients may use; '*' for any.")
    ] = None,
) -> None:
    """A page to browse a catalogue and its neighbours, and the same as a JSON API under /api.

    Example: tgq-fast serve pools/tgq --model runs/tgq
    """
    from tgq_fast.serve.server import open_shop
    from tgq_fast.serve.server import serve as run

    def announce(address: str) -> None:
        console.note(f"{address} (Ctrl-C ends it)")

    run(open_shop(pool, model or [], catalog), host=host, port=port, hosts=allow_host or [], announce=announce)
