"""GroceryStoreDataset (github.com/marcusklasson/GroceryStoreDataset): shelf photos of 81 products.

Form: dataset/{train,val,test}.txt with lines `train/Fruit/Apple/Golden-Delicious/Golden-Delicious_001.jpg, 0, 0`
(path, fine class, coarse class) and dataset/classes.csv, whose header is `Class Name (str),Class ID (int),Coarse
Class Name (str),…`.
"""

from __future__ import annotations

import csv
from itertools import permutations
from pathlib import Path, PurePosixPath

from tgq_fast.data.importers.common import CatalogWriter
from tgq_fast.errors import CatalogError

__all__ = ["import_grocery"]

_LISTS = {"train": "train", "val": "validation", "test": "test"}


def import_grocery(path: Path, writer: CatalogWriter) -> None:
    """Import the repository (or its dataset/ folder). Pairs stay within one list, so no test photo is trained on."""
    root = path / "dataset" if (path / "dataset" / "classes.csv").is_file() else path
    if not (root / "classes.csv").is_file():
        raise CatalogError(path, ["no dataset/classes.csv"], "Give the folder that `git clone` made.")
    names = _classes(root / "classes.csv")
    members: dict[tuple[str, int], list[str]] = {}
    try:
        for stem, split in _LISTS.items():
            listing = root / f"{stem}.txt"
            if not listing.is_file():
                writer.report.notes.append(f"{stem}.txt is missing")
                continue
            with open(listing, encoding="utf-8", errors="replace") as lines:
                for row, line in enumerate(lines, 1):
                    if line.strip():
                        _import_line(root, stem, split, row, line, names, members, writer)
    finally:  # also when the limit ends the loop
        for (split, _), ids in members.items():
            for query, target in permutations(ids, 2):  # every mate: one that is left out would count as a miss
                writer.add_pair(query, target, split)
    writer.report.notes.append("metadata is per product: guide with category or department only, never with title")


def _import_line(
    root: Path,
    stem: str,
    split: str,
    row: int,
    line: str,
    names: dict[int, tuple[str, str]],
    members: dict[tuple[str, int], list[str]],
    writer: CatalogWriter,
) -> None:
    parts = [part.strip() for part in line.split(",")]
    try:
        file, fine = PurePosixPath(parts[0]), int(parts[1])
        name, coarse = names[fine]
        department = file.parts[1]
    except (IndexError, ValueError, KeyError):
        writer.skip(row, "broken line", f"{stem}.txt: {line.strip()}")
        return
    if file.is_absolute() or ".." in file.parts:
        writer.skip(row, "path leaves the data set", str(file))
        return
    item_id = f"{stem}-{file.stem}"
    raw = {
        "id": item_id,
        "title": name.replace("-", " "),
        "category": coarse.replace("-", " "),
        "attributes": {"department": department},
        "group_id": f"product-{fine:02d}",
    }
    if writer.add(row, raw, root / file):
        members.setdefault((split, fine), []).append(item_id)


def _classes(path: Path) -> dict[int, tuple[str, str]]:
    """Fine class id → (product name, coarse class name)."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = [column.split(" (")[0].strip() for column in next(reader, [])]
        try:
            fine, number, coarse = (header.index(name) for name in ("Class Name", "Class ID", "Coarse Class Name"))
            return {
                int(row[number]): (row[fine], row[coarse]) for row in reader if len(row) > max(fine, number, coarse)
            }
        except ValueError as error:
            raise CatalogError(path, [f"not the classes.csv of GroceryStoreDataset: {error}"]) from error
