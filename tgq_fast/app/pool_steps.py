"""What the verbs over a finished pool do: search, related items, near-identical items, hard negatives."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgq_fast.errors import ArgumentError, PoolError, TGQError
from tgq_fast.workflow import open_run

if TYPE_CHECKING:
    import pyarrow as pa

    from tgq_fast.pool import ItemPool, PoolHits

Progress = Callable[[int, int], None]


def search_pool(
    path: Path,
    *,
    items: Sequence[str] = (),
    image: Path | None = None,
    fields: Mapping[str, str] | None = None,
    model: Path | None = None,
    catalog: Path | None = None,
    table: Path | None = None,
    where: str | None = None,
    per_group: int | None = None,
    k: int = 10,
) -> dict[str, Any]:
    """Neighbours of items of the pool, or of a new picture with metadata.

    Args:
        where, per_group: see :func:`tgq_fast.pool.neighbours`.
        catalog, table: where titles and columns come from; None: what embed wrote beside the pool.

    Returns:
        "k", "pool_size" and "queries", each a "query" with its "hits"; of a single query also these two themselves.

    Raises:
        ArgumentError: neither or both of `items` and `image`, metadata without a picture, an unknown id or field.
        PoolError, CheckpointError: the pool was made by another model, or one of them cannot be read.
    """
    from tgq_fast.pool import ItemPool
    from tgq_fast.pool.columns import groups_of

    if bool(items) == (image is not None):
        raise ArgumentError("query", "both" if items else "nothing", "either items or image")
    if items and fields:
        raise ArgumentError("fields", ", ".join(fields), "a query by image", "An item brings its own metadata.")
    with ItemPool.open(path) as pool:
        known = columns(table, catalog) if where is not None or per_group is not None else None
        select = None if where is None else pool.select(where, known)
        if items:
            groups = None if per_group is None else groups_of(pool._state[0], per_group, known)
            found, names = pool.search_like(list(items), k, select=select, per_group=groups), list(items)
        else:
            assert image is not None
            if per_group is not None or (select is not None and select.relative):
                expected = "conditions that need no item, or a query by item"
                raise ArgumentError("where", repr(where), expected)
            vector = _embedded(pool, image, fields or {}, model)
            found, names = pool.search(vector, k, where=None if select is None else select.base), [str(image)]
        facts = facts_of(path, {name for line in found.ids for name in line if name is not None}, catalog)
        queries = [{"query": name, "hits": hits} for name, hits in zip(names, _hits(found, facts), strict=True)]
        document: dict[str, Any] = {"k": k, "pool_size": len(pool), "queries": queries}
        return document | (queries[0] if len(queries) == 1 else {})


def _embedded(pool: ItemPool, image: Path, fields: Mapping[str, str], model: Path | None) -> Any:
    """[1, D] embedding of a picture by the run that made the pool."""
    import torch

    from tgq_fast.pool import model_digest

    if model is None:
        raise ArgumentError("model", None, "the run that made the pool, to embed the picture")
    network = open_run(model)
    unknown = [name for name in fields if name not in network.config.fields]
    if unknown:
        known = ", ".join(network.config.fields) or "none"
        raise ArgumentError("fields", ", ".join(unknown), f"fields that guide this model: {known}")
    if pool.manifest.model != model_digest(network):
        raise PoolError(f"{pool.path}: was made by another model than {model}; embed the catalogue with this one")
    return torch.as_tensor(network.encode([image], fields=[dict(fields)])).float()


def _hits(found: PoolHits, facts: Mapping[str, Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    return [
        [
            {"rank": rank, "id": name, "score": score} | dict(facts.get(name, {}))
            for rank, (name, score) in enumerate(zip(names, scores), start=1)
            if name is not None
        ]
        for names, scores in zip(found.ids, found.scores.tolist())
    ]


def facts_of(pool: Path, ids: set[str], catalog: Path | None) -> dict[str, dict[str, Any]]:
    """Title, brand, category and file of some items, read from the table beside the pool, or else row by row from a
    catalogue (the one given, or the one that was embedded if it is still there) until all are found.
    """
    from tgq_fast.data.loading import metadata_file, stream_items
    from tgq_fast.pool.item_table import facts_of as read
    from tgq_fast.pool.item_table import read_note

    if catalog is None:
        found = read(pool, sorted(ids))
        if found:
            return found
        note = read_note(pool)
        if "catalog" not in note:
            return {}
        catalog = Path(note["catalog"])
    found = {}
    try:
        metadata = metadata_file(catalog)
        for item in stream_items(metadata):
            if item.id in ids and item.id not in found:
                file = None if item.file_name is None else str(metadata.parent / item.file_name)
                facts = {"title": item.title, "brand": item.brand, "category": item.category, "file": file}
                found[item.id] = facts
                if len(found) == len(ids):
                    break
    except TGQError:
        if catalog is not None and not found:
            return {}
    return found


def columns(table: Path | None, catalog: Path | None) -> pa.Table | None:
    """Columns of the items from a Parquet or CSV file with an "id", or from a catalogue; None for those of the pool."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    from tgq_fast.data import Catalog
    from tgq_fast.pool.item_table import table_of

    if table is None:
        return None if catalog is None else table_of(Catalog.load(catalog, policy="skip"))
    try:
        if table.suffix == ".parquet":
            return pq.read_table(table)
        kept = pyarrow.csv.ConvertOptions(column_types={"id": pa.string()}, strings_can_be_null=True)
        return pyarrow.csv.read_csv(table, convert_options=kept)
    except (pa.ArrowException, OSError) as error:
        raise ArgumentError("table", str(table), f"a Parquet or CSV file ({error})") from None


def related_items(
    path: Path,
    out: Path,
    *,
    k: int,
    where: str | None = None,
    per_group: int | None = None,
    catalog: Path | None = None,
    table: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The neighbours of every item as a table; see :func:`tgq_fast.pool.neighbours`."""
    from tgq_fast.pool import ItemPool, neighbours

    with ItemPool.open(path) as pool:
        known = columns(table, catalog) if where is not None or per_group is not None else None
        return neighbours(pool, out, k=k, where=where, per_group=per_group, table=known, progress=progress).to_dict()


def hard_negatives(
    path: Path, catalog: Path, out: Path, *, k: int, skip: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """The nearest items that are no positives: of another group, and in no pair with the item in any split.

    Args:
        skip: leave so many of the nearest out: unlabelled positives are most often among them.
    """
    from tgq_fast.data import Catalog
    from tgq_fast.pool import ItemPool, neighbours
    from tgq_fast.pool.item_table import table_of

    loaded = Catalog.load(catalog, policy="skip")
    mates: dict[str, set[str]] = {}
    if loaded.pairs is not None:
        ids = loaded.ids
        for query, target in zip(loaded.pairs.query.tolist(), loaded.pairs.target.tolist()):
            mates.setdefault(ids[query], set()).add(ids[target])
            mates.setdefault(ids[target], set()).add(ids[query])
    with ItemPool.open(path) as pool:
        where, known = "group_id != same", table_of(loaded)
        return neighbours(
            pool, out, k=k, where=where, table=known, skip=skip, exclude=mates, progress=progress
        ).to_dict()


def near_identical(
    path: Path, threshold: float, out: Path | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Groups of near-identical items; with `out` also as a CSV file (group, item, nearest, score)."""
    from tgq_fast.io.files import atomic_writer, check_target
    from tgq_fast.pool import ItemPool, duplicates

    if out is not None:
        check_target(out)
    with ItemPool.open(path) as pool:
        found, total = duplicates(pool, threshold, progress=progress), len(pool)
    if out is not None:
        with atomic_writer(out) as file:
            import io

            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.writer(text)
            writer.writerow(("group", "item", "nearest", "score"))
            writer.writerows((one.group, one.item, one.nearest, one.score) for one in found)
            text.flush()
            text.detach()
    groups: dict[int, list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault(one.group, []).append({"id": one.item, "nearest": one.nearest, "score": one.score})
    return {"items": total, "duplicates": len(found), "groups": list(groups.values())}
