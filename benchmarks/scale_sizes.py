"""Time and memory by size: catalogues, pools and embedding, each figure from a process of its own.

    python -m benchmarks.scale_sizes --work FOLDER --json docs/results/scale/sizes.json
    python -m benchmarks.scale_sizes --only pool --rows 10000,1000000 --work FOLDER
    python -m benchmarks.scale_sizes --json docs/results/scale/sizes.json --table docs/scaling.md

CPU seconds, so that other load on the machine counts less; memory is the resident set at its peak, mapped files among
it, and what the process had before it began beside it. FOLDER needs 3 GB for a pool of ten million rows.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import ROOT, command_line, commit, cpu_name, usable_cores, versions
from tgq_fast.io.files import write_atomic

__all__ = ["CASES", "measure", "table"]

_BLOCK = 65_536
WIDTH, QUERIES, ADDED = 64, 1000, 20
Figures = dict[str, float]


def _ids(first: int, stop: int) -> list[str]:
    return [f"item-{number:09d}" for number in range(first, stop)]


def _peak() -> float:
    """MB of 10⁶ bytes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


@contextmanager
def _cpu(figures: Figures, name: str) -> Iterator[None]:
    """CPU seconds of the block."""
    begin = time.process_time()
    yield
    figures[name] = round(time.process_time() - begin, 4)


def make_catalogue(folder: Path, rows: int) -> None:
    """JSON lines of products with five fields and two attributes; groups of three."""
    folder.mkdir(parents=True)
    kinds = ("shirt", "shoe", "bag", "watch", "dress")
    with (folder / "metadata.jsonl").open("w") as file:
        for number, name in enumerate(_ids(0, rows)):
            kind = kinds[number % 5]
            row = {
                "id": name, "file_name": f"images/{number:09d}.jpg", "title": f"A {kind} number {number}",
                "brand": f"brand {number % 977}", "category": kind, "price": number % 500 + 0.5,
                "group_id": f"g{number // 3}",
                "attributes": {"colour": ("red", "blue", "green")[number % 3], "season": str(number % 4)},
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


def catalogue(folder: Path, rows: int) -> Figures:
    """`Catalog.load` of JSON lines."""
    from tgq_fast.data import Catalog

    figures: Figures = {"before, MB": _peak()}
    with _cpu(figures, "load"):
        catalog = Catalog.load(folder)
    assert len(catalog) == rows
    return figures | {"peak, MB": _peak()}


def make_pool(folder: Path, rows: int) -> None:
    """A pool of unit vectors, and beside it a catalogue whose pairs name `QUERIES` test queries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tgq_fast.pool import ItemPool

    drawn = torch.Generator().manual_seed(0)
    with ItemPool.create(folder / "pool", dims=WIDTH, dtype="float16") as pool:
        for first in range(0, rows, _BLOCK):
            names = _ids(first, min(first + _BLOCK, rows))
            pool.append(names, torch.nn.functional.normalize(torch.randn(len(names), WIDTH, generator=drawn), dim=1))
    (folder / "shop").mkdir()
    schema = pa.schema([("id", pa.string()), ("title", pa.string())])
    with pq.ParquetWriter(folder / "shop" / "metadata.parquet", schema) as writer:
        for first in range(0, rows, _BLOCK):
            names = _ids(first, min(first + _BLOCK, rows))
            writer.write_table(pa.table({"id": names, "title": ["a thing"] * len(names)}, schema))
    chosen = np.random.default_rng(0).choice(rows, (QUERIES, 2), replace=False)
    pairs = {"query": [f"item-{q:09d}" for q in chosen[:, 0]], "target": [f"item-{t:09d}" for t in chosen[:, 1]]}
    pq.write_table(pa.table(pairs | {"split": ["test"] * QUERIES}), folder / "shop" / "pairs.parquet")


def pool(folder: Path, rows: int) -> Figures:
    """Looking up, searching and taking rows of a pool on disk."""
    from tgq_fast.pool import ItemPool

    figures: Figures = {"before, MB": _peak()}
    with _cpu(figures, "open"):
        opened = ItemPool.open(folder / "pool", verify=False)
    with _cpu(figures, "get one, cold"):
        opened.get(_ids(rows // 3, rows // 3 + 1))
    far = np.linspace(0, rows - 1, 50).astype(int)
    for number in far:
        opened.get(_ids(number, number + 1))
    with _cpu(figures, "get one, warm"):
        for number in far:
            opened.get(_ids(number, number + 1))
    figures["get one, warm"] /= len(far)
    queries = torch.nn.functional.normalize(torch.randn(10, WIDTH), dim=1)
    with _cpu(figures, "search 10, first"):
        opened.search(queries, 10)
    with _cpu(figures, "search 10, again"):
        opened.search(queries, 10, exclude_ids=_ids(0, 10))
    figures["peak, MB"] = _peak()
    if rows <= 1_000_000:
        every = _ids(0, rows)
        with _cpu(figures, "rows of all ids"):
            opened.rows(every)
    return figures


def evaluation(folder: Path, rows: int) -> Figures:
    """`evaluate` of a pool with `QUERIES` random pairs: nearly all ranks are far below any depth of a search."""
    from tgq_fast.data import Catalog
    from tgq_fast.evaluation import evaluate
    from tgq_fast.pool import ItemPool

    figures: Figures = {"before, MB": _peak()}
    with _cpu(figures, "load catalogue"):
        catalog = Catalog.load(folder / "shop")
    figures["catalogue, MB"] = _peak()
    with ItemPool.open(folder / "pool", verify=False) as opened, _cpu(figures, "evaluate"):
        found = evaluate(catalog, opened, ks=(1, 10, 100), samples=0)
    assert found.queries == QUERIES and found.pool_size == rows and found.missing_pairs == 0
    return figures | {"peak, MB": _peak()}


def _write_items(folder: Path, first: int, stop: int) -> None:
    """Append items that share 500 pictures."""
    with (folder / "metadata.jsonl").open("a") as file:
        for number, name in enumerate(_ids(first, stop), start=first):
            row = {"id": name, "file_name": f"images/{number % 500}.jpg", "title": f"thing {number}"}
            file.write(json.dumps(row) + "\n")


def make_pictures(folder: Path, rows: int) -> None:
    """Items that share 500 pictures of 240 × 320."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    for number in range(500):
        coarse = np.random.default_rng(number).integers(0, 255, (6, 8, 3), np.uint8)
        Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"images/{number}.jpg")
    _write_items(folder, 0, rows)


def _embed(folder: Path, encoder: Any, shard_size: int) -> Figures:
    """Bring the pool of a folder up to date."""
    from tgq_fast.data import Catalog
    from tgq_fast.pool import embed_catalog

    catalog = Catalog.load(folder)
    figures: Figures = {"catalogue, MB": _peak()}
    with _cpu(figures, "embed"):
        embed_catalog(
            catalog, encoder, folder / "pool", dims=WIDTH, batch_size=64, shard_size=shard_size, codes=False,
            digest="one", threads=2,
        )  # fmt: skip
    return figures | {"peak, MB": _peak()}


def embedding(folder: Path, rows: int) -> Figures:
    """Streaming embedding with an encoder so light that reading, decoding and writing are the work."""
    from benchmarks.scale_losses import Blocks

    figures = _embed(folder, Blocks(), shard_size=512)
    return figures | {"items per CPU second": round(rows / figures["embed"], 1)}


class Numbers(torch.nn.Module):
    """Reads no picture; counts the items that it was given."""

    items = 0

    def encode(self, items: Any, *, batch_size: int, on_error: str) -> torch.Tensor:
        """[n, WIDTH]."""
        self.items += len(items)
        return torch.tensor([[int(name[-9:]) + 1.0] * WIDTH for name in items.ids])


def make_update(folder: Path, rows: int) -> None:
    """An embedded catalogue to which `ADDED` items have come since."""
    make_pictures(folder, rows)
    _embed(folder, Numbers(), shard_size=4096)
    _write_items(folder, rows, rows + ADDED)


def update(folder: Path, rows: int) -> Figures:
    """Embedding again: pictures of all items are compared with what was embedded, and the new ones embedded."""
    encoder = Numbers()
    figures = _embed(folder, encoder, shard_size=4096)
    assert encoder.items == ADDED
    return {"items embedded": encoder.items} | figures


Case = tuple[Callable[[Path, int], None], Callable[[Path, int], Figures], tuple[int, ...]]
CASES: dict[str, Case] = {
    "catalogue": (make_catalogue, catalogue, (10_000, 100_000, 1_000_000)),
    "pool": (make_pool, pool, (10_000, 100_000, 1_000_000, 10_000_000)),
    "evaluation": (make_pool, evaluation, (10_000, 100_000, 1_000_000, 10_000_000)),
    "embedding": (make_pictures, embedding, (2_000, 10_000, 50_000)),
    "update": (make_update, update, (1_000, 10_000, 100_000)),
}
TITLES = {
    "catalogue": "`Catalog.load` of JSON lines with five fields and two attributes",
    "pool": f"A pool of {WIDTH} columns in fp16",
    "evaluation": f"`evaluate` of that pool, {QUERIES:,} queries with random mates, every row a candidate",
    "embedding": "`embed_catalog`, pictures of 240 × 320, a light encoder",
    "update": f"`embed_catalog` again after {ADDED} items were added",
}


def measure(names: list[str], work: Path, sizes: list[int] | None) -> list[dict[str, Any]]:
    """One entry per case and size; data that two cases share is made once."""
    results = []
    for rows in sorted({size for name in names for size in sizes or CASES[name][2]}):
        for name in names:
            make, _, own = CASES[name]
            if rows not in (sizes or own):
                continue
            folder = work / f"{make.__name__}-{rows}"
            for step in ("make", "measure") if not folder.exists() else ("measure",):
                told = subprocess.run(
                    [sys.executable, "-m", "benchmarks.scale_sizes", step, name, str(rows), str(folder)],
                    stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
                )  # fmt: skip
            results.append({"case": name, "rows": rows, "commit": commit(), **json.loads(told.stdout)})
            print(json.dumps(results[-1]), flush=True)
        for folder in work.glob(f"*-{rows}"):
            shutil.rmtree(folder)
    return results


def table(document: dict[str, Any]) -> str:
    """The figures as Markdown."""
    commits = ", ".join(f"`{name}`" for name in dict.fromkeys(entry["commit"] for entry in document["results"]))
    lines = [f"{document['machine']}, {document['threads']} thread(s); times are CPU time; commit {commits}."]
    for name, title in TITLES.items():
        found = [entry for entry in document["results"] if entry["case"] == name]
        columns = list(dict.fromkeys(key for entry in found for key in entry if key not in ("case", "rows", "commit")))
        if not found:
            continue
        lines += ["", f"{title}:", "", "| rows | " + " | ".join(columns) + " |", "|---:" * (len(columns) + 1) + "|"]
        for entry in found:
            cells = [_shown(column, entry.get(column)) for column in columns]
            lines.append(f"| {entry['rows']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return ""
    if column.endswith("MB") or "items" in column:
        return f"{value:,.0f}"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:,.1f} s"


def fill(text: str, document: dict[str, Any]) -> str:
    """`text` with the table between its markers."""
    return filled(text, "scale", table(document))


def filled(text: str, name: str, lines: str) -> str:
    """`text` with `lines` between the markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{lines}\n{end}", text, flags=re.DOTALL)


def main() -> None:
    """See the module."""
    if sys.argv[1:2] in (["make"], ["measure"]):
        step, name, rows, folder = sys.argv[1:]
        made, measured, _ = CASES[name]
        answer = made(Path(folder), int(rows)) if step == "make" else measured(Path(folder), int(rows))
        print(json.dumps(answer))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--rows", help="sizes with commas between, instead of each case's own")
    parser.add_argument("--work", type=Path, help="folder for data, which is removed again; none: nothing is measured")
    parser.add_argument("--json", type=Path, help="results; those of other cases and sizes stay")
    parser.add_argument("--table", type=Path, help="page to write the table into")
    given = parser.parse_args()
    document: dict[str, Any] = {"results": []}
    if given.json is not None and given.json.exists():
        document = json.loads(given.json.read_text())
    if given.work is not None:
        sizes = None if given.rows is None else [int(part) for part in given.rows.split(",")]
        results = measure(given.only.split(","), given.work, sizes)
        fresh = {(entry["case"], entry["rows"]) for entry in results}
        kept = [entry for entry in document["results"] if (entry["case"], entry["rows"]) not in fresh]
        document = {
            "command": command_line(),
            "machine": cpu_name(),
            "cores": usable_cores(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "results": sorted(kept + results, key=lambda entry: (list(CASES).index(entry["case"]), entry["rows"])),
        }
        if given.json is not None:
            write_atomic(given.json, (json.dumps(document, indent=1) + "\n").encode())
    if given.table is not None:
        write_atomic(given.table, fill(given.table.read_text(encoding="utf-8"), document).encode())


if __name__ == "__main__":
    main()
