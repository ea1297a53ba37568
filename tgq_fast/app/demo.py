"""What `make demo` runs: validate, train tgq and qformer under one budget, embed, search, evaluate, report.

Every step is one that the command line offers by itself; the demo prints the command that would do it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tgq_fast import workflow
from tgq_fast.app import console, intake, pool_steps
from tgq_fast.errors import ArgumentError
from tgq_fast.io.sealed import seal

_MARKER = ".tgq-demo"  # in the output folder: what is in it was made by the demo and may be replaced by it

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@console.guarded
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for runs, pools, results and report.")] = Path("demo-output"),
    catalog: Annotated[Path | None, typer.Option(help="Your catalogue; default: the embedded one.")] = None,
    fields: Annotated[
        str | None, typer.Option(metavar="a,b,c", help="Metadata that may guide; default: by rule.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: as in tgq-fast train.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs per step.")] = 128,
    lr: Annotated[float, typer.Option()] = 1e-3,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--fp32", help="Mixed precision. Default: where it saves time.")
    ] = None,
    vision: Annotated[str | None, typer.Option(help="Vision tower; default: the preset's.")] = None,
    connectors: Annotated[
        str, typer.Option(metavar="a,b", help="Connectors to compare, main one first.")
    ] = "tgq,qformer",
    cache: Annotated[Path | None, typer.Option(help="Folder of frozen features.")] = None,
) -> None:
    """Validate, train, embed, search, evaluate and report on one catalogue."""
    from tgq_fast.io.files import write_atomic
    from tgq_fast.io.identity import package_identity

    begin = time.monotonic()
    prepare(out)
    own = catalog
    if catalog is None:
        from tgq_fast.data import write_demo_catalog

        with step("draw the embedded catalogue"):
            catalog = write_demo_catalog(out / "catalog")
    with step(f"tgq-fast validate {catalog}"):
        found = intake.validate_catalog(catalog, images=True, rejects=out / "rejects.jsonl", watch=console.TERMINAL)
        report = found.report
        console.note(
            f"{report.items} items, {report.pairs} pairs, {report.problem_count} rows and "
            f"{len(report.image_problems)} pictures refused"
        )
        for line in [*report.problems, *report.image_problems, *report.warnings][:5]:
            console.note(f"  {line}")
    loaded = intake.load_catalog(catalog, "skip", watch=console.TERMINAL)
    names = found.fields if fields is None else [name.strip() for name in fields.split(",") if name.strip()]
    console.note("guiding fields: " + (", ".join(names) or "none"))
    overrides = {} if vision is None else {"vision_tower": vision}
    runs, pools, trained = {}, {}, {}
    compared = [name.strip() for name in connectors.split(",") if name.strip()]
    for connector in compared:
        runs[connector], pools[connector] = out / "runs" / connector, out / "pools" / connector
        config = workflow.make_config(
            loaded, preset="tiny", connector=connector, fields=names, overrides=overrides, watch=console.TERMINAL
        )
        with step(
            f"tgq-fast train {catalog} --out {runs[connector]} --connector {connector} --fields {','.join(names)}"
        ):
            trained[connector] = workflow.train_run(
                loaded,
                config,
                runs[connector],
                epochs=epochs,
                seed=seed,
                batch_size=batch_size,
                lr=lr,
                bf16=bf16,
                keep="trained",  # connectors are compared as they are; the floors stand beside them
                cache=cache,
                on_error="skip",
                watch=console.TERMINAL,
            )
        with step(f"tgq-fast embed {catalog} --model {runs[connector]} --out {pools[connector]}"):
            workflow.embed_run(
                loaded, runs[connector], pools[connector], cache=cache, on_error="skip", watch=console.TERMINAL
            )
    results: dict[str, Any] = {}
    for connector in compared:
        with step(f"tgq-fast evaluate {catalog} --model {runs[connector]} --pool {pools[connector]}"):
            results |= workflow.evaluate_run(
                loaded,
                runs[connector],
                pool=pools[connector],
                floor=connector == compared[-1],
                cache=cache,
                on_error="skip",
                watch=console.TERMINAL,
            )
    query = loaded.items[int(loaded.split_pairs("test").query[0])]
    main = compared[0]
    with step(f"tgq-fast search {pools[main]} --item {query.id} -k 5"):
        hits = pool_steps.search_pool(pools[main], items=[query.id], k=5)["hits"]
    models = " ".join(f"--model {run}" for run in runs.values())
    with step(f"tgq-fast report {catalog} {models} --out {out / 'report.html'}"):
        from tgq_fast.report.collect import write_report

        write_report(
            loaded,
            list(runs.values()),
            out / "report.html",
            pools=list(pools.values()),
            cache=cache,
            on_error="skip",
            watch=console.TERMINAL,
            seed=seed,
        )
    _print(f"nearest to {query.title or query.id!r} ({main})", hits, results)
    summary = {
        "catalogue": "embedded" if own is None else catalog.name,
        "digest": loaded.digest(),
        "command": command_line(context, None if own is None else catalog.name),
        "versions": package_identity(),
        "fields": names,
        "seed": seed,
        "training": {name: {k: v for k, v in facts.items() if k != "run"} for name, facts in trained.items()},
        "results": {name: result.to_dict() for name, result in results.items()},
    }
    write_atomic(out / "results.json", (json.dumps(seal(console.plain(summary)), indent=1) + "\n").encode())
    console.note(
        f"\nreport: {out / 'report.html'}   results: {out / 'results.json'}   {time.monotonic() - begin:.0f} s in all"
    )


def command_line(context: typer.Context, catalog: str | None) -> str:
    """The make command of this demo but for its folders and its seed, which differ between runs of one study."""
    given = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in ("out", "catalog", "cache", "seed"):
            continue
        value = context.params[name]
        given.append(parameter.opts[0] if value is True else f"{parameter.opts[0]} {value}")
    place = "" if catalog is None else f" CATALOG={catalog}"
    return "make demo" + place + (f' DEMO_ARGS="{" ".join(given)}"' if given else "")


def prepare(out: Path) -> None:
    """Empty output folder; an earlier demo's is emptied, anything else is refused.

    Raises:
        ArgumentError: the folder holds something that no demo wrote.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).is_file():
            raise ArgumentError("--out", str(out), "an empty or new folder, or one of an earlier demo")
        for name in ("runs", "pools", "catalog"):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "rejects.jsonl").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


@contextmanager
def step(command: str) -> Iterator[None]:
    """Say what happens, and how long it took."""
    console.stderr().rule(f"[bold]{command}", align="left") if "[" not in command else console.note(command)
    begin = time.monotonic()
    yield
    console.note(f"{time.monotonic() - begin:.1f} s")


def _print(title: str, hits: Sequence[dict[str, Any]], results: dict[str, Any]) -> None:
    rows = [[hit["rank"], f"{hit['score']:.3f}", hit["id"], hit.get("title"), hit.get("brand")] for hit in hits]
    console.table(title, ["rank", "score", "id", "title", "brand"], rows, left=5)
    columns, table = workflow.metric_table(results)
    first = next(iter(results.values()))
    console.table(f"test split: {first.queries} queries, every item of {first.pool_size} a candidate", columns, table)


if __name__ == "__main__":
    app()
