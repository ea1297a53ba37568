"""The verbs of the command line over a finished pool, and what they share with the others."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tgq_fast import console
from tgq_fast.console import guarded
from tgq_fast.errors import ArgumentError

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
PoolPath = Annotated[Path, typer.Argument(help="Folder that embed wrote.", show_default=False)]
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


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (search, neighbours, duplicates, mine_negatives):
        app.command()(guarded(verb))


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
    from tgq_fast.pool_steps import search_pool

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
    from tgq_fast.pool_steps import related_items

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
    from tgq_fast.pool_steps import near_identical

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
    from tgq_fast.pool_steps import hard_negatives

    with console.progress("negatives") as advance:
        found = hard_negatives(pool, catalog, out, k=k, skip=skip, progress=advance)
    _show("negatives", found, as_json)


def _show(title: str, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(found)
    else:
        console.table(title, ("", "value"), list(found.items()))


def assignments(values: Sequence[str] | None, option: str, *, parse: bool = False) -> dict[str, Any]:
    """name=value pairs; with `parse`, values that are JSON (numbers, true, null, lists) are read as JSON."""
    pairs: dict[str, Any] = {}
    for entry in values or ():
        quoted = re.match(r'\s*"((?:[^"]|"")+)"\s*=', entry)  # a name with "=" in it
        name, equals, value = entry.partition("=")
        if quoted:
            name, value = quoted[1].replace('""', '"'), entry[quoted.end() :]
        if not equals or not name.strip():
            raise ArgumentError(option, repr(entry), 'name=value, or "a=b"=value')
        if parse:
            try:
                pairs[name.strip()] = json.loads(value)
            except json.JSONDecodeError:
                pairs[name.strip()] = {"True": True, "False": False, "None": None}.get(value, value)
        else:
            pairs[name.strip()] = value
    return pairs
