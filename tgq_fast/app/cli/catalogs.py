"""Verbs over catalogues: check one, make one from a shop's export or a public data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tgq_fast.app import console
from tgq_fast.app.cli.options import CatalogPath, Json, assignments, names, short
from tgq_fast.app.console import EXIT_DATA
from tgq_fast.errors import ArgumentError


def validate(
    catalog: CatalogPath,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Also decode every picture.")] = True,
    rejects: Annotated[Path | None, typer.Option(help="Append every unusable item to this JSONL file.")] = None,
    as_json: Json = False,
) -> None:
    """Check rows, pairs and pictures of a catalogue; exit code 3 when there are problems.

    Example: tgq-fast validate shop --rejects rejects.jsonl
    """
    from tgq_fast.app.intake import validate_catalog

    found = validate_catalog(catalog, images=images, rejects=rejects, watch=console.TERMINAL)
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


def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="Your own: merchant, shopify, woocommerce, table, pictures, dataset, parquet, webdataset. "
            "Public: grocery, fashion, amazon2023, abo.",
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
    from tgq_fast.app.intake import after_import, import_source
    from tgq_fast.data.importers import PUBLIC, DownloadLimits, ShopOptions

    columns = assignments([part for entry in map_ or () for part in names(entry) or ()], "--map")
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
    result = import_source(
        source, path, out, limit=limit, link=link, options=None if source in PUBLIC else options, watch=console.TERMINAL
    )
    if as_json:
        console.print_json(result)
    else:
        shown = [(name, short(value)) for name, value in result.items() if value or name == "items"]
        console.table(f"imported {source}", ("", "value"), shown)
        for line in after_import(out, result):
            console.note(line)
