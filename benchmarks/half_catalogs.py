"""Two random halves of a catalogue, as the studies of docs/evaluation.md use them.

    python -m benchmarks.half_catalogs CATALOG FIRST SECOND [--seed 0]

A half has whole components (groups, and what pairs join), so no product has a sibling in the other. Lines of
metadata.jsonl and pairs.jsonl stay as they are; pictures are linked, or copied where the file system has no links.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tgq_fast.data.catalog import Catalog
from tgq_fast.io.files import write_atomic


def halve(source: Path, targets: tuple[Path, Path], seed: int) -> tuple[int, int]:
    """Writes both halves; returns how many items each has."""
    catalog = Catalog.load(source)
    labels = catalog.components()
    names = np.unique(labels)
    first = np.isin(labels, np.random.default_rng(seed).permutation(names)[: len(names) // 2])
    items, pairs = (_lines(source / name) for name in ("metadata.jsonl", "pairs.jsonl"))
    sizes = []
    for target, member in zip(targets, (first, ~first), strict=True):
        ids = {item_id for item_id, chosen in zip(catalog.ids, member, strict=True) if chosen}
        target.mkdir(parents=True)
        kept = [(item, line) for item, line in items if item["id"] in ids]
        write_atomic(target / "metadata.jsonl", "".join(line for _, line in kept).encode())
        for item, _ in kept:
            if item.get("file_name"):
                _link(source / item["file_name"], target / item["file_name"])
        if pairs:
            write_atomic(target / "pairs.jsonl", "".join(line for pair, line in pairs if pair["query"] in ids).encode())
        sizes.append(len(ids))
    return sizes[0], sizes[1]


def _lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Every line of a file of JSON objects, read and as it stands; none where there is no file."""
    if not path.exists():
        return []
    with path.open() as lines:
        return [(json.loads(line), line) for line in lines]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog", type=Path)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    first, second = halve(given.catalog, (given.first, given.second), given.seed)
    print(f"{given.first}: {first} items\n{given.second}: {second} items")


if __name__ == "__main__":
    main()
