"""A bare folder of pictures, and a folder that `datasets` saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tgq_fast.data.columns import canonical_name
from tgq_fast.data.importers.common import CatalogWriter
from tgq_fast.data.importers.shop import Product, ShopOptions, folder_pictures, write_products
from tgq_fast.data.importers.table import is_attribute, split_pictures
from tgq_fast.data.parquet_rows import looks_like_picture
from tgq_fast.errors import CatalogError
from tgq_fast.io.files import open_regular
from tgq_fast.io.json_text import read_json

__all__ = ["import_dataset", "import_pictures", "label_names", "product_of_row"]


def import_pictures(path: Path, writer: CatalogWriter, options: ShopOptions) -> None:
    """Import every picture below a folder: its path is its id, the names of the folders on the way its category."""
    if not path.is_dir():
        raise CatalogError(path, ["no folder"])
    found = list(folder_pictures(path))
    if not found:
        raise CatalogError(path, ["no pictures in the folder or below it"])
    stems = [file.relative_to(path).with_suffix("").as_posix() for file in found]
    unique = len(set(stems)) == len(stems)

    def products() -> Iterator[Product]:
        for number, (file, stem) in enumerate(zip(found, stems), 1):
            folders = file.relative_to(path).parts[:-1]
            columns: dict[str, Any] = {
                "id": stem if unique else file.relative_to(path).as_posix(),
                "category": folders[-1] if folders else None,
                "attributes": {"department": folders[0]} if len(folders) > 1 else {},
                "group_id": None,
            }
            yield Product(number, columns, [str(file.absolute())])

    writer.report.notes.append("there are no groups: write pairs.jsonl, or group_id into metadata.jsonl, to train")
    write_products(products(), writer, options, path)


def import_dataset(path: Path, writer: CatalogWriter, options: ShopOptions) -> None:
    """Import what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; class labels become their names."""
    parts = sorted(path.rglob("data-*.arrow")) or sorted(path.glob("*.arrow"))
    if not parts:
        raise CatalogError(path, ["no data-*.arrow"], "Give the folder that save_to_disk wrote; Parquet: import table.")
    splits = {part.parent for part in parts}

    def products() -> Iterator[Product]:
        number = 0
        for part in parts:
            for row, labels in _arrow_rows(part):
                number += 1
                split = part.parent.name if len(splits) > 1 else None
                yield product_of_row(number, row, labels, options, split=split)

    write_products(products(), writer, options, path)


def _arrow_rows(path: Path) -> Iterator[tuple[dict[str, Any], Mapping[str, list[str]]]]:
    import pyarrow as pa

    try:
        with open_regular(path) as raw, pa.ipc.open_stream(raw) as stream:
            labels = label_names(read_json((stream.schema.metadata or {}).get(b"huggingface", b"{}")))
            for batch in stream:
                for row in batch.to_pylist():
                    yield row, labels
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CatalogError(path, [f"not a readable Arrow file: {str(error)[:200]}"]) from error


def label_names(described: Any) -> dict[str, list[str]]:
    """Column → names of its classes, from the features that `datasets` writes beside the schema."""
    try:
        features = described["info"]["features"]
        return {
            name: [str(label) for label in kind["names"]]
            for name, kind in features.items()
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError):
        return {}


def product_of_row(
    number: int,
    row: Mapping[str, Any],
    labels: Mapping[str, list[str]],
    options: ShopOptions,
    *,
    split: str | None = None,
) -> Product:
    """An item of a row of `datasets`: pictures by content, `text` as the title, class labels by their names."""
    from tgq_fast.data.importers.table import ALIASES

    columns: dict[str, Any] = {"group_id": None}
    attributes: dict[str, Any] = {} if split is None else {"split": split}
    pictures: list[Any] = []
    usual = {name: target for target, names in ALIASES.items() for name in names} | {
        "text": "title",
        "caption": "title",
    }
    forced = {canonical_name(column): target for target, column in options.columns.items()}
    for name, value in row.items():
        if name in labels and isinstance(value, int) and not isinstance(value, bool):
            value = labels[name][value] if 0 <= value < len(labels[name]) else None
        target = forced.get(canonical_name(name)) or usual.get(canonical_name(name))
        picture = value.get("bytes") if isinstance(value, Mapping) else value
        if looks_like_picture(picture) or target == "file_name":
            pictures += split_pictures(value)
        elif target is not None and target.startswith("attributes."):
            attributes[target[11:]] = value
        elif target is not None and columns.get(target) is None:
            columns[target] = value
        elif is_attribute(value):
            attributes[str(name)] = value
    columns["category"] = columns.get("category") or attributes.get("label")
    if columns.get("id") is None:
        columns["id"] = str(number)
    return Product(number, {**columns, "attributes": attributes}, pictures)
